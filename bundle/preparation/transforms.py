"""MONAI dictionary transforms from a NIfTI file to the store, put together in configs/prepare.json.

Each is thin over a function of `grid`, `bold`, `frames`, `register`, `confounds`, `scaling` or `store`. Its arguments
are kept under their own names, from which the preparation's parameters are read.
"""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from monai.config import KeysCollection
from monai.transforms import MapTransform

from bundle.anatomy import grid
from bundle.errors import InputError
from bundle.preparation import bold, store
from bundle.preparation.bold import TR_RANGE
from bundle.preparation.confounds import Cleaning, clean_frames
from bundle.preparation.frames import KEPT_BYTES, brain_on_grid, frame_reader, sample
from bundle.preparation.register import METHODS, refuse_misaligned, register
from bundle.preparation.scaling import frames_after, resample_tr, zscore

CLIP_FRAMES = 20
CONSTANT = "voxels constant over time"
REGISTERED = "registered: nilearn's mask of the mean EPI, near the MNI152 brain"

Item = dict[Hashable, Any]


def mask_kind(record: Mapping[str, Any]) -> str:
    """Say of a prepared run's record whose brain mask its z-scores rest on: "given", `CONSTANT`'s, `REGISTERED`'s."""
    return record["mask_source"] if record["mask_source"] in (CONSTANT, REGISTERED) else "given"


class LoadBOLDd(MapTransform):
    """Open a 4D NIfTI file by its path: `item[key]` becomes a `bold.Bold`, checked but not loaded.

    Args:
        keys: where the path is.
        tr_key: where a TR in seconds may be, to be used instead of the file's.
        space_key: where the user's word on the space ("MNI...") may be.
    """

    def __init__(self, keys: KeysCollection = "bold", tr_key: str = "tr", space_key: str = "space") -> None:
        super().__init__(keys)
        self.tr_key = tr_key
        self.space_key = space_key

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Open the file; raises `InputError` (see `bold.open_bold`)."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = bold.open_bold(item[key], item.get(self.tr_key), item.get(self.space_key))
        return item


