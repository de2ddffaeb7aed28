"""What sees what: readouts of frozen encoders, and plain connectivity, on cohorts whose truth is known.

A plan (see configs/dynamics.json) names cohorts, encoders and readouts. Of each cohort all subjects are tested once, in
folds by site and diagnosis; everything is fitted to a fold's training subjects alone. Encoders are pretrained first, on
a synthetic cohort of other subjects without any difference between groups.

What is done is kept: one file per cohort and encoder, `cells/<cohort>/<encoder>.csv`, with each tested subject's logit
for every readout. A cohort's images are made where a cell is missing, and deleted afterwards. Pretraining goes on from
its last epoch. Each pretrained encoder's network rebuilds hidden regions of the pretraining cohort's test subjects,
beside a ridge regression. Commands that share a folder of results wait for each other's cohorts and pretrainings.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bundle.anatomy.atlas import AAL3, load_atlas
from bundle.data.splits import make_splits, save_splits
from bundle.errors import InputError
from bundle.evaluation.reconstruction import regions_rebuilt
from bundle.experiments.auroc import PAINTED, differences, summarise
from bundle.experiments.frozen import CEILING, CONNECTIVITY, Design, connectivity_rows, encoder_rows
from bundle.experiments.synthetic import EFFECTS
from bundle.experiments.trial import Strategy
from bundle.experiments.truth import painted_cohort, prepared_cohort
from bundle.files import file_sha256, slug, write_text
from bundle.heads.combat import COMBAT
from bundle.locks import locked
from bundle.preparation.store import read_manifest
from bundle.process import run_config
from bundle.workers import parallel_map

NO_ENCODER = "none"
SHIFTED = ("coupling", "intensity")
REBUILT, RIDGE = "reconstruction/reconstruction.csv", "ridge/reconstruction.csv"


@dataclass(frozen=True)
class Plan:
    """What a plan's JSON file says.

    Attributes:
        results: folder of the results.
        cohorts: "nothing", or what differs between the groups (`EFFECTS`), or "painted". None at all: encoders are
            pretrained and compared by what they rebuild.
        seeds: of the cohorts; of "painted", of its noise, and of all folds.
        encoders: name to what it is: `{"size": {...}, "normalisation": {...}}` has random weights;
            `{"mask": ..., "overrides": {...}}` is pretrained by pretrain.json, with a mask as of a sweep's strategy;
            `{"checkpoint": path}` was pretrained elsewhere. `"against"` names the one that it is compared with.
        readouts: name to `{"kind": "mean", "attention" or "covariance"}` and its head's arguments; a mean may have
            `"harmonise": "combat"`.
        subjects: of each synthetic cohort.
        effect: planted, Cohen's d.
        duration_s: of each synthetic run.
        folds: in which every subject is tested once.
        sizes: numbers of training subjects, beside all of them.
        shift: regions whose voxels are moved in time by half a run in the test subjects, as a control of the cohorts
            `SHIFTED`; none if empty.
        pretraining: of its cohort `subjects` and `seed`, and `overrides` of pretrain.json for all encoders.
        painted: arguments of `paint`, without its folder and seed.
        atlas: of masks, connectivity, covariance readouts and shifted regions. Synthetic cohorts are made with AAL3.
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
    pretraining: Mapping[str, Any] | None = None
    painted: Mapping[str, Any] | None = None
    atlas: str = AAL3


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
    for name, readout in plan.readouts.items():
        if "harmonise" in readout and dict(readout) != {"kind": "mean", "harmonise": COMBAT}:
            raise InputError(f"{path}: readout {name!r}: harmonise is {COMBAT!r}, and belongs to the kind mean alone")
    return plan


