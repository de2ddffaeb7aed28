"""From a prepared store and a split file to batches on the device."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from monai.data.utils import set_rnd
from monai.transforms import Compose
from torch import Tensor

from bundle.data.splits import SETS, check_participants, load_splits
from bundle.errors import InputError
from bundle.preparation.store import read_manifest
from bundle.preparation.transforms import CLIP_FRAMES, clips

logger = logging.getLogger(__name__)

Batch: TypeAlias = tuple[Tensor, dict, tuple, dict]  # network input, target, further arguments and keywords


def split_clips(
    store: str | Path,
    splits_file: str | Path,
    subset: str,
    frames: int = CLIP_FRAMES,
    stride: int = CLIP_FRAMES,
    labelled: bool = False,
    label_shuffle_seed: int | None = None,
) -> list[dict]:
    """List the clips of one set of the split file.

    Args:
        store: folder of the prepared store.
        splits_file: split file that names exactly the store's participants.
        subset: ``train``, ``validation`` or ``test``.
        frames: frames per clip (0.8 s each).
        stride: frames from the start of one clip to the start of the next.
        labelled: add ``label`` (1 case, 0 control), and refuse runs without one. A training or validation set of
            one class only is refused too; a test set may be so (a site left out).
        label_shuffle_seed: a control: give the labels of the set's participants to each other at random, site by site.

    Returns:
        Rows with ``run_id``, ``participant_id``, ``start`` (frame) and, if asked for, ``label``.

    Raises:
        InputError: the store has no runs, disagrees with the split file, or lacks a label.
    """
    runs = read_manifest(store)["runs"]
    if not runs:
        raise InputError(f"{store}: the store holds no prepared run; see its summary.tsv and prepare again")
    splits = load_splits(splits_file)
    check_participants(splits, {run["participant_id"] for run in runs}, splits_file)
    members = set(splits["sets"][subset])
    chosen = [run for run in runs if run["participant_id"] in members]
    items = clips(chosen, frames=frames, stride=stride)
    if labelled:
        labels = _labels(chosen, subset, store)
        if label_shuffle_seed is not None:
            labels = _shuffled(labels, chosen, subset, label_shuffle_seed)
        items = [item | {"label": labels[item["participant_id"]]} for item in items]
    logger.info(
        "%s set: %d clips of %d frames from %d runs of %d participants",
        subset,
        len(items),
        frames,
        len(chosen),
        len({run["participant_id"] for run in chosen}),
    )
    return items


def _labels(runs: Sequence[dict], subset: str, store: str | Path) -> dict[str, float]:
    """Label of each participant."""
    for run in runs:
        if run["diagnosis"] is None:
            raise InputError(
                f"{store}: run {run['run_id']} has no diagnosis; add it to participants.tsv and prepare again"
            )
    labels = {run["participant_id"]: float(run["diagnosis"]) for run in runs}
    if len(set(labels.values())) == 1:
        only = "cases" if 1.0 in labels.values() else "controls"
        if subset != "test":
            raise InputError(
                f"{store}: the {subset} set holds only {only}, so there is nothing to tell apart; make other splits"
            )
        logger.warning("The test set holds only %s: it has no AUROC and no balanced accuracy of its own", only)
    return labels


def _shuffled(labels: dict[str, float], runs: Sequence[dict], subset: str, seed: int) -> dict[str, float]:
    """Exchange labels within a set and a site.

    In the test set too, or a true difference would show through by chance. Within a site (an exchangeability block,
    Winkler et al. 2014, NeuroImage 92:381), or cases and controls would differ in their sites by chance.
    """
    logger.warning("The labels of the %s set are SHUFFLED: a control that must find nothing", subset)
    rng = np.random.default_rng([seed, SETS.index(subset)])
    sites = {run["participant_id"]: str(run["site"]) for run in runs}
    shuffled = dict(labels)
    for site in sorted(set(sites.values())):
        members = [name for name in labels if sites[name] == site]
        values = rng.permutation([labels[name] for name in members])
        shuffled |= dict(zip(members, values.tolist(), strict=True))
    return shuffled


def keep_items(items: list[dict]) -> list[dict]:
    """Collate nothing: runs differ in their number of brain voxels, so items are stacked on the device.

    Arrays become tensors, which the loader passes through shared memory and can pin for the way to the GPU.
    """
    return [
        {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in item.items()}
        for item in items
    ]


class PrepareBatch:
    """Trainer's ``prepare_batch``: run transforms on every item on the device, then stack.

    The loader's workers read half-precision brain voxels only; dense frames, augmentation and masks are made
    here, on the device. The network receives the mask as its second input where there is one.

    Args:
        transforms: applied to each item in order; they must leave ``image`` ``(1, X, Y, Z, T)``.
        encode: a frozen map from images ``(1, 1, X, Y, Z, T)`` to features ``(1, c)``, which the network then
            receives instead of images. Every clip is encoded once, and remembered by its run and start; where the
            first transform is the one that reads it, not the loader's, it is read once too.
    """

    def __init__(self, transforms: Sequence[Callable], encode: Callable[[Tensor], Tensor] | None = None) -> None:
        self.transform = Compose(transforms)
        self.encode = encode
        self._features: dict[tuple[str, int], Tensor] = {}

    def __call__(
        self,
        items: list[dict],
        device: torch.device | str | None = None,
        non_blocking: bool = False,
        **_: object,
    ) -> Batch:
        """Return ``(image, target, network arguments, {})`` of a batch, as MONAI's engines expect."""
        if self.encode is not None:
            return self._encoded(items, device, non_blocking)
        return self._images(items, device, non_blocking)

    def _encoded(self, items: list[dict], device: torch.device | str | None, non_blocking: bool) -> Batch:
        """Features and labels; one clip at a time, so that a clip's features do not depend on its batch."""
        assert self.encode is not None
        for item in items:
            clip = item["run_id"], item["start"]
            if clip not in self._features:
                image, *_ = self._images([item], device, non_blocking)
                with torch.no_grad():
                    self._features[clip] = self.encode(image)[0]
        features = torch.stack([self._features[item["run_id"], item["start"]] for item in items])
        labels = torch.tensor([[item["label"]] for item in items], device=features.device)
        return features, {"participant_id": [item["participant_id"] for item in items], "label": labels}, (), {}

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
        target: dict = {"image": image, "participant_id": [item["participant_id"] for item in items]}
        if "label" in items[0]:
            target["label"] = torch.tensor([[item["label"]] for item in items], device=image.device)
        if "mask" not in items[0]:
            return image, target, (), {}
        target["mask"] = torch.stack([torch.as_tensor(item["mask"]).as_subclass(Tensor) for item in items])
        return image, target, (target["mask"],), {}


def reseed(transforms: Sequence[object], seed: int) -> None:
    """Seed torch and the generators of all random transforms, so that an epoch can be drawn again."""
    torch.manual_seed(seed)
    for transform in transforms:
        set_rnd(transform, seed)
