"""Sort DICOM files into series, say what each shows, and whether a BOLD series is complete.

Clocks are not believed: the order is that of temporal positions and of instance numbers, the TR is RepetitionTime.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bundle.dicom.headers import Image, short_hash
from bundle.preparation.bold import TR_RANGE

SAME_PLACE_MM = 0.05  # rounding of ImagePositionPatient
VOXEL_MM = (0.3, 15.0)  # edges of pixels that an EPI of a head may have
EVEN = 0.1  # share of the slice distance by which distances may differ
SAME_DIRECTION = 1e-3  # of direction cosines


@dataclass(frozen=True)
class Series:
    """The files of one SeriesInstanceUID.

    Attributes:
        name: hash of the SeriesInstanceUID, the only name that may be shown.
        subject: hash of the StudyInstanceUID.
        kind: "BOLD", or what it shows instead.
        images: its files, by instance number.
    """

    name: str
    subject: str
    kind: str
    images: tuple[Image, ...]


@dataclass(frozen=True)
class Layout:
    """How a complete BOLD series lies in space and time.

    Attributes:
        shape: columns, rows, slices, volumes.
        pixel_mm: size of columns and rows.
        tr: seconds.
        planned: how many volumes the scanner was to take; 0 where no file says.
        frames: (volumes, slices, 2) int, file and frame within it, slices from the first place along the normal; of a
            mosaic (volumes, 1, 2).
        places: (slices,) mm along the slices' normal, ascending; empty for a mosaic.
        normal: (3,) of the slices, DICOM's LPS world.
        corners: (3, 3) mm, LPS, of the first volume's first slice: the first pixel, the last of its row, the last of
            its column.
    """

    shape: tuple[int, int, int, int]
    pixel_mm: tuple[float, float]
    tr: float
    planned: int
    frames: NDArray[np.intp]
    places: NDArray[np.float64]
    normal: NDArray[np.float64]
    corners: NDArray[np.float64]


class IncompleteError(Exception):
    """A BOLD series cannot be used; the message says why, in words that follow "the series"."""


def sort_series(images: Iterable[Image], salt: str = "") -> list[Series]:
    """Group files by SeriesInstanceUID; sorted by kind, BOLD first, and name.

    Args:
        images: files of which the series is known.
        salt: goes into the hashes that become names.
    """
    groups: dict[str, list[Image]] = {}
    for image in images:
        groups.setdefault(image.series, []).append(image)
    found = []
    for uid, members in groups.items():
        members.sort(key=lambda image: (image.instance, image.sop))
        study = next((image.study for image in members if image.study), "")
        found.append(Series(short_hash(salt + uid), short_hash(salt + study), _kind_of(members), tuple(members)))
    return sorted(found, key=lambda series: (series.kind != "BOLD", series.name))


def _kind_of(images: Sequence[Image]) -> str:
    """What a series shows.

    One damaged or foreign image must not sort a BOLD series out: with any BOLD image it is BOLD, and refused later.
    Two things are no run although each image could be one: the b=0 images of a diffusion series, and a single volume.
    """
    kinds = Counter(image.kind for image in images if image.kind)
    if "diffusion" in kinds:
        return "diffusion"
    if "BOLD" not in kinds:
        return kinds.most_common(1)[0][0] if kinds else "BOLD"
    return "single volume" if len(kinds) == 1 and _is_single(images) else "BOLD"


def _is_single(images: Sequence[Image]) -> bool:
    """Whether the slices make one volume at most, as those of a reference for a multiband run do."""
    if any(image.problem for image in images) or any(image.mosaic for image in images):
        return len(images) == 1 and not images[0].problem
    origins = [np.round(frame.origin, 1) for image in images for frame in image.frames]
    return len({tuple(origin) for origin in origins}) == len(origins)


def layout_of(series: Series) -> Layout:
    """Check that a BOLD series is whole, from its headers alone.

    Args:
        series: of kind "BOLD".

    Returns:
        Its shape, its TR and the order of its slices.

    Raises:
        IncompleteError: it is damaged, mixed, or something is missing or doubled.
    """
    images = series.images
    for image in images:
        if image.problem:
            raise IncompleteError(f"has a file (instance {image.instance or 'unknown'}) that {image.problem}")
    _refuse_mixed(images)
    _refuse_gaps([image.instance for image in images], [image.sop for image in images])
    tr = images[0].tr
    if not TR_RANGE[0] <= tr <= TR_RANGE[1]:
        raise IncompleteError(
            f"gives a RepetitionTime (0018,0080) of {tr:g} s, not of {TR_RANGE[0]} to {TR_RANGE[1]} s"
        )
    (rows, columns), (down, across) = images[0].size, images[0].pixel_mm
    if not VOXEL_MM[0] <= min(down, across) <= max(down, across) <= VOXEL_MM[1]:
        raise IncompleteError(f"has pixels of {across:g} x {down:g} mm, not of {VOXEL_MM[0]} to {VOXEL_MM[1]} mm")
    if any(image.mosaic for image in images):
        slices, order = images[0].mosaic, np.stack([np.arange(len(images)), np.zeros(len(images), int)], 1)[:, None]
        places, normal = np.empty(0), np.empty(0)
    else:
        order, places, normal = _volumes(images)
        slices = len(places)
    planned = max(image.planned for image in images)
    corners = _corners(images, order[0, 0])
    return Layout((columns, rows, slices, len(order)), (across, down), tr, planned, order, places, normal, corners)


def _corners(images: Sequence[Image], first: NDArray) -> NDArray:
    """Three corners of a slice, (3, 3) LPS; a mosaic's header gives the corner that an image of its size would have."""
    image = images[first[0]]
    frame = image.frames[first[1]]
    along_row, along_column = np.reshape(frame.orientation, (2, 3))
    (rows, columns), (down, across) = image.size, image.pixel_mm
    tiles = math.ceil(math.sqrt(image.mosaic)) or 1
    corner = np.array(frame.origin) + (tiles - 1) / 2 * (columns * across * along_row + rows * down * along_column)
    return np.stack([corner, corner + (columns - 1) * across * along_row, corner + (rows - 1) * down * along_column])


