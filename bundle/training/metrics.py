"""Ignite metrics: reconstruction of the hidden voxels, and subject-level classification scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from ignite.engine import Engine
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from torch import Tensor

from bundle.anatomy.atlas import AAL3, ALL, load_atlas, region_choices
from bundle.anatomy.parcels import region_index
from bundle.data.engine_output import EngineMetric
from bundle.training.losses import masked_squared_error, with_frames


class MeanLoss(Metric):
    """Mean of the losses of an epoch's steps, which all processes know alike; nothing waits for the device before.

    A checkpoint keeps it, so that an epoch that was resumed in the middle has the mean of a whole one.
    """

    def __init__(self) -> None:
        super().__init__(output_transform=lambda output: output[0]["loss"])

    def started(self, engine: Engine) -> None:
        """Begin with an epoch, unless it is resumed in the middle."""
        if engine.state.iteration % (engine.state.epoch_length or 1) == 0:
            self.reset()

    def reset(self) -> None:
        """Start a new epoch."""
        self._sum: torch.Tensor | float = 0.0
        self._steps = 0

    def update(self, output: Tensor) -> None:
        """Add a step's loss, a scalar."""
        self._sum = self._sum + output.detach().double()
        self._steps += 1

    def compute(self) -> float:
        """Return the mean of what was added since `reset`."""
        if self._steps == 0:
            raise NotComputableError("MeanLoss needs at least one step")
        return float(self._sum) / self._steps

    def state_dict(self) -> dict[str, float]:  # type: ignore[override]
        """The sum and number of losses; Ignite's own would be asked of all processes at once."""
        return {"sum": float(self._sum), "steps": self._steps}

    def load_state_dict(self, state_dict: Mapping) -> None:
        """Restore what `state_dict` returned."""
        self._sum, self._steps = state_dict["sum"], state_dict["steps"]


class MaskedMSE(EngineMetric):
    """Mean squared error over all masked voxels and frames of all clips, on all ranks."""

    _state_dict_all_req_keys = ("_squared", "_count")

    @reinit__is_reduced
    def reset(self) -> None:
        """Start a new epoch."""
        self._squared = torch.zeros((), dtype=torch.float64)
        self._count = 0

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, dict]) -> None:
        """Add a batch: prediction `(B, 1, X, Y, Z, T)` and its `{"image", "mask"}`."""
        prediction, target = output
        squared, count = masked_squared_error(prediction.detach(), target["image"], target["mask"])
        self._squared += squared.double().cpu()
        self._count += int(count)

    @sync_all_reduce("_squared", "_count")
    def compute(self) -> float:
        """Return the mean over everything added since `reset`."""
        if self._count == 0:
            raise NotComputableError("MaskedMSE needs at least one batch")
        return float(self._squared / self._count)


class TemporalR2(EngineMetric):
    """Share of the temporal variance of masked voxels that the reconstruction explains.

    Both signals are taken around their own mean over the clip, voxel by voxel, so that static anatomy, which
    dominates the squared error of globally z-scored BOLD, counts for nothing:
    `1 - sum((y - mean(y)) - (p - mean(p)))^2 / sum(y - mean(y))^2`. 1 is perfect, 0 is a flat prediction,
    below 0 is worse than flat.

    Where a voxel is hidden at some frames only, the sums are over these, and `p` is the clip as one would use it: the
    reconstruction at these frames, and what is seen at the others (there the network is not trained, and what it
    gives must not count). 0 is then the mean of the frames that are seen, held flat; 1 is still perfect.
    """

    _state_dict_all_req_keys = ("_residual", "_total")

    @reinit__is_reduced
    def reset(self) -> None:
        """Start a new epoch."""
        self._residual = torch.zeros((), dtype=torch.float64)
        self._total = torch.zeros((), dtype=torch.float64)

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, dict]) -> None:
        """Add a batch: prediction `(B, 1, X, Y, Z, T)` and its `{"image", "mask"}`."""
        y, p, hidden, _ = _hidden_courses(*output)
        self._residual += (y - p)[hidden].square().sum().cpu()
        self._total += y[hidden].square().sum().cpu()

    @sync_all_reduce("_residual", "_total")
    def compute(self) -> float:
        """Return R^2 over everything added since `reset`; NaN if the hidden voxels never varied."""
        if float(self._total) == 0:
            return float("nan")
        return float(1 - self._residual / self._total)


