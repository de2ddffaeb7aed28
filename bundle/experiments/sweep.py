"""Many masking strategies x seeds x folds: each trial pretrains, trains a classifier and tests it once.

A sweep is a small JSON file:

    store       prepared store
    results     folder of the results, one folder per trial in trials/
    splits      {"folds": 10, "seed": 0, "test": "all" or [0, 3] or "sites"}; "sites" leaves one site out at a time
    strategies  names of configs/masks, "random_weights" (no pretraining), or {"name", "mask", "pretrain", "train"}
                with overrides for the two stages, and "readout", a name of configs/readouts, if it is not the mean;
                {"mask": "equal", "regions": ["limbic", ["frontal", "cerebellum"]]} stands for one strategy per item,
                named equal_limbic and equal_frontal_cerebellum (of the mask "region", which is pretrain.json's own,
                just limbic); "atlas": ["AAL3", "AAL116"] multiplies likewise, and comes first: AAL3_equal_limbic
    baselines   names of `bundle.experiments.baselines.BASELINES`, or {"baseline": ..., "atlas": [...]}, named likewise;
                {"baseline": "connectivity_logistic", "harmonise": "combat"} takes effects of sites off, is called
                connectivity_logistic_combat, and has the baseline "site" beside it
    seeds       of the networks
    configs     overlays for every stage, such as "demo"
    target      column to predict; "diagnosis" by default, and beside it task and classes, as in train.json
    overrides   config id to value, for every stage; its "atlas" is that of the baselines and the report too
    pretrain    the same, for pretraining only
    train       the same, for classification and what follows it
    steps       beyond training and test: any of "reconstruct", "attribute"

Relative paths, in overrides too, count from the folder in which the sweep is started, wherever a trial is run.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from bundle.anatomy.atlas import AAL3, load_atlas, located
from bundle.data.splits import make_splits, save_splits
from bundle.data.targets import strata_of, target_of
from bundle.errors import InputError
from bundle.experiments.baselines import BASELINES, OF_LABELS, mean_motion, suitable
from bundle.experiments.trial import REGION, Strategy, Trial, is_finished, run_trial
from bundle.files import config_file, slug, write_json, write_text
from bundle.heads.combat import COMBAT
from bundle.preparation.store import read_manifest
from bundle.workers import dask_executor

logger = logging.getLogger(__name__)

STEPS = ("reconstruct", "attribute")
RANDOM_WEIGHTS = "random_weights"
SITE = "site"


@dataclass(frozen=True)
class Sweep:
    """What a sweep's JSON file says; see the module."""

    store: str
    results: str
    splits: Mapping[str, Any]
    strategies: Sequence[Any] = ()
    baselines: Sequence[Any] = ()
    target: str = "diagnosis"
    task: str | None = None
    classes: Sequence[Any] | None = None
    seeds: Sequence[int] = (0,)
    configs: Sequence[str] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    pretrain: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[str] = ("reconstruct",)
    bootstrap_resamples: int = 2000

    @property
    def predicted(self) -> dict[str, Any]:
        """The entries that say what is predicted, as `bundle.data.targets` takes them."""
        return {"target": self.target, "task": self.task, "classes": self.classes}


