"""What a classifier's training subjects are like, kept with it, so that what is unlike them is noticed.

Distances are over what the head weighs: for a linear head, who is given an extreme output is far in it.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import numpy as np
import torch
from monai.data import Dataset
from monai.networks.utils import eval_mode
from torch import nn
from tqdm.auto import tqdm

from bundle.data.batches import PrepareBatch
from bundle.data.clips import clips_of
from bundle.errors import InputError
from bundle.evaluation.unlike import Floats, exceedance, fit_distances, log_distances, log_distances_left_out
from bundle.networks.precision import PrecisionInferer
from bundle.preparation.acquisition import acquisition
from bundle.preparation.store import content_sha256, read_manifest
from bundle.tasks.scores import mean_outputs
from bundle.tasks.task import Task
from bundle.training.checkpoints import load_checkpoint, load_network, write_checkpoint
from bundle.training.provenance import Provenance

logger = logging.getLogger(__name__)

FEWEST = 3
"""Training subjects, of whom one is left out."""
FEATURES_FLOOR = 1e-4
"""Of features, as a share of the largest: what differs by less differs by rounding."""
ACQUISITION_FLOOR = 0.01
"""Of intensity and coverage: one percent."""
SAME_TR = 0.01
"""A TR that differs by less than this share is the same."""


class Observed(NamedTuple):
    """What is known of a participant.

    Attributes:
        participant: identifier.
        features: what the head weighs, the mean over clips or runs, (d,).
        outputs: of the network, of each clip or run, (k,) each.
        label: number of the class, or value.
        acquisition: see `bundle.preparation.acquisition.acquisition`.
        hashes: of each run's file and of its content.
    """

    participant: str
    features: Floats
    outputs: list[list[float]]
    label: float
    acquisition: dict[str, Any]
    hashes: set[str]


class Finding(NamedTuple):
    """How unlike the training subjects a participant is in one respect, 0 to 1, and that in words."""

    percentile: float
    words: str


def keep_reference(
    network: nn.Module,
    inferer: PrecisionInferer,
    prepare_batch: PrepareBatch,
    task: Task,
    training: Dataset,
    validation: Dataset,
    store: str | Path,
    folder: str | Path,
    provenance: Provenance,
    device: torch.device,
) -> None:
    """Add to `best.pt` what the training subjects are like, and what the validation subjects say of its outputs.

    Where it is there already, nothing is done. The network is left with the weights of `best.pt`.

    Args:
        network: the classifier.
        inferer: how it is served.
        prepare_batch: makes `features` of clips at fixed places.
        task: what is predicted.
        training: the labelled clips, or whole runs, of the training set.
        validation: those of the validation set.
        store: the prepared store.
        folder: of the checkpoints.
        provenance: of this training.
        device: where the network is.

    Raises:
        InputError: the checkpoint was made with other settings, or there are too few training subjects.
    """
    idist.barrier()  # the first process has written it
    path = Path(folder) / "best.pt"
    saved = load_checkpoint(path)
    if "reference" in saved:
        logger.info("%s: knows its training subjects already", path)
        return
    load_network(network, path, provenance)
    trained, validated = (
        observe(network, inferer, prepare_batch, dataset.data, store, device, name)
        for name, dataset in (("training", training), ("validation", validation))
    )
    if idist.get_rank() == 0:
        write_checkpoint(saved | {"reference": reference_of(trained, validated, task)}, path)
        logger.info("%s: knows its %d training subjects now", path, len(trained))
    idist.barrier()


def observe(
    network: nn.Module,
    inferer: PrecisionInferer,
    prepare_batch: PrepareBatch,
    items: Sequence[Mapping[str, Any]],
    store: str | Path,
    device: torch.device,
    name: str,
) -> list[Observed]:
    """What is known of the participants of some labelled clips or whole runs; processes share them out."""
    records = {run["run_id"]: run for run in read_manifest(store)["runs"]}
    own: dict[str, list[Mapping[str, Any]]] = {}
    for item in items:
        own.setdefault(item["participant_id"], []).append(item)
    found = []
    world = idist.get_world_size()
    shares = [sorted(own)[start : start + world] for start in range(0, len(own), world)]
    for share in tqdm(shares, desc=f"{name} subjects"):
        idist.barrier()  # no process gets so far ahead that it takes another for lost
        if idist.get_rank() >= len(share):
            continue
        participant = share[idist.get_rank()]
        seen, outputs = [], []
        for item in own[participant]:
            with eval_mode(network):
                features, _, counts, _ = prepare_batch([dict(item)], device)
                outputs.append(inferer(features, network, *counts)[0].float().tolist())
            seen.append(seen_by(network, features, [len(clips_of(item))])[0])
        runs = [records[run_id] for run_id in dict.fromkeys(item["run_id"] for item in own[participant])]
        label = float(own[participant][0]["label"])
        about = acquisition(store, runs), hashes_of(store, runs)
        found.append(Observed(participant, np.mean(seen, axis=0), outputs, label, *about))
    if world == 1:
        return found
    gathered: list[list[Observed]] = [[] for _ in range(world)]
    torch.distributed.all_gather_object(gathered, found)
    return sorted((one for part in gathered for one in part), key=lambda one: one.participant)


def seen_by(network: nn.Module, features: torch.Tensor, counts: Sequence[int]) -> Floats:
    """What a head weighs of features, float64, (n, d)."""
    with eval_mode(network):  # in which MONAI's engines leave no network; without gradients too
        return network.seen(features.float(), counts).cpu().double().numpy()  # type: ignore[operator]


def hashes_of(store: str | Path, records: Sequence[Mapping[str, Any]]) -> set[str]:
    """Hashes of runs: of their files' bytes, and of what was prepared from them."""
    made = {content_sha256(store, record["run_id"]) for record in records}
    return made | {record["source_sha256"] for record in records}