class RegionTemporalR2(EngineMetric):
    """`TemporalR2` of each region's hidden voxels, as metrics of their own: `val_temporal_r2_limbic` and so on.

    Regions that are never hidden have none. With normalisation by voxel it is how well a region's time courses follow
    from the rest of the brain.

    Args:
        regions: the regions, as in `CurriculumMaskd`.
        atlas: see `bundle.anatomy.atlas.load_atlas`.
        prefix: of the metrics' names.
    """

    _state_dict_all_req_keys = ("_residual", "_total")

    def __init__(
        self,
        regions: str | Sequence[str | int] = ALL,
        atlas: str | Path = AAL3,
        prefix: str = "val_temporal_r2_",
    ) -> None:
        loaded = load_atlas(atlas)
        choices = region_choices(regions, loaded)
        self.names = [f"{prefix}{region}" for region in choices]
        self.index = torch.from_numpy(region_index(choices, loaded))
        super().__init__()

    @reinit__is_reduced
    def reset(self) -> None:
        """Start a new epoch."""
        self._residual = torch.zeros(len(self.names) + 1, dtype=torch.float64)
        self._total = torch.zeros(len(self.names) + 1, dtype=torch.float64)

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, dict]) -> None:
        """Add a batch: prediction `(B, 1, X, Y, Z, T)` on the fixed grid, and its `{"image", "mask"}`."""
        y, p, hidden, voxels = _hidden_courses(*output)
        index = self.index.to(voxels.device).expand_as(voxels[:, 0])[voxels[:, 0]]  # (V,)
        for total, squares in ((self._residual, (y - p).square()), (self._total, y.square())):
            total += torch.bincount(index, (squares * hidden).sum(-1), minlength=len(total)).cpu()

    @sync_all_reduce("_residual", "_total")
    def compute(self) -> dict[str, float]:
        """Return R^2 of each region that was hidden and varies."""
        rows = zip(self.names, self._residual[1:].tolist(), self._total[1:].tolist(), strict=True)
        return {name: 1 - residual / total for name, residual, total in rows if total}


def _hidden_courses(prediction: Tensor, target: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Courses (V, T) around their mean of the voxels that are hidden at any frame: true, predicted, whether hidden.

    Where they are not hidden, the true course stands in the predicted one.

    Returns:
        These three, and which voxels they are, bool (B, 1, X, Y, Z).
    """
    mask = with_frames(target["mask"], prediction).expand_as(prediction)
    voxels = mask.any(dim=-1)
    y, p, hidden = target["image"][voxels], prediction.detach()[voxels], mask[voxels]  # (B, 1, X, Y, Z, T) -> (V, T)
    return _around_mean(y), _around_mean(torch.where(hidden, p, y)), hidden, voxels


def _around_mean(series: Tensor) -> Tensor:
    series = series.double()
    return series - series.mean(dim=-1, keepdim=True)


class RegionMSE(EngineMetric):
    """Mean squared error of each region's masked voxels, over all clips and ranks.

    Args:
        regions: the regions, as in `CurriculumMaskd`.
        atlas: see `bundle.anatomy.atlas.load_atlas`.
    """

    def __init__(self, regions: str | Sequence[str | int] = ALL, atlas: str | Path = AAL3) -> None:
        loaded = load_atlas(atlas)
        self.regions = region_choices(regions, loaded)
        self.index = torch.from_numpy(region_index(self.regions, loaded))
        super().__init__()

    @reinit__is_reduced
    def reset(self) -> None:
        """Start a new epoch."""
        self._squared = torch.zeros(len(self.regions) + 1, dtype=torch.float64)
        self._count = torch.zeros(len(self.regions) + 1, dtype=torch.float64)

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, dict]) -> None:
        """Add a batch: prediction `(B, 1, X, Y, Z, T)` on the fixed grid, and its `{"image", "mask"}`."""
        prediction, target = output
        mask = with_frames(target["mask"], prediction)
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
