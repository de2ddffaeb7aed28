"""Runs in their own space: motion against closed forms, the affine and left and right against made-up heads.

Truth: heads that `small_heads` has put where it says, analytic images, and Power's formula by hand. One real series,
where ../shared is there. Not covered here: how a run in MNI space is prepared (test_transforms.py, test_prepare.py).
"""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nibabel.affines import apply_affine, from_matvec
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from small_heads import MARKER, PLACE, head, orientation, rigid, save_head
from small_runs import coarse_signal, run_of, save_bold, touch

from bundle.anatomy import grid
from bundle.anatomy.parcels import dense
from bundle.deploy.inference import prepared_clips
from bundle.errors import InputError
from bundle.preparation import register
from bundle.preparation.acquisition import acquisition
from bundle.preparation.bold import NATIVE, open_bold
from bundle.preparation.chain import load_preparation, rebuild_preparation
from bundle.preparation.frames import frame_reader
from bundle.preparation.pictures import stored_picture
from bundle.preparation.prepare import prepare
from bundle.preparation.sources import find_runs
from bundle.preparation.store import read_manifest, read_moments, read_run, read_voxels
from bundle.preparation.transforms import REGISTERED, CleanSignalsd, mask_kind
from bundle.training.provenance import Provenance

pytest.importorskip("SimpleITK", reason="SimpleITK is absent; pip install -e '.[register]'")

MOVES = [
    rigid(tuple(shift), tuple(turn))
    for shift, turn in zip(
        np.cumsum(np.random.default_rng(3).normal(0, 0.4, (9, 3)), axis=0),
        np.cumsum(np.random.default_rng(4).normal(0, 0.3, (9, 3)), axis=0),
        strict=True,
    )
]
RUNS = {"sub-01_task-rest": ("LAS", True, {}), "sub-02_task-rest": ("RAS", False, {"sform": 0, "qform": 1})}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw BIDS folder: the same moving head stored LAS and oblique with an sform, and RAS with a qform."""
    folder = tmp_path_factory.mktemp("raw")
    for name, (codes, oblique, header) in RUNS.items():
        path = folder / name[:6] / "func" / f"{name}_bold.nii.gz"
        save_head(path, orientation(codes, oblique), MOVES, **header)
    touch(folder / "participants.tsv", "participant_id\tsite\nsub-01\tA\nsub-02\tA\n")
    return folder


@pytest.fixture(scope="module")
def store(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The raw folder, registered and stored."""
    folder = tmp_path_factory.mktemp("registered")
    done = prepare(find_runs(raw, native=True), folder, load_preparation(register="affine"))
    assert done["prepared"] == 2, done["rows"]
    return folder


def mean_of(store: Path, run_id: str) -> np.ndarray:
    return dense(read_moments(store, run_id)[0].astype(np.float32), read_voxels(store, run_id))


# --- where things come to lie -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("run_id", RUNS)
def test_the_marker_on_the_left_is_on_the_left(store: Path, run_id: str):
    mean = mean_of(store, run_id)[:95]  # x from -94 to 94 mm
    both = (mean != 0) & (mean[::-1] != 0)
    difference = gaussian_filter(np.where(both, mean - mean[::-1], 0), 3)  # a sharp edge differs by what it is off
    brightest = apply_affine(grid.AFFINE, np.unravel_index(np.argmax(difference), difference.shape))
    assert np.linalg.norm(brightest - MARKER) < 8
    x, y, z = np.rint(apply_affine(np.linalg.inv(grid.AFFINE), MARKER)).astype(int)
    assert difference[x, y, z] > 150  # of 600, before it was smoothed
    assert difference[94 - x, y, z] < -150


def test_however_it_is_stored_a_head_comes_out_the_same(store: Path):
    one, other = (mean_of(store, run_id) for run_id in RUNS)
    both = (one != 0) & (other != 0)
    assert both.sum() > 150_000
    alike, mirrored = (np.corrcoef(one[both], image[both])[0, 1] for image in (other, np.roll(other[::-1], -1, 0)))
    assert alike > 0.8  # sharp edges, voxels of 5 mm
    assert alike > mirrored + 0.1


