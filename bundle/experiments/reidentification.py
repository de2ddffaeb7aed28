"""Which scan belongs to whom? Features of a frozen encoder against connectivity, and against the brain's outline."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.inferers import Inferer
from monai.transforms import Compose
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor
from tqdm.auto import tqdm

from bundle.anatomy import grid
from bundle.anatomy.atlas import AAL3, load_atlas
from bundle.errors import InputError
from bundle.experiments.baselines import region_series
from bundle.files import write_text
from bundle.heads.covariance import correlation_of_labels
from bundle.heads.pooling import pool, token_shares
from bundle.networks.swin_mamba import SwinMambaEncoder
from bundle.preparation.store import read_run, read_voxels

logger = logging.getLogger(__name__)

RANKS = (1, 5)
STAGE = 1
FEATURES = ("mean token", "connectivity of tokens", "connectivity of labels", "brain mask")
"""The first two are the encoder's. Connectivity of labels needs none: the fingerprint of Finn et al. 2015 (Nature
Neuroscience 18:1664). The brain's outline says how much is told by what is no activity at all."""


@dataclass(frozen=True)
class Part:
    """What is compared: the clips of a run, or of one half of it.

    Attributes:
        participant: whose it is.
        clips: as for `bundle.data.transforms.ReadClipd`, in order.
        frames: the first frame, and the one after the last.
    """

    participant: str
    clips: Sequence[dict[str, Any]]
    frames: tuple[int, int]


def pairs_of(runs: Sequence[dict[str, Any]], frames: int, gap: int) -> tuple[list[Part], list[Part], str]:
    """Two parts of each participant, one for the gallery and one as a probe.

    Args:
        runs: whole runs, see `bundle.data.clips.split_clips`.
        frames: of a clip.
        gap: frames at least between two halves of a run.

    Returns:
        The gallery, the probes in the same order, and "runs" or "halves": of everybody the first two runs, or, where
        somebody has one only, the two ends of the first run.

    Raises:
        InputError: fewer than two participants, or a run too short for two clips in each half.
    """
    by_name: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_name.setdefault(run["participant_id"], []).append(run)
    if len(by_name) < 2:
        raise InputError(f"one of {len(by_name)} participants cannot be told from others; take a larger --subset")
    if min(map(len, by_name.values())) > 1:
        chosen = [[_part(name, own[k], own[k]["starts"], frames) for name, own in by_name.items()] for k in (0, 1)]
        return chosen[0], chosen[1], "runs"
    gallery, probes = [], []
    for name, (run, *_) in by_name.items():
        starts = run["starts"]
        middle = (starts[0] + starts[-1] + frames) / 2
        first = [start for start in starts if start + frames <= middle - gap / 2]
        second = [start for start in starts if start >= middle + gap / 2]
        if min(len(first), len(second)) < 2:
            raise InputError(
                f"run {run['run_id']} is too short for two halves of two clips with a gap of {gap} frames; give a "
                "smaller --gap or --frames, or leave short runs out of the subset"
            )
        gallery.append(_part(name, run, first, frames))
        probes.append(_part(name, run, second, frames))
    return gallery, probes, "halves"


def _part(name: str, run: dict[str, Any], starts: Sequence[int], frames: int) -> Part:
    rest = {key: value for key, value in run.items() if key != "starts"}
    return Part(name, [rest | {"start": start} for start in starts], (starts[0], starts[-1] + frames))


