"""From a prepared store and a split file to batches on the device."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeAlias

import ignite.distributed as idist
import numpy as np
import torch
from monai.data import DataLoader, Dataset, DistributedSampler
from monai.data.utils import set_rnd
from monai.transforms import Compose
from torch import Tensor

from bundle.data.clips import clips_of
from bundle.errors import InputError

logger = logging.getLogger(__name__)

Batch: TypeAlias = tuple[Tensor, dict, tuple, dict]  # network input, target, further arguments and keywords


def keep_items(items: list[dict]) -> list[dict]:
    """Collate nothing: runs differ in their number of brain voxels, so items are stacked on the device.

    Arrays become tensors, which the loader passes through shared memory and can pin for the way to the GPU.
    """
    return [
        {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in item.items()}
        for item in items
    ]


def loader(
    dataset: Dataset, batch_size: int, shuffle: bool, num_workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """Loader of a dataset's items, uncollated; of several processes each gets its share.

    Args:
        dataset: of clips.
        batch_size: items of a batch, per process.
        shuffle: for training: in random order, and the shares are made equally long by repeating items. Else every
            item comes once, in order.
        num_workers: processes that read.
        pin_memory: for the way to a GPU.
    """
    sampler = None
    if idist.get_world_size() > 1:
        sampler = DistributedSampler(dataset, even_divisible=shuffle, shuffle=shuffle)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle and sampler is None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=keep_items,
    )


class PrepareBatch:
    """Trainer's `prepare_batch`: run transforms on every item on the device, then stack.

    The loader's workers read half-precision brain voxels only; dense frames, augmentation and masks are made
    here, on the device. The network receives the mask as its second input where there is one.

    Args:
        transforms: applied to each item in order; they must leave `image` `(channels, X, Y, Z, T)`, of
            which the last channel is the target.
        encode: a frozen map from images `(1, channels, X, Y, Z, T)` to features `(1, c)`, in the precision in which the
            model is served. The network then receives features instead of images. Every clip is encoded once, and
            remembered by its run and start; where the first transform is the one that reads it, not the loader's, it
            is read once too. Of items that are whole runs the features of all clips are stacked, one run after another,
            and the network receives the number of clips of each run as its second input.
        remember: False forgets features after their batch, where every clip comes once.

    Raises:
        InputError: (when called) whole runs, but no `encode`.
    """

    def __init__(
        self,
        transforms: Sequence[Callable],
        encode: Callable[[Tensor], Tensor] | None = None,
        remember: bool = True,
    ) -> None:
        self.transform = Compose(transforms)
        self.encode = encode
        self.remember = remember
        self._features: dict[tuple[str, int], Tensor] = {}

    def __call__(
        self,
        items: list[dict],
        device: torch.device | str | None = None,
        non_blocking: bool = False,
        **_: object,
    ) -> Batch:
        """Return `(image, target, network arguments, {})` of a batch, as MONAI's engines expect."""
        if self.encode is not None:
            return self._encoded(items, device, non_blocking)
        if "starts" in items[0]:
            raise InputError("whole runs need a frozen encoder; set freeze_encoder true or whole_runs false")
        return self._images(items, device, non_blocking)

    def _encoded(self, items: list[dict], device: torch.device | str | None, non_blocking: bool) -> Batch:
        """Features and labels; one clip at a time, so that a clip's features do not depend on its batch."""
        assert self.encode is not None
        clips = [clip for item in items for clip in clips_of(item)]
        for clip in clips:
            key = clip["run_id"], clip["start"]
            if key not in self._features:
                image, *_ = self._images([clip], device, non_blocking)
                with torch.no_grad():
                    self._features[key] = self.encode(image)[0]
        features = torch.stack([self._features[clip["run_id"], clip["start"]] for clip in clips])
        if not self.remember:
            self._features.clear()
        target: dict = {"participant_id": [item["participant_id"] for item in items]}
        if "label" in items[0]:
            target["label"] = torch.tensor([[item["label"]] for item in items], device=features.device)
        counts = ([len(item["starts"]) for item in items],) if "starts" in items[0] else ()
        return features, target, counts, {}

    def _images(self, items: list[dict], device: torch.device | str | None, non_blocking: bool) -> Batch:
        items = [
            self.transform(
                {
                    key: value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value
                    for key, value in item.items()
                }
            )
            for item in items
        ]
        image = torch.stack([torch.as_tensor(item["image"]).as_subclass(Tensor) for item in items])
        target: dict = {"image": image[:, -1:], "participant_id": [item["participant_id"] for item in items]}
        if "label" in items[0]:
            target["label"] = torch.tensor([[item["label"]] for item in items], device=image.device)
        if "mask" not in items[0]:
            return image, target, (), {}
        target["mask"] = torch.stack([torch.as_tensor(item["mask"]).as_subclass(Tensor) for item in items])
        target["affine"] = torch.stack([torch.as_tensor(item["mask"].affine).as_subclass(Tensor) for item in items])
        return image, target, (target["mask"],), {}


def reseed(transforms: Sequence[object], seed: int) -> None:
    """Seed torch and the generators of all random transforms, so that an epoch can be drawn again."""
    torch.manual_seed(seed)
    for transform in transforms:
        set_rnd(transform, seed)
