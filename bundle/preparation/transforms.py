"""MONAI dictionary transforms for the data's walk: NIfTI, frames on the grid, store, clip, dense image.

Each is thin over a function of `grid`, `bold` or `store`. The chains:

    preparing               LoadBOLDd, ToGridd, (cleaning), ResampleTRd, ZScored, StoreRund
    training and inference  ReadClipd, ScatterClipd, (masks), TimeLastd
    without a store         LoadBOLDd, ToGridd, ResampleTRd, ZScored, TakeClipd, ScatterClipd, TimeLastd
"""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable

from bundle.anatomy import grid
from bundle.errors import InputError
from bundle.preparation import bold, store

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
            read = bold.frame_reader(run, 0 if mask is not None else bold.KEPT_BYTES)  # only masks need one pass
            brain = bold.brain_on_grid(run, mask, read)
            overlap = grid.mni_overlap(brain)
            if overlap < self.min_overlap:
                raise InputError(
                    f"{run.path} covers only {overlap:.0%} of the MNI brain (low overlap: "
                    f"{self.min_overlap:.0%} is needed), so it is likely in native space or its mask is wrong; "
                    "give the MNI-space run and mask"
                )
            item[key] = bold.sample(run, brain, read)
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
            count = bold.frames_after(len(item[key]), record["tr_in"], self.tr)
            if count < self.min_frames:
                raise InputError(
                    f"{record['source']} has {len(item[key])} frames at {record['tr_in']:g} s, which is "
                    f"{count} at {self.tr:g} s, but {self.min_frames} are needed; give a longer run"
                )
            item[key] = bold.resample_tr(item[key], record["tr_in"], self.tr)
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
                item[key], mean, sd = bold.zscore(item[key])
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
        """Write; raises `StoreWriteError` where the store cannot be written."""
        item = dict(data)
        for key in self.key_iterator(item):
            item["record"] = item["record"] | {"voxels": len(item["voxels"])}
            store.write_run(self.folder, item["record"], item[key], item["voxels"])
            item[key] = self.folder / "runs" / item["record"]["run_id"]
        return item


class ReadClipd(Randomizable, MapTransform):
    """Read a clip of a run from the store: adds "frames" (T, V) float16, "voxels" (V,), "fill" and "start".

    Args:
        store: the store's folder.
        frames: the clip's length.
        random: draw the start uniformly from all possible ones; else take the item's "start".
        seed: of this transform's own generator; None seeds it from the system.
        keys: where the run's id is.
    """

    def __init__(
        self,
        store: str | Path,
        frames: int = CLIP_FRAMES,
        random: bool = False,
        seed: int | None = None,
        keys: KeysCollection = "run_id",
    ) -> None:
        MapTransform.__init__(self, keys)
        self.store = Path(store)
        self.frames = frames
        self.random = random
        self.set_random_state(seed)

    def randomize(self, total: int) -> None:
        """Draw a start for a run of `total` frames, each of 0 ... total - frames as likely as the others."""
        self.start = int(self.R.randint(0, total - self.frames + 1))

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Read; raises `InputError` where the run or the frames do not exist."""
        item = dict(data)
        for key in self.key_iterator(item):
            run_id = item[key]
            if self.random:
                total = store.count_frames(self.store, run_id)
                if total < self.frames:
                    raise InputError(f"run {run_id} in {self.store} has {total} frames, not {self.frames}")
                self.randomize(total)
                item["start"] = self.start
            item["frames"] = store.read_clip(self.store, run_id, item["start"], self.frames)
            item["voxels"] = store.read_voxels(self.store, run_id)
            item["fill"] = store.read_run(self.store, run_id)["fill"]
        return item


class TakeClipd(MapTransform):
    """Take a clip of a run in memory, exactly as `ReadClipd` would read it: "frames" replaces the run.

    Args:
        keys: where the z-scored frames (T, V) are.
        frames: the clip's length; it begins at the item's "start", else at frame 0.
    """

    def __init__(self, keys: KeysCollection = "bold", frames: int = CLIP_FRAMES) -> None:
        super().__init__(keys)
        self.frames = frames

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Cut; raises `InputError` where the run has no such frames."""
        item = dict(data)
        for key in self.key_iterator(item):
            run = item.pop(key)
            start = item.setdefault("start", 0)
            if not 0 <= start <= len(run) - self.frames:
                raise InputError(
                    f"{item['record']['source']} has {len(run)} frames at {item['record']['tr']:g} s, so no "
                    f"clip of {self.frames} begins at frame {start}"
                )
            item["frames"] = run[start : start + self.frames]
        return item


class ScatterClipd(MapTransform):
    """Put a clip's brain voxels back on the dense grid, on the device.

    "frames" (T, V) and "voxels" (V,) become "image", a MetaTensor (T, X, Y, Z) float32 with `grid.AFFINE`,
    its background holding the item's "fill", and "brain", a bool MetaTensor (1, X, Y, Z).

    Args:
        device: where the dense image is made; only the brain's half-precision values travel there.
        keys: where the clip is.
    """

    def __init__(self, device: torch.device | str = "cpu", keys: KeysCollection = "frames") -> None:
        super().__init__(keys)
        self.device = torch.device(device)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Scatter."""
        item = dict(data)
        for key in self.key_iterator(item):
            frames = torch.as_tensor(item.pop(key)).to(self.device)  # (T, V)
            voxels = torch.as_tensor(item.pop("voxels")).to(self.device, torch.int64)
            size = grid.SHAPE[0] * grid.SHAPE[1] * grid.SHAPE[2]
            image = torch.full((len(frames), size), float(item["fill"]), device=self.device)
            image.index_copy_(1, voxels, frames.float())
            brain = torch.zeros(size, dtype=torch.bool, device=self.device).index_fill_(0, voxels, True)
            affine = torch.as_tensor(grid.AFFINE)
            item["image"] = MetaTensor(image.view(-1, *grid.SHAPE), affine=affine)  # (T, XYZ) -> (T, X, Y, Z)
            item["brain"] = MetaTensor(brain.view(1, *grid.SHAPE), affine=affine)
        return item


class TimeLastd(MapTransform):
    """Turn time-as-channel images (T, X, Y, Z), as spatial transforms want them, into (1, X, Y, Z, T).

    Args:
        keys: where the images are.
    """

    def __init__(self, keys: KeysCollection = "image") -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Move the axis; the affine stays, since it maps X, Y, Z only."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = item[key].movedim(0, -1).unsqueeze(0)  # (T, X, Y, Z) -> (1, X, Y, Z, T)
        return item


def clips(runs: Sequence[Mapping[str, Any]], frames: int = CLIP_FRAMES, stride: int = CLIP_FRAMES) -> list[dict]:
    """List the clips of stored runs, in order: 1 + (T - frames) // stride of each run, the tail left out.

    Args:
        runs: records, as in the manifest's "runs".
        frames: the clip's length.
        stride: frames from one clip's start to the next's; equal to `frames` they do not overlap.

    Returns:
        {"run_id", "participant_id", "start"} for each clip.

    Raises:
        InputError: a length is below 1, or a run is shorter than a clip.
    """
    if frames < 1 or stride < 1:
        raise InputError(f"a clip's frames ({frames}) and stride ({stride}) must be at least 1")
    for run in runs:
        if run["frames"] < frames:
            raise InputError(f"run {run['run_id']} has {run['frames']} frames, fewer than a clip's {frames}")
    return [
        {"run_id": run["run_id"], "participant_id": run["participant_id"], "start": start}
        for run in runs
        for start in range(0, run["frames"] - frames + 1, stride)
    ]
