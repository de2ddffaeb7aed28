"""MONAI dictionary transforms from the store to the network's input: a clip, dense on the grid, time last."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable

from bundle.anatomy import grid
from bundle.data.normalisation import Normalisation
from bundle.errors import InputError
from bundle.preparation import store
from bundle.preparation.scaling import run_moments
from bundle.preparation.transforms import CLIP_FRAMES, Item


class ReadClipd(Randomizable, MapTransform):
    """Read a clip of a run from the store: adds "frames" (T, V), "moments" (2, V), "voxels" (V,), "fill" and "start".

    The frames are float16, each voxel by its own mean and SD over the run; the moments are these, in units of the
    run's z (`bundle.preparation.scaling.run_moments`).

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

            def start_of(total: int, run_id: str = run_id) -> int:
                if not self.random:
                    return item["start"]
                if total < self.frames:
                    raise InputError(f"run {run_id} in {self.store} has {total} frames, not {self.frames}")
                self.randomize(total)
                item["start"] = self.start
                return self.start

            item["frames"] = store.read_drawn_clip(self.store, run_id, start_of, self.frames)
            item["voxels"] = store.read_voxels(self.store, run_id)
            record = store.read_run(self.store, run_id)
            item["moments"] = run_moments(store.read_moments(self.store, run_id), record)
            item["fill"] = record["fill"]
        return item


class TakeClipd(MapTransform):
    """Take a clip of a run in memory, exactly as `ReadClipd` would read it: "frames" replaces the run.

    Args:
        keys: where the prepared frames (T, V) are; their "moments" and "record" go with them.
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
            item["moments"] = run_moments(item["moments"], item["record"])
            item["fill"] = item["record"]["fill"]
        return item


class ScatterClipd(MapTransform):
    """Normalise a clip's brain voxels and put them back on the dense grid, on the device.

    "frames" (T, V), "moments" and "voxels" (V,) become "image", a MetaTensor (T, X, Y, Z) float32 with `grid.AFFINE`,
    and "brain", a bool MetaTensor (1, X, Y, Z). Where the normalisation has two channels, "image" is the one that is
    predicted, and the other is "anatomy", of the same shape: give spatial augmentation both keys.

    Args:
        normalisation: how the values are scaled.
        device: where the dense image is made; only the brain's half-precision values travel there.
        keys: where the clip is.
    """

    def __init__(
        self, normalisation: Normalisation, device: torch.device | str = "cpu", keys: KeysCollection = "frames"
    ) -> None:
        super().__init__(keys)
        self.normalisation = normalisation
        self.device = torch.device(device)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Scatter."""
        item = dict(data)
        for key in self.key_iterator(item):
            frames = torch.as_tensor(item.pop(key)).to(self.device).float()  # (T, V)
            moments = torch.as_tensor(item.pop("moments")).to(self.device)
            voxels = torch.as_tensor(item.pop("voxels")).to(self.device, torch.int64)
            size = grid.SHAPE[0] * grid.SHAPE[1] * grid.SHAPE[2]
            brain = torch.zeros(size, dtype=torch.bool, device=self.device).index_fill_(0, voxels, True)
            affine = torch.as_tensor(grid.AFFINE)
            channels = self.normalisation.apply(frames, moments, float(item.pop("fill")))
            for name, (values, fill) in zip(("image", "anatomy"), reversed(channels), strict=False):
                image = torch.full((len(values), size), fill, device=self.device).index_copy_(1, voxels, values)
                item[name] = MetaTensor(image.view(-1, *grid.SHAPE), affine=affine)  # (T, XYZ) -> (T, X, Y, Z)
            item["brain"] = MetaTensor(brain.view(1, *grid.SHAPE), affine=affine)
        return item


class TimeLastd(MapTransform):
    """Turn time-as-channel images (T, X, Y, Z), as spatial transforms want them, into (1, X, Y, Z, T).

    An item's "anatomy" becomes the image's first channel, (2, X, Y, Z, T); what is predicted stays the last.

    Args:
        keys: where the images are.
    """

    def __init__(self, keys: KeysCollection = "image") -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Move the axis; the affine stays, since it maps X, Y, Z only."""
        item = dict(data)
        for key in self.key_iterator(item):
            channels = [item.pop("anatomy"), item[key]] if "anatomy" in item else [item[key]]
            item[key] = torch.stack([channel.movedim(0, -1) for channel in channels])  # (T, X, Y, Z) -> (1, X, Y, Z, T)
        return item