def run_plan(plan: Plan, workers: int = 1) -> pd.DataFrame:
    """Make every cell that is missing, and return all.

    Args:
        plan: what to run.
        workers: pretrainings, and then cohorts, at a time.

    Returns:
        A row per tested subject: `WHAT`, `seed`, `fold`, `participant_id`, `label` and `logit`; none if the plan has no
        cohorts, but encoders to pretrain.
    """
    _pretrain(plan, workers)
    cohorts = [(cohort, seed) for seed in plan.seeds for cohort in plan.cohorts]
    with parallel_map(workers, None) as each:
        each(partial(_run_cohort, plan), cohorts, "cohorts")
    paths = [_cell(plan, *cohort, name) for cohort in cohorts for name in _cells(plan)]
    tables = [pd.read_csv(path, dtype={"participant_id": str}) for path in paths]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def rebuilt(plan: Plan) -> pd.DataFrame:
    """How well hidden regions of the pretraining cohort's test subjects are rebuilt.

    Returns:
        Rows of `encoder`, `by` ("network" or "ridge regression"), `region` (with "all"), `temporal_r2`, `low` and
        `high`; each region is hidden in turn, whole, at all frames.
    """
    found = [
        regions_rebuilt(_checkpoint(plan, name).parent / file).assign(encoder=name, by=by)
        for name in _pretrained(plan)
        for by, file in (("network", REBUILT), ("ridge regression", RIDGE))
    ]
    columns = ["encoder", "by", "region", "temporal_r2", "low", "high"]
    return pd.concat(found, ignore_index=True)[columns] if found else pd.DataFrame(columns=columns)


def _pretrain(plan: Plan, workers: int) -> None:
    """Pretrain the encoders that are to be, each from where it was left, and rebuild hidden regions with each."""
    folder = Path(plan.results).absolute() / "pretraining"
    wanted = _pretrained(plan)
    if not wanted:
        return
    if plan.pretraining is None:
        raise InputError(f"the plan's encoder {min(wanted)!r} is to be pretrained, but it does not say on what")
    subjects, seed = plan.pretraining["subjects"], plan.pretraining["seed"]
    with locked(Path(f"{folder}.lock"), patience_s=math.inf):
        store = prepared_cohort(folder, subjects, "nothing", 0.0, seed, plan.duration_s)
        if not (folder / "splits.json").is_file():
            save_splits(make_splits(read_manifest(store)["runs"]), folder / "splits.json")
        with parallel_map(workers, None) as each:
            each(partial(_pretrain_one, plan, store), wanted, "encoders")


def _pretrained(plan: Plan) -> list[str]:
    return [name for name, settings in plan.encoders.items() if "mask" in settings]


def _pretrain_one(plan: Plan, store: Path, name: str) -> None:
    settings = plan.encoders[name]
    overrides = settings.get("overrides", {})
    configs = ["pretrain", *Strategy(name, settings["mask"]).overlays]
    _run(plan, store, name, None, "pretrain", configs, overrides)
    _run(plan, store, name, REBUILT, "run", [*configs, "reconstruct"], overrides)
    units = {key: value for key, value in overrides.items() if key.startswith("normalisation")}
    _run(plan, store, name, RIDGE, "run", ["pretrain", "reconstruct", "ridge"], units)  # of whole regions: its own mask


def _run(
    plan: Plan,
    store: Path,
    name: str,
    result: str | None,
    run_id: str,
    configs: list[str],
    overrides: Mapping[str, Any],
) -> None:
    """Run configs in an encoder's folder, unless the result (there) has been made."""
    place = _checkpoint(plan, name).parent
    if plan.pretraining is None or (result is not None and (place / result).is_file()):
        return
    given = {"dataset_dir": store, "splits_file": store.parent / "splits.json", "atlas": plan.atlas}
    run_config(run_id, configs, given | {"output_dir": place} | plan.pretraining["overrides"] | overrides)


def _checkpoint(plan: Plan, encoder: str) -> Path:
    """Of an encoder with weights, the file that has them."""
    settings = plan.encoders[encoder]
    made = Path(plan.results).absolute() / "pretraining" / slug(encoder) / "best.pt"
    return Path(settings["checkpoint"]) if "checkpoint" in settings else made


def _cells(plan: Plan) -> dict[str, Mapping[str, Any]]:
    return {NO_ENCODER: {}} | dict(plan.encoders)


