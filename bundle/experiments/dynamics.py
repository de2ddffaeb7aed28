"""What sees what: readouts of frozen encoders, and plain connectivity, on cohorts whose truth is known.

A plan (see configs/dynamics.json) names cohorts, encoders and readouts. Of each cohort all subjects are tested once, in
folds by site and diagnosis; everything is fitted to a fold's training subjects alone. Encoders are pretrained first, on
a synthetic cohort of other subjects without any difference between groups.

What is done is kept: one file per cohort, encoder and readout, `cells/<cohort>/<encoder>-<readout>-<hash>.csv`, with
each tested subject's logit. A cohort's images are made where a cell is missing, and deleted afterwards. Pretraining
goes on from its last epoch. Each pretrained encoder's network rebuilds hidden regions of the pretraining cohort's test
subjects, beside a ridge regression. Commands that share a folder of results wait for each other's cohorts and
pretrainings.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bundle.anatomy.atlas import AAL3, load_atlas
from bundle.data.splits import make_splits, save_splits
from bundle.errors import InputError
from bundle.evaluation import reconstruction
from bundle.experiments.auroc import PAINTED, differences, summarise
from bundle.experiments.auroc_picture import what_sees_what
from bundle.experiments.frozen import CEILING, CONNECTIVITY, Design, connectivity_rows, encoder_rows
from bundle.experiments.synthetic import EFFECTS
from bundle.experiments.trial import Strategy
from bundle.experiments.truth import painted_cohort, prepared_cohort
from bundle.files import file_sha256, slug, write_bytes, write_text
from bundle.heads.combat import COMBAT
from bundle.locks import locked
from bundle.pages import png
from bundle.preparation.store import read_manifest
from bundle.process import run_config
from bundle.workers import parallel_map

NO_ENCODER = "none"
SHIFTED = ("coupling", "intensity")
REBUILT, RIDGE = "reconstruction/reconstruction.csv", "ridge/reconstruction.csv"
REBUILT_SUMS = "reconstruction/reconstruction_subjects.csv"


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
        folds: in which every subject is tested once.
        sizes: numbers of training subjects, beside all of them.
        shift: regions whose voxels are moved in time by half a run in the test subjects, as a control of the cohorts
            `SHIFTED`; none if empty.
        synthetic: of each synthetic cohort `subjects`, the planted `effect` (Cohen's d), and `duration_s` of its runs.
        pretraining: of its cohort `subjects`, `seed` and `duration_s`, and `overrides` of pretrain.json for all
            encoders.
        painted: arguments of `paint`, without its folder and seed.
        atlas: of masks, connectivity, covariance readouts and shifted regions. Synthetic cohorts are made with AAL3.
    """

    results: str
    cohorts: Sequence[str]
    seeds: Sequence[int]
    encoders: Mapping[str, Mapping[str, Any]]
    readouts: Mapping[str, Mapping[str, Any]]
    folds: int
    sizes: Sequence[int] = ()
    shift: Sequence[str] = ()
    synthetic: Mapping[str, Any] | None = None
    pretraining: Mapping[str, Any] | None = None
    painted: Mapping[str, Any] | None = None
    atlas: str = AAL3


