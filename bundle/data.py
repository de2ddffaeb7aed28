"""From a prepared store and a split file to batches on the device."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.data.utils import set_rnd
from monai.transforms import Compose
from torch import Tensor

from bundle.errors import InputError
from bundle.splits import check_participants, load_splits
from bundle.store import read_manifest
from bundle.transforms import clips

logger = logging.getLogger(__name__)


def split_clips(
    store: str | Path,
    splits_file: str | Path,
    subset: str,
    frames: int = 20,
    stride: int = 20,
    labelled: bool = False,
) -> list[dict]:
    """List the clips of one set of the split file.

    Args:
        store: folder of the prepared store.
        splits_file: split file that names exactly the store's participants.
        subset: ``train``, ``validation`` or ``test``.
        frames: frames per clip (0.8 s each).
        stride: frames from the start of one clip to the start of the next.
        labelled: add ``label`` (1 case, 0 control), and refuse runs without one and a set of one class only.

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
        items = [item | {"label": labels[item["run_id"]]} for item in items]
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
    for run in runs:
        if run["diagnosis"] is None:
            raise InputError(
                f"{store}: run {run['run_id']} has no diagnosis; add it to participants.tsv and prepare again"
            )
    labels = {run["run_id"]: float(run["diagnosis"]) for run in runs}
    if len(set(labels.values())) == 1:
        only = "cases" if labels.popitem()[1] else "controls"
        raise InputError(
            f"{store}: the {subset} set holds only {only}, so there is nothing to tell apart; make other splits"
        )
    return labels


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
    """

    def __init__(self, transforms: Sequence[Callable]) -> None:
        self.transform = Compose(transforms)

    def __call__(
        self,
        items: list[dict],
        device: torch.device | str | None = None,
        non_blocking: bool = False,
        **_: object,
    ) -> tuple[Tensor, dict, tuple, dict]:
        """Return ``(image, target, network arguments, {})`` of a batch, as MONAI's engines expect."""
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