class ToGridd(MapTransform):
    """Bring a run onto the fixed grid in one trilinear step in world space; keep the brain's voxels only.

    `item[key]` becomes (T, V) float32 in the file's units; adds "voxels" (V,), flat C-order indices into
    `grid.SHAPE`, and "record", what is known of the file. The brain mask's path, where there is one, is taken
    out of the item: it lives on in the record.

    Args:
        keys: where the opened run is.
        mask_key: where a brain mask's path may be; without one, background is what is constant over time.
        min_overlap: the least share, 0 to 1, of the MNI152 brain mask that the run's brain must contain.

    Raises:
        InputError: a share outside 0 to 1.
    """

    def __init__(self, min_overlap: float, keys: KeysCollection = "bold", mask_key: str = "mask") -> None:
        super().__init__(keys)
        if not 0 <= min_overlap <= 1:
            raise InputError(f"min_overlap must be between 0 and 1, not {min_overlap}")
        self.mask_key = mask_key
        self.min_overlap = min_overlap

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Interpolate; raises `InputError` for a bad mask, low overlap, damaged data, NaN or Inf."""
        item = dict(data)
        mask = item.pop(self.mask_key, None)
        for key in self.key_iterator(item):
            run: bold.Bold = item[key]
            read = frame_reader(run, 0 if mask is not None else KEPT_BYTES)  # only masks need one pass
            brain = brain_on_grid(run, mask, read)
            overlap = grid.mni_overlap(brain)
            if overlap < self.min_overlap:
                raise InputError(
                    f"{run.path} covers only {overlap:.0%} of the MNI brain (low overlap: "
                    f"{self.min_overlap:.0%} is needed), so it is likely in native space or its mask is wrong; "
                    "give the MNI-space run and mask"
                )
            item[key] = sample(run, brain, read)
            item["voxels"] = np.flatnonzero(brain)
            source = CONSTANT if mask is None else str(Path(mask).absolute())
            item["record"] = item.get("record", {}) | _facts(run, source, overlap)
        return item


def _facts(run: bold.Bold, mask_source: str, overlap: float) -> dict[str, Any]:
    """What a record says of the file."""
    return {
        "source": str(run.path.absolute()),
        "mask_source": mask_source,
        "tr_in": run.tr,
        "tr_source": run.tr_source,
        "frames_in": run.frames,
        "shape_in": list(run.shape),
        "affine_in": run.affine.tolist(),
        "axcodes_in": "".join(run.axcodes),
        "space": run.space,
        "mni_overlap": overlap,
    }


class RegisterToGridd(MapTransform):
    """Instead of `LoadBOLDd` and `ToGridd`: bring a run in its own space onto the grid, by its own registration.

    No substitute for fMRIPrep, see `bundle.preparation.register`. Motion and the affine transform to MNI152 are
    composed, so that each frame is interpolated once, linearly. What comes out is as of `ToGridd`; besides, "confounds"
    becomes the table of motion, and the record gets "registration", what the check has measured, and "mean_fd", mm.

    Args:
        method: "affine".
        min_overlap: as for `ToGridd`.
        min_alignment: the least that both margins of `register.alignment` must reach.
        keys: where the run's path is.
        tr_key: as for `LoadBOLDd`.
        space_key: likewise.
        mask_key: where nothing may be, as the mask comes from the run.
        table_key: where nothing may be, as the confounds come from the run.

    Raises:
        InputError: an unknown method, or a number outside its range.
    """

    def __init__(
        self,
        method: str,
        min_overlap: float,
        min_alignment: float,
        keys: KeysCollection = "bold",
        tr_key: str = "tr",
        space_key: str = "space",
        mask_key: str = "mask",
        table_key: str = "confounds",
    ) -> None:
        super().__init__(keys)
        if method not in METHODS:
            raise InputError(f"register must be {' or '.join(METHODS)}, or null for runs in MNI space, not {method!r}")
        if not 0 <= min_overlap <= 1:
            raise InputError(f"min_overlap must be between 0 and 1, not {min_overlap}")
        if not min_alignment >= 1:
            raise InputError(f"min_alignment must be at least 1, not {min_alignment}")
        self.method, self.min_overlap, self.min_alignment = method, min_overlap, min_alignment
        self.tr_key, self.space_key, self.mask_key, self.table_key = tr_key, space_key, mask_key, table_key

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Register; raises `InputError` where that fails, and where a mask or confounds are given."""
        item = dict(data)
        for key in self.key_iterator(item):
            run = bold.open_bold(item[key], item.get(self.tr_key), item.get(self.space_key), native=True)
            for given in (self.mask_key, self.table_key):
                if item.pop(given, None) is not None:
                    raise InputError(
                        f"{run.path} comes with a file of {given}, but --register makes its own; give the MNI-space run"
                        " without --register, or take that file away"
                    )
            read = frame_reader(run)
            found = register(run, read)
            refuse_misaligned(found.alignment, self.min_alignment, run.path)
            overlap = grid.mni_overlap(found.brain)
            if overlap < self.min_overlap:
                raise InputError(
                    f"{run.path} covers only {overlap:.0%} of the MNI brain after its registration (low overlap: "
                    f"{self.min_overlap:.0%} is needed); its field of view cuts the brain, or the head moved out of it"
                )
            item[key] = sample(run, found.brain, read, found.affines)
            item["voxels"] = np.flatnonzero(found.brain)
            item[self.table_key] = found.confounds
            item["record"] = item.get("record", {}) | _facts(run, REGISTERED, overlap)
            item["record"] |= {
                "registration": {"method": self.method} | found.alignment,
                "mean_fd": float(found.confounds["framewise_displacement"].mean()),
            }
        return item