def _cell(plan: Plan, cohort: str, seed: int, encoder: str) -> Path:
    """The file of a cell, whose name holds a hash of all that shapes it."""
    settings = {key: value for key, value in _cells(plan)[encoder].items() if key != "against"}
    if encoder != NO_ENCODER and "size" not in settings:
        settings = {"checkpoint": file_sha256(_checkpoint(plan, encoder))}
    shaping = [settings, plan.subjects, plan.effect, plan.duration_s, plan.folds, list(plan.sizes), list(plan.shift)]
    shaping += [
        plan.painted if cohort == PAINTED else None,
        [*CONNECTIVITY, CEILING] if encoder == NO_ENCODER else dict(plan.readouts),
    ]
    shaping += [] if plan.atlas == AAL3 else [load_atlas(plan.atlas).sha256]
    digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:8]
    return Path(plan.results) / "cells" / f"{cohort}_seed-{seed}" / f"{slug(encoder)}-{digest}.csv"


def _run_cohort(plan: Plan, which: tuple[str, int]) -> None:
    folder = Path(plan.results) / "cohorts" / "{}_seed-{}".format(*which)
    if _missing(plan, *which):  # a finished cohort is neither waited for nor written to
        with locked(Path(f"{folder}.lock"), patience_s=math.inf):
            if missing := _missing(plan, *which):  # another command may have finished it meanwhile
                _run_missing(plan, *which, folder, missing)


def _missing(plan: Plan, cohort: str, seed: int) -> list[str]:
    return [name for name in _cells(plan) if not _cell(plan, cohort, seed, name).is_file()]


def _run_missing(plan: Plan, cohort: str, seed: int, folder: Path, missing: list[str]) -> None:
    torch.set_num_threads(1)
    store = _store(plan, folder, cohort, seed)
    design = Design(plan.readouts, plan.folds, plan.sizes, plan.shift if cohort in SHIFTED else (), seed, plan.atlas)
    for name in missing:
        if name == NO_ENCODER:
            made = connectivity_rows(design, store, cohort != PAINTED)
        else:
            settings = plan.encoders[name]
            given = settings if "size" in settings else {"checkpoint": _checkpoint(plan, name)}
            made = encoder_rows(design, store, given)
        rows = pd.DataFrame(made).assign(cohort=cohort, seed=seed, encoder=name)
        write_text(_cell(plan, cohort, seed, name), rows.to_csv(index=False))
    shutil.rmtree(folder)


def _store(plan: Plan, folder: Path, cohort: str, seed: int) -> Path:
    """Make a cohort's images in a folder, prepare them, and return the store."""
    if cohort != PAINTED:
        return prepared_cohort(folder, plan.subjects, cohort, plan.effect, seed, plan.duration_s)
    if plan.painted is None:
        raise InputError("the plan has no `painted`: the arguments of `python -m scripts paint`")
    return painted_cohort(folder, seed=seed, **plan.painted)


def write_tables(plan: Plan, rows: pd.DataFrame, resamples: int = 2000) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write `dynamics.csv` and `dynamics_differences.csv` to the plan's results, and return both.

    Writes `dynamics_r2.csv`, see `rebuilt`, beside them.

    Each encoder and readout is compared with the encoder that its plan names, and with every kind of connectivity.
    """
    write_text(Path(plan.results) / "dynamics_r2.csv", rebuilt(plan).to_csv(index=False, float_format="%.4f"))
    if rows.empty:
        return rows, rows
    pairs = []
    for cohort in plan.cohorts:
        for encoder, settings in plan.encoders.items():
            for readout in plan.readouts:
                first = {"cohort": cohort, "encoder": encoder, "readout": readout}
                if "against" in settings:
                    pairs.append((first, first | {"encoder": settings["against"]}))
                rivals = [*CONNECTIVITY, *([] if cohort == PAINTED else [CEILING])]
                pairs += [(first, {"cohort": cohort, "encoder": NO_ENCODER, "readout": rival}) for rival in rivals]
    tables = summarise(rows, resamples), differences(rows, pairs, resamples)
    for name, table in zip(("dynamics", "dynamics_differences"), tables, strict=True):
        write_text(Path(plan.results) / f"{name}.csv", table.to_csv(index=False, float_format="%.4f"))
    return tables