def reference_of(training: Sequence[Observed], validation: Sequence[Observed], task: Task) -> dict[str, Any]:
    """Everything that serving needs, as tensors and plain values.

    Of single participants it holds hashes and distances.

    Args:
        training: the training subjects.
        validation: the validation subjects, of whom are the threshold and the temperature; how unlike they are is kept
            too, since none of what is measured was fitted to them.
        task: what is predicted.

    Returns:
        "participants", how many; "features", "intensity", "coverage": see `fit_distances`, with "names" of columns and
        the logarithms of the participants' own distances, "others"; "motion", these of mean framewise displacement, or
        None where it is not known; "tr" and "masks", which there were; "hashes" of "training" and "validation"; and
        "calibration".

    Raises:
        InputError: there are fewer than three training subjects.
    """
    if len(training) < FEWEST:
        raise InputError(
            f"the training set holds {len(training)} subjects, too few to say what is like them; make other splits"
        )
    features = np.stack([one.features for one in training])
    reference: dict[str, Any] = {
        "participants": len(training),
        "features": _measured(features, FEATURES_FLOOR * max(float(np.abs(features).max()), FEATURES_FLOOR), []),
    }
    for name in ("intensity", "coverage"):
        rows = [one.acquisition[name] for one in training]
        reference[name] = _measured(_rows(rows, list(rows[0])), ACQUISITION_FLOOR, list(rows[0]))
    motions = [one.acquisition["motion"] for one in training if one.acquisition["motion"] is not None]
    reference["motion"] = torch.tensor(sorted(motions), dtype=torch.float64) if len(motions) >= FEWEST else None
    for name in ("tr", "masks"):
        reference[name] = sorted({value for one in training for value in one.acquisition[name]})
    sets = {"training": training, "validation": validation}
    reference["hashes"] = {name: sorted(set().union(*(one.hashes for one in rows))) for name, rows in sets.items()}

    scores = mean_outputs(((one.participant, output) for one in validation for output in one.outputs), task)
    labels = np.array([one.label for one in sorted(validation, key=lambda one: one.participant)])
    outputs = scores[list(task.columns)].to_numpy(float)
    reference["calibration"] = {
        "threshold": task.threshold(labels, outputs),
        "temperature": task.temperature(labels, outputs),
        "validation_subjects": len(validation),
        "validation_percentiles": sorted(
            percentile_of(findings(reference, one.features, one.acquisition)) for one in validation
        ),
    }
    return reference


def _measured(rows: Floats, floor: float, names: list[str]) -> dict[str, Any]:
    made = fit_distances(rows, floor) | {"others": np.sort(log_distances_left_out(rows, floor))}
    return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in made.items()} | {"names": names}


def _rows(measures: Sequence[Mapping[str, float]], names: Sequence[str]) -> Floats:
    return np.array([[row[name] for name in names] for row in measures])


def findings(reference: Mapping[str, Any], features: Floats, about: Mapping[str, Any]) -> list[Finding]:
    """How unlike the training subjects a participant is, in each respect that is known.

    Of k respects with a distribution the probability of each is multiplied by k (Bonferroni), so that the largest
    percentile is above q of at most a share 1 - q of subjects like the training subjects. A TR outside the training
    subjects', or a mask of another origin, which no share of them can say the rarity of, has the percentile 1.

    Args:
        reference: see `reference_of`.
        features: what the head weighs, (d,).
        about: see `bundle.preparation.acquisition.acquisition`.
    """
    chances: list[tuple[float, str]] = []
    for name in ("features", "intensity", "coverage"):
        fitted = {key: value.numpy() for key, value in reference[name].items() if key != "names"}
        names = reference[name]["names"]
        row = _rows([about[name]], names) if names else features[None]
        chance = exceedance(float(log_distances(fitted, row)[0]), fitted["others"])
        if names:
            away = ((row - fitted["mean"]) / fitted["scale"])[0]
            most = int(np.abs(away).argmax())
            words = f"{name}, most of all {names[most]} ({away[most]:+.1f} SD)"
        else:
            words = "what the network reads of the scan"
        chances.append((chance, f"{words}, is far from the training subjects'"))
    if about["motion"] is not None and reference["motion"] is not None:
        moved = math.exp(about["motion"]) - 0.01
        chance = exceedance(about["motion"], reference["motion"].numpy())
        chances.append((chance, f"the head moves more ({moved:.2f} mm on average) than the training subjects'"))
    found = [Finding(1 - min(1.0, len(chances) * chance), words) for chance, words in chances]
    low, high = reference["tr"][0], reference["tr"][-1]
    if odd := [tr for tr in about["tr"] if not low * (1 - SAME_TR) <= tr <= high * (1 + SAME_TR)]:
        trained = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        found.append(Finding(1.0, f"the TR is {odd[0]:g} s, and of the training subjects {trained} s"))
    if other := sorted(set(about["masks"]) - set(reference["masks"])):
        trained = " or ".join(reference["masks"])
        found.append(Finding(1.0, f"the brain mask's origin is {other[0]!r}, and of the training subjects {trained!r}"))
    return found


def percentile_of(found: Sequence[Finding]) -> float:
    """How unlike the training subjects a participant is in all, 0 to 1."""
    return max(finding.percentile for finding in found)