def read_sweep(path: str | Path, **changes: Any) -> Sweep:
    """Read a sweep's JSON file; `changes` that are not None replace its entries.

    Raises:
        InputError: it cannot be read, lacks an entry, or holds an unknown entry, strategy, baseline or step.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text()) | {name: value for name, value in changes.items() if value is not None}
        sweep = Sweep(**content)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a sweep ({error}); see configs/sweeps/paper.json for an example") from error
    rows, rivals = strategies(sweep), baselines(sweep)
    wanted = [rival.baseline for rival in rivals]
    for kind, named, known in (("baseline", wanted, BASELINES), ("step", sweep.steps, STEPS)):
        for name in named:
            if name not in known:
                raise InputError(f"{path}: {kind} {name!r} is unknown; choose from {', '.join(known)}")
    stages = [sweep.pretrain, sweep.train, *(given for row in rows for given in (row.pretrain, row.train))]
    if any("atlas" in given for given in stages):
        raise InputError(
            f"{path}: `atlas` belongs to a strategy or to `overrides`, so that all stages have the same one"
        )
    names = [strategy.name for strategy in rows + rivals]
    if len(set(names)) < len(names):
        raise InputError(f"{path}: two strategies have the same name; give each its own")
    if not names:
        raise InputError(f"{path}: names no strategy and no baseline, so there is nothing to run")
    return sweep


def strategies(sweep: Sweep) -> list[Strategy]:
    """All strategies of a sweep, those over several regions multiplied."""
    return [strategy for entry in sweep.strategies for strategy in _expand(entry)]


def baselines(sweep: Sweep) -> list[Strategy]:
    """All baselines of a sweep, those over several atlases multiplied; where sites are harmonised, what they tell."""
    found = [baseline for entry in sweep.baselines for baseline in _rivals(entry)]
    alone = any(own.harmonise for own in found) and all(own.baseline != SITE for own in found)
    return [Strategy(SITE, baseline=SITE), *found] if alone else found


def _rivals(entry: Any) -> list[Strategy]:
    """The baselines that one entry stands for; see the module."""
    if isinstance(entry, str):
        return [Strategy(entry, baseline=entry)]
    whole = isinstance(entry, Mapping) and {"baseline"} < set(entry) <= {"baseline", "atlas", "harmonise"}
    if not whole or entry["baseline"] not in OF_LABELS or entry.get("harmonise") not in (None, COMBAT):
        raise InputError(
            f"baseline {entry!r} must be a name, or have `atlas`, `harmonise` ({COMBAT!r}) or both and, as `baseline`, "
            f"one of {', '.join(OF_LABELS)}"
        )
    name, harmonise = entry["baseline"], entry.get("harmonise")
    return [
        Strategy(
            "_".join(part for part in (atlas and _stem(atlas), name, harmonise) if part),
            atlas=atlas,
            baseline=name,
            harmonise=harmonise,
        )
        for atlas in _listed(entry.get("atlas"))
    ]


def _expand(entry: Any) -> list[Strategy]:
    """The strategies that one entry stands for; see the module."""
    if isinstance(entry, str):
        found = [Strategy(entry, None if entry == RANDOM_WEIGHTS else entry)]
    elif isinstance(entry, Mapping) and ("atlas" in entry or "regions" in entry):
        rest = {key: value for key, value in entry.items() if key not in ("atlas", "regions")}
        found = []
        for atlas in _listed(entry.get("atlas")):
            over = [_over_regions(rest, one) for one in _listed(entry["regions"])] if "regions" in entry else [rest]
            found += [_made(_of_atlas(one, atlas)) for one in over]
    else:
        found = [_made(entry)]
    for strategy in found:
        for overlay in strategy.overlays + strategy.readouts:
            config_file(overlay)
    return found


def _listed(value: Any) -> list:
    """The items of a list, or one thing as a list."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _of_atlas(entry: Mapping[str, Any], atlas: str | None) -> dict[str, Any]:
    """An entry with its atlas, after which it is called."""
    if atlas is None:
        return dict(entry)
    name = entry.get("name", Path(entry.get("mask") or RANDOM_WEIGHTS).stem)
    return {**entry, "name": f"{_stem(atlas)}_{name}", "atlas": atlas}


def _stem(atlas: str) -> str:
    return Path(atlas).name.split(".")[0]


def _over_regions(entry: Mapping[str, Any], regions: str | Sequence[str]) -> dict[str, Any]:
    names = [regions] if isinstance(regions, str) else list(regions)
    mask = entry.get("mask", REGION)
    name = "_".join(names if mask == REGION else [Path(mask).stem, *names])
    rest = {key: value for key, value in entry.items() if key not in ("mask", "pretrain")}
    return {"name": name, "mask": mask, "pretrain": {"regions": names} | entry.get("pretrain", {})} | rest


def _made(entry: Any) -> Strategy:
    try:
        if {"baseline", "harmonise"} & set(entry):
            raise TypeError("a network is no baseline, and is served without knowing sites")
        return Strategy(**entry)
    except TypeError as error:
        raise InputError(
            f"strategy {entry!r} must be a name, or have name, mask, atlas, regions, pretrain, train and readout "
            f"({error})"
        ) from error