def _refuse_mixed(images: Sequence[Image]) -> None:
    """Refuse images that cannot be of one run."""
    if others := sorted({image.kind for image in images} - {"BOLD"}):
        raise IncompleteError(f"mixes BOLD with other images ({', '.join(others)})")
    if len({(image.study, image.patient) for image in images}) > 1:
        raise IncompleteError("mixes two patients or two studies")
    if len({image.echo_times for image in images} | {frozenset([t]) for i in images for t in i.echo_times}) > 1:
        raise IncompleteError("holds several echoes; combine them first")
    if any(len(values) > 1 for image in images for values in image.scale):
        raise IncompleteError("mixes scales of values in one file")
    if any(image.three_d for image in images):
        raise IncompleteError("is a 3D acquisition, whose RepetitionTime is not the time between volumes")
    for what, values in (
        ("repetition times", {image.tr for image in images}),
        ("image sizes", {(image.size, image.mosaic, len(image.frames), image.dtype) for image in images}),
        ("scales of values", {image.scale for image in images}),
        ("pixel spacings", {image.pixel_mm for image in images}),
    ):
        if len(values) > 1:
            raise IncompleteError(f"mixes {len(values)} {what}")
    directions = np.array([frame.orientation for image in images for frame in image.frames])
    if np.ptp(directions, axis=0).max() > SAME_DIRECTION:
        raise IncompleteError("mixes orientations")


def _refuse_gaps(instances: Sequence[int], identities: Sequence[str]) -> None:
    """Refuse instance numbers that are not 1, 2, 3 ..., each once."""
    counts = Counter(identities)
    for instance, identity in zip(instances, identities, strict=True):
        if counts[identity] > 1:
            raise IncompleteError(f"holds the instance {instance} {counts[identity]} times")
    if doubled := [number for number, count in Counter(instances).items() if count > 1]:
        raise IncompleteError(f"holds the instance number {doubled[0]} twice, with different content")
    positive = {number for number in instances if number > 0}
    if lacking := max(positive, default=0) - len(positive):  # counted, not listed: a number may be beyond all memory
        first = next(number for number in itertools.count(1) if number not in positive)
        raise IncompleteError(f"lacks {lacking} of {max(positive)} instances, the first being {first}")
    if min(instances) < 1:
        raise IncompleteError("has an instance without a number")


def _volumes(images: Sequence[Image]) -> tuple[NDArray, NDArray, NDArray]:
    """Put slices into volumes: by temporal position, else by the order of the instances.

    Returns:
        (volumes, slices, 2) file and frame; (slices,) places along the normal, mm; (3,) the normal.
    """
    index = np.array([(i, j) for i, image in enumerate(images) for j in range(len(image.frames))])
    frames = [image.frames[j] for i, image in enumerate(images) for j in range(len(image.frames))]
    rows, columns = np.reshape(frames[0].orientation, (2, 3))
    normal = np.cross(rows, columns)
    origins = np.array([frame.origin for frame in frames])  # (n, 3)
    along = origins @ normal
    order = np.argsort(along, kind="stable")
    slots = np.empty(len(frames), int)  # which slice of its volume each is
    slots[order] = np.concatenate([[0], np.cumsum(np.diff(along[order]) > SAME_PLACE_MM)])
    places = np.array([along[slots == slot].mean() for slot in range(slots.max() + 1)])
    counts = np.bincount(slots)
    if len(set(counts)) > 1:
        raise IncompleteError(f"has {min(counts)} to {max(counts)} images of a slice; slices are missing or doubled")
    _refuse_uneven(origins - np.outer(along, normal), places)
    times = _times(frames, slots, len(places), int(counts[0]))
    volumes = np.full((counts[0], len(places), 2), -1)
    volumes[times, slots] = index
    if (volumes < 0).any():
        raise IncompleteError("has a volume in which slices are missing or doubled")
    return volumes, places, normal


def _refuse_uneven(in_plane: NDArray, places: NDArray) -> None:
    """Refuse slices that do not stack up: (n, 3) their origins without the part along the normal, (slices,) places."""
    gaps = np.diff(places)
    if len(gaps) < 1:
        raise IncompleteError("has one slice only")
    if np.ptp(gaps) > EVEN * np.median(gaps):
        raise IncompleteError(f"has slices {gaps.min():.2f} to {gaps.max():.2f} mm apart; one is missing")
    if np.ptp(in_plane, axis=0).max() > EVEN * np.median(gaps):
        raise IncompleteError("has slices that are shifted against each other")


def _times(frames: Sequence, slots: NDArray, slices: int, volumes: int) -> NDArray:
    """Which volume each slice belongs to, from 0: (n,)."""
    stated = [frame.time for frame in frames]
    if len(set(stated)) > 1:
        if set(stated) not in (set(range(1, volumes + 1)), set(range(volumes))):
            raise IncompleteError("has temporal positions that are not 1, 2, 3 ...; volumes are missing")
        return np.array(stated) - min(stated)
    in_turn = np.arange(len(frames))
    if (np.sort(slots.reshape(volumes, slices), axis=1) == np.arange(slices)).all():
        return in_turn // slices  # volume after volume
    if (slots.reshape(slices, volumes) == slots.reshape(slices, volumes)[:, :1]).all():
        return in_turn % volumes  # slice after slice
    raise IncompleteError("has images in an order that shows no volumes")
