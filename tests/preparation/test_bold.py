"""One BOLD file: what is refused and how it is said, TR, background, sampling, time and z against numpy and nibabel.

Pitfalls 1, 3, 4, 5, 7. Not covered here: the interpolation itself (test_grid.py) and whole datasets (test_prepare.py).
"""

import gzip
import json
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_runs import COARSE_AFFINE, COARSE_SHAPE, coarse_brain, coarse_signal, save_bold, save_mask

from bundle.anatomy import grid
from bundle.errors import InputError
from bundle.preparation import bold
from bundle.preparation.bids_names import entities
from bundle.preparation.frames import brain_on_grid, frame_reader, sample, varying
from bundle.preparation.scaling import frames_after, resample_tr, zscore


@pytest.fixture(scope="module")
def signal():
    return coarse_signal()


def one_sentence(message: str) -> bool:
    return "\n" not in message and len(message) > 30 and not message.endswith(".")


# --- what is refused --------------------------------------------------------------------------------------------------

BAD_HEADERS = {
    "3D": ({"frames": None}, "must be 4D"),
    "TR 0": ({"tr": 0.0}, "TR must be between .* not 0.0 .*--tr"),
    "TR 2000 s": ({"tr": 2000.0}, "TR must be between .* not 2000.0 .*--tr"),
    "TR 0.05 s": ({"tr": 0.05}, "TR must be .*--tr"),
    "TR negative": ({"tr": -2.0}, "TR must be .*--tr"),
    "TR without unit": ({"unit": None}, "unit 'unknown'; give --tr"),
    "TR in hertz": ({"unit": "hz"}, "unit 'hz'; give --tr"),
    "no sform, no qform": ({"sform": 0}, "neither an sform nor a qform.*--space MNI"),
    "scanner space": ({"sform": 1}, "not known to be in MNI space.*--space MNI"),
    "aligned space": ({"sform": 2}, "not known to be in MNI space.*--space MNI"),
    "native name, MNI code": ({"name": "sub-01_space-T1w_bold.nii"}, "its name says space-T1w"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_bad_headers_are_refused_in_one_sentence(tmp_path, signal, changes, message):
    changes = dict(changes)
    data = signal if changes.pop("frames", 30) else signal[..., 0]
    path = save_bold(tmp_path / changes.pop("name", "run.nii"), data, **changes)
    with pytest.raises(InputError, match=message) as caught:
        bold.open_bold(path)
    assert path.name in str(caught.value)
    assert one_sentence(str(caught.value))


DAMAGED_HEADERS = {  # bytes of the NIfTI-1 header that cannot be, by their offset
    "a data type that is none": (70, "<h", 30),
    "data that begin inside the header": (108, "<f", 151),
    "data that begin at infinity": (108, "<f", np.inf),
    "an intercept that is not a number": (116, "<f", np.nan),
    "a unit that NIfTI does not define": (123, "<B", 255),
    "no frames": (48, "<h", 0),
    "a negative size": (42, "<h", -25),
    "an axis that vanishes beside another": (284, "<f", 1e30),
}


@pytest.mark.parametrize(("offset", "kind", "value"), DAMAGED_HEADERS.values(), ids=DAMAGED_HEADERS.keys())
def test_damaged_headers_are_refused_in_one_sentence(tmp_path, signal, offset, kind, value):
    path = save_bold(tmp_path / "run.nii", signal, slope=2.0)
    content = bytearray(path.read_bytes())
    struct.pack_into(kind, content, offset, value)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"run\.nii") as caught:
        bold.open_bold(path)
    assert one_sentence(str(caught.value))


def test_files_that_are_no_nifti_are_refused(tmp_path, signal):
    with pytest.raises(InputError, match="does not exist"):
        bold.open_bold(tmp_path / "absent.nii")
    (tmp_path / "text.nii.gz").write_text("not an image")
    with pytest.raises(InputError, match="cannot be read as NIfTI"):
        bold.open_bold(tmp_path / "text.nii.gz")
    nib.save(nib.AnalyzeImage(signal, COARSE_AFFINE), tmp_path / "old.img")
    with pytest.raises(InputError, match="not NIfTI"):
        bold.open_bold(tmp_path / "old.img")
    nib.save(nib.Nifti1Image(signal.astype(np.complex64), COARSE_AFFINE), tmp_path / "complex.nii")
    with pytest.raises(InputError, match="real numbers"):
        bold.open_bold(tmp_path / "complex.nii")
    broken = nib.Nifti1Image(signal, COARSE_AFFINE)
    broken.header.set_sform(np.zeros((4, 4)), 4)
    nib.save(nib.Nifti1Image(signal, None, broken.header), tmp_path / "flat.nii")
    with pytest.raises(InputError, match="cannot be inverted"):
        bold.open_bold(tmp_path / "flat.nii")


def test_the_real_awkward_files(shared):
    folder = shared / "awkward"
    refused = {
        "facerep_orig_bigendian_pair.hdr": "must be 4D",
        "moae_native_3D_float32.nii.gz": "must be 4D",
        "moae_native_TR-zero_3frames.nii.gz": "TR must be|unit",
        "nibabel_example4d_TR2000sec_2frames.nii.gz": "not 2000.0",
        "nitime_fmri1_slab_40frames.nii.gz": "TR|not known to be in MNI",
    }
    for name, message in refused.items():
        with pytest.raises(InputError, match=message) as caught:
            bold.open_bold(folder / name)
        assert one_sentence(str(caught.value))


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
def test_a_truncated_file_is_refused(tmp_path, signal, ending, share):
    whole = save_bold(tmp_path / f"whole{ending}", signal)
    cut = tmp_path / f"cut{ending}"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    with pytest.raises(InputError, match="cut"):
        varying(bold.open_bold(cut))


def test_a_damaged_gzip_is_refused(tmp_path, signal):
    path = save_bold(tmp_path / "run.nii.gz", signal)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = b"\x00" * 200
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        varying(bold.open_bold(path))


def test_a_flipped_bit_that_only_the_checksum_shows_is_refused(tmp_path, signal):
    path = save_bold(tmp_path / "run.nii", signal)
    content = bytearray(gzip.compress(path.read_bytes(), compresslevel=0))  # stored as it is
    content[len(content) // 2] ^= 1
    damaged = tmp_path / "damaged.nii.gz"
    damaged.write_bytes(content)
    with pytest.raises(InputError, match=r"damaged.*CRC"):
        varying(bold.open_bold(damaged))


@pytest.mark.parametrize("dtype", ["<i2", ">i2", ">f4", "<f8", "u1", "<u2", "<i4"])
def test_every_number_type_and_byte_order_reads_as_nibabel_does(tmp_path, dtype):
    data = np.random.default_rng(0).integers(0, 200, (3, 4, 5, 6)).astype(dtype)
    image = nib.Nifti1Image(data, np.eye(4), nib.Nifti1Header(endianness=">" if dtype[0] == ">" else "<"))
    image.header.set_data_dtype(dtype)
    image.header["pixdim"][4] = 2
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / "run.nii.gz")
    opened = bold.open_bold(tmp_path / "run.nii.gz", space="MNI")
    frames = [frame.reshape(opened.shape, order="F") for frame in frame_reader(opened)()]
    expected = nib.load(tmp_path / "run.nii.gz").dataobj.get_unscaled()
    assert np.array_equal(np.stack(frames, axis=3), expected)


# --- TR and space -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tr", "unit"), [(0.72, "sec"), (720.0, "msec"), (720000.0, "usec")])
def test_tr_units_are_converted(tmp_path, signal, tr, unit):
    opened = bold.open_bold(save_bold(tmp_path / "run.nii", signal, tr=tr, unit=unit))
    assert (opened.tr, opened.tr_source) == (0.72, "header")


def test_sidecar_comes_before_the_header_and_the_user_before_both(tmp_path, signal, caplog):
    path = save_bold(tmp_path / "run.nii.gz", signal, tr=1.0)
    (tmp_path / "run.json").write_text(json.dumps({"RepetitionTime": 0.72}))
    assert (bold.open_bold(path).tr, bold.open_bold(path).tr_source) == (0.72, "run.json")
    assert "header says 1 s" in caplog.text
    assert (bold.open_bold(path, tr=2).tr, bold.open_bold(path, tr=2).tr_source) == (2.0, "given")
    with pytest.raises(InputError, match="not 720"):
        bold.open_bold(path, tr=720)
    (tmp_path / "run.json").write_text(json.dumps({"RepetitionTime": "0.72"}))
    with pytest.raises(InputError, match=r"'0.72'"):
        bold.open_bold(path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="not a JSON object"):
        bold.open_bold(path)


def test_space_by_name_code_or_word(tmp_path, signal):
    named = save_bold(tmp_path / "sub-01_space-MNI152NLin6Asym_desc-preproc_bold.nii", signal, sform=1)
    assert bold.open_bold(named).space == "MNI152NLin6Asym"
    coded = save_bold(tmp_path / "coded.nii", signal, sform=0, qform=4)
    assert bold.open_bold(coded).space == "MNI152"
    scanner = save_bold(tmp_path / "scanner.nii", signal, sform=1, qform=4)
    with pytest.raises(InputError, match="affine code 1"):
        bold.open_bold(scanner)  # the sform is the one in use
    assert bold.open_bold(scanner, space="MNI").space == "MNI"
    with pytest.raises(InputError, match="must begin with MNI"):
        bold.open_bold(scanner, space="T1w")


def test_sform_is_used_when_set_else_the_qform(tmp_path, signal):
    image = nib.Nifti1Image(signal, COARSE_AFFINE)
    other = COARSE_AFFINE + np.array([[0, 0, 0, 8.0]] * 3 + [[0] * 4])
    image.header.set_zooms((8, 8, 8, 0.8))
    image.header.set_xyzt_units("mm", "sec")
    for sform, expected in ((4, COARSE_AFFINE), (0, other)):
        image.set_sform(COARSE_AFFINE if sform else None, sform)
        image.set_qform(other, 4)
        nib.save(image, tmp_path / "run.nii")
        np.testing.assert_allclose(bold.open_bold(tmp_path / "run.nii").affine, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sub-01_task-rest_run-2_space-MNI152_desc-preproc_bold.nii.gz", ("01", "rest", "2", "MNI152")),
        ("sub-A1_ses-x_run-2_task-rest_space-MNI152_bold.nii", ("A1", "rest", "2", "MNI152")),
        ("sfnwmrda1_session_1_rest_1.nii.gz", (None, None, None, None)),
    ],
)
def test_entities_are_read_by_key(name, expected):
    found = entities(Path(name))
    assert tuple(found.get(key) for key in ("sub", "task", "run", "space")) == expected


