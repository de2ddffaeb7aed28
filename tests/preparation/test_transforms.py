"""The data transforms: one chain in memory, one through the store, both the same to the bit.

Pitfalls 1, 4, 5. Not covered here: the functions under them (test_grid.py, test_bold.py, test_store.py) and masks.
"""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose
from scipy.stats import chisquare
from small_runs import COARSE_AFFINE, coarse_brain, coarse_signal, save_bold, save_mask

from bundle.anatomy import grid
from bundle.data.clips import clips
from bundle.data.normalisation import Normalisation
from bundle.data.transforms import ReadClipd, ScatterClipd, TakeClipd, TimeLastd
from bundle.errors import InputError
from bundle.preparation import store
from bundle.preparation.transforms import LoadBOLDd, ResampleTRd, StoreRund, ToGridd, ZScored

RUN = Normalisation("run", sd_floor=0.1, clip=5.0)
PREPARE = (LoadBOLDd(), ToGridd(0.6), ResampleTRd(0.8), ZScored())


def apply(transforms, item):
    for transform in transforms:
        item = transform(item)
    return item


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """One run of 41 frames at 1 s: the file, the item in memory, and its store."""
    folder = tmp_path_factory.mktemp("prepared")
    path = save_bold(folder / "run.nii.gz", coarse_signal(41), tr=1.0)
    item = apply(PREPARE, {"bold": path})
    item["record"] |= {"run_id": "sub-01"}
    StoreRund(folder / "store")(item)
    return path, item, folder / "store"


def test_both_chains_give_the_same_dense_clip(prepared):
    path, _, folder = prepared
    tail = [ScatterClipd(RUN), TimeLastd()]
    raw = apply([*PREPARE, TakeClipd(), *tail], {"bold": path, "start": 17})
    read = apply([ReadClipd(folder), *tail], {"run_id": "sub-01", "start": 17})
    assert torch.equal(raw["image"].as_tensor(), read["image"].as_tensor())
    assert torch.equal(raw["brain"].as_tensor(), read["brain"].as_tensor())


def test_dense_clip_holds_the_run_at_its_voxels_and_the_fill_elsewhere(prepared):
    _, item, folder = prepared
    clip = ScatterClipd(RUN)(ReadClipd(folder)({"run_id": "sub-01", "start": 5}))
    image, brain = clip["image"], clip["brain"]
    assert isinstance(image, MetaTensor)
    assert (image.shape, image.dtype) == ((20, 96, 96, 96), torch.float32)
    assert (brain.shape, brain.dtype) == ((1, 96, 96, 96), torch.bool)
    for tensor in (image, brain):
        assert np.array_equal(tensor.affine, grid.AFFINE)
    dense, inside = image.numpy(), brain.numpy()[0]
    assert np.array_equal(np.flatnonzero(inside), item["voxels"])
    record, moments = item["record"], item["moments"]
    values = item["bold"].astype(float) * moments[1] + moments[0]  # in the file's units
    z = (values - record["mean"]) / record["sd"]
    np.testing.assert_allclose(dense[:, inside], z[5:25], atol=1e-5)
    assert (z.mean(), z.std()) == (pytest.approx(0, abs=1e-3), pytest.approx(1, abs=1e-3))
    np.testing.assert_allclose(dense[:, ~inside], z.min(), atol=1e-3)


def test_units_can_be_had_back(prepared):
    """z * SD + mean is the signal in the file's unit, at a voxel of the file that lies on the grid."""
    _, item, _ = prepared
    record, moments = item["record"], item["moments"]
    native = np.argwhere(coarse_brain())
    places = nib.affines.apply_affine(np.linalg.inv(grid.AFFINE) @ COARSE_AFFINE, native)
    assert np.array_equal(places, places.round())  # every 8 mm voxel is a grid voxel
    columns = np.searchsorted(item["voxels"], np.ravel_multi_index(places.astype(int).T, grid.SHAPE))
    restored = item["bold"][::5, columns].astype(float) * moments[1, columns] + moments[0, columns]  # every 4 s
    expected = coarse_signal(41)[tuple(native.T)].T[::4]
    np.testing.assert_allclose(restored[: len(expected)], expected, atol=record["sd"] * 8 / 2048)


def test_time_goes_last_and_the_affine_stays():
    image = MetaTensor(torch.arange(2.0 * 3 * 4 * 5).view(5, 2, 3, 4), affine=torch.as_tensor(grid.AFFINE))
    out = TimeLastd()({"image": image})["image"]
    assert out.shape == (1, 2, 3, 4, 5)
    assert np.array_equal(out.affine, grid.AFFINE)
    assert all(torch.equal(out[0, ..., t], image[t]) for t in range(5))


def test_transforms_leave_their_input_alone(prepared):
    path, _, folder = prepared
    for transform, item in (
        (ReadClipd(folder), {"run_id": "sub-01", "start": 0}),
        (ToGridd(0.6), LoadBOLDd()({"bold": path, "mask": None})),
    ):
        before = dict(item)
        transform(item)
        assert item == before


def test_random_starts_are_uniform_over_all_possible_ones(prepared):
    _, item, folder = prepared
    last = len(item["bold"]) - 20
    reader = ReadClipd(folder, random=True, seed=3)
    starts = []
    for _ in range(40 * (last + 1)):
        reader.randomize(len(item["bold"]))
        starts.append(reader.start)
    counts = np.bincount(starts, minlength=last + 1)
    assert len(counts) == last + 1
    assert chisquare(counts).pvalue > 1e-3


