"""What sees what: readouts of frozen encoders, and plain connectivity, on cohorts whose truth is known.

A plan (see configs/dynamics.json) names cohorts, encoders and readouts. Of each cohort all subjects are tested once, in
folds by site and diagnosis; everything is fitted to a fold's training subjects alone. Encoders are pretrained
elsewhere, on other subjects.

What is done is kept: one file per cohort and encoder, `cells/<cohort>/<encoder>.csv`, with each tested subject's logit
for every readout. A cohort's images are made where a cell is missing, and deleted afterwards.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from bundle.anatomy import grid
from bundle.anatomy.atlas import labels_on, load_atlas, region_labels
from bundle.data.normalisation import Normalisation
from bundle.data.transforms import ScatterClipd, TimeLastd
from bundle.errors import InputError
from bundle.experiments.baselines import region_series
from bundle.experiments.painted import paint
from bundle.experiments.synthetic import EFFECTS, make_cohort
from bundle.files import file_sha256, write_text
from bundle.heads.attention import AttentionClassifier
from bundle.heads.connectivity import PENALTIES, ConnectivityClassifier, least_class
from bundle.heads.covariance import CovarianceReadout
from bundle.heads.pooling import pool
from bundle.networks.swin_mamba import SwinMambaEncoder
from bundle.preparation import store
from bundle.preparation.prepare import prepare, refuse_failed_rows
from bundle.preparation.scaling import run_moments
from bundle.preparation.sources import find_runs
from bundle.training.checkpoints import load_checkpoint, saved_facts
from bundle.workers import parallel_map

logger = logging.getLogger(__name__)

CONNECTIVITY = "connectivity"
PAINTED = "painted"
COLUMNS = ("cohort", "seed", "encoder", "readout", "size", "shuffled", "shifted", "fold", "participant_id", "label")


@dataclass(frozen=True)
class Plan:
    """What a plan's JSON file says.

    Attributes:
        results: folder of the results.
        cohorts: "nothing", or what differs between the groups (`EFFECTS`), or "painted".
        seeds: of the cohorts; of "painted", of its noise, and of all folds.
        encoders: name to `{"checkpoint": path}`, or to `{"size": {...}, "normalisation": {...}}` with random weights.
        readouts: name to `{"kind": "mean", "attention" or "covariance"}` and its head's arguments.
        subjects: of each synthetic cohort.
        effect: planted, Cohen's d.
        duration_s: of each synthetic run.
        folds: in which every subject is tested once.
        sizes: numbers of training subjects, beside all of them.
        shift: regions whose voxels are moved in time by half a run in the test subjects, as a control; none if empty.
        painted: arguments of `paint`, without its folder and seed.
    """

    results: str
    cohorts: Sequence[str]
    seeds: Sequence[int]
    encoders: Mapping[str, Mapping[str, Any]]
    readouts: Mapping[str, Mapping[str, Any]]
    subjects: int
    effect: float
    duration_s: float
    folds: int
    sizes: Sequence[int] = ()
    shift: Sequence[str] = ()
    painted: Mapping[str, Any] | None = None


def read_plan(path: str | Path, **changes: Any) -> Plan:
    """Read a plan's JSON file; `changes` that are not None replace its entries.

    Raises:
        InputError: it cannot be read, or names an unknown cohort.
    """
    try:
        content = json.loads(Path(path).read_text()) | {name: value for name, value in changes.items() if value}
        plan = Plan(**content)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a plan ({error}); see configs/dynamics.json for an example") from error
    if unknown := set(plan.cohorts) - {"nothing", PAINTED, *EFFECTS}:
        raise InputError(f"{path}: cohorts are nothing, {', '.join(EFFECTS)} or {PAINTED}, not {min(unknown)!r}")
    return plan


def run_plan(plan: Plan, workers: int = 1) -> pd.DataFrame:
    """Make every cell that is missing; return the logits of all (see `COLUMNS`, and `logit`).

    Args:
        plan: what to run.
        workers: cohorts at a time.
    """
    cohorts = [(cohort, seed) for seed in plan.seeds for cohort in plan.cohorts]
    with parallel_map(workers, None) as each:
        each(partial(_run_cohort, plan), cohorts, "cohorts")
    paths = [_cell(plan, *cohort, name) for cohort in cohorts for name in _cells(plan)]
    return pd.concat([pd.read_csv(path, dtype={"participant_id": str}) for path in paths], ignore_index=True)


def _cells(plan: Plan) -> dict[str, Mapping[str, Any]]:
    return {CONNECTIVITY: {}} | dict(plan.encoders)


def _cell(plan: Plan, cohort: str, seed: int, encoder: str) -> Path:
    """The file of a cell, whose name holds a hash of all that shapes it."""
    settings = dict(_cells(plan)[encoder])
    if "checkpoint" in settings:
        settings["checkpoint"] = file_sha256(settings["checkpoint"])
    shaping = [settings, plan.subjects, plan.effect, plan.duration_s, plan.folds, list(plan.sizes), list(plan.shift)]
    shaping += [plan.painted if cohort == PAINTED else None, {} if encoder == CONNECTIVITY else dict(plan.readouts)]
    digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:8]
    return Path(plan.results) / "cells" / f"{cohort}_seed-{seed}" / f"{encoder}-{digest}.csv"


def _run_cohort(plan: Plan, which: tuple[str, int]) -> None:
    cohort, seed = which
    missing = [name for name in _cells(plan) if not _cell(plan, cohort, seed, name).is_file()]
    if not missing:
        return
    torch.set_num_threads(1)
    folder = Path(plan.results) / "cohorts" / f"{cohort}_seed-{seed}"
    source = _images(plan, folder / "derivatives", cohort, seed)
    refuse_failed_rows(prepare(find_runs(source), folder / "store")["rows"])  # half a cohort is no test
    for name in missing:
        if name == CONNECTIVITY:
            made = _connectivity_rows(plan, folder / "store", seed)
        else:
            made = _encoder_rows(plan, folder / "store", seed, plan.encoders[name])
        rows = pd.DataFrame(made).assign(cohort=cohort, seed=seed, encoder=name)
        write_text(_cell(plan, cohort, seed, name), rows.to_csv(index=False))
    shutil.rmtree(folder)


def _images(plan: Plan, folder: Path, cohort: str, seed: int) -> Path:
    if cohort == PAINTED:
        if plan.painted is None:
            raise InputError("the plan has no `painted`: the arguments of `python -m scripts paint`")
        return paint(folder=folder, seed=seed, **plan.painted)
    effect_on, effect = ("coupling", 0.0) if cohort == "nothing" else (cohort, plan.effect)
    return make_cohort(folder, plan.subjects, effect, seed, duration_s=plan.duration_s, effect_on=effect_on)


Readout = Callable[[list, NDArray[np.int64], list], NDArray[np.float64]]
"""Fits to training rows and labels, and returns the logits of test rows."""


def _tested(
    plan: Plan, runs: Sequence[dict], seed: int, rows: Mapping[bool, list], readout: Readout, control: bool
) -> Iterator[dict[str, Any]]:
    """Test every subject once per training size; with all training subjects also under the controls.

    Args:
        plan: its folds, sizes and shift.
        runs: the records, one per subject.
        seed: of folds, subsets and shuffles.
        rows: False: what the readout is given of each subject; True: the same with regions shifted in time.
        readout: fits and scores.
        control: whether to run it with shuffled labels too.
    """
    labels = np.array([run["diagnosis"] for run in runs])
    strata = [f"{run['site']} {run['diagnosis']}" for run in runs]
    rng = np.random.default_rng(seed)
    shuffled = labels.copy()
    for site in sorted({run["site"] for run in runs}):  # within sites, see `bundle.data.clips`
        members = np.flatnonzero([run["site"] == site for run in runs])
        shuffled[members] = rng.permutation(labels[members])
    folds = StratifiedKFold(plan.folds, shuffle=True, random_state=seed)
    for fold, (train, test) in enumerate(folds.split(labels, strata)):
        jobs = [(labels, _some(train, labels, size, rng), size, False) for size in plan.sizes if size < len(train)]
        jobs.append((labels, train, 0, False))
        jobs += [(shuffled, train, 0, True)] if control else []
        for truth, chosen, size, shuffle in jobs:
            for shift in rows if size == 0 and not shuffle else [False]:
                given = [rows[False][i] for i in chosen]
                logits = readout(given, truth[chosen], [rows[shift][i] for i in test])
                for i, logit in zip(test, logits, strict=True):
                    yield {
                        "size": size, "shuffled": shuffle, "shifted": shift, "fold": fold,
                        "participant_id": runs[i]["participant_id"], "label": truth[i], "logit": float(logit),
                    }  # fmt: skip


def _some(train: NDArray, labels: NDArray, size: int, rng: np.random.Generator) -> NDArray:
    """A random half-and-half subset of training subjects."""
    parts = [rng.permutation(train[labels[train] == label])[: size // 2] for label in (0, 1)]
    return np.sort(np.concatenate(parts))


def _records(folder: Path) -> list[dict]:
    """The runs of a store, one per participant."""
    runs = store.read_manifest(folder)["runs"]
    if len({run["participant_id"] for run in runs}) < len(runs):
        raise InputError(f"{folder}: a participant has several runs; these cohorts have one each")
    least_class(np.array([run["diagnosis"] for run in runs]))
    return runs


def _connectivity_rows(plan: Plan, folder: Path, seed: int) -> Iterator[dict[str, Any]]:
    runs = _records(folder)
    atlas = load_atlas()
    tables = [region_series(folder, run, atlas) for run in runs]
    names = sorted(set.intersection(*(set(table) for table in tables)))
    series = [table[names].to_numpy() for table in tables]

    def fitted(rows: list, labels: NDArray, test: list) -> NDArray:
        model = ConnectivityClassifier(LogisticRegression(max_iter=5000, random_state=seed), seed)
        return model.fit(rows, labels).decision_function(test)

    for row in _tested(plan, runs, seed, {False: series}, fitted, control=True):
        yield row | {"readout": CONNECTIVITY}


def _encoder_rows(plan: Plan, folder: Path, seed: int, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    runs = _records(folder)
    encoder, normalisation = load_frozen(settings, seed)
    heads = {
        name: CovarianceReadout(**{k: v for k, v in arguments.items() if k != "kind"}, **encoder.size)
        for name, arguments in plan.readouts.items()
        if arguments["kind"] == "covariance"
    }
    for head in heads.values():
        head.encoder = encoder
    moved = region_labels(plan.shift, load_atlas().names) if plan.shift else ()
    kinds = {False: (), True: moved} if plan.shift else {False: ()}
    features = {
        shifted: [_features(folder, run, encoder, normalisation, heads, numbers) for run in runs]
        for shifted, numbers in kinds.items()
    }
    for name, arguments in plan.readouts.items():
        if arguments["kind"] == "covariance":
            readout, key = partial(_covariance, heads[name], seed), name
        else:
            readout, key = (
                {"mean": partial(_mean, seed), "attention": partial(_attention, encoder, seed)}[arguments["kind"]],
                "tokens",
            )
        rows = {shifted: [run[key] for run in found] for shifted, found in features.items()}
        for row in _tested(plan, runs, seed, rows, readout, control=True):
            yield row | {"readout": name}


def load_frozen(settings: Mapping[str, Any], seed: int) -> tuple[SwinMambaEncoder, Normalisation]:
    """A frozen encoder of a plan, and the units that it sees.

    Args:
        settings: `{"checkpoint": path}`, or `{"size": arguments of the encoder, "normalisation": arguments}`.
        seed: of random weights.
    """
    if "checkpoint" not in settings:
        torch.manual_seed(seed)
        encoder = SwinMambaEncoder(**settings["size"])
        return encoder.requires_grad_(False).eval(), Normalisation(**settings["normalisation"])
    saved = load_checkpoint(settings["checkpoint"])
    facts = saved_facts(saved, settings["checkpoint"])
    encoder = SwinMambaEncoder(**facts["network"])
    prefix = "encoder."
    state = {k.removeprefix(prefix): v for k, v in saved["network"].items() if k.startswith(prefix)}
    encoder.load_state_dict(state, strict=True)
    return encoder.requires_grad_(False).eval(), Normalisation(**facts["normalisation"])


@torch.no_grad()
def _features(
    folder: Path,
    run: dict,
    encoder: SwinMambaEncoder,
    normalisation: Normalisation,
    heads: Mapping[str, CovarianceReadout],
    moved: Sequence[int],
) -> dict[str, Tensor]:
    """Of a whole run: the last stage's tokens (C, tokens, c), and each covariance readout's features (C, T, P, c).

    Args:
        folder: the store.
        run: the run's record.
        encoder: the frozen encoder.
        normalisation: the units that it sees.
        heads: covariance readouts by name.
        moved: labels whose voxels are moved in time by half a run.
    """
    name, voxels = run["run_id"], store.read_voxels(folder, run["run_id"])
    frames = store.read_clip(folder, name, 0, run["frames"])
    if moved:
        columns = np.isin(labels_on(load_atlas(), grid.AFFINE, grid.SHAPE).ravel()[voxels], moved)
        frames[:, columns] = np.roll(frames[:, columns], len(frames) // 2, axis=0)
    moments = run_moments(store.read_moments(folder, name), run)
    scatter, time_last = ScatterClipd(normalisation), TimeLastd()
    found: dict[str, list[Tensor]] = {key: [] for key in ("tokens", *heads)}
    for start in range(0, len(frames) - encoder.frames + 1, encoder.frames):
        clip = {"frames": frames[start : start + encoder.frames], "voxels": voxels}
        item = time_last(scatter(clip | {"moments": moments, "fill": run["fill"]}))
        image = item["image"].as_tensor()[None]
        stages = list(encoder.all_tokens(image))  # (1, x, y, z, T, c)
        found["tokens"].append(stages[-1].flatten(1, 4))
        for key, head in heads.items():
            found[key].append(pool(stages[head.stage], head.shares))
    return {key: torch.cat(parts) for key, parts in found.items()}


def _covariance(head: CovarianceReadout, seed: int, rows: list, labels: NDArray, test: list) -> NDArray:
    head.fit(rows, labels.tolist(), seed)
    return head(torch.cat(test), [len(run) for run in test])[:, 0].numpy()


def _mean(seed: int, rows: list, labels: NDArray, test: list) -> NDArray:
    """The best that a linear unit on the mean token can do: a logistic regression whose penalty is tuned."""
    folds = StratifiedKFold(min(5, least_class(labels)), shuffle=True, random_state=seed)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    search = GridSearchCV(model, {"logisticregression__C": list(PENALTIES)}, scoring="roc_auc", cv=folds)
    search.fit([run.mean((0, 1)).numpy() for run in rows], labels)
    return search.decision_function([run.mean((0, 1)).numpy() for run in test])


def _attention(
    encoder: SwinMambaEncoder, seed: int, rows: list, labels: NDArray, test: list, epochs: int = 40
) -> NDArray:
    """`AttentionClassifier`, trained as by train.json with its overlay: AdamW, learning rate 0.001, batches of 8."""
    torch.manual_seed(seed)
    head = AttentionClassifier(**encoder.size)
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=1e-3)
    targets = torch.as_tensor(labels, dtype=torch.float32)[:, None]
    for _ in range(epochs):
        for batch in torch.randperm(len(rows)).split(8):
            chosen = [rows[int(i)] for i in batch]
            logits = head(torch.cat(chosen), [len(run) for run in chosen])
            loss = nn.functional.binary_cross_entropy_with_logits(logits, targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return head.eval()(torch.cat(test), [len(run) for run in test])[:, 0].numpy()