# --- background -------------------------------------------------------------------------------------------------------


def test_background_is_what_is_constant_over_time_whatever_its_value(tmp_path, signal):
    data = signal - 1000  # demeaned: negative values are data, 0 is a value like others
    data[3:6, 4:9, 5] = 17.5
    data[10, 10, 10, 0] = 0
    data[20, 20, 20] = np.nan
    opened = bold.open_bold(save_bold(tmp_path / "run.nii.gz", data))
    filled = np.nan_to_num(data, nan=-1)
    assert np.array_equal(varying(opened), filled.max(axis=3) != filled.min(axis=3))


def test_background_is_decided_once_over_all_frames(tmp_path):
    data = np.zeros((2, 2, 2, 10), np.int16)
    data[0, 0, 0, 9] = 1  # differs in the last frame only
    data[1, 1, 1, :3] = 1
    path = save_bold(tmp_path / "run.nii.gz", data)
    assert np.argwhere(varying(bold.open_bold(path))).tolist() == [[0, 0, 0], [1, 1, 1]]


def test_mask_in_another_space_goes_through_its_own_affine(tmp_path, signal):
    opened = bold.open_bold(save_bold(tmp_path / "run.nii", signal))
    fine = np.zeros((40, 50, 45), np.uint8)
    fine[5:30, 10:45, 8:40] = 1
    affine = nib.affines.from_matvec(np.diag([-3.0, 3.0, 3.0]), [60.0, -90.0, -60.0])
    brain = brain_on_grid(opened, save_mask(tmp_path / "mask.nii.gz", fine, affine))
    points = nib.affines.apply_affine(grid.AFFINE, np.argwhere(brain))
    # outer faces of the mask: x 60 - 3 * 29.5 ... 60 - 3 * 4.5; y -90 + 3 * 9.5 ...; z -60 + 3 * 7.5 ...
    assert points.min(axis=0).tolist() == [-28, -60, -36]
    assert points.max(axis=0).tolist() == [46, 42, 58]
    assert brain.sum() == 38 * 52 * 48


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: (np.zeros_like(mask), COARSE_AFFINE), "is empty"),
        (lambda mask: (mask, COARSE_AFFINE + np.array([[0, 0, 0, 500.0]] * 3 + [[0] * 4])), "do not overlap"),
        (lambda mask: (np.stack([mask, mask], axis=3), COARSE_AFFINE), "must be 3D"),
    ],
    ids=["empty", "elsewhere", "4D"],
)
def test_bad_masks_are_refused(tmp_path, signal, change, message):
    opened = bold.open_bold(save_bold(tmp_path / "run.nii", signal))
    with pytest.raises(InputError, match=message):
        brain_on_grid(opened, save_mask(tmp_path / "mask.nii.gz", *change(coarse_brain())))


