"""Adaptive masking: draw regions in proportion to their reconstruction error, and weight the loss by region.

The future work that arXiv 2511.00443 names. `CurriculumMaskd` hides one region at a time; after each validation
`FollowRegionErrors` gives it the regions' current errors, so that what is rebuilt badly is hidden more often.
`RegionWeightedMSELoss` says instead how much a voxel of each region counts.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from monai.config import KeysCollection
from monai.data import MetaTensor
from torch import Tensor, nn

from bundle.anatomy import grid
from bundle.anatomy.atlas import REGIONS, Regions, labels_on, load_atlas, region_labels
from bundle.errors import InputError
from bundle.masking import draws as masking
from bundle.masking.transforms import AAL3ROIMaskd
from bundle.preparation.store import write_json
from bundle.training.metrics import EngineMetric

logger = logging.getLogger(__name__)


def region_index(regions: Sequence[Regions], atlas: str | Path | None = None) -> Tensor:
    """Which region each voxel of the grid belongs to: int64 of `grid.SHAPE`, 0 for none, 1 for the first."""
    loaded = load_atlas(atlas)
    labels = labels_on(loaded, grid.AFFINE, grid.SHAPE)
    index = np.zeros(grid.SHAPE, np.int64)
    for number, region in enumerate(regions, start=1):
        index[np.isin(labels, region_labels(region, loaded.names))] = number
    return torch.from_numpy(index)


class CurriculumMaskd(AAL3ROIMaskd):
    """Hide one region of several, drawn with probabilities that follow the regions' errors.

    All are equally likely until `follow` is called. The copy that `frozen` makes for validation keeps equal
    probabilities, so that the validation loss of all epochs is over the same masks.

    Args:
        keys: the image, one key.
        regions: the regions to choose from, each a name of `bundle.anatomy.atlas.REGIONS` or a label.
        floor: least share, 0 to 1, of the equal probability that every region keeps: none is forgotten.
        atlas: label image; None: AAL3v1, 1 mm.
        table: its label table; None: AAL3's.
        mask_key: key of the mask to add.
        seed: see `fixed`.
        fixed: the draw depends only on seed, ``run_id`` and ``start``; for validation.

    Raises:
        InputError: an unknown region, or a floor outside 0..1.
    """

    def __init__(
        self,
        keys: KeysCollection,
        regions: Sequence[str | int] = tuple(REGIONS),
        floor: float = 0.1,
        atlas: str | Path | None = None,
        table: str | Path | None = None,
        mask_key: str = "mask",
        seed: int = 0,
        fixed: bool = False,
    ) -> None:
        super().__init__(keys, list(regions), atlas=atlas, table=table, mask_key=mask_key, seed=seed, fixed=fixed)
        if not 0 <= floor <= 1:
            raise InputError(f"floor must be 0 to 1, not {floor}")
        self.regions = list(regions)
        self.floor = floor
        self.choices = [region_labels(region, self.atlas.names) for region in self.regions]
        self.probabilities = np.full(len(self.regions), 1 / len(self.regions))

    def follow(self, errors: Mapping[str | int, float]) -> None:
        """Set the probabilities in proportion to errors; a region without one counts as average.

        Args:
            errors: reconstruction error of each region, 0 or more, e.g. the validation MSE.
        """
        values = np.array([errors.get(region, np.nan) for region in self.regions], float)
        if not np.nansum(values) > 0:
            return
        values = np.where(np.isnan(values), np.nanmean(values), values)
        equal = 1 / len(values)
        self.probabilities = self.floor * equal + (1 - self.floor) * values / values.sum()

    def draw(self, item: dict, image: MetaTensor, rng: np.random.RandomState) -> Tensor:
        """Return one region, in the image's world space."""
        labels = labels_on(self.atlas, image.affine.cpu().double().numpy(), image.shape[1:4])
        choice = int(rng.choice(len(self.choices), p=self.probabilities))
        return torch.from_numpy(masking.region_mask(labels, self.choices[choice]))


