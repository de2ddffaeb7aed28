"""Which clips there are, of stored runs and of the sets of a split file."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.data.splits import SETS, check_participants, load_splits
from bundle.data.targets import Target
from bundle.errors import InputError
from bundle.preparation.store import read_manifest
from bundle.preparation.transforms import CLIP_FRAMES

logger = logging.getLogger(__name__)


def clips(
    runs: Sequence[Mapping[str, Any]], frames: int = CLIP_FRAMES, stride: int = CLIP_FRAMES, whole_runs: bool = False
) -> list[dict]:
    """List the clips of stored runs, in order: 1 + (T - frames) // stride of each run, the tail left out.

    Args:
        runs: records, as in the manifest's "runs".
        frames: the clip's length.
        stride: frames from one clip's start to the next's; equal to `frames` they do not overlap.
        whole_runs: one item per run, with the "starts" of its clips.

    Returns:
        {"run_id", "participant_id", "start"} for each clip, or {"run_id", "participant_id", "starts"} for each run.

    Raises:
        InputError: a length is below 1, or a run is shorter than a clip.
    """
    if frames < 1 or stride < 1:
        raise InputError(f"a clip's frames ({frames}) and stride ({stride}) must be at least 1")
    for run in runs:
        if run["frames"] < frames:
            raise InputError(f"run {run['run_id']} has {run['frames']} frames, fewer than a clip's {frames}")
    items = [
        {
            "run_id": run["run_id"],
            "participant_id": run["participant_id"],
            "starts": list(range(0, run["frames"] - frames + 1, stride)),
        }
        for run in runs
    ]
    return items if whole_runs else [clip for item in items for clip in clips_of(item)]


def clips_of(item: Mapping[str, Any]) -> list[dict]:
    """The clips of an item: of a whole run one per start, with all else that the run has; of a clip itself."""
    if "starts" not in item:
        return [dict(item)]
    rest = {key: value for key, value in item.items() if key != "starts"}
    return [rest | {"start": start} for start in item["starts"]]


def split_clips(
    store: str | Path,
    splits_file: str | Path,
    subset: str,
    frames: int = CLIP_FRAMES,
    stride: int = CLIP_FRAMES,
    target: Target | None = None,
    label_shuffle_seed: int | None = None,
    whole_runs: bool = False,
) -> list[dict]:
    """List the clips of one set of the split file, or its runs.

    Args:
        store: folder of the prepared store.
        splits_file: split file that names exactly the store's participants.
        subset: `train`, `validation` or `test`.
        frames: frames per clip (0.8 s each).
        stride: frames from the start of one clip to the start of the next.
        target: add each participant's `label`, and leave out who has none. A training or validation set of one class
            only is refused; a test set may be so (a site left out).
        label_shuffle_seed: a control: give the labels of the set's participants to each other at random, site by site.
        whole_runs: one item per run, with the `starts` of its clips.

    Returns:
        Rows with `run_id`, `participant_id`, `start` (frame; of whole runs `starts`) and, if asked for, `label`.

    Raises:
        InputError: the store has no runs, disagrees with the split file, or a set has nobody to learn from.
    """
    runs = read_manifest(store)["runs"]
    if not runs:
        raise InputError(f"{store}: the store holds no prepared run; see its summary.tsv and prepare again")
    splits = load_splits(splits_file)
    check_participants(splits, {run["participant_id"] for run in runs}, splits_file)
    members = set(splits["sets"][subset]) - (set(target.missing) if target else set())
    chosen = [run for run in runs if run["participant_id"] in members]
    items = clips(chosen, frames=frames, stride=stride, whole_runs=whole_runs)
    if target is not None:
        labels = _labels(chosen, target, subset, store)
        if label_shuffle_seed is not None:
            labels = _shuffled(labels, chosen, subset, label_shuffle_seed)
        items = [item | {"label": labels[item["participant_id"]]} for item in items]
    logger.info(
        "%s set: %d clips of %d frames from %d runs of %d participants",
        subset,
        sum(len(clips_of(item)) for item in items),
        frames,
        len(chosen),
        len({run["participant_id"] for run in chosen}),
    )
    return items


def _labels(runs: Sequence[dict], target: Target, subset: str, store: str | Path) -> dict[str, float]:
    """Label of each participant."""
    labels = {run["participant_id"]: target.labels[run["participant_id"]] for run in runs}
    if not labels:
        raise InputError(f"{store}: nobody in the {subset} set has a value of {target.column!r}; make other splits")
    if len(set(labels.values())) == 1:
        only = f"{target.column} {target.name_of(next(iter(labels)))}"
        if subset != "test":
            raise InputError(
                f"{store}: the {subset} set holds only {only}, so there is nothing to tell apart; make other splits"
            )
        logger.warning("The test set holds only %s: what compares classes has no value there", only)
    return labels


def _shuffled(labels: dict[str, float], runs: Sequence[dict], subset: str, seed: int) -> dict[str, float]:
    """Exchange labels within a set and a site.

    In the test set too, or a true difference would show through by chance. Within a site (an exchangeability block,
    Winkler et al. 2014, NeuroImage 92:381), or the classes would differ in their sites by chance.
    """
    logger.warning("The labels of the %s set are SHUFFLED: a control that must find nothing", subset)
    rng = np.random.default_rng([seed, SETS.index(subset)])
    sites = {run["participant_id"]: str(run["site"]) for run in runs}
    values = shuffled_within([sites[name] for name in labels], np.array(list(labels.values())), rng)
    return dict(zip(labels, values.tolist(), strict=True))


def shuffled_within(sites: Sequence[str], labels: NDArray, rng: np.random.Generator) -> NDArray:
    """Labels (n,) exchanged at random within each site."""
    shuffled = labels.copy()
    for site in sorted(set(sites)):
        members = np.flatnonzero(np.array(sites) == site)
        shuffled[members] = rng.permutation(labels[members])
    return shuffled