def read_plan(path: str | Path, **changes: Any) -> Plan:
    """Read a plan's JSON file; `changes` that are not None replace its entries.

    Raises:
        InputError: it cannot be read, names an unknown cohort, or does not say of what one is made.
    """
    try:
        content = json.loads(Path(path).read_text()) | {name: value for name, value in changes.items() if value}
        plan = Plan(**content)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a plan ({error}); see configs/dynamics.json for an example") from error
    if unknown := set(plan.cohorts) - {"nothing", PAINTED, *EFFECTS}:
        raise InputError(f"{path}: cohorts are nothing, {', '.join(EFFECTS)} or {PAINTED}, not {min(unknown)!r}")
    for name, needed, keys in (
        ("synthetic", set(plan.cohorts) - {PAINTED}, {"subjects", "effect", "duration_s"}),
        ("pretraining", _pretrained(plan), {"subjects", "seed", "duration_s", "overrides"}),
        (PAINTED, set(plan.cohorts) & {PAINTED}, {"series", "participants", "atlas"}),
    ):
        if needed and (lacking := keys - set(getattr(plan, name) or {})):
            raise InputError(f"{path}: {min(needed)!r} needs {', '.join(sorted(lacking))} in the plan's {name!r}")
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
    paths = [path for cohort in cohorts for path in _cells(plan, *cohort).values()]
    tables = [pd.read_csv(path, dtype={"participant_id": str}) for path in paths]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def rebuilt(plan: Plan) -> pd.DataFrame:
    """How well hidden regions of the pretraining cohort's test subjects are rebuilt.

    Returns:
        Rows of `encoder`, `by` ("network" or "ridge regression"), `region` (with "all"), `temporal_r2`, `low` and
        `high`; each region is hidden in turn, whole, at all frames.
    """
    found = [
        reconstruction.regions_rebuilt(_checkpoint(plan, name).parent / file).assign(encoder=name, by=by)
        for name in _pretrained(plan)
        for by, file in (("network", REBUILT), ("ridge regression", RIDGE))
    ]
    columns = ["encoder", "by", "region", "temporal_r2", "low", "high"]
    return pd.concat(found, ignore_index=True)[columns] if found else pd.DataFrame(columns=columns)