def test_a_constant_image_is_refused(tmp_path):
    opened = bold.open_bold(save_bold(tmp_path / "run.nii", np.full((*COARSE_SHAPE, 25), 3.0, np.float32)))
    with pytest.raises(InputError, match="constant over time"):
        brain_on_grid(opened, None)


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [None, 3.0])
def test_frames_are_interpolated_alike_and_in_the_files_unit(tmp_path, slope):
    stored = np.random.default_rng(0).integers(-500, 500, (*COARSE_SHAPE, 30)).astype(np.int16)
    image = nib.Nifti1Image(stored, COARSE_AFFINE)
    path = save_bold(tmp_path / "run.nii.gz", stored)
    if slope:  # nibabel keeps stored integers only where the slope is written into the file
        raw = bytearray(gzip.decompress(path.read_bytes()))
        raw[112:116] = np.float32(slope).tobytes()  # scl_slope of NIfTI-1
        path.write_bytes(gzip.compress(bytes(raw)))
    opened = bold.open_bold(path)
    brain = grid.covered(image.affine, COARSE_SHAPE)
    frames = sample(opened, brain)
    operator = grid.linear_operator(COARSE_AFFINE, COARSE_SHAPE, np.flatnonzero(brain))
    assert np.array_equal(sample(opened, brain, frame_reader(opened)), frames)  # kept in memory
    for index in (0, 6, 7, 29):
        expected = operator @ (stored[..., index].ravel() * np.float32(slope or 1))
        np.testing.assert_allclose(frames[index], expected, rtol=1e-5, atol=1e-3)