def test_frames_and_affine_are_those_of_the_phantom(raw: Path):
    bold = open_bold(raw / "sub-02" / "func" / "sub-02_task-rest_bold.nii.gz", native=True)
    found = register.register(bold, frame_reader(bold))
    brain = apply_affine(grid.AFFINE, np.argwhere(grid.mni_brain())[::200])
    errors = []
    for affine, moved in zip(found.affines, MOVES, strict=True):
        scanner = apply_affine(bold.affine @ np.linalg.inv(affine), brain)
        errors.append(np.linalg.norm(scanner - apply_affine(moved @ PLACE, brain), axis=1))
    assert np.mean(errors) < 2  # mm, of voxels of 5 mm
    assert np.max(errors) < 4
    assert min(found.alignment["information_margin"], found.alignment["edge_margin"]) > 1.3


def test_motion_is_kept_as_confounds(store: Path):
    table = pd.read_csv(store / "runs" / "sub-01_task-rest" / "confounds.tsv", sep="\t")
    assert list(table) == ["trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z", "framewise_displacement"]
    assert len(table) == 9
    rot = np.diff(np.array([Rotation.from_matrix(m[:3, :3]).as_euler("xyz") for m in MOVES]), axis=0)
    middle = apply_affine(orientation("LAS", True), (np.array((40, 44, 38)) - 1) / 2)
    shifts = np.diff(np.array([apply_affine(m, middle) for m in MOVES]), axis=0)
    expected = np.mean(np.abs(shifts).sum(1) + 50 * np.abs(rot).sum(1))
    record = read_run(store, "sub-01_task-rest")
    assert record["mean_fd"] == pytest.approx(table["framewise_displacement"].mean())
    assert record["mean_fd"] == pytest.approx(expected, rel=0.25)  # 5 mm voxels


# --- motion -----------------------------------------------------------------------------------------------------------

BLOBS = np.random.default_rng(0).uniform(-35, 35, (30, 3)), np.random.default_rng(1).uniform(0.3, 1, 30)


def blobs(affine: np.ndarray, shape: tuple[int, int, int], moved: np.ndarray) -> np.ndarray:
    """A sum of Gaussians of SD 9 mm that has moved, by its formula: nothing is interpolated."""
    places = apply_affine(np.linalg.inv(moved) @ affine, np.indices(shape).reshape(3, -1).T)
    values = sum(
        height * np.exp(-np.sum(np.square(places - at), axis=1) / (2 * 9.0**2))
        for at, height in zip(*BLOBS, strict=True)
    )
    return values.reshape(shape)


@pytest.mark.parametrize("codes", ["RAS", "LAS", "PIR"])
def test_motion_is_that_of_an_analytic_image(tmp_path: Path, codes: str):
    shape = (28, 26, 30)
    axes = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), shape)[:3, :3] * [3.5, 4, 4.5]
    affine = from_matvec(axes, -axes @ ((np.array(shape) - 1) / 2))
    moves = [
        np.eye(4),
        rigid((1, -2, 0.5), (1, 0, -2)),
        np.eye(4),
        rigid((0, 3, 0), (0, 0, 20)),
        rigid((0.2, 0, 0), (0,) * 3),
    ]
    frames = [blobs(affine, shape, moved) * factor for moved, factor in zip(moves, (1, 1, 1, 1.3, 0.8), strict=True)]
    path = tmp_path / "run.nii"
    save_bold(path, np.stack(frames, -1).astype(np.float32), affine, sform=1)
    bold = open_bold(path, native=True)
    motion, mean = register._motion(bold, frame_reader(bold))
    points = np.random.default_rng(2).uniform(-30, 30, (100, 3))
    for found, moved in zip(motion, moves, strict=True):
        error = np.linalg.norm(apply_affine(found, points) - apply_affine(moved, points), axis=1)
        assert error.max() < 0.3  # mm, of voxels of 4 mm
    assert np.corrcoef(mean.ravel(), frames[2].ravel())[0, 1] > 0.99


