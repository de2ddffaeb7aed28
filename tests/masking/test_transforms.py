"""Mask transforms: masks follow the image in space, hide what they say, and draw from their own generators.

Not covered: warps that no affine describes; MONAI keeps no record of them, and the module says not to use them.
"""

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import (
    Affined,
    Compose,
    Flipd,
    Orientationd,
    RandAffined,
    RandFlipd,
    RandRotated,
    RandZoomd,
    Rotate90d,
    SpatialPadd,
    Transposed,
)
from torch import Tensor

from bundle.anatomy import grid
from bundle.anatomy.atlas import REGIONS, labels_on, load_atlas, region_labels
from bundle.data.transforms import TimeLastd
from bundle.errors import InputError
from bundle.masking.transforms import (
    AAL3ROIMaskd,
    EqualVolumeMaskd,
    RandomTokenMaskd,
    RegionAndTubesMaskd,
    SomeFramesMaskd,
    WindowMaskd,
)
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.training.losses import MaskedMSELoss
from bundle.training.metrics import MaskedMSE, TemporalR2

SMALL = nib.affines.from_matvec(np.diag([8.0, 8, 8]), (-91, -111, -75))  # the grid's box in 24^3 voxels


def full_labels() -> np.ndarray:
    return labels_on(load_atlas(), grid.AFFINE, grid.SHAPE)


@pytest.fixture(scope="module")
def grid_atlas(tmp_path_factory) -> str:
    """AAL3 sampled on the fixed grid, as a file: an image of it can be carried through augmentation."""
    path = tmp_path_factory.mktemp("atlas") / "grid.nii.gz"
    nib.save(nib.Nifti1Image(full_labels().astype(np.uint8), grid.AFFINE), path)
    return str(path)


def labels_as_image() -> dict:
    labels = torch.from_numpy(full_labels().astype(np.float32))
    return {"image": MetaTensor(labels.expand(2, -1, -1, -1).clone(), affine=torch.tensor(grid.AFFINE))}


def small_item(run_id: str = "run", start: int = 0, frames: int = 4, last: bool = False) -> dict:
    """A clip of 24^3 voxels of 8 mm (tokens of 6^3 voxels: 4^3) with the brain where AAL3 has labels."""
    brain = torch.from_numpy(labels_on(load_atlas(), SMALL, (24, 24, 24)) > 0)
    affine = torch.tensor(SMALL)
    shape = (1, 24, 24, 24, frames) if last else (frames, 24, 24, 24)
    return {
        "image": MetaTensor(torch.zeros(shape), affine=affine),
        "brain": MetaTensor(brain[None].float(), affine=affine),
        "run_id": run_id,
        "start": start,
    }


def dice(one, other) -> float:
    one, other = np.asarray(one, bool), np.asarray(other, bool)
    return 2 * (one & other).sum() / (one.sum() + other.sum())


AUGMENTATIONS = {
    "flip x": (Flipd("image", 0), 1),
    "flip all": (RandFlipd("image", prob=1), 1),
    "turn xz": (Rotate90d("image", 1, (0, 2)), 1),
    "turn yz twice": (Rotate90d("image", 2, (1, 2)), 1),
    "pad": (SpatialPadd("image", (100, 98, 96)), 1),
    "LAS": (Orientationd("image", "LAS", labels=None), 1),
    "affine": (
        Affined(
            "image", (0.1, 0.2, 0.3), (0.05, 0, 0.1, 0, 0, 0), (1, 2.5, 3), (1.1, 0.9, 1), mode="nearest",
            padding_mode="zeros",
        ),
        0.99,
    ),
    "random affine": (
        RandAffined(
            "image", prob=1, rotate_range=0.3, translate_range=6, scale_range=0.15, mode="nearest",
            padding_mode="zeros",
        ),
        0.99,
    ),
    "random rotation": (RandRotated("image", 0.3, 0.3, 0.3, prob=1, mode="nearest", padding_mode="zeros"), 0.99),
}  # fmt: skip