class CleanSignalsd(MapTransform):
    """Regress confounds out of (T, V) frames, censor and filter them (see `bundle.preparation.confounds`).

    The record's "cleaning" says what was done, or is None where nothing was to be done.

    Args:
        confounds: strategies of nilearn's `load_confounds`, or "table"; none by default.
        max_fd: frames with more framewise displacement, mm, are censored.
        high_pass: lowest frequency kept, Hz.
        low_pass: highest frequency kept, Hz.
        keys: where the frames are.
        table_key: where the path of the run's own table of confounds may be.

    Raises:
        InputError: an argument that cannot be used.
    """

    def __init__(
        self,
        confounds: str | Sequence[str] = (),
        max_fd: float | None = None,
        high_pass: float | None = None,
        low_pass: float | None = None,
        keys: KeysCollection = "bold",
        table_key: str = "confounds",
    ) -> None:
        super().__init__(keys)
        self.confounds = (confounds,) if isinstance(confounds, str) else tuple(confounds)
        self.max_fd, self.high_pass, self.low_pass = max_fd, high_pass, low_pass
        self.table_key = table_key
        self.cleaning = Cleaning(self.confounds, max_fd, high_pass, low_pass)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Clean; raises `InputError` where confounds are missing or do not fit the run."""
        item = dict(data)
        record = item["record"]
        done = None
        for key in self.key_iterator(item):
            if self.cleaning:
                table, source = item.get(self.table_key), Path(record["source"])
                item[key], done = clean_frames(item[key], record["tr_in"], self.cleaning, source, table)
        return item | {"record": record | {"cleaning": done}}


class ResampleTRd(MapTransform):
    """Bring (T, V) frames to one TR, linearly in time.

    Args:
        tr: the wanted TR, seconds, 0.1 to 20.
        min_frames: the fewest frames that must come out.
        keys: where the frames are; the item's "record" says their TR.

    Raises:
        InputError: a TR or a number of frames outside its range.
    """

    def __init__(self, tr: float, min_frames: int = CLIP_FRAMES, keys: KeysCollection = "bold") -> None:
        super().__init__(keys)
        if not TR_RANGE[0] <= tr <= TR_RANGE[1]:
            raise InputError(f"the prepared TR must be {TR_RANGE[0]} to {TR_RANGE[1]} seconds, not {tr}")
        if min_frames < 1:
            raise InputError(f"min_frames must be at least 1, not {min_frames}")
        self.tr = tr
        self.min_frames = min_frames

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Interpolate; raises `InputError` where the run is too short."""
        item = dict(data)
        record = dict(item["record"])
        for key in self.key_iterator(item):
            count = frames_after(len(item[key]), record["tr_in"], self.tr)
            if count < self.min_frames:
                raise InputError(
                    f"{record['source']} has {len(item[key])} frames at {record['tr_in']:g} s, which is "
                    f"{count} at {self.tr:g} s, but {self.min_frames} are needed; give a longer run"
                )
            item[key] = resample_tr(item[key], record["tr_in"], self.tr)
            record |= {"tr": self.tr, "frames": count}
        return item | {"record": record}


class ZScored(MapTransform):
    """Scale (T, V) frames voxel by voxel, as float16; adds "moments" (2, V), each voxel's mean and SD (see `zscore`).

    The record gets "mean" and "sd" over all voxels and frames, and "fill", the least z by these: the z-scores of the
    published method, which `bundle.data.normalisation` makes from this too.

    Args:
        keys: where the frames are.
    """

    def __init__(self, keys: KeysCollection = "bold") -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Scale; raises `InputError` where all values are the same."""
        item = dict(data)
        for key in self.key_iterator(item):
            try:
                least = float(item[key].min())
                item[key], item["moments"], mean, sd = zscore(item[key])
            except InputError as error:
                raise InputError(f"{item['record']['source']}: {error}") from error
            item["record"] = item["record"] | {"mean": mean, "sd": sd, "fill": (least - mean) / sd}
        return item


class StoreRund(MapTransform):
    """Write a run to the prepared store; "bold" becomes the folder it now lives in.

    Args:
        folder: the store.
        keys: where the frames are; "voxels", "moments" and "record" (with a "run_id") go with them.
    """

    def __init__(self, folder: str | Path, keys: KeysCollection = "bold") -> None:
        super().__init__(keys)
        self.folder = Path(folder)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Write; raises `WriteError` where the store cannot be written."""
        item = dict(data)
        for key in self.key_iterator(item):
            item["record"] = item["record"] | {"voxels": len(item["voxels"])}
            table = item.get("confounds")
            motion = table if isinstance(table, pd.DataFrame) else None  # a path of a file that lies elsewhere
            store.write_run(self.folder, item["record"], item[key], item["voxels"], item["moments"], motion)
            item[key] = self.folder / "runs" / item["record"]["run_id"]
        return item
