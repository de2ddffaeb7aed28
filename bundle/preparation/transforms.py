"""MONAI dictionary transforms for the data's walk: NIfTI, frames on the grid, store, clip, dense image.

Each is thin over a function of `grid`, `bold` or `store`. The chains:

    preparing               LoadBOLDd, ToGridd, (cleaning), ResampleTRd, ZScored, StoreRund
    training and inference  ReadClipd, ScatterClipd, (masks), TimeLastd
    without a store         LoadBOLDd, ToGridd, ResampleTRd, ZScored, TakeClipd, ScatterClipd, TimeLastd
"""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform

from bundle.anatomy import grid
from bundle.errors import InputError
from bundle.preparation import bold, store
from bundle.preparation.frames import KEPT_BYTES, brain_on_grid, frame_reader, sample
from bundle.preparation.scaling import frames_after, resample_tr, zscore

CLIP_FRAMES = 20
MIN_OVERLAP = 0.6  # of the MNI152 brain mask
TR_SECONDS = 0.8
CONSTANT = "voxels constant over time"

Item = dict[Hashable, Any]


def mask_kind(record: Mapping[str, Any]) -> str:
    """Say of a prepared run's record whose brain mask its z-scores rest on: "given", or `CONSTANT`'s."""
    return CONSTANT if record["mask_source"] == CONSTANT else "given"


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
        min_overlap: the least share of the MNI152 brain mask that the run's brain must contain.
    """

    def __init__(self, keys: KeysCollection = "bold", mask_key: str = "mask", min_overlap: float = MIN_OVERLAP) -> None:
        super().__init__(keys)
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
            item["record"] = {
                "source": str(run.path.absolute()),
                "mask_source": CONSTANT if mask is None else str(Path(mask).absolute()),
                "tr_in": run.tr,
                "tr_source": run.tr_source,
                "frames_in": run.frames,
                "shape_in": list(run.shape),
                "affine_in": run.affine.tolist(),
                "axcodes_in": "".join(run.axcodes),
                "space": run.space,
                "mni_overlap": overlap,
            }
        return item


class ResampleTRd(MapTransform):
    """Bring (T, V) frames to one TR, linearly in time.

    Args:
        keys: where the frames are; the item's "record" says their TR.
        tr: the wanted TR, seconds.
        min_frames: the fewest frames that must come out.
    """

    def __init__(self, keys: KeysCollection = "bold", tr: float = TR_SECONDS, min_frames: int = CLIP_FRAMES) -> None:
        super().__init__(keys)
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
    """Scale (T, V) frames to z over all voxels and frames, as float16; adds "fill", the run's least z.

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
                item[key], mean, sd = zscore(item[key])
            except InputError as error:
                raise InputError(f"{item['record']['source']}: {error}") from error
            item["fill"] = float(item[key].min())
            item["record"] = item["record"] | {"mean": mean, "sd": sd, "fill": item["fill"]}
        return item


class StoreRund(MapTransform):
    """Write a run to the prepared store; "bold" becomes the folder it now lives in.

    Args:
        folder: the store.
        keys: where the z-scored frames are; "voxels" and "record" (with a "run_id") go with them.
    """

    def __init__(self, folder: str | Path, keys: KeysCollection = "bold") -> None:
        super().__init__(keys)
        self.folder = Path(folder)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Write; raises `WriteError` where the store cannot be written."""
        item = dict(data)
        for key in self.key_iterator(item):
            item["record"] = item["record"] | {"voxels": len(item["voxels"])}
            store.write_run(self.folder, item["record"], item[key], item["voxels"])
            item[key] = self.folder / "runs" / item["record"]["run_id"]
        return item