def test_constant_nan_background_is_kept_out_of_the_brain(tmp_path):
    brain = coarse_brain()
    data = np.where(brain[..., None], 100.0, np.nan).astype(np.float32) + np.arange(25, dtype=np.float32)
    opened = bold.open_bold(save_bold(tmp_path / "run.nii.gz", data))
    inside = brain_on_grid(opened, None)
    frames = sample(opened, inside)
    # a mean with 0 or NaN beyond the brain's edge would show: everything in the brain is 100 + t
    np.testing.assert_allclose(frames, np.broadcast_to(100 + np.arange(25)[:, None], frames.shape), rtol=1e-6)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (np.s_[12, 15, 12, 4], np.nan, "NaN or Inf in 1 voxels"),
        (np.s_[12, 15, 10:13, 29], np.inf, "NaN or Inf in 3 voxels"),
        (np.s_[12, 15, 12, 0], np.nan, "NaN"),
        (np.s_[0, 0, 0, 7], np.nan, "NaN or Inf in 1 voxels"),
        (np.s_[0, 0, 0], np.inf, "NaN or Inf in 1 voxels"),
        (np.s_[12, 15, 12], np.nan, "NaN in 64 grid voxels of its brain mask"),
    ],
    ids=["once in brain", "Inf in brain", "first frame", "once outside", "Inf outside", "always in brain"],
)
def test_nan_and_inf_are_refused_with_a_count(tmp_path, signal, place, value, message):
    data = signal.copy()
    data[place] = value
    opened = bold.open_bold(save_bold(tmp_path / "run.nii", data))
    brain = brain_on_grid(opened, save_mask(tmp_path / "mask.nii.gz", coarse_brain()))
    with pytest.raises(InputError, match=message):
        sample(opened, brain)


# --- time and scale ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(2, 60), tr=st.floats(0.3, 4).map(lambda v: round(v, 3)), new_tr=st.sampled_from([0.8, 1, 0.5])
)
@example(frames=120, tr=0.10084, new_tr=0.8)  # the last new frame lies behind the last one by less than the tolerance
def test_resampling_in_time_is_numpys_interpolation(frames, tr, new_tr):
    data = np.random.default_rng(frames).normal(size=(frames, 3)).astype(np.float32)
    last = (frames - 1) * tr
    times = np.arange(0, 10000) * new_tr
    times = times[times <= last + 1e-4 * new_tr]
    expected = np.stack([np.interp(times, np.arange(frames) * tr, column) for column in data.T], axis=1)
    got = resample_tr(data, tr, new_tr)
    assert len(got) == frames_after(frames, tr, new_tr) == len(times)
    np.testing.assert_allclose(got, expected, atol=2e-3)


@pytest.mark.parametrize(
    ("frames", "tr", "expected"), [(120, 2.0, 298), (20, 0.8, 20), (41, 0.4, 21), (3, 7.0, 18), (176, 2.0, 438)]
)
def test_frame_counts(frames, tr, expected):
    assert frames_after(frames, tr, 0.8) == expected


