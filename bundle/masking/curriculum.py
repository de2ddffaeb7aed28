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
from monai.config import KeysCollection
from monai.data import MetaTensor
from torch import Tensor

from bundle.anatomy.atlas import AAL3, ALL, labels_on, region_choices, region_labels
from bundle.errors import InputError
from bundle.files import write_json
from bundle.masking import draws
from bundle.masking.transforms import AAL3ROIMaskd

logger = logging.getLogger(__name__)


class CurriculumMaskd(AAL3ROIMaskd):
    """Hide one region of several, drawn with probabilities that follow the regions' errors.

    All are equally likely until `follow` is called. The copy that `frozen` makes for validation keeps equal
    probabilities, so that the validation loss of all epochs is over the same masks.

    Args:
        keys: the image, one key.
        regions: the regions to choose from, each a name of a group or label of the atlas; "all": its groups.
        floor: least share, 0 to 1, of the equal probability that every region keeps: none is forgotten.
        atlas: see `bundle.anatomy.atlas.load_atlas`.
        mask_key: key of the mask to add.
        seed: see `fixed`.
        fixed: the draw depends only on seed, `run_id` and `start`; for validation.

    Raises:
        InputError: an unknown region, or a floor outside 0..1.
    """

    def __init__(
        self,
        keys: KeysCollection,
        regions: str | Sequence[str | int] = ALL,
        floor: float = 0.1,
        atlas: str | Path = AAL3,
        mask_key: str = "mask",
        seed: int = 0,
        fixed: bool = False,
    ) -> None:
        super().__init__(keys, regions, atlas=atlas, mask_key=mask_key, seed=seed, fixed=fixed)
        if not 0 <= floor <= 1:
            raise InputError(f"floor must be 0 to 1, not {floor}")
        self.regions = region_choices(regions, self.atlas)
        self.floor = floor
        self.choices = [region_labels(region, self.atlas) for region in self.regions]
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
        return torch.from_numpy(draws.region_mask(labels, self.choices[choice]))


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
