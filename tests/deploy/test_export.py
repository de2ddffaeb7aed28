"""Back to NIfTI: values, affine, TR and units against the file that the run came from, read by nibabel and nilearn.

Not covered here: where reconstructions and attributions come from.
"""

import errno

import nibabel as nib
import numpy as np
import pytest
import torch
from nilearn.image import resample_img
from small_runs import coarse_signal, run_of, save_bold

from bundle.anatomy import grid
from bundle.data.normalisation import Normalisation
from bundle.data.transforms import ReadClipd, ScatterClipd, TimeLastd
from bundle.deploy.export import export_run, to_nifti
from bundle.errors import InputError
from bundle.preparation import store
from bundle.preparation.bold import open_bold
from bundle.preparation.chain import load_preparation
from bundle.preparation.prepare import prepare
from bundle.training.checkpoints import save_checkpoint
from bundle.training.provenance import Provenance


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    data = np.where(coarse_signal()[..., :1] != 0, coarse_signal(24, mean=-30.0, sd=8.0), 0)  # around 0, negative too
    source = save_bold(folder / "run.nii.gz", data, tr=2.0)
    assert prepare([run_of(source, "sub-01")], folder / "store", load_preparation(new_tr=2.0))["prepared"] == 1
    return folder, source


@pytest.mark.parametrize("array", [False, True])
def test_a_disk_that_fills_up_leaves_the_earlier_file_and_nothing_else(prepared, tmp_path, monkeypatch, array):
    folder, _ = prepared
    np.save(tmp_path / "map.npy", np.zeros(grid.SHAPE, np.float32))
    (tmp_path / "out.nii.gz").write_bytes(b"earlier")

    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bundle.deploy.export._write_frames", full)
    monkeypatch.setattr(nib, "save", lambda _, path: full(path))
    with pytest.raises(InputError, match="No space left"):
        export_run(folder / "store", "sub-01", tmp_path / "out.nii.gz", array=tmp_path / "map.npy" if array else None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.npy", "out.nii.gz"]
    assert (tmp_path / "out.nii.gz").read_bytes() == b"earlier"


def test_a_round_trip_gives_the_original_values_at_the_original_times(prepared):
    folder, source = prepared
    export_run(folder / "store", "sub-01", folder / "out.nii.gz")
    image = nib.load(folder / "out.nii.gz")
    assert image.shape == (*grid.SHAPE, 24)
    assert np.array_equal(image.affine, grid.AFFINE)
    assert (image.header["sform_code"], image.header["qform_code"]) == (4, 4)
    assert image.header.get_xyzt_units() == ("mm", "sec")
    assert image.header["pixdim"][4] == 2.0
    assert nib.aff2axcodes(image.get_qform()) == ("R", "A", "S")
    expected = resample_img(
        nib.load(source), grid.AFFINE, grid.SHAPE, interpolation="linear", force_resample=True, copy_header=True
    ).get_fdata()  # fmt: skip
    brain = np.zeros(grid.SHAPE, bool)
    brain.ravel()[store.read_voxels(folder / "store", "sub-01")] = True
    assert not image.get_fdata()[~brain].any()
    sd = store.read_run(folder / "store", "sub-01")["sd"]
    np.testing.assert_allclose(image.get_fdata()[brain], expected[brain], atol=sd * 4 / 2048)  # float16 at 4 SD


def test_an_export_can_be_prepared_again_to_the_same_store(prepared):
    folder, _ = prepared
    export_run(folder / "store", "sub-01", folder / "again.nii")
    assert open_bold(folder / "again.nii").tr == 2.0
    prepare([run_of(folder / "again.nii", "sub-01")], folder / "second", load_preparation(new_tr=2.0))
    first, second = (store.read_clip(folder / name, "sub-01", 0, 24).astype(float) for name in ("store", "second"))
    np.testing.assert_allclose(second, first, atol=0.004)


def test_a_part_of_a_run_in_z(prepared):
    folder, _ = prepared
    export_run(folder / "store", "sub-01", folder / "part.nii", units="z", start=5, frames=3)
    values = nib.load(folder / "part.nii").get_fdata().reshape(-1, 3)[store.read_voxels(folder / "store", "sub-01")]
    record = store.read_run(folder / "store", "sub-01")
    expected = (store.read_values(folder / "store", "sub-01", 5, 3) - record["mean"]) / record["sd"]
    np.testing.assert_allclose(values.T, expected, atol=1e-5)


@pytest.mark.parametrize("ending", ["npy", "pt"])
def test_an_array_on_the_grid_in_the_runs_units(prepared, ending):
    folder, _ = prepared
    record, voxels = store.read_run(folder / "store", "sub-01"), store.read_voxels(folder / "store", "sub-01")
    array = np.random.default_rng(0).normal(size=(1, *grid.SHAPE, 2)).astype(np.float32)
    np.save(folder / "map.npy", array)
    torch.save(torch.from_numpy(array), folder / "map.pt")
    export_run(folder / "store", "sub-01", folder / "map.nii", array=folder / f"map.{ending}")
    values = nib.load(folder / "map.nii").get_fdata().reshape(-1, 2)
    expected = array.reshape(-1, 2)[voxels] * record["sd"] + record["mean"]
    np.testing.assert_allclose(values[voxels], expected, rtol=1e-4, atol=1e-4)
    export_run(folder / "store", "sub-01", folder / "plain.nii", units="z", array=folder / f"map.{ending}")
    assert np.array_equal(nib.load(folder / "plain.nii").get_fdata(), array[0])


@pytest.mark.parametrize("array", [False, True])
def test_a_folder_that_cannot_be_made_is_said(prepared, tmp_path, array):
    folder, _ = prepared
    np.save(tmp_path / "map.npy", np.zeros(grid.SHAPE, np.float32))
    with pytest.raises(InputError, match=r"out\.nii cannot be written"):
        export_run(
            folder / "store", "sub-01", tmp_path / "map.npy" / "out.nii", array=tmp_path / "map.npy" if array else None
        )


def test_values_at_voxels_land_where_the_flat_index_says():
    image = to_nifti(np.array([7.0]), voxels=np.array([np.ravel_multi_index((10, 20, 30), grid.SHAPE)]))
    assert image.shape == grid.SHAPE
    assert np.argwhere(image.get_fdata()).tolist() == [[10, 20, 30]]
    world = nib.affines.apply_affine(image.affine, [10, 20, 30])
    assert world.tolist() == [-94 + 20, -114 + 40, -78 + 60]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": "out.img"}, "must end in"),
        ({"units": "percent"}, "units must be"),
        ({"run_id": "sub-02"}, "no run sub-02"),
        ({"start": 20, "frames": 9}, "no clip of 9"),
        ({"array": "absent.npy"}, "does not exist"),
        ({"array": "run.nii.gz"}, "not an array"),
        ({"array": "small.npy"}, "not on the grid"),
    ],
)
def test_what_cannot_be_exported_is_said(prepared, monkeypatch, changes, words):
    folder, _ = prepared
    np.save(folder / "small.npy", np.zeros((3, 3, 3)))
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=words):
        export_run(**({"folder": "store", "run_id": "sub-01", "path": "bad.nii"} | changes))


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("mode", ["run", "voxel", "both"])
def test_what_a_network_would_rebuild_perfectly_exports_to_the_runs_own_values(prepared, tmp_path, mode, per_frame):
    """In the units of its normalisation, which the network's checkpoint knows."""
    folder, _ = prepared
    normalisation = Normalisation(mode, sd_floor=0.1, clip=50.0, per_frame=per_frame)
    facts = Provenance(config={}, normalisation=normalisation.facts())
    save_checkpoint({"network": torch.nn.Linear(1, 1), "provenance": facts}, tmp_path / "best.pt")
    clip = ReadClipd(folder / "store", frames=3)({"run_id": "sub-01", "start": 5})
    perfect = TimeLastd()(ScatterClipd(normalisation)(clip))["image"].as_tensor()[-1]
    torch.save(perfect, tmp_path / "rebuilt.pt")
    given = {"start": 5, "array": tmp_path / "rebuilt.pt", "checkpoint": tmp_path / "best.pt"}
    export_run(folder / "store", "sub-01", tmp_path / "rebuilt.nii", **given)
    export_run(folder / "store", "sub-01", tmp_path / "own.nii", start=5, frames=3)
    rebuilt, own = (nib.load(tmp_path / f"{name}.nii").get_fdata() for name in ("rebuilt", "own"))
    np.testing.assert_allclose(rebuilt, own, atol=0.02)