def test_frames_on_input_frames_are_copies():
    data = np.random.default_rng(0).normal(size=(41, 5)).astype(np.float32)
    assert np.array_equal(resample_tr(data, 0.4, 0.8), data[::2])
    assert np.array_equal(resample_tr(data, 2.4, 0.8)[::3], data)


@settings(max_examples=30, deadline=None)
@given(mean=st.floats(-5000, 5000), sd=st.floats(1, 500), seed=st.integers(0, 99))
def test_each_voxel_has_zero_mean_and_unit_sd_and_can_be_undone(mean, sd, seed):
    frames = np.random.default_rng(seed).normal(mean, sd, (25, 40)).astype(np.float32)
    z, moments, got_mean, got_sd = zscore(frames)
    assert (z.dtype, moments.dtype) == (np.float16, np.float64)
    np.testing.assert_allclose([got_mean, got_sd], [np.mean(frames, dtype=float), np.std(frames, dtype=float)])
    np.testing.assert_allclose(moments, [frames.mean(0, dtype=float), frames.std(0, dtype=float)])
    # float16 keeps 11 bits: half a step is at most |z| / 2048
    restored = z.astype(float) * moments[1] + moments[0]
    assert np.all(np.abs(restored - frames) <= moments[1] * (np.abs(z.astype(float)) / 2048 + 1e-6) + 1e-3)


def test_z_keeps_a_signal_of_two_thousandths_of_the_anatomys_sd():
    """Float16 of z over the whole run would keep steps of 0.001 to 0.004: as wide as this signal."""
    anatomy = np.random.default_rng(0).normal(0, 1, 500)
    course = 0.002 * np.sin(np.arange(60) / 5)
    z, moments, _, _ = zscore((anatomy + course[:, None]).astype(np.float32))
    restored = z.astype(float) * moments[1] + moments[0] - anatomy
    assert min(np.corrcoef(restored[:, voxel], course)[0, 1] for voxel in range(500)) > 0.9999


def test_a_voxel_that_does_not_vary_is_zero_and_has_its_mean():
    frames = np.random.default_rng(0).normal(1000, 10, (30, 3)).astype(np.float32)
    frames[:, 1] = np.float32(1234.5) + np.float32(1e-4) * np.arange(30)  # rounding only
    z, moments, _, _ = zscore(frames)
    assert np.array_equal(z[:, 1], np.zeros(30))
    assert moments[:, 1].tolist() == [pytest.approx(1234.5, abs=2e-3), 0.0]


def test_z_of_a_constant_is_refused():
    with pytest.raises(InputError, match="no signal"):
        zscore(np.full((20, 5), 7.3, np.float32))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_header_that_claims_2_to_the_31_frames_is_refused(tmp_path, signal, ending):
    """At once: neither memory nor time is spent on what the file cannot hold."""
    image = nib.Nifti2Image.from_image(nib.load(save_bold(tmp_path / "run.nii", signal)))
    header = image.header.copy()
    header["dim"][4] = 2**31
    content = header.binaryblock + bytes(4) + np.asarray(image.dataobj).tobytes()
    path = tmp_path / f"claims{ending}"
    path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    with pytest.raises(InputError, match="25 x 30 x 25 x 2147483648 values, more than the file can hold") as caught:
        bold.open_bold(path)
    assert one_sentence(str(caught.value))


def test_what_compresses_best_is_not_taken_for_a_claim(tmp_path):
    """Zeros, a thousand times smaller in the file."""
    path = tmp_path / "run.nii.gz"
    save_bold(path, np.zeros((64, 64, 36, 50), np.float32))
    assert bold.open_bold(path).frames == 50


def test_names_that_lead_nowhere_are_refused(tmp_path):
    loop = tmp_path / "loop.nii"
    loop.symlink_to(loop)
    for path in (loop, tmp_path / f"{'x' * 300}.nii"):
        with pytest.raises(InputError, match="does not exist"):
            bold.open_bold(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"RepetitionTime":' * 100_000, "[2.0]", "\x00"])
def test_a_sidecar_that_is_no_object_is_refused(tmp_path, signal, text):
    """Found by `python -m tests.fuzz`: nested without end, it ended in an error of Python's own."""
    path = save_bold(tmp_path / "run.nii", signal)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json is not a JSON object") as caught:
        bold.open_bold(path)
    assert one_sentence(str(caught.value))