class RegionMSE(EngineMetric):
    """Mean squared error of each region's masked voxels, over all clips and ranks.

    Args:
        regions: the regions, as in `CurriculumMaskd`.
        atlas: label image; None: AAL3v1, 1 mm.
    """

    def __init__(self, regions: Sequence[str | int] = tuple(REGIONS), atlas: str | Path | None = None) -> None:
        self.regions = list(regions)
        self.index = region_index(self.regions, atlas)
        super().__init__()

    @reinit__is_reduced
    def reset(self) -> None:
        """Start a new epoch."""
        self._squared = torch.zeros(len(self.regions) + 1, dtype=torch.float64)
        self._count = torch.zeros(len(self.regions) + 1, dtype=torch.float64)

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, dict]) -> None:
        """Add a batch: prediction ``(B, 1, X, Y, Z, T)`` on the fixed grid, and its ``{"image", "mask"}``."""
        prediction, target = output
        mask = target["mask"] if target["mask"].ndim == prediction.ndim else target["mask"].unsqueeze(-1)
        squared = (prediction.detach().float() - target["image"].float()).square() * mask
        frames = mask.expand_as(prediction).sum((0, 1, -1))  # (X, Y, Z)
        index, size = self.index.flatten(), len(self.regions) + 1
        summed = squared.sum((0, 1, -1)).double().flatten().cpu()
        self._squared += torch.bincount(index, summed, minlength=size)
        self._count += torch.bincount(index, frames.double().flatten().cpu(), minlength=size)

    @sync_all_reduce("_squared", "_count")
    def compute(self) -> dict[str | int, float]:
        """Return the error of each region that was masked at all."""
        pairs = zip(self.regions, self._squared[1:].tolist(), self._count[1:].tolist(), strict=True)
        return {region: squared / count for region, squared, count in pairs if count}


class FollowRegionErrors:
    """Validator's handler: after each validation, give the curriculum the regions' errors, and write it down.

    Args:
        mask: the curriculum of the trainer.
        metric: name of the validator's `RegionMSE`.
        history: JSON file, epoch to probabilities, for `ResumeCurriculum`. It is written before the epoch's
            checkpoint is, so that no checkpoint lacks its entry.
    """

    def __init__(self, mask: CurriculumMaskd, metric: str, history: str | Path) -> None:
        self.mask = mask
        self.metric = metric
        self.history = Path(history)

    def attach(self, engine: Engine) -> None:
        """Register with a validator."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Follow the errors; the validator's epoch is the trainer's."""
        self.mask.follow(engine.state.metrics[self.metric])
        shares = zip(self.mask.regions, self.mask.probabilities, strict=True)
        logger.info("Next masks: %s", ", ".join(f"{region} {share:.0%}" for region, share in shares))
        if idist.get_rank() == 0:
            entry = {str(engine.state.epoch): self.mask.probabilities.tolist()}
            write_json(self.history, _read_history(self.history) | entry)


class ResumeCurriculum:
    """Trainer's handler, after the one that resumes: go on with the curriculum of the epoch resumed from.

    Args:
        mask: the curriculum.
        history: what `FollowRegionErrors` writes.
    """

    def __init__(self, mask: CurriculumMaskd, history: str | Path) -> None:
        self.mask = mask
        self.history = Path(history)

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Restore the probabilities, or keep equal ones before the first validation."""
        known = {int(epoch): values for epoch, values in _read_history(self.history).items()}
        done = [epoch for epoch in known if epoch <= engine.state.epoch]
        if done:  # the last validation at or before the epoch: not every epoch need be validated
            self.mask.probabilities = np.array(known[max(done)])


def _read_history(path: Path) -> dict[str, list[float]]:
    return json.loads(path.read_text()) if path.is_file() else {}


class RegionWeightedMSELoss(nn.Module):
    """Mean squared error over masked voxels, each weighted by its region.

    Args:
        weights: region to weight, positive; voxels of no named region weigh 1. ``"balanced"``: each of the seven
            regions weighs the same as a whole, however many voxels it has, and so do the voxels outside them.
        atlas: label image; None: AAL3v1, 1 mm.

    Raises:
        InputError: a weight that is not positive, or an unknown region.
    """

    voxel_weight: Tensor  # (1, 1, X, Y, Z, 1)

    def __init__(self, weights: Mapping[str, float] | str, atlas: str | Path | None = None) -> None:
        super().__init__()
        if weights != "balanced" and (isinstance(weights, str) or not all(w > 0 for w in weights.values())):
            raise InputError(f"weights must be 'balanced' or positive numbers by region, not {weights!r}")
        named = REGIONS if isinstance(weights, str) else weights
        index = region_index(list(named), atlas)
        if isinstance(weights, str):
            table = 1 / torch.bincount(index.flatten(), minlength=len(named) + 1)
        else:
            table = torch.tensor([1.0, *weights.values()])
        self.register_buffer("voxel_weight", table[index].float()[None, None, ..., None], persistent=False)

    def forward(self, prediction: Tensor, target: dict[str, Tensor]) -> Tensor:
        """Return the scalar loss of ``prediction`` ``(B, 1, X, Y, Z, T)`` on the fixed grid."""
        mask = target["mask"] if target["mask"].ndim == prediction.ndim else target["mask"].unsqueeze(-1)
        weight = self.voxel_weight.to(prediction.device) * mask
        squared = (prediction.float() - target["image"].float()).square()
        return (weight * squared).sum() / weight.expand_as(squared).sum()