@torch.no_grad()
def reidentify(
    encoder: SwinMambaEncoder,
    inferer: Inferer,
    runs: Sequence[dict[str, Any]],
    transforms: Sequence[Callable],
    store: str | Path,
    output_dir: str | Path,
    gap: int = 10,
    atlas: str | Path = AAL3,
) -> pd.DataFrame:
    """Find each participant's probe in a gallery of all participants, by several features; see `FEATURES`.

    Nothing is trained. Features are taken around the gallery's mean and compared by cosine; a probe is found at rank k
    if fewer than k of the gallery's others are as near to it as its own.

    Args:
        encoder: frozen.
        inferer: runs it in the precision that it was trained in.
        runs: dataset of whole runs.
        transforms: from a clip to `image` `(channels, X, Y, Z, T)`, on the device.
        store: the prepared store.
        output_dir: folder of `reidentification.csv`.
        gap: see `pairs_of`.
        atlas: see `bundle.anatomy.atlas.load_atlas`.

    Returns:
        Rows of `features`, `rank`, `share` of the participants found, with its exact 95 % limits `low` and `high`
        (Clopper and Pearson), `chance`, `participants` and `parts`.

    Raises:
        InputError: as `pairs_of`.
    """
    encoder.eval()
    gallery, probes, parts = pairs_of([runs[i] for i in range(len(runs))], encoder.frames, gap)
    found = _features(encoder, inferer, transforms, store, [*gallery, *probes], atlas)
    rows = []
    for name in FEATURES:
        ranks = ranks_of(found[name][: len(gallery)], found[name][len(gallery) :])
        for rank in RANKS:
            hits = int((ranks < rank).sum())
            limits = binomtest(hits, len(ranks)).proportion_ci(0.95, method="exact")
            row = {"features": name, "rank": rank, "share": hits / len(ranks), "low": limits.low, "high": limits.high}
            row |= {"chance": min(rank / len(ranks), 1), "participants": len(ranks), "parts": parts}
            rows.append(row)
            logger.info("Found at rank %d of %d by %s: %.3f", rank, len(ranks), name, row["share"])
    table = pd.DataFrame(rows)
    write_text(Path(output_dir) / "reidentification.csv", table.to_csv(index=False))
    return table


def ranks_of(gallery: NDArray[np.float64], probes: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many of the gallery's others are as near to each probe as its own: rows (n, f) in the same order, (n,)."""
    mean = gallery.mean(0)
    unit = [
        rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        for rows in (gallery - mean, probes - mean)
    ]
    alike = np.round(unit[1] @ unit[0].T, 9)  # (probes, gallery); equal features are equally near
    return (alike >= np.diag(alike)[:, None]).sum(1) - 1


def _features(
    encoder: SwinMambaEncoder,
    inferer: Inferer,
    transforms: Sequence[Callable],
    store: str | Path,
    parts: Sequence[Part],
    atlas: str | Path,
) -> dict[str, NDArray[np.float64]]:
    """Each kind of features of all parts, (n, f)."""
    prepare, loaded = Compose(transforms), load_atlas(atlas)
    edge, _ = encoder.tokens_of(STAGE)
    shares = token_shares(atlas, edge, encoder.image_size)
    runs = {part.clips[0]["run_id"] for part in parts}  # of which two parts may be halves
    courses = {name: region_series(store, read_run(store, name), loaded) for name in runs}
    outlines = {name: _outline(store, name, edge) for name in runs}
    rows: dict[str, list[NDArray]] = {name: [] for name in FEATURES}
    series = []
    for part in tqdm(parts, desc="features", unit="part"):
        means, labels = [], []
        for clip in part.clips:
            image = prepare(dict(clip))["image"].as_tensor()[None]
            tokens = list(inferer(image, _all_tokens(encoder)))
            means.append(tokens[-1].float().mean((1, 2, 3, 4))[0])
            labels.append(pool(tokens[STAGE], shares.to(tokens[STAGE].device)))
        rows["mean token"].append(torch.stack(means).mean(0).cpu().double().numpy())
        rows["connectivity of tokens"].append(correlation_of_labels(torch.cat(labels)).cpu().double().numpy())
        run_id = part.clips[0]["run_id"]
        rows["brain mask"].append(outlines[run_id])
        series.append(courses[run_id].iloc[slice(*part.frames)])
    shared = [name for name in series[0] if all(name in own for own in series)]
    upper = np.triu_indices(len(shared), 1)
    rows["connectivity of labels"] = [np.nan_to_num(np.corrcoef(own[shared].T.to_numpy()))[upper] for own in series]
    return {name: np.stack(found) for name, found in rows.items()}


def _all_tokens(encoder: SwinMambaEncoder) -> Callable[[Tensor], list[Tensor]]:
    return lambda image: list(encoder.all_tokens(image))


def _outline(store: str | Path, run_id: str, edge: int) -> NDArray[np.float64]:
    """Number of the brain's voxels in each cube of the grid."""
    places = np.stack(np.unravel_index(read_voxels(store, run_id), grid.SHAPE)) // edge
    cubes = [size // edge for size in grid.SHAPE]
    return np.bincount(np.ravel_multi_index(tuple(places), cubes), minlength=int(np.prod(cubes))).astype(float)