def plan_trials(sweep: Sweep) -> list[Trial]:
    """Write the split files, and list all trials, baselines first.

    Raises:
        InputError: the store cannot be read or split as asked, a config does not exist, or two sites or strategies
            would share files.
    """
    runs = read_manifest(sweep.store)["runs"]
    results = Path(sweep.results).absolute()
    target = sweep.predicted
    kind = target_of(runs, **target, source=sweep.store).kind
    named = [own.baseline or own.name for own in baselines(sweep)]
    if unsuited := [name for name in named if not BASELINES[name].suits(kind)]:
        raise InputError(f"the baseline {unsuited[0]} does not suit a {kind} target; {suitable(kind)}")
    folds = _folds(sweep.splits, runs, target)
    refuse_shared_files("sites", folds)
    refuse_shared_files("strategies", [strategy.name for strategy in strategies(sweep) + baselines(sweep)])
    # with their hash: another plan for the same folder never changes the splits of a trial that waits
    files = {f: results / "splits" / f"fold-{slug(f)}-{splits['sha256'][:8]}.json" for f, splits in folds.items()}
    for fold, splits in folds.items():
        save_splits(splits, files[fold])
    shared = {
        "data": read_manifest(sweep.store)["parameters_hash"],
        "runs": [[run[key] for key in ("run_id", "source_sha256", "site", "diagnosis", "participant")] for run in runs],
        "resamples": sweep.bootstrap_resamples,
        "target": target,
        "version": version("brain-fmri-roi-mae"),
    }
    networks_only = {
        "configs": {name: config_file(name).read_text() for name in ("pretrain", "train", "evaluate", *sweep.steps)},
        "overlays": [config_file(name).read_text() for name in sweep.configs],
        "overrides": dict(sweep.overrides),
        "steps": list(sweep.steps),
    }
    rivals = baselines(sweep)
    known = [rival for rival in rivals if rival.baseline != "head_motion" or mean_motion(runs) is not None]
    if len(known) < len(rivals):
        logger.warning("%s: head motion is not known, so there is no baseline head_motion", sweep.store)
    rows = [
        replace(own, pretrain={**sweep.pretrain, **own.pretrain}, train={**sweep.train, **own.train})
        for own in strategies(sweep)
    ]
    networks = [(strategy, seed, False) for seed in sweep.seeds for strategy in rows]
    trials = []
    for (strategy, seed, baseline), (fold, splits) in _in_order(
        [(rival, 0, True) for rival in known] + networks, folds
    ):
        atlas = located(strategy.atlas or sweep.overrides.get("atlas", AAL3))
        overrides = dict(sweep.overrides) | ({} if strategy.atlas is None else {"atlas": atlas})
        own = {"strategy": asdict(strategy), "seed": seed, "splits": splits["sha256"], "baseline": baseline}
        own |= {} if baseline and strategy.baseline not in OF_LABELS else {"atlas": load_atlas(atlas).sha256}
        own["mask"] = [config_file(overlay).read_text() for overlay in strategy.overlays + strategy.readouts]
        own |= {} if baseline else networks_only
        pretraining = {name: own[name] for name in ("seed", "splits")} | {
            "configs": [config_file(name).read_text() for name in ("pretrain", *strategy.overlays, *sweep.configs)],
            "reconstruct": config_file("reconstruct").read_text() if "reconstruct" in sweep.steps else None,
            "overrides": {**overrides, **strategy.pretrain},
            "atlas": load_atlas(atlas).sha256,
        }
        name = f"{slug(strategy.name)}__seed-{seed}__fold-{slug(fold)}"
        trials.append(
            Trial(
                strategy=replace(
                    strategy,
                    mask=strategy.mask and _anywhere(strategy.mask),
                    readout=strategy.readout and _anywhere(strategy.readout),
                ),
                seed=seed,
                fold=fold,
                folder=str(results / "trials" / name),
                store=str(Path(sweep.store).absolute()),
                splits_file=str(files[fold]),
                baseline=baseline,
                configs=tuple(map(_anywhere, sweep.configs)),
                overrides=overrides,
                steps=tuple(sweep.steps),
                resamples=sweep.bootstrap_resamples,
                target=target,
                directory=str(Path.cwd()),
                atlas=atlas,
                pretraining="" if strategy.mask is None else _hash(shared | pretraining)[:16],
                sha256=_hash(shared | own),
            )
        )
    return trials


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _anywhere(config: str) -> str:
    """Name of a config that means the same in the working directory of a Dask worker."""
    return str(config_file(config)) if config.endswith(".json") else config


def _in_order(kinds: list, folds: Mapping[str, dict]) -> Iterator[tuple]:
    """Baselines first, then seed by seed and fold by fold, so that an early stop leaves whole comparisons."""
    for seed in dict.fromkeys((seed, baseline) for _, seed, baseline in kinds):
        for fold in folds.items():
            yield from ((kind, fold) for kind in kinds if kind[1:] == seed)


def _folds(splits: Mapping[str, Any], runs: Sequence[dict], target: Mapping[str, Any]) -> dict[str, dict]:
    """Split of each fold, or each site left out, by name."""
    unknown = set(splits) - {"folds", "seed", "test"}
    if unknown:
        raise InputError(f"splits has folds, seed and test, not {sorted(unknown)[0]!r}")
    folds, seed, test = splits.get("folds", 10), splits.get("seed", 0), splits.get("test", "all")
    if test == "sites":
        sites = sorted({str(run["site"]) for run in runs})
        return {site: make_splits(runs, folds=folds, seed=seed, test_site=site, **target) for site in sites}
    chosen = range(folds) if test == "all" else test
    return {str(fold): make_splits(runs, folds=folds, fold=fold, seed=seed, **target) for fold in chosen}