def test_random_clips_come_from_the_transforms_own_generator(prepared):
    _, item, folder = prepared
    draw = lambda reader: [reader({"run_id": "sub-01"})["start"] for _ in range(8)]  # noqa: E731
    first = draw(ReadClipd(folder, random=True, seed=1))
    np.random.seed(0)
    torch.manual_seed(0)
    assert draw(ReadClipd(folder, random=True, seed=1)) == first
    assert draw(ReadClipd(folder, random=True, seed=2)) != first
    assert draw(ReadClipd(folder, random=True)) != draw(ReadClipd(folder, random=True))
    clip = ReadClipd(folder, random=True, seed=1)({"run_id": "sub-01"})
    assert np.array_equal(clip["frames"], item["bold"][clip["start"] :][:20])


def test_loader_workers_read_clips(prepared):
    _, _, folder = prepared
    data = Dataset([{"run_id": "sub-01", "start": 20}] * 4, ReadClipd(folder))
    loader = DataLoader(data, batch_size=2, num_workers=2, collate_fn=list)
    frames = [item["frames"] for batch in loader for item in batch]
    assert len(frames) == 4
    assert all(np.array_equal(clip, store.read_clip(folder, "sub-01", 20, 20)) for clip in frames)


@pytest.mark.parametrize("start", [-1, 32, 100])
def test_clips_that_do_not_fit_are_refused(prepared, start):
    _, item, folder = prepared
    for transform, entry in ((ReadClipd(folder), {"run_id": "sub-01"}), (TakeClipd(), item)):
        with pytest.raises(InputError, match=f"at frame {start}"):
            transform(entry | {"start": start})
    with pytest.raises(InputError, match="51 frames, not 60"):
        ReadClipd(folder, frames=60, random=True)({"run_id": "sub-01"})


@pytest.mark.parametrize(
    ("frames", "stride", "expected"),
    [(20, 20, [0, 20]), (20, 10, [0, 10, 20, 30]), (51, 1, [0]), (17, 17, [0, 17, 34]), (20, 31, [0, 31])],
)
def test_clip_lists(frames, stride, expected):
    runs = [{"run_id": f"r{n}", "participant_id": f"p{n}", "frames": 51} for n in range(2)]
    listed = clips(runs, frames, stride)
    assert [clip["start"] for clip in listed] == expected * 2
    assert listed[-1] == {"run_id": "r1", "participant_id": "p1", "start": expected[-1]}


@pytest.mark.parametrize(("frames", "stride"), [(52, 20), (0, 20), (20, 0)])
def test_clip_lists_that_cannot_be_are_refused(frames, stride):
    with pytest.raises(InputError):
        clips([{"run_id": "r", "participant_id": "p", "frames": 51}], frames, stride)


def test_low_overlap_and_short_runs_are_refused(tmp_path):
    signal = coarse_signal(25)
    path = save_bold(tmp_path / "run.nii", signal)
    brain = coarse_brain()
    brain[12:] = False
    half = save_mask(tmp_path / "mask.nii", brain)
    with pytest.raises(InputError, match=r"low overlap.*likely in native space"):
        apply(PREPARE, {"bold": path, "mask": half})
    record = apply([LoadBOLDd(), ToGridd(min_overlap=0.3)], {"bold": path, "mask": half})["record"]
    assert 0.3 < record["mni_overlap"] < 0.6
    short = save_bold(tmp_path / "short.nii", signal[..., :19])
    with pytest.raises(InputError, match=r"short.nii has 19 frames at 0\.8 s, which is 19 at 0\.8 s, but 20"):
        apply(PREPARE, {"bold": short})
    constant = save_bold(tmp_path / "flat.nii", np.broadcast_to(signal[..., :1] * 0 + 5, signal.shape))
    with pytest.raises(InputError, match=r"flat\.nii: every value"):
        apply(PREPARE, {"bold": constant, "mask": save_mask(tmp_path / "whole.nii", coarse_brain())})


def test_storage_order_changes_nothing(tmp_path):
    """The same run stored RAS, LAS and PIR gives the same frames at the same voxels, bit by bit."""
    signal = coarse_signal(25) - 900
    reference = apply(PREPARE, {"bold": save_bold(tmp_path / "ras.nii", signal)})
    for axcodes in ("LAS", "PIR"):
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(COARSE_AFFINE), nib.orientations.axcodes2ornt(axcodes)
        )
        turned = nib.Nifti1Image(signal, COARSE_AFFINE).as_reoriented(turn)
        path = save_bold(tmp_path / f"{axcodes}.nii", np.asarray(turned.dataobj), turned.affine)
        item = apply(PREPARE, {"bold": path})
        assert item["record"]["axcodes_in"] == axcodes
        for key in ("bold", "voxels"):
            assert np.array_equal(item[key], reference[key])


def test_composed_by_monai(prepared):
    path, item, _ = prepared
    composed = Compose([*PREPARE, TakeClipd(), ScatterClipd(RUN), TimeLastd()])({"bold": path})
    assert composed["image"].shape == (1, 96, 96, 96, 20)
    assert composed["start"] == 0
    assert composed["record"]["sd"] == item["record"]["sd"]
