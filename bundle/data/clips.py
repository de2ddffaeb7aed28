"""Which clips there are, of stored runs and of the sets of a split file."""

import logging
from collections.abc import Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from bundle.data.splits import SETS, check_participants, load_splits
from bundle.data.targets import Target
from bundle.errors import InputError
from bundle.preparation.store import read_index
from bundle.preparation.transforms import CLIP_FRAMES

logger = logging.getLogger(__name__)


class Clips(Sequence[dict]):
    """A list of clips, or of whole runs, whose dictionaries are made when they are asked for.

    It holds a few numbers and names per run, in arrays: ten million dictionaries would take 3 GB, and as much again in
    each of a loader's processes, which copy what they count references to.

    Args:
        runs: records, as in the manifest's "runs".
        frames: the clip's length, which no run falls short of.
        stride: frames from one clip's start to the next's.
        whole_runs: one item per run, with the "starts" of its clips.
        labels: of each participant, each item's "label"; None: items have none.
    """

    def __init__(
        self,
        runs: Sequence[Mapping[str, Any]],
        frames: int,
        stride: int,
        whole_runs: bool,
        labels: Mapping[str, float] | None = None,
    ) -> None:
        self.run_ids = np.array([run["run_id"] for run in runs], str)
        self.participants = np.array([run["participant_id"] for run in runs], str)
        self.labels = None if labels is None else np.array([labels[run["participant_id"]] for run in runs], float)
        self.ends = np.cumsum([1 + (run["frames"] - frames) // stride for run in runs], dtype=np.int64)
        self.stride = stride
        self.whole_runs = whole_runs

    @property
    def clip_count(self) -> int:
        """How many clips there are, also of whole runs."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def __len__(self) -> int:
        """How many items there are."""
        return len(self.ends) if self.whole_runs else self.clip_count

    @overload
    def __getitem__(self, place: int) -> dict:
        pass

    @overload
    def __getitem__(self, place: slice) -> list[dict]:
        pass

    def __getitem__(self, place: int | slice) -> dict | list[dict]:
        """An item, or a list of some."""
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = index(place)
        number += len(self) if number < 0 else 0
        if not 0 <= number < len(self):
            raise IndexError(f"item {place} of {len(self)}")
        run = number if self.whole_runs else int(np.searchsorted(self.ends, number, "right"))
        first = int(self.ends[run - 1]) if run else 0
        item: dict[str, Any] = {"run_id": str(self.run_ids[run]), "participant_id": str(self.participants[run])}
        if self.whole_runs:
            item["starts"] = [self.stride * clip for clip in range(int(self.ends[run]) - first)]
        else:
            item["start"] = self.stride * (number - first)
        return item if self.labels is None else item | {"label": float(self.labels[run])}


def clips(
    runs: Sequence[Mapping[str, Any]],
    frames: int = CLIP_FRAMES,
    stride: int = CLIP_FRAMES,
    whole_runs: bool = False,
    labels: Mapping[str, float] | None = None,
) -> Clips:
    """List the clips of stored runs, in order: 1 + (T - frames) // stride of each run, the tail left out.

    Args:
        runs: records, as in the manifest's "runs".
        frames: the clip's length.
        stride: frames from one clip's start to the next's; equal to `frames` they do not overlap.
        whole_runs: one item per run, with the "starts" of its clips.
        labels: of each participant, added as the items' "label"; None: none is.

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
    return Clips(runs, frames, stride, whole_runs, labels)


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
) -> Clips:
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
    runs = read_index(store)["runs"]
    if not runs:
        raise InputError(f"{store}: the store holds no prepared run; see its summary.tsv and prepare again")
    splits = load_splits(splits_file)
    check_participants(splits, {run["participant_id"] for run in runs}, splits_file)
    members = set(splits["sets"][subset]) - (set(target.missing) if target else set())
    chosen = [run for run in runs if run["participant_id"] in members]
    labels = None if target is None else _labels(chosen, target, subset, store)
    if labels is not None and label_shuffle_seed is not None:
        labels = _shuffled(labels, chosen, subset, label_shuffle_seed)
    items = clips(chosen, frames=frames, stride=stride, whole_runs=whole_runs, labels=labels)
    logger.info(
        "%s set: %d clips of %d frames from %d runs of %d participants",
        subset,
        items.clip_count,
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