def rebuilt_differences(plan: Plan, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """How much better hidden regions are rebuilt than with the encoder that a plan names, of the same subjects.

    Args:
        plan: what was run.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        Rows of `encoder`, `against`, `region` (with "all"), `difference` of temporal R², `low` and `high`, of encoders
        that are both pretrained by the plan.
    """
    atlas, pretrained, found = load_atlas(plan.atlas), _pretrained(plan), []
    for encoder in pretrained:
        if (against := plan.encoders[encoder].get("against")) in pretrained:
            paths = [_checkpoint(plan, name).parent / REBUILT_SUMS for name in (encoder, against)]
            first, second = (pd.read_csv(path, dtype={"participant_id": str}) for path in paths)
            table = reconstruction.differences(first, second, atlas, resamples, seed)
            found.append(table.assign(encoder=encoder, against=against))
    columns = ["encoder", "against", "region", "difference", "low", "high"]
    return pd.concat(found, ignore_index=True)[columns] if found else pd.DataFrame(columns=columns)


def _pretrain(plan: Plan, workers: int) -> None:
    """Pretrain the encoders that are to be, each from where it was left, and rebuild hidden regions with each."""
    folder = Path(plan.results).absolute() / "pretraining"
    wanted = _pretrained(plan)
    if not wanted or plan.pretraining is None:
        return
    cohort = {key: value for key, value in plan.pretraining.items() if key != "overrides"}
    with locked(Path(f"{folder}.lock"), patience_s=math.inf):
        store = prepared_cohort(folder, planted="nothing", effect=0.0, **cohort)
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


def _rivals(cohort: str) -> list[str]:
    return [*CONNECTIVITY, *([] if cohort == PAINTED else [CEILING])]


def _cells(plan: Plan, cohort: str, seed: int) -> dict[tuple[str, str], Path]:
    """The file of each encoder and readout, whose name holds a hash of all that shapes it."""
    tests: list[Any] = [plan.folds, list(plan.sizes), plan.painted if cohort == PAINTED else plan.synthetic]
    tests += [] if plan.atlas == AAL3 else [load_atlas(plan.atlas).sha256]
    shaping: dict[tuple[str, str], list] = {(NO_ENCODER, rival): [rival] for rival in _rivals(cohort)}
    for encoder, given in plan.encoders.items():
        settings = {key: value for key, value in given.items() if key != "against"}
        if "size" not in given:
            settings = {"checkpoint": file_sha256(_checkpoint(plan, encoder))}
        shift = list(plan.shift) if cohort in SHIFTED else []
        shaping |= {(encoder, name): [settings, readout, shift] for name, readout in plan.readouts.items()}
    paths = {}
    for names, own in shaping.items():
        digest = hashlib.sha256(json.dumps([*own, *tests], sort_keys=True).encode()).hexdigest()[:8]
        file = f"{slug(names[0])}-{slug(names[1])}-{digest}.csv"
        paths[names] = Path(plan.results) / "cells" / f"{cohort}_seed-{seed}" / file
    return paths


def _run_cohort(plan: Plan, which: tuple[str, int]) -> None:
    folder = Path(plan.results) / "cohorts" / "{}_seed-{}".format(*which)
    if _missing(plan, *which):  # a finished cohort is neither waited for nor written to
        with locked(Path(f"{folder}.lock"), patience_s=math.inf):
            if missing := _missing(plan, *which):  # another command may have finished it meanwhile
                _run_missing(plan, *which, folder, missing)


def _missing(plan: Plan, cohort: str, seed: int) -> dict[tuple[str, str], Path]:
    return {names: path for names, path in _cells(plan, cohort, seed).items() if not path.is_file()}


def _run_missing(plan: Plan, cohort: str, seed: int, folder: Path, missing: Mapping[tuple[str, str], Path]) -> None:
    torch.set_num_threads(1)
    store = _store(plan, folder, cohort, seed)
    design = Design(plan.readouts, plan.folds, plan.sizes, plan.shift if cohort in SHIFTED else (), seed, plan.atlas)
    for encoder, names in groupby(missing, itemgetter(0)):
        wanted = [readout for _, readout in names]
        if encoder == NO_ENCODER:
            made = connectivity_rows(design, store, wanted)
        else:
            settings = plan.encoders[encoder]
            given = settings if "size" in settings else {"checkpoint": _checkpoint(plan, encoder)}
            chosen = replace(design, readouts={name: plan.readouts[name] for name in wanted})
            made = encoder_rows(chosen, store, given)
        for readout, rows in zip(wanted, made, strict=True):  # each is kept as soon as it is there
            table = pd.DataFrame(rows).assign(cohort=cohort, seed=seed, encoder=encoder)
            write_text(missing[encoder, readout], table.to_csv(index=False))
    shutil.rmtree(folder)


def _store(plan: Plan, folder: Path, cohort: str, seed: int) -> Path:
    """Make a cohort's images in a folder, prepare them, and return the store."""
    if cohort != PAINTED:
        return prepared_cohort(folder, planted=cohort, seed=seed, **(plan.synthetic or {}))
    return painted_cohort(folder, seed=seed, **(plan.painted or {}))


def write_tables(plan: Plan, rows: pd.DataFrame, resamples: int = 2000) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write `dynamics.csv` and `dynamics_differences.csv` to the plan's results, and return both.

    Writes `dynamics_r2.csv` and `dynamics_r2_differences.csv`, see `rebuilt` and `rebuilt_differences`, and the picture
    `dynamics.png`, see `what_sees_what`, beside them.

    Each encoder and readout is compared with the encoder that its plan names, and with every kind of connectivity.
    """
    for name, table in (("r2", rebuilt(plan)), ("r2_differences", rebuilt_differences(plan, resamples))):
        write_text(Path(plan.results) / f"dynamics_{name}.csv", table.to_csv(index=False, float_format="%.4f"))
    if rows.empty:
        return rows, rows
    pairs = []
    for cohort in plan.cohorts:
        for encoder, settings in plan.encoders.items():
            for readout in plan.readouts:
                first = {"cohort": cohort, "encoder": encoder, "readout": readout}
                if "against" in settings:
                    pairs.append((first, first | {"encoder": settings["against"]}))
                pairs += [
                    (first, {"cohort": cohort, "encoder": NO_ENCODER, "readout": rival}) for rival in _rivals(cohort)
                ]
    tables = summarise(rows, resamples), differences(rows, pairs, resamples)
    for name, table in zip(("dynamics", "dynamics_differences"), tables, strict=True):
        write_text(Path(plan.results) / f"{name}.csv", table.to_csv(index=False, float_format="%.4f"))
    write_bytes(Path(plan.results) / "dynamics.png", png(what_sees_what(tables[0], NO_ENCODER)))
    return tables
