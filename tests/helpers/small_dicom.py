"""Small classic DICOM series of a made-up head, one file per slice, as GE and Philips write them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from scipy.ndimage import gaussian_filter

PIXEL_MM, GAP_MM, ORIGIN = 6.0, 8.0, (-93.0, -90.0, -40.0)  # LPS
NAME = "Zyzzyva^Quux"  # occurs nowhere else
SECRETS = (NAME, "Quux", "St. Elsewhere", "19700102", "MR-SERIAL-77", "Dr^Nemo", "secret comment", "STATION9")


def head(volumes: int = 10, slices: int = 10, seed: int = 0) -> np.ndarray:
    """(32, 30, slices, volumes) uint16, columns to the left, rows to the back: a textured disc, bright on the left."""
    random = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(-1, 1, 32), np.linspace(-1, 1, 30), indexing="ij")
    inside = (x**2 + y**2 < 0.8)[..., None]
    texture = 1 + 0.25 * random.standard_normal((32, 30, slices))
    texture[20:24, 13:17] *= 1.5  # the patient's left
    still = 800 * np.clip(texture, 0.3, 3) * inside * (1 + np.arange(slices) / 50)
    moving = 10 * gaussian_filter(random.standard_normal((*still.shape, volumes)), (1, 1, 1, 0))
    return np.clip(still[..., None] + moving + 20, 0, 4000).astype(np.uint16)


def slices_of(
    data: np.ndarray, tr: float = 2.0, vendor: str = "GE", temporal: bool = True, by_slice: bool = False
) -> Iterator[Dataset]:
    """A data set per slice.

    Args:
        data: (X, Y, Z, T) as `head` gives it.
        tr: seconds.
        vendor: "GE" or "Philips".
        temporal: with TemporalPositionIdentifier.
        by_slice: number the instances slice after slice, not volume after volume.
    """
    volumes, slices = data.shape[3], data.shape[2]
    study, series, place = (generate_uid(entropy_srcs=[vendor, kind]) for kind in ("study", "series", "place"))
    for t in range(volumes):
        for k in range(slices):
            number = 1 + (k * volumes + t if by_slice else t * slices + k)
            item = Dataset()
            item.file_meta = FileMetaDataset()
            item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            item.SOPClassUID = item.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
            uid = generate_uid(entropy_srcs=[series, str(number)])
            item.SOPInstanceUID = item.file_meta.MediaStorageSOPInstanceUID = uid
            item.StudyInstanceUID, item.SeriesInstanceUID, item.FrameOfReferenceUID = study, series, place
            item.Modality, item.SeriesNumber, item.AcquisitionNumber, item.InstanceNumber = "MR", 5, 1, number
            item.PatientName, item.PatientID, item.PatientBirthDate = NAME, NAME, "19700102"
            item.InstitutionName, item.StationName, item.DeviceSerialNumber = SECRETS[2], "STATION9", "MR-SERIAL-77"
            item.ReferringPhysicianName, item.ImageComments = "Dr^Nemo", "secret comment"
            item.StudyDate = item.SeriesDate = item.AcquisitionDate = "19700102"
            item.ProtocolName = item.SeriesDescription = f"rest of {NAME}"
            item.AcquisitionTime = clock(t * tr)
            item.MRAcquisitionType, item.SequenceVariant, item.ScanOptions = "2D", "SS", "FS"
            item.RepetitionTime, item.EchoTime, item.FlipAngle, item.MagneticFieldStrength = 1000 * tr, 30, 77, 3
            item.SliceThickness = item.SpacingBetweenSlices = GAP_MM
            item.PixelSpacing, item.ImageOrientationPatient = [PIXEL_MM] * 2, [1, 0, 0, 0, 1, 0]
            item.ImagePositionPatient = [*ORIGIN[:2], ORIGIN[2] + k * GAP_MM]
            item.SliceLocation = ORIGIN[2] + k * GAP_MM
            item.NumberOfTemporalPositions = volumes
            if temporal:
                item.TemporalPositionIdentifier = t + 1
            (_ge if vendor == "GE" else _philips)(item, t, k, slices, tr)
            item.Rows, item.Columns, item.SamplesPerPixel, item.PhotometricInterpretation = 30, 32, 1, "MONOCHROME2"
            item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 16, 16, 15, 0
            item.PixelData = np.ascontiguousarray(data[:, :, k, t].T).tobytes()  # rows, then columns
            yield item


def clock(seconds: float) -> str:
    """Seconds after ten o'clock as DICOM's time."""
    minutes, rest = divmod(seconds, 60)
    return f"10{int(minutes):02d}{rest:09.6f}"


def _ge(item: Dataset, t: int, k: int, slices: int, tr: float) -> None:
    item.Manufacturer, item.ImageType = "GE MEDICAL SYSTEMS", ["ORIGINAL", "PRIMARY", "OTHER"]
    item.ScanningSequence, item.EchoTrainLength = ["EP", "GR"], 1
    item.ImagesInAcquisition = slices
    item.TriggerTime = 1000 * tr * (t + k / slices)
    item.private_block(0x43, "GEMS_PARM_01", create=True).add_new(0x2F, "SS", 0)  # magnitude


def _philips(item: Dataset, t: int, k: int, slices: int, tr: float) -> None:
    item.Manufacturer, item.ImageType = "Philips Medical Systems", ["ORIGINAL", "PRIMARY", "M_FFE", "M", "FFE"]
    item.ScanningSequence, item.EchoTrainLength = "GR", 43
    item.RescaleSlope, item.RescaleIntercept, item.RescaleType = 2.5, 0, "normalized"
    imaging = item.private_block(0x2001, "Philips Imaging DD 001", create=True)
    imaging.add_new(0x03, "FL", 0.0)  # b-value
    imaging.add_new(0x0A, "IS", k + 1)  # number of the slice
    imaging.add_new(0x13, "SL", 43)  # EPI factor
    imaging.add_new(0x18, "SL", slices)
    item.private_block(0x2005, "Philips MR Imaging DD 001", create=True).add_new(0x0E, "FL", 0.004)  # scale slope


def save_series(
    folder: Path, slices: Iterator[Dataset], change: Callable[[int, Dataset], Any] = lambda number, item: None
) -> Path:
    """Write the slices as files; `change` gets each one's number, from 0, and data set; False leaves it out."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, item in enumerate(slices):
        if change(number, item) is not False:
            item.save_as(folder / f"{number:05d}.dcm", enforce_file_format=True)
    return folder
