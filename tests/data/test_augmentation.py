"""Augmentation against scipy and nibabel in world space, and the statistics of what it draws.

Not covered: whether it helps.
"""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.ndimage import map_coordinates
from scipy.stats import kstest

from bundle.anatomy import grid
from bundle.anatomy.atlas import REGIONS, labels_on, load_atlas
from bundle.data.augmentation import AugmentClipd
from bundle.errors import InputError
from bundle.masking.transforms import AAL3ROIMaskd, EqualVolumeMaskd

MOVING = {"rotate": 6.0, "translate": 8.0, "scale": 0.1}
FILL = -2.5
LEFT = [label for label in REGIONS["limbic"] if label % 2]  # one side, so that a mirrored mask is seen


def item_of(frames: np.ndarray | torch.Tensor, fill: float = FILL, anatomy: bool = False) -> dict:
    """A clip of (T, V) values in the MNI brain, over a background of one value."""
    brain = torch.from_numpy(grid.mni_brain().copy())
    affine = torch.as_tensor(grid.AFFINE)
    image = torch.full((len(frames), *grid.SHAPE), fill)
    image[:, brain] = torch.as_tensor(frames, dtype=torch.float32)
    item = {"image": MetaTensor(image, affine=affine), "brain": MetaTensor(brain[None], affine=affine)}
    if anatomy:
        item["anatomy"] = MetaTensor(3 * image + 1, affine=affine)
    return item


