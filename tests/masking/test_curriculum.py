"""Adaptive masking: draws follow the errors, and weighted losses equal a voxel-by-voxel sum."""

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from bundle.anatomy import grid
from bundle.anatomy.atlas import REGIONS, labels_on, load_atlas
from bundle.anatomy.parcels import region_index
from bundle.errors import InputError
from bundle.masking.curriculum import CurriculumMaskd, FollowRegionErrors, ResumeCurriculum
from bundle.training.losses import RegionWeightedMSELoss, masked_mse
from bundle.training.metrics import RegionMSE

LABELS = labels_on(load_atlas(), grid.AFFINE, grid.SHAPE)


def item(number: int = 0) -> dict:
    image = MetaTensor(torch.zeros(1, *grid.SHAPE), affine=torch.as_tensor(grid.AFFINE))
    return {"image": image, "run_id": f"sub-{number}", "start": 0}


def region_of(mask: torch.Tensor) -> str:
    inside = LABELS[mask[0].numpy()]
    return next(name for name, numbers in REGIONS.items() if set(np.unique(inside)) <= set(numbers))


def test_draws_follow_the_errors_and_no_region_is_forgotten():
    mask = CurriculumMaskd("image", floor=0.14, seed=3)
    mask.follow({"limbic": 3.0, "frontal": 1.0} | dict.fromkeys(REGIONS.keys() - {"limbic", "frontal"}, 0.0))
    expected = dict.fromkeys(REGIONS, 0.02) | {"limbic": 0.02 + 0.86 * 0.75, "frontal": 0.02 + 0.86 * 0.25}
    assert dict(zip(mask.regions, mask.probabilities, strict=True)) == pytest.approx(expected)
    drawn = [region_of(mask(item())["mask"]) for _ in range(200)]
    assert drawn.count("limbic") / 200 == pytest.approx(expected["limbic"], abs=0.1)  # about 3 SD
    assert drawn.count("frontal") / 200 == pytest.approx(expected["frontal"], abs=0.1)


def test_frozen_copy_keeps_its_masks_while_the_curriculum_moves():
    mask = CurriculumMaskd("image")
    frozen = mask.frozen()
    before = [region_of(frozen(item(n))["mask"]) for n in range(20)]
    mask.follow({"limbic": 1.0} | dict.fromkeys(REGIONS.keys() - {"limbic"}, 0.0))
    assert [region_of(frozen(item(n))["mask"]) for n in range(20)] == before
    assert len(set(before)) > 3


def test_a_resumed_run_goes_on_with_the_curriculum_of_its_epoch(tmp_path):
    """The history holds a later epoch too, whose checkpoint was never written: it must not be taken."""
    history = tmp_path / "curriculum.json"
    mask, resumed = CurriculumMaskd("image"), CurriculumMaskd("image")
    after = {}
    for epoch, error in ((1, 2.0), (2, 5.0), (3, 9.0)):
        engine = Engine(lambda *_: None)
        engine.state.epoch, engine.state.metrics = epoch, {"mse": {"limbic": error, "parietal": 1.0}}
        FollowRegionErrors(mask, "mse", history)(engine)
        after[epoch] = mask.probabilities.tolist()
    engine = Engine(lambda *_: None)
    engine.state.epoch = 2
    ResumeCurriculum(resumed, history)(engine)
    assert resumed.probabilities.tolist() == after[2]
    assert sum(after[2]) == pytest.approx(1)
    engine.state.epoch, fresh = 0, CurriculumMaskd("image")
    ResumeCurriculum(fresh, history)(engine)
    assert fresh.probabilities.tolist() == CurriculumMaskd("image").probabilities.tolist()


def batch(seed: int = 0) -> tuple[torch.Tensor, dict]:
    rng = np.random.default_rng(seed)
    prediction, image = (torch.from_numpy(rng.normal(size=(2, 1, 96, 96, 96, 2))).float() for _ in range(2))
    mask = torch.from_numpy(rng.random((2, 1, 96, 96, 96)) < 0.3)
    return prediction, {"image": image, "mask": mask}


def test_handler_feeds_the_errors_of_the_regions_by_numpy(tmp_path):
    prediction, target = batch()
    metric = RegionMSE()
    mask = CurriculumMaskd("image", floor=0.0)
    engine = Engine(lambda _, data: {"pred": data[0], "label": data[1]})
    metric.attach(engine, "val_region_mse")
    FollowRegionErrors(mask, "val_region_mse", tmp_path / "curriculum.json").attach(engine)
    engine.run([(prediction, target)])
    squared = (prediction - target["image"]).square().numpy()
    hidden = target["mask"].numpy()
    errors = []
    for numbers in REGIONS.values():
        where = hidden & np.isin(LABELS, numbers)
        errors.append(squared[where].mean())
    assert mask.probabilities == pytest.approx(np.array(errors) / np.sum(errors), rel=1e-5)


def test_region_weights_by_numpy():
    prediction, target = batch(1)
    squared = (prediction - target["image"]).square().numpy()
    weight = np.where(np.isin(LABELS, REGIONS["limbic"]), 3.0, 1.0)[None, None] * target["mask"].numpy()
    expected = (squared * weight[..., None]).sum() / (weight.sum() * 2)
    assert float(RegionWeightedMSELoss({"limbic": 3.0})(prediction, target)) == pytest.approx(expected, rel=1e-5)
    equal = RegionWeightedMSELoss({"limbic": 1.0})(prediction, target)
    assert float(equal) == pytest.approx(float(masked_mse(prediction, target["image"], target["mask"])), rel=1e-5)


def test_balanced_regions_count_alike():
    """An error of 1 in one region only gives the same loss whichever region it is in."""
    loss = RegionWeightedMSELoss("balanced")
    index = torch.from_numpy(region_index(list(REGIONS), load_atlas()))
    target = {"image": torch.zeros(1, 1, 96, 96, 96, 1), "mask": torch.ones(1, 1, 96, 96, 96, dtype=torch.bool)}
    losses = [float(loss((index == n).float()[None, None, ..., None], target)) for n in range(8)]
    assert losses == pytest.approx([1 / 8] * 8, rel=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CurriculumMaskd("image", floor=2),
        lambda: CurriculumMaskd("image", regions=["limbo"]),
        lambda: RegionWeightedMSELoss({"limbic": 0.0}),
        lambda: RegionWeightedMSELoss("equal"),
    ],
)
def test_bad_settings_are_named(make):
    with pytest.raises(InputError):
        make()
