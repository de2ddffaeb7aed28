"""In which units the network sees BOLD: the run's z, each voxel's own z, or both; all made from one store."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from bundle.errors import InputError

MODES = ("run", "voxel", "both")
_TINY = 1e-12


@dataclass(frozen=True)
class Normalisation:
    """How the values of a run's brain voxels are scaled.

    With "run" a voxel's course is about 0.02 wide around anatomy that is about 1 wide, so that a squared error is one
    of anatomy. With "voxel" every voxel has SD 1 over its run and no anatomy is left; with "both" the network gets the
    two as channels, and predicts the second.

    Attributes:
        mode: "run": by the mean and SD over all voxels and frames, background at the run's least z (NeuroSTORM,
            arXiv 2506.11167, and arXiv 2511.00443); "voxel": each voxel by its own mean and SD over the run,
            background 0; "both": two channels, "run" and "voxel".
        sd_floor: for "voxel", the SD is at least this share of the median voxel's, so that noise of voxels that
            hardly vary is not blown up.
        clip: for "voxel", values beyond so many SD are cut, so that a spike does not rule.
        per_frame: z-score each frame over the brain afterwards, background 0: takes out what all voxels share.

    Raises:
        InputError: an unknown mode, or a number that is not positive.
    """

    mode: str
    sd_floor: float
    clip: float
    per_frame: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"normalisation#mode must be one of {', '.join(MODES)}, not {self.mode!r}")
        if self.sd_floor <= 0 or self.clip <= 0:
            raise InputError(f"normalisation#sd_floor and #clip must be above 0, not {self.sd_floor} and {self.clip}")

    @property
    def channels(self) -> int:
        """How many channels the network gets; the last one is predicted."""
        return 2 if self.mode == "both" else 1

    def facts(self) -> dict[str, Any]:
        """Attributes as JSON values."""
        return asdict(self)

    def apply(self, frames: Tensor, moments: Tensor, fill: float) -> list[tuple[Tensor, float]]:
        """Scale frames as a store keeps them.

        Args:
            frames: (T, V), each voxel by its own mean and SD.
            moments: (2, V), these means and SDs in units of the run's z.
            fill: the run's least z.

        Returns:
            (T, V) and the background's value, per channel.
        """
        mean, sd = moments
        made = []
        if self.mode in ("run", "both"):
            made.append((frames * sd + mean, fill))
        if self.mode in ("voxel", "both"):
            made.append(((frames * (sd / self._floored(sd))).clamp(-self.clip, self.clip), 0.0))
        return [(_per_frame(values), 0.0) for values, _ in made] if self.per_frame else made

    def undo(self, values: Tensor, frames: Tensor, moments: Tensor) -> Tensor:
        """Bring predicted values, in units of the last channel, to the run's z.

        Args:
            values: (T, V) in this normalisation.
            frames: (T, V) of the store at the same frames, whose mean and SD over the brain `per_frame` took out.
            moments: as for `apply`.

        Returns:
            (T, V); what `clip` cut stays cut.
        """
        mean, sd = moments
        if self.per_frame:
            last, _ = replace(self, per_frame=False).apply(frames, moments, 0.0)[-1]
            values = values * last.std(1, correction=0, keepdim=True) + last.mean(1, keepdim=True)
        return values if self.mode == "run" else values * self._floored(sd) + mean

    def _floored(self, sd: Tensor) -> Tensor:
        return sd.clamp(min=(self.sd_floor * sd.median().double()).clamp(min=_TINY))  # a tensor: no wait for a GPU


def _per_frame(values: Tensor) -> Tensor:
    centred = values - values.mean(1, keepdim=True)
    return centred / centred.std(1, correction=0, keepdim=True).clamp(min=_TINY)