def refuse_shared_files(what: str, names: Iterable[str]) -> None:
    """Raise `InputError` if two names differ only in characters that file names of trials do not keep."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(slug(name), name)
        if other != name:
            raise InputError(f"{what} {other!r} and {name!r} would both be filed under {slug(name)!r}; rename one")


def run_sweep(sweep: Sweep, workers: int = 1, scheduler: str | None = None) -> list[str]:
    """Run every trial that is not finished; one that fails never stops the others.

    Args:
        sweep: what to run.
        workers: trials at a time on this machine.
        scheduler: address of a Dask scheduler whose workers see the same files; they run the trials instead.

    Returns:
        What went wrong, one sentence per failed trial; empty if all are finished.
    """
    trials = plan_trials(sweep)
    _write_plan(sweep, trials)
    todo = [trial for trial in trials if not is_finished(trial)]
    logger.info("%d of %d trials are finished; %d to run", len(trials) - len(todo), len(trials), len(todo))
    with _executor(workers, scheduler) as executor:
        # bars of their own: baselines are fast, and would spoil the estimate
        failures = _run_all(executor, [trial for trial in todo if trial.baseline], "baselines")
        return failures + _run_all(executor, [trial for trial in todo if not trial.baseline], "networks")


def _run_all(executor: Executor, trials: Sequence[Trial], what: str) -> list[str]:
    """Run trials in any order, with a bar that estimates the time left; return what went wrong.

    The estimate rests on the mean rate: trials that began together end together, which misleads a recent rate.
    """
    failures = []
    futures = {executor.submit(run_trial, trial): trial for trial in trials}
    with tqdm(total=len(trials), desc=what, unit="trial", smoothing=0, disable=not trials) as bar:
        for future in as_completed(futures):
            error = _error(future)
            if error is not None:
                failures.append(f"{Path(futures[future].folder).name}: {error}")
                logger.error("trial %s", failures[-1], exc_info=None if isinstance(error, InputError) else error)
            bar.update()
    return failures


def _error(future: Future) -> BaseException | None:
    if future.cancelled():  # by Dask
        return InputError("the connection to the Dask scheduler was lost; start it again, and the sweep")
    return future.exception()


@contextmanager
def _executor(workers: int, scheduler: str | None) -> Iterator[Executor]:
    if scheduler is None:
        pool = ThreadPoolExecutor(workers)  # each trial's work is in processes of its own
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)  # when interrupted, begin no other trial
        return
    with dask_executor(scheduler) as (remote, _):
        yield remote


def describe_data(sweep: Sweep) -> dict[str, Any]:
    """Summary of a sweep's data for the report; `synthetic` is None where the source files are gone."""
    manifest = read_manifest(sweep.store)
    runs = manifest["runs"]
    strata = strata_of(runs, **sweep.predicted)
    people = pd.DataFrame(list(strata.values()), columns=["site", "group"])
    counts = people.groupby(["site", "group"]).size().rename("participants").reset_index()
    target = target_of(runs, **sweep.predicted, source=sweep.store)
    return {
        "store": str(Path(sweep.store).absolute()),
        "target": {
            "column": target.column,
            "kind": target.kind,
            "classes": target.classes,
            "missing": len(target.missing),
        },
        "runs": len(runs),
        "participants": len(people),
        "by_site_and_group": counts.to_dict("records"),
        "frames": {"least": min(run["frames"] for run in runs), "most": max(run["frames"] for run in runs)},
        "tr_in_s": sorted({run["tr_in"] for run in runs}),
        "parameters": manifest["parameters"],
        "parameters_hash": manifest["parameters_hash"],
        "synthetic": is_synthetic([run["source"] for run in runs]),
    }


def is_synthetic(sources: Sequence[str]) -> bool | None:
    """Whether any file lies in a cohort made by `bundle.experiments.synthetic`; None if no file exists any more."""
    folders = {folder for source in sources for folder in list(Path(source).parents)[:4]}
    if any((folder / "truth.json").is_file() for folder in folders):
        return True
    return False if any(Path(source).is_file() for source in sources) else None


def _write_plan(sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Keep in the results folder what the report needs: the plan, the data's summary and the exact configs."""
    results = Path(sweep.results)
    plan = asdict(sweep) | {"trials": {Path(trial.folder).name: trial.sha256 for trial in trials}}
    plan["directory"] = str(Path.cwd())
    write_json(results / "sweep.json", plan)
    write_json(results / "data.json", describe_data(sweep))
    masks = [overlay for strategy in strategies(sweep) for overlay in strategy.overlays + strategy.readouts]
    for name in dict.fromkeys(["pretrain", "train", "evaluate", *sweep.steps, *sweep.configs, *masks]):
        file = config_file(name)
        write_text(results / "configs" / f"{slug(name.removesuffix('.json'))}.json", file.read_text())