def test_framewise_displacement_is_power_s(tmp_path: Path):
    bold = open_bold(save_bold(tmp_path / "run.nii", coarse_signal(), sform=1), native=True)
    middle = apply_affine(bold.affine, (np.array(bold.shape) - 1) / 2)
    turn = Rotation.from_rotvec([0.02, 0, 0]).as_matrix()
    motion = np.array([np.eye(4), from_matvec(np.eye(3), [1, 0, -0.5]), from_matvec(turn, middle - turn @ middle)])
    table = register._confounds(motion, bold)
    assert np.isnan(table["framewise_displacement"][0])
    np.testing.assert_allclose(table["framewise_displacement"][1:], [1.5, 1.5 + 50 * 0.02])


# --- the check --------------------------------------------------------------------------------------------------------

MIDDLE = np.array([0.0, -18.0, 8.0])


def about_middle(matrix: np.ndarray) -> np.ndarray:
    return from_matvec(matrix, MIDDLE - matrix @ MIDDLE)


WRONG = {
    "upside down": about_middle(np.diag([1, 1, -1])),
    "upside down, turned": about_middle(np.diag([-1, 1, -1])),
    "back to front": about_middle(np.diag([1, -1, 1])),
    **{f"20 mm, {axis}": from_matvec(np.eye(3), 20 * np.eye(3)[axis]) for axis in range(3)},
    "20 mm, oblique": from_matvec(np.eye(3), 20 * np.array([0.6, -0.64, 0.48])),
    **{
        f"{degrees} degrees, {axis}": about_middle(Rotation.from_euler(axis, degrees, degrees=True).as_matrix())
        for axis in "xyz"
        for degrees in (30, -30)
    },
    "10 mm": from_matvec(np.eye(3), [0, 0, 10]),
    "half too large": about_middle(1.5 * np.eye(3)),
}


@pytest.fixture(scope="module")
def placed() -> tuple[np.ndarray, np.ndarray]:
    """A head, and the affine that brings it to where it belongs in MNI space."""
    affine = orientation("LAS", oblique=True)
    return head(affine), np.linalg.inv(PLACE) @ affine


def test_the_check_accepts_the_right_place(placed: tuple[np.ndarray, np.ndarray]):
    register.refuse_misaligned(register.alignment(*placed), 1.1, "run.nii")


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_the_check_fails_where_a_head_lies_wrong(placed: tuple[np.ndarray, np.ndarray], wrong: np.ndarray):
    mean, affine = placed
    with pytest.raises(InputError, match=r"run\.nii: its registration to the MNI template failed"):
        register.refuse_misaligned(register.alignment(mean, wrong @ affine), 1.1, "run.nii")


def test_the_check_fails_for_a_phantom_in_the_right_place(placed: tuple[np.ndarray, np.ndarray]):
    """As large as a head, and smooth: a mask's overlap would be perfect."""
    _, affine = placed
    places = apply_affine(affine, np.indices((40, 44, 38)).reshape(3, -1).T).reshape(40, 44, 38, 3)
    radius = np.linalg.norm((places - MIDDLE) / [70, 70, 70], axis=-1)
    with pytest.raises(InputError, match=r"registration to the MNI template failed"):
        register.refuse_misaligned(register.alignment(1000.0 * (radius < 1), affine), 1.1, "run.nii")