def noise(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((frames, int(grid.mni_brain().sum())))


def sources(affine: torch.Tensor) -> np.ndarray:
    """Where the voxels of a moved image lie in the image before, by world coordinates: (3, voxels)."""
    places = np.indices(grid.SHAPE).reshape(3, -1).T
    world = nib.affines.apply_affine(affine.numpy(), places)
    return nib.affines.apply_affine(np.linalg.inv(grid.AFFINE), world).T


@pytest.mark.parametrize("seed", range(3))
def test_image_and_brain_are_those_of_scipy_at_the_same_world_coordinates(seed):
    """Linear interpolation of the brain's voxels alone, where they have at least half the weight."""
    item = item_of(noise(2))
    moved = AugmentClipd(**MOVING, seed=seed)(item)
    assert not np.allclose(moved["image"].affine, grid.AFFINE, atol=0.1)
    assert torch.equal(moved["image"].affine, moved["brain"].affine)
    at = sources(moved["image"].affine)
    inside = grid.mni_brain()
    share = map_coordinates(inside.astype(float), at, order=1)
    brain = moved["brain"][0].numpy().ravel()
    clear = np.abs(share - 0.5) > 1e-4  # where rounding does not decide
    assert np.array_equal(brain[clear], share[clear] >= 0.5)
    for before, after in zip(item["image"], moved["image"], strict=True):
        values = map_coordinates(np.where(inside, before.numpy(), 0), at, order=1)
        found = after.numpy().ravel()
        both = brain & clear
        np.testing.assert_allclose(found[both], values[both] / share[both], atol=1e-3)
        assert (found[~brain] == np.float32(FILL)).all()


def test_a_marker_keeps_its_place_in_the_world():
    wanted = np.array([-24.0, -20.0, -12.0])  # mm; the left hippocampus
    places = nib.affines.apply_affine(grid.AFFINE, np.argwhere(grid.mni_brain()))
    item = item_of(np.exp(-((places - wanted) ** 2).sum(1) / 50)[None], fill=0.0)
    for seed in range(3):
        moved = AugmentClipd(**MOVING, seed=seed)(item)["image"]
        values = moved[0].numpy().ravel()
        world = nib.affines.apply_affine(moved.affine.numpy(), np.indices(grid.SHAPE).reshape(3, -1).T)
        assert (values @ world) / values.sum() == pytest.approx(wanted, abs=0.1)
        index = np.array(np.unravel_index(values.argmax(), grid.SHAPE))
        before = nib.affines.apply_affine(np.linalg.inv(grid.AFFINE), wanted)
        assert np.linalg.norm(index - before) > 0.9  # voxels: it has moved on the grid


@pytest.mark.parametrize("seed", range(3))
def test_a_mask_that_is_drawn_afterwards_lies_on_the_region_that_has_moved(seed):
    region = np.isin(labels_on(load_atlas(), grid.AFFINE, grid.SHAPE), LEFT)
    painted = region[grid.mni_brain()].astype(float)[None]
    moved = AugmentClipd(**MOVING, seed=seed)(item_of(painted, fill=0.0))
    mask = AAL3ROIMaskd("image", LEFT)(moved)["mask"][0].numpy()
    there = moved["image"][0].numpy() > 0.5

    def dice(one, other) -> float:
        return 2 * (one & other).sum() / (one.sum() + other.sum())

    brain = moved["brain"][0].numpy()
    assert dice(mask & brain, there) > 0.9  # a region of thin parts, interpolated
    assert dice(region, there) < 0.8  # what a mask that stayed behind would score
    elsewhere = EqualVolumeMaskd("image", LEFT)(moved)["mask"][0].numpy()  # refused if the brain had not moved along
    assert not (elsewhere & ~brain).any()


def test_the_edge_of_the_brain_keeps_its_values_and_the_background_its_own():
    """A brain of one value: mixed with the background, its edge would have others."""
    for fill in (FILL, 0.0):
        moved = AugmentClipd(**MOVING, seed=1)(item_of(np.ones((2, int(grid.mni_brain().sum()))), fill))
        image, brain = moved["image"].numpy(), moved["brain"][0].numpy()
        np.testing.assert_allclose(image[:, brain], 1, atol=1e-4)
        assert (image[:, ~brain] == np.float32(fill)).all()
        assert 0.7 < brain.sum() / grid.mni_brain().sum() < 1.4


def test_all_frames_at_once_are_the_frames_one_by_one():
    item = item_of(noise(3), fill=0.0)
    together = AugmentClipd(**MOVING, seed=5)(item)
    for frame in range(3):
        one = AugmentClipd(**MOVING, seed=5)(item | {"image": item["image"][frame : frame + 1]})
        assert torch.equal(one["image"][0].as_tensor(), together["image"][frame].as_tensor())


def test_noise_differs_in_each_frame_and_voxel_and_is_as_wide_as_asked():
    signal = np.linspace(0.2, 5, int(grid.mni_brain().sum())) * noise(12)  # voxels of different SD
    item = item_of(signal)
    found = AugmentClipd(noise=0.3, seed=0)(item)
    brain = item["brain"][0]
    before, after = (image.as_tensor()[:, brain].double().numpy() for image in (item["image"], found["image"]))
    drawn = (after - before) / before.std(0)  # (T, V)
    for frame in drawn:
        assert frame.mean() == pytest.approx(0, abs=0.005)  # eight standard errors
        assert frame.std() == pytest.approx(0.3, abs=0.004)
        assert kstest(frame[::100] / 0.3, "norm").pvalue > 1e-3
    shared = np.corrcoef(drawn) - np.eye(12)
    assert np.abs(shared).max() < 0.015  # the same noise in two frames would give 1
    assert len({frame.tobytes() for frame in drawn}) == 12
    outside = ~brain
    assert torch.equal(found["image"].as_tensor()[:, outside], item["image"].as_tensor()[:, outside])


def test_one_factor_scales_all_values_of_a_clip():
    item = item_of(noise(4))
    augment = AugmentClipd(intensity=0.2, seed=0)
    brain = item["brain"][0]
    factors = []
    for _ in range(30):
        before, after = (image.as_tensor()[:, brain] for image in (item["image"], augment(item)["image"]))
        factors.append(float((before * after).sum() / before.square().sum()))
        torch.testing.assert_close(after, factors[-1] * before, atol=1e-5, rtol=1e-5)
    assert 0.8 < min(factors) < 0.85
    assert 1.15 < max(factors) < 1.2


def test_both_channels_of_a_clip_are_changed_alike():
    item = item_of(noise(4), anatomy=True)
    found = AugmentClipd(**MOVING, noise=0.5, seed=3)(item)
    assert torch.equal(found["image"].affine, found["anatomy"].affine)
    image, anatomy = (found[name].as_tensor() for name in ("image", "anatomy"))
    torch.testing.assert_close(anatomy, 3 * image + 1, atol=1e-3, rtol=0)


def test_without_any_range_a_clip_stays_as_it_is():
    item = item_of(noise(2))
    found = AugmentClipd(seed=0)(item)
    assert torch.equal(found["image"].affine, item["image"].affine)
    assert torch.equal(found["brain"].as_tensor(), item["brain"].as_tensor())
    torch.testing.assert_close(found["image"].as_tensor(), item["image"].as_tensor(), atol=1e-6, rtol=0)


def test_draws_follow_their_own_seed_and_nothing_else():
    item = item_of(noise(2))
    states = np.random.get_state()[1].copy(), torch.get_rng_state()

    def twice(seed: int) -> list[torch.Tensor]:
        augment = AugmentClipd(**MOVING, intensity=0.1, noise=0.1, seed=9).set_random_state(seed)
        return [augment(item)["image"].as_tensor() for _ in range(2)]

    (first, second), (again, after), (other, _) = twice(1), twice(1), twice(2)
    assert torch.equal(first, again)
    assert torch.equal(second, after)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    assert np.array_equal(np.random.get_state()[1], states[0])
    assert torch.equal(torch.get_rng_state(), states[1])


def test_movement_and_intensity_are_drawn_independently():
    """MONAI gives every generator inside a transform one seed, so that one draw would follow from the other."""
    pairs = []
    for seed in range(60):
        augment = AugmentClipd(rotate=5, intensity=0.5, seed=seed)
        augment.move.rand_affine_grid.randomize()
        pairs.append((augment.move.rand_affine_grid.rotate_params[0], augment.R.uniform(-1, 1)))
    assert abs(np.corrcoef(np.transpose(pairs))[0, 1]) < 0.4  # three standard errors


@pytest.mark.parametrize("wrong", [{"rotate": -1}, {"noise": -0.1}, {"scale": 1.0}, {"intensity": 1.5}])
def test_impossible_ranges_are_refused(wrong):
    with pytest.raises(InputError, match="augment: rotate, translate"):
        AugmentClipd(**wrong)


def test_item_is_not_changed_in_place():
    item = item_of(noise(1))
    before = item["image"].as_tensor().clone(), item["image"].affine.clone()
    AugmentClipd(**MOVING, intensity=0.1, noise=0.1, seed=0)(item)
    assert torch.equal(item["image"].as_tensor(), before[0])
    assert torch.equal(item["image"].affine, before[1])