@pytest.mark.parametrize(("augment", "overlap"), AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_mask_moves_with_the_augmented_image(grid_atlas, augment, overlap):
    item = Compose([augment]).set_random_state(1)(labels_as_image())
    left = [label for label in REGIONS["limbic"] if label % 2]  # one side, so that a mirrored mask is seen
    for regions in (left, REGIONS["cerebellum"], REGIONS["frontal"]):
        mask = AAL3ROIMaskd("image", regions, atlas=grid_atlas)(item)["mask"][0].numpy()
        assert dice(mask, np.isin(np.rint(item["image"][0].numpy()), regions)) >= overlap
    in_place = AAL3ROIMaskd("image", left, atlas=grid_atlas)(labels_as_image())["mask"][0].numpy()
    moved = AAL3ROIMaskd("image", left, atlas=grid_atlas)(item)["mask"][0].numpy()
    assert moved.shape != in_place.shape or dice(moved, in_place) < 0.8  # what a mask left behind would score


@pytest.mark.parametrize(
    ("augment", "follows"),
    [
        (RandAffined("image", prob=1, rotate_range=0.3, translate_range=6, scale_range=0.15), True),
        (RandRotated("image", 0.3, 0.3, 0.3, prob=1), True),
        (RandZoomd("image", prob=1, min_zoom=1.1, max_zoom=1.3, mode="trilinear"), True),
        (Flipd("image", 1), True),
        (Rotate90d("image", 1, (0, 1)), True),
        (Transposed("image", (0, 2, 1, 3)), False),  # the module's docstring warns of it
    ],
)
def test_which_monai_transforms_keep_the_affine_true(augment, follows):
    """An image of its own world coordinates (mm) still holds, after a transform, what its affine says."""

    def coordinates(affine, shape):
        return np.moveaxis(nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)), -1, 0)

    image = MetaTensor(torch.from_numpy(coordinates(SMALL, (24, 24, 24))).float(), affine=torch.tensor(SMALL))
    moved = Compose([augment]).set_random_state(3)({"image": image})["image"]
    error = np.abs(moved.as_tensor().numpy() - coordinates(moved.affine.numpy(), moved.shape[1:]))
    middle = error[:, 8:16, 8:16, 8:16]  # away from the padding
    assert (middle.max() < 0.01) == follows


def test_atlas_storage_order_changes_no_mask(shared):
    masks = [
        AAL3ROIMaskd("image", ["limbic"], atlas=shared / "atlas" / f"AAL3v1_res-02_{order}dseg.nii.gz")(
            labels_as_image()
        )["mask"]
        for order in ("", "LAS_")
    ]
    assert torch.equal(*masks)
    assert int(masks[0].sum()) == 12690


def test_a_region_is_hidden_at_every_frame():
    for last in (False, True):
        mask = AAL3ROIMaskd("image", "limbic")(small_item(frames=20, last=last))["mask"]
        assert mask.shape == (1, 24, 24, 24)  # no time axis: the same at all frames
    tube = RandomTokenMaskd("image", 0.25, tube=True)(small_item(frames=20))["mask"]
    assert tube.shape == (1, 24, 24, 24)


TUBE, FRAMEWISE = (1, 24, 24, 24), (1, 24, 24, 24, 8)
KINDS = {
    "region": (AAL3ROIMaskd("image", "limbic"), TUBE),
    "part of a region": (AAL3ROIMaskd("image", "limbic", 0.5, split_labels=True), TUBE),
    "region and tubes": (RegionAndTubesMaskd("image", ["limbic", "frontal"], 0.5), TUBE),
    "equal volume": (EqualVolumeMaskd("image", "limbic"), TUBE),
    "region, random frames": (SomeFramesMaskd(AAL3ROIMaskd("image", "limbic"), 0.5), FRAMEWISE),
    "region, a block of frames": (SomeFramesMaskd(AAL3ROIMaskd("image", "limbic"), 0.5, 4), FRAMEWISE),
    "random/random": (RandomTokenMaskd("image", 0.1), FRAMEWISE),
    "random/tube": (RandomTokenMaskd("image", 0.1, tube=True), TUBE),
    "window/random": (WindowMaskd("image", 0.5), FRAMEWISE),
    "window/tube": (WindowMaskd("image", 1.0, tube=True), TUBE),
}


@pytest.mark.parametrize(("transform", "shape"), KINDS.values(), ids=KINDS)
def test_every_mask_fits_the_image_and_its_device(transform, shape):
    item = small_item(frames=8, last=True)
    mask = transform(item)["mask"]
    assert (tuple(mask.shape), mask.dtype) == (shape, torch.bool)
    assert mask.device == item["image"].device
    assert torch.equal(mask.affine, item["image"].affine)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
