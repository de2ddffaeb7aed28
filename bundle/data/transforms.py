"""MONAI dictionary transforms from the store to the network's input: a clip, dense on the grid, time last."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable

from bundle.anatomy import grid
from bundle.errors import InputError
from bundle.preparation import store
from bundle.preparation.transforms import CLIP_FRAMES, Item


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