def test_left_and_right_cannot_be_told_apart_by_the_template():
    """So that no check of likeness could see an exchange: our code must not make one, see the marker."""
    template = register.template()[:95]
    np.testing.assert_allclose(template, template[::-1], atol=1e-5)


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "MNI by its code": ({"sform": 4}, "in MNI space already"),
    "MNI by its name": ({"name": "sub-01_space-MNI152NLin6Asym_bold.nii"}, "in MNI space already"),
    "no place in space": ({"sform": 0}, "left and right are unknown"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_run_that_cannot_be_registered_is_refused(tmp_path: Path, changes: dict, message: str):
    changes = {"name": "run.nii", "sform": 1} | changes
    path = save_bold(tmp_path / changes.pop("name"), coarse_signal(), **changes)
    with pytest.raises(InputError, match=message):
        open_bold(path, native=True)


def test_affines_that_contradict_each_other_are_refused(tmp_path: Path):
    path = save_bold(tmp_path / "run.nii", coarse_signal(), sform=1)
    image = nib.load(path)
    mirrored = image.affine @ from_matvec(np.diag([-1, 1, 1]), [24, 0, 0])
    image.set_qform(mirrored, 1)
    nib.save(image, tmp_path / "other.nii")
    with pytest.raises(InputError, match="different orientations, so left and right are unknown"):
        open_bold(tmp_path / "other.nii", native=True)


@pytest.mark.parametrize("field", ["srow_x", "quatern_b"])
def test_an_affine_that_is_no_number_is_refused(tmp_path: Path, field: str):
    """Found by `python -m tests.fuzz`, as is the next one."""
    image = nib.load(save_bold(tmp_path / "run.nii", coarse_signal(), sform=1, qform=1))
    image.header[field] = np.nan
    path = tmp_path / "other.nii"
    path.write_bytes(image.header.binaryblock + bytes(4) + np.asarray(image.dataobj).tobytes(order="F"))
    with pytest.raises(InputError, match=r"different orientations|cannot be inverted"):
        open_bold(path, native=True)


@pytest.mark.parametrize("frame", [3, 15])
def test_values_that_are_no_numbers_are_refused(tmp_path: Path, frame: int):
    """Also in the frame that the others are aligned with."""
    data = coarse_signal()
    data[0, 0, 0, frame] = np.nan
    bold = open_bold(save_bold(tmp_path / "run.nii", data, sform=1), native=True)
    with pytest.raises(InputError, match="holds NaN or Inf"):
        register.register(bold, frame_reader(bold))


def test_each_preparation_refuses_the_other_s_runs(raw: Path, tmp_path: Path):
    native = find_runs(raw, native=True)[:1]
    (row,) = prepare(native, tmp_path / "a")["rows"]
    assert "not known to be in MNI space" in row["reason"]
    mni = run_of(save_bold(tmp_path / "run.nii", coarse_signal()))
    (row,) = prepare([mni], tmp_path / "b", load_preparation(register="affine"))["rows"]
    assert "in MNI space already" in row["reason"]


def test_a_given_mask_or_table_is_refused(raw: Path, tmp_path: Path):
    (run, _) = find_runs(raw, native=True)
    run |= {"confounds": touch(tmp_path / "confounds.tsv", "a\n1\n")}
    (row,) = prepare([run], tmp_path / "store", load_preparation(register="affine"))["rows"]
    assert "comes with a file of confounds" in row["reason"]


def test_what_is_no_head_is_refused(tmp_path: Path):
    noise = np.random.default_rng(0).normal(1000, 50, (20, 20, 20, 21)).astype(np.float32)
    affine = from_matvec(np.diag([8.0, 8, 8]), [-80, -90, -70])
    run = run_of(save_bold(tmp_path / "run.nii", noise, affine, sform=1))
    (row,) = prepare([run], tmp_path / "store", load_preparation(register="affine"))["rows"]
    assert row["status"] == "failed"
    assert "unexpectedly" not in row["reason"]


@pytest.mark.parametrize("change", [{"register": "syn"}, {"register": "affine", "min_alignment": 0.9}])
def test_unknown_settings_are_refused(change: dict):
    with pytest.raises(InputError, match=r"register must be affine|min_alignment must be at least 1"):
        load_preparation(**change)


# --- a preparation of its own -----------------------------------------------------------------------------------------


def test_registration_is_part_of_the_preparation_and_travels_with_it():
    usual, registered = load_preparation(), load_preparation(register="affine")
    assert usual.parameters_hash != registered.parameters_hash
    assert not usual.native
    again = rebuild_preparation(json.loads(json.dumps(registered.parameters())), "model.json")
    assert again.native
    assert again.parameters_hash == registered.parameters_hash
    with pytest.raises(InputError, match="was made with preparation"):
        Provenance(preparation=registered.parameters()).require({"preparation": usual.parameters()}, "model.pt")


def test_the_record_says_what_was_done(store: Path):
    record = read_run(store, "sub-01_task-rest")
    assert record["registration"]["method"] == "affine"
    assert record["registration"]["edge_margin"] > 1.1
    assert record["space"] == NATIVE
    assert "no substitute for fMRIPrep" in (store / "report.html").read_text()
    assert mask_kind(record) == REGISTERED
    about = acquisition(store, [record])
    assert about["masks"] == [REGISTERED]
    assert about["motion"] == pytest.approx(np.log(record["mean_fd"] + 0.01))
    assert "SimpleITK" in record["versions"]
    assert stored_picture(store, "AAL3", "sub-01_task-rest").startswith(b"RIFF")


def test_a_model_of_registered_runs_serves_raw_bids(raw: Path, store: Path):
    preparation = rebuild_preparation(read_manifest(store)["parameters"], "model.json")
    items = prepared_clips(raw, store, 20, 20, preparation)
    assert {item["participant_id"] for item in items} == {"sub-01", "sub-02"}


def test_again_nothing_is_done_and_motion_stays(raw: Path, store: Path):
    runs = find_runs(raw, native=True)
    before = read_run(store, "sub-01_task-rest")["mean_fd"]
    changed = [run | {"participant": {"age": 7}} for run in runs]
    done = prepare(changed, store, load_preparation(register="affine"))
    assert done["updated"] == 2
    assert read_run(store, "sub-01_task-rest")["mean_fd"] == before
    assert prepare(changed, store, load_preparation(register="affine"))["current"] == 2


def test_motion_can_be_regressed_out_and_censored(store: Path):
    table = pd.read_csv(store / "runs" / "sub-01_task-rest" / "confounds.tsv", sep="\t")
    table.loc[4, "framewise_displacement"] = 9.0
    draw = np.random.default_rng(0)
    frames = (draw.normal(size=(9, 50)) + 1000 * np.outer(table["trans_x"], draw.normal(size=50))).astype(np.float32)
    record = {"source": "run.nii", "tr_in": 2.0}
    item = {"bold": frames.copy(), "confounds": table[["trans_x", "framewise_displacement"]], "record": record}
    done = CleanSignalsd("table", max_fd=5.0)(item)
    assert done["record"]["cleaning"] == {"censored": 1, "regressors": ["trans_x", "framewise_displacement"]}
    assert done["bold"].std(0).mean() < 0.05 * frames.std(0).mean()


def test_raw_bids_is_found_and_phase_and_echoes_are_not_taken(tmp_path: Path):
    for name in (
        "task-rest_bold", "task-nback_part-phase_bold", "task-me_echo-1_bold", "task-me_echo-2_bold",
        "task-rest_space-MNI152NLin6Asym_desc-preproc_bold", "task-rest_space-T1w_desc-preproc_bold",
    ):  # fmt: skip
        touch(tmp_path / "sub-01" / "func" / f"sub-01_{name}.nii.gz")
    runs = find_runs(tmp_path, labels="optional", native=True)
    assert [run["run_id"] for run in runs if "problem" not in run] == ["sub-01_task-rest"]
    assert [run["run_id"] for run in runs if "echoes" in run.get("problem", "")] == [
        "sub-01_task-me_echo-1", "sub-01_task-me_echo-2",
    ]  # fmt: skip
    (usual,) = find_runs(tmp_path, labels="optional")
    assert usual["bold"].name.endswith("space-MNI152NLin6Asym_desc-preproc_bold.nii.gz")


def test_a_real_head_that_turned_in_the_scanner(shared: Path):
    """Six frames; after the third, the head is turned by about 25 degrees (seen on the images)."""
    path = shared / "dicom" / "siemens_mosaic_D13" / "Ref" / "8_cmrr_Int.nii"
    if not path.is_file():
        pytest.skip("the real DICOM series ../shared/dicom are absent")
    bold = open_bold(path, native=True)
    found = register.register(bold, frame_reader(bold))
    register.refuse_misaligned(found.alignment, 1.1, path)
    turned = np.rad2deg(np.abs(np.diff(found.confounds["rot_z"])))
    assert 15 < turned[2] < 35
    assert turned[[0, 1, 4]].max() < 3
    mean, still = register._motion(bold, frame_reader(bold))[1], found.affines[bold.frames // 2]
    for name in ("upside down", "20 mm, 0", "20 mm, 2", "30 degrees, x", "-30 degrees, z"):
        measured = register.alignment(mean, WRONG[name] @ still)
        assert min(measured["information_margin"], measured["edge_margin"]) < 1.1, name