@pytest.mark.parametrize(("transform", "shape"), KINDS.values(), ids=KINDS)
def test_every_mask_goes_through_network_loss_and_metrics(transform, shape, device):
    """The loss is the sum of squared errors where the mask is true, over their number."""
    network = MaskedAutoencoder(image_size=[24] * 3, frames=8, embed_dim=4, depths=[1, 1]).to(device)
    item = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in small_item().items()}
    images = [MetaTensor(torch.randn(8, 24, 24, 24, device=device), affine=item["image"].affine) for _ in range(2)]
    items = [TimeLastd("image")(transform(item | {"image": image})) for image in images]
    target = {key: torch.stack([item[key].as_tensor() for item in items]) for key in ("image", "mask")}
    prediction = network(target["image"], target["mask"])
    loss = MaskedMSELoss()(prediction, target)
    loss.backward()
    hidden = target["mask"].reshape(2, *shape, *[1] * (5 - len(shape)))  # (B, 1, X, Y, Z, T or 1)
    squared = (prediction.detach() - target["image"]).square() * hidden
    expected = float(squared.sum() / hidden.expand_as(squared).sum())
    assert loss.device.type == device
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    for make in (MaskedMSE, TemporalR2):
        given, frame_by_frame = make(), make()
        given.update((prediction, target))
        frame_by_frame.update((prediction, target | {"mask": hidden.expand_as(squared)}))
        assert given.compute() == pytest.approx(frame_by_frame.compute(), rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_masks_are_made_on_the_gpu():
    item = small_item()
    on_gpu = item | {key: item[key].cuda() for key in ("image", "brain")}
    for make in (
        lambda: AAL3ROIMaskd("image", "limbic", 0.5, split_labels=True),
        lambda: EqualVolumeMaskd("image", "limbic"),
        lambda: RandomTokenMaskd("image", 0.1),
    ):
        mask = make()(on_gpu)["mask"]
        assert mask.is_cuda
        assert torch.equal(mask.cpu(), make()(item)["mask"])


def test_mask_is_voxelwise_and_hides_the_region_alone():
    mask = AAL3ROIMaskd("image", list(REGIONS))(labels_as_image())["mask"][0].numpy()
    labels = full_labels()
    assert np.array_equal(mask, (labels > 0) & (labels != 33) & (labels != 34))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_one_whole_region_is_hidden_and_tubes_fill_up_to_the_share_of_the_brains_tokens(share):
    labels = full_labels()
    inside = grid.mni_brain()
    item = labels_as_image() | {"brain": MetaTensor(torch.from_numpy(inside.copy())[None], affine=grid.AFFINE)}
    make = RegionAndTubesMaskd("image", ["limbic", ["frontal", "parietal"]], share, seed=3)
    regions = [np.isin(labels, REGIONS["limbic"]), np.isin(labels, REGIONS["frontal"] + REGIONS["parietal"])]
    tokens_in = inside.reshape(16, 6, 16, 6, 16, 6).any((1, 3, 5))
    seen = set()
    for _ in range(8):
        mask = make(item)["mask"][0].numpy()
        [which] = [n for n, region in enumerate(regions) if mask[region].all()][:1] or [None]
        seen.add(which)
        rest = mask & ~regions[which]
        hidden = mask.reshape(16, 6, 16, 6, 16, 6).any((1, 3, 5)) & tokens_in
        least = (regions[which].reshape(16, 6, 16, 6, 16, 6).any((1, 3, 5)) & tokens_in).sum()
        assert hidden.sum() == max(least, round(share * tokens_in.sum()))
        tubes = rest.reshape(16, 6, 16, 6, 16, 6)
        touched = tubes.any((1, 3, 5)) & ~regions[which].reshape(16, 6, 16, 6, 16, 6).any((1, 3, 5))
        assert (tubes.all((1, 3, 5)) == touched).all()  # whole tokens
    assert seen == {0, 1}


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31), share=st.floats(0.1, 1), block=st.integers(1, 6), frames=st.integers(6, 20),
    last=st.booleans(),
)  # fmt: skip
def test_a_region_is_hidden_whole_at_the_drawn_frames_and_not_at_all_at_the_others(seed, share, block, frames, last):
    assume(round(share * frames / block) > 0)
    item = small_item(frames=frames, last=last)
    region = AAL3ROIMaskd("image", "limbic", seed=seed)
    mask = SomeFramesMaskd(region, share, block)(item)["mask"][0].as_tensor()
    tube = region(item)["mask"][0].as_tensor()
    shown = ~mask.flatten(0, 2).any(0)  # (T,)
    assert torch.equal(mask, tube[..., None] & ~shown)
    assert int((~shown).sum()) == min(round(share * frames / block), frames // block) * block
    runs = [len(list(run)) for hidden, run in itertools.groupby((~shown).tolist()) if hidden]
    assert all(length % block == 0 for length in runs)  # two blocks may touch


def test_a_token_is_hidden_at_a_frame_when_any_of_its_voxels_is():
    item = small_item(frames=8, last=True)
    mask = SomeFramesMaskd(AAL3ROIMaskd("image", "limbic"), 0.5, 2)(item)["mask"]
    network = MaskedAutoencoder(image_size=[24] * 3, frames=8, embed_dim=4, depths=[1, 1])
    hidden = network.hidden_tokens(item["image"].as_tensor()[None], mask.as_tensor()[None])[0]
    for place in itertools.product(range(4), range(4), range(4), range(8)):
        x, y, z, t = place
        voxels = mask[0, 6 * x : 6 * x + 6, 6 * y : 6 * y + 6, 6 * z : 6 * z + 6, t]
        assert bool(hidden[place]) == bool(voxels.any())


def test_the_voxels_hidden_at_some_frames_are_those_of_the_mask_inside():
    """A fixed mask of part of a region hides the same part, whether at all frames or at some."""
    for start in range(4):
        part = AAL3ROIMaskd("image", "frontal", 0.5, fixed=True)
        some = SomeFramesMaskd(AAL3ROIMaskd("image", "frontal", 0.5), 0.5).frozen()
        item = small_item(start=start, frames=8)
        assert torch.equal(some(item)["mask"].any(-1), part(item)["mask"])


def test_random_masks_are_drawn_in_the_brain():
    item = labels_as_image()
    brain = torch.from_numpy(full_labels() > 0)
    item["brain"] = MetaTensor(brain[None], affine=item["image"].affine)
    blocks = brain.reshape(16, 6, 16, 6, 16, 6).any(5).any(3).any(1)
    mask = RandomTokenMaskd("image", 0.1, tube=True)(item)["mask"][0]
    hidden = mask[::6, ::6, ::6]
    assert int(hidden.sum()) == round(0.1 * int(blocks.sum()))
    assert not (hidden & ~blocks).any()
    published = RandomTokenMaskd("image", 0.1, tube=True, where="grid")(item)["mask"][0]
    assert (published & brain).sum() / published.sum() < 0.3 < 0.5 < (mask & brain).sum() / mask.sum()


def test_draws_leave_the_global_generators_alone():
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    for transform in (RandomTokenMaskd("image", 0.1), EqualVolumeMaskd("image", "limbic")):
        transform(small_item())
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    assert torch.equal(torch.get_rng_state(), torch_before)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), region=st.sampled_from(sorted(REGIONS)))
def test_equal_volume_is_the_regions_and_in_the_brain(seed, region):
    item = small_item()
    region_voxels = int(AAL3ROIMaskd("image", region)(item)["mask"].sum())
    mask = EqualVolumeMaskd("image", region, seed=seed)(item)["mask"]
    assert int(mask.sum()) == region_voxels
    assert not (mask & (item["brain"] == 0)).any()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), fraction=st.floats(0.05, 0.95))
