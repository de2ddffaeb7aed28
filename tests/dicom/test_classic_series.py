"""Classic series, one file per slice, as GE and Philips write them: made up, with known voxels and places.

Real ones differ in ways that are not known here; what is tested is that order, place, values and TR are right for every
way of numbering, that clocks are not believed, and that what is missing is noticed.
"""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless
from small_dicom import GAP_MM, ORIGIN, PIXEL_MM, clock, head, save_series, slices_of

from bundle.dicom.convert import convert_folder
from bundle.errors import InputError


def no_change(number: int, item: Dataset) -> None:
    pass


def constant_clock(number: int, item: Dataset) -> None:
    item.AcquisitionTime = "100000"


def no_clock(number: int, item: Dataset) -> None:
    del item.AcquisitionTime, item.AcquisitionDate


def clock_that_jumps_back(number: int, item: Dataset) -> None:
    if item.TemporalPositionIdentifier > 5:
        item.AcquisitionTime = clock(2 * (item.TemporalPositionIdentifier - 1) - 2.1)


def converted(folder: Path) -> nib.Nifti1Image:
    (path,) = folder.rglob("*_bold.nii.gz")
    return nib.load(path)


def assert_is(image: nib.Nifti1Image, data: np.ndarray, scale: float = 1.0) -> None:
    """The value at each place of the world is that of the pixel whose centre is there."""
    i, j, k = np.meshgrid(*(np.arange(size) for size in data.shape[:3]), indexing="ij")
    lps = np.array(ORIGIN) + np.stack([i, j, k], -1) * [PIXEL_MM, PIXEL_MM, GAP_MM]
    voxels = nib.affines.apply_affine(np.linalg.inv(image.affine), lps * [-1, -1, 1])
    np.testing.assert_allclose(voxels, np.rint(voxels), atol=1e-3)
    values = np.asarray(image.dataobj)[tuple(np.rint(voxels).astype(int).reshape(-1, 3).T)]
    np.testing.assert_allclose(values.reshape(data.shape), data * scale, rtol=1e-6)


@pytest.mark.parametrize(
    ("temporal", "by_slice", "change"),
    [
        (True, False, no_change),
        (True, True, constant_clock),
        (False, False, constant_clock),
        (False, False, no_clock),
        (False, True, no_change),
        (True, False, no_clock),
    ],
)
@pytest.mark.parametrize(("vendor", "scale"), [("GE", 1.0), ("Philips", 250.0)])  # Philips: 1 / its scale slope
def test_every_voxel_is_where_and_when_it_was(
    tmp_path: Path, vendor: str, scale: float, temporal: bool, by_slice: bool, change: Callable
):
    data = head(slices=7)
    save_series(tmp_path / "in", slices_of(data, vendor=vendor, temporal=temporal, by_slice=by_slice), change)
    convert_folder(tmp_path / "in", tmp_path / "out")
    image = converted(tmp_path / "out")
    assert image.header.get_zooms()[3] == 2.0
    assert_is(image, data, scale)