def test_fraction_of_a_region(seed, fraction):
    item = small_item()
    whole = AAL3ROIMaskd("image", "frontal")(item)["mask"]
    split = AAL3ROIMaskd("image", "frontal", fraction, split_labels=True, seed=seed)(item)["mask"]
    assert int(split.sum()) == round(fraction * int(whole.sum()))
    assert not (split & ~whole).any()
    labels = labels_on(load_atlas(), SMALL, (24, 24, 24))
    part = AAL3ROIMaskd("image", "frontal", fraction, seed=seed)(item)["mask"][0].numpy()
    shown = set(labels[~part].tolist())
    assert not shown & set(labels[part].tolist())  # no label is both hidden and shown


MAKERS = [
    lambda **k: AAL3ROIMaskd("image", "frontal", 0.5, **k),
    lambda **k: AAL3ROIMaskd("image", "frontal", 0.5, split_labels=True, **k),
    lambda **k: EqualVolumeMaskd("image", "limbic", **k),
    lambda **k: SomeFramesMaskd(AAL3ROIMaskd("image", "frontal", 0.5, **k), 0.5, 2),
    lambda **k: RandomTokenMaskd("image", 0.1, **k),
    lambda **k: WindowMaskd("image", 0.5, **k),
]


@pytest.mark.parametrize("make", MAKERS)
def test_same_seed_same_masks_and_training_draws_differ(make):
    def draws(transform) -> list[Tensor]:
        return [transform(small_item(frames=8))["mask"] for _ in range(6)]

    one, again, other = draws(make(seed=1)), draws(make(seed=1)), draws(make(seed=2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not all(torch.equal(one[0], b) for b in one)
    reseeded = Compose([make(seed=5)]).set_random_state(9).transforms[0]
    assert not all(torch.equal(a, b) for a, b in zip(draws(make(seed=5)), draws(reseeded), strict=True))


@pytest.mark.parametrize("make", MAKERS)
def test_fixed_masks_depend_on_the_clip_alone(make):
    clips = [(run, start) for run in ("a", "b", "c") for start in (0, 20)]
    transform = make(seed=3, fixed=True)
    first = {clip: transform(small_item(*clip, frames=8))["mask"] for clip in clips}
    transform.set_random_state(99)  # as MONAI does to every transform of a worker
    second = {clip: transform(small_item(*clip, frames=8))["mask"] for clip in reversed(clips)}
    assert all(torch.equal(first[clip], second[clip]) for clip in clips)
    assert len({first[clip].numpy().tobytes() for clip in clips}) > 1
    other = make(seed=4, fixed=True)
    assert not all(torch.equal(first[clip], other(small_item(*clip, frames=8))["mask"]) for clip in clips)


def test_workers_draw_different_masks():
    transform = RandomTokenMaskd("image", 0.1, where="grid")
    dataset = Dataset([small_item() for _ in range(4)], transform)
    masks = [batch["mask"] for batch in DataLoader(dataset, batch_size=1, num_workers=2)]
    assert len({mask.numpy().tobytes() for mask in masks}) == 4


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (lambda: AAL3ROIMaskd("image", "limbc"), {}, "did you mean limbic"),
        (lambda: AAL3ROIMaskd("image", "limbic", 0.0), {}, "fraction must be"),
        (lambda: AAL3ROIMaskd("image", "limbic", 1.5), {}, "fraction must be"),
        (lambda: RandomTokenMaskd("image", -0.1), {}, "ratio must be"),
        (lambda: RandomTokenMaskd("image", where="head"), {}, "'brain' or 'grid'"),
        (lambda: AAL3ROIMaskd(["image", "brain"], "limbic"), {}, "one key"),
        (lambda: SomeFramesMaskd(AAL3ROIMaskd("image", "limbic"), 0.0), {}, "share must be"),
        (lambda: SomeFramesMaskd(AAL3ROIMaskd("image", "limbic"), 0.5, 0), {}, "block must be"),
        (lambda: SomeFramesMaskd(AAL3ROIMaskd("image", "limbic"), 0.5, 9), {}, "no block of 9 frames"),
        (lambda: SomeFramesMaskd(AAL3ROIMaskd("image", "limbic"), 0.1), {}, "no block of 1 frames"),
        (lambda: SomeFramesMaskd(RandomTokenMaskd("image"), 0.5), {}, "other voxels at each frame"),
        (lambda: AAL3ROIMaskd("image", "limbic"), {"image": torch.zeros(4, 24, 24, 24)}, "MetaTensor"),
        (
            lambda: AAL3ROIMaskd("image", "limbic"),
            {"image": MetaTensor(torch.zeros(4, 9, 9, 9), affine=torch.eye(4) + 500)},
            "hides no voxel of run",
        ),
        (lambda: RandomTokenMaskd("image"), {"image": MetaTensor(torch.zeros(4, 25, 24, 24))}, "brain' must be"),
        (
            lambda: RandomTokenMaskd("image", where="grid"),
            {"image": MetaTensor(torch.zeros(4, 25, 24, 24))},
            "cannot be cut",
        ),
        (lambda: EqualVolumeMaskd("image", "limbic"), {"brain": torch.zeros(1, 24, 24, 24)}, "does not fit"),
        (
            lambda: EqualVolumeMaskd("image", "limbic"),
            {"brain": MetaTensor(torch.ones(1, 24, 24, 24), affine=torch.eye(4))},
            "was not moved with the image",
        ),
    ],
)
def test_misuse_is_refused(make, change, message):
    with pytest.raises(InputError, match=message):
        make()(small_item() | change)


def test_absent_brain_and_absent_clip_name_are_refused():
    item = small_item()
    with pytest.raises(InputError, match="no 'brain'"):
        RandomTokenMaskd("image")({"image": item["image"]})
    with pytest.raises(InputError, match="run_id and start"):
        RandomTokenMaskd("image", where="grid", fixed=True)({"image": item["image"]})


def test_item_is_not_changed_in_place():
    item = small_item()
    AAL3ROIMaskd("image", region_labels("limbic", load_atlas()), mask_key="hidden")(item)
    assert set(item) == {"image", "brain", "run_id", "start"}