def test_a_clock_that_jumps_back_never_makes_a_wrong_tr(tmp_path: Path):
    """dcm2niix makes 1.77 s of 2 s and exits with 0."""
    save_series(tmp_path / "in", slices_of(head(slices=6), vendor="Philips"), clock_that_jumps_back)
    with pytest.raises(InputError, match=r"RepetitionTime \(0018,0080\) of 2 s, but 1\.76667 s by dcm2niix's header"):
        convert_folder(tmp_path / "in", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.nii*"))


def test_compressed_pixels(tmp_path: Path):
    data = head(volumes=10, slices=5)
    save_series(
        tmp_path / "in", slices_of(data), lambda number, item: item.compress(RLELossless, generate_instance_uid=False)
    )
    convert_folder(tmp_path / "in", tmp_path / "out")
    assert_is(converted(tmp_path / "out"), data)


def leave_out(*numbers: int) -> Callable:
    return lambda number, item: number not in numbers


def huge_instance(number: int, item: Dataset) -> None:
    """Found by tests/fuzz.py: all numbers up to it are more than any memory holds."""
    if number == 9:
        item["InstanceNumber"].value = "9" * 12


def renumbered(number: int, item: Dataset) -> bool:
    """One slice is lost and the numbers are made to fit, as a tool that renames files may do."""
    item.InstanceNumber = number if number > 37 else number + 1
    return number != 37


def one_slice_lost_everywhere(number: int, item: Dataset) -> bool:
    item.InstanceNumber = number // 6 * 5 + number % 6 + (0 if number % 6 > 2 else 1)
    return number % 6 != 2


def volume_lost_and_renumbered(number: int, item: Dataset) -> bool:
    item.InstanceNumber = number + 1 if number < 24 else number - 5
    return not 24 <= number < 30


def doubled(number: int, item: Dataset) -> None:
    item.InstanceNumber = min(number + 1, 59)


def oblique(number: int, item: Dataset) -> None:
    if number == 50:
        item.ImageOrientationPatient = [1, 0, 0, 0, 0.8, 0.6]


def sheared(number: int, item: Dataset) -> None:
    item.ImagePositionPatient = [ORIGIN[0], ORIGIN[1] + 2.0 * (number % 6), ORIGIN[2] + GAP_MM * (number % 6)]


def second_echo(number: int, item: Dataset) -> None:
    item.EchoTime = 30 if number % 2 else 60


def no_tr(number: int, item: Dataset) -> None:
    del item.RepetitionTime


def no_slope(number: int, item: Dataset) -> None:
    """dcm2niix then scales this slice in another way than the others, and exits with 0."""
    item.RescaleSlope = item.get("RescaleSlope", 2.5)
    if number == 22:
        del item.RescaleSlope


def large_pixels(number: int, item: Dataset) -> None:
    item.PixelSpacing = [65535, 65535]


def no_spacing(number: int, item: Dataset) -> None:
    item.PixelSpacing = None


def three_d(number: int, item: Dataset) -> None:
    item.MRAcquisitionType = "3D"


def shuffled(number: int, item: Dataset) -> None:
    item.InstanceNumber = int(np.random.default_rng(0).permutation(60)[number]) + 1


def shuffled_within_volumes(number: int, item: Dataset) -> None:
    item.InstanceNumber = number // 6 * 6 + (2, 5, 0, 3, 1, 4)[number % 6] + 1


@pytest.mark.parametrize("vendor", ["GE", "Philips"])
@pytest.mark.parametrize(
    ("change", "temporal", "reason"),
    [
        (leave_out(37), True, "lacks 1 of 60 instances, the first being 38"),
        (leave_out(*range(24, 30)), True, "lacks 6 of 60 instances"),
        (huge_instance, True, "lacks 999999999939 of 999999999999 instances, the first being 10"),
        (leave_out(59), True, "has 9 to 10 images of a slice"),
        (leave_out(*range(54, 60)), True, "holds 9 of the 10 volumes"),
        (renumbered, True, "has 9 to 10 images of a slice"),
        (one_slice_lost_everywhere, True, "one is missing"),
        (volume_lost_and_renumbered, True, "temporal positions that are not 1, 2, 3"),
        (doubled, True, "holds the instance number 59 twice"),
        (oblique, True, "mixes orientations"),
        (sheared, True, "shifted against each other"),
        (second_echo, True, "several echoes"),
        (no_tr, True, "RepetitionTime (0018,0080) of 0 s"),
        (no_slope, True, "mixes 2 scales of values"),
        (no_spacing, True, "has a damaged header"),
        (large_pixels, True, "pixels of 65535 x 65535 mm"),
        (three_d, True, "3D acquisition"),
        (shuffled, False, "an order that shows no volumes"),
        (shuffled_within_volumes, False, "elsewhere by its headers than by dcm2niix"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_refused(
    tmp_path: Path, vendor: str, change: Callable, temporal: bool, reason: str
):
    save_series(tmp_path / "in", slices_of(head(slices=6), vendor=vendor, temporal=temporal), change)
    with pytest.raises(InputError) as error:
        convert_folder(tmp_path / "in", tmp_path / "out")
    assert reason in str(error.value)
    assert not list((tmp_path / "out").rglob("*.nii*"))


def test_a_smooth_sphere_is_no_brain(tmp_path: Path):
    """Also one that is noisy and brighter near the coil."""
    still = np.where(head() > 100, 900, 20) * np.linspace(0.6, 1.4, 32)[:, None, None, None]
    noisy = still + np.random.default_rng(0).normal(0, 20, still.shape)
    save_series(tmp_path / "in", slices_of(np.clip(noisy, 0, None).astype(np.uint16)))
    with pytest.raises(InputError, match="shows no brain"):
        convert_folder(tmp_path / "in", tmp_path / "out")
