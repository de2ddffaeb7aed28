"""What a foundation model has to beat, on the very same splits: no input, site, age and sex, connectivity, head motion.

Each baseline is a scikit-learn model with one row per participant. It is fitted, and its settings are chosen, on
the training participants alone; the threshold comes from the validation participants, and the test participants are
scored once, as for the networks.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import nibabel as nib
import numpy as np
import pandas as pd
from nilearn.maskers import NiftiLabelsMasker
from sklearn.base import BaseEstimator
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import LinearSVC

from bundle.anatomy import grid
from bundle.anatomy.atlas import AAL3, Atlas, labels_on, load_atlas
from bundle.data.splits import SETS, load_splits
from bundle.data.targets import read_target
from bundle.errors import InputError
from bundle.evaluation.subjects import write_test_scores
from bundle.files import write_json, write_text
from bundle.heads.combat import COMBAT
from bundle.heads.connectivity import ConnectivityModel, least_class
from bundle.preparation.motion import MOTION_COLUMNS, mean_fd_in
from bundle.preparation.store import read_manifest, read_values, read_voxels
from bundle.tasks.kinds import task_of
from bundle.tasks.task import Linear, Task

logger = logging.getLogger(__name__)

FEWEST_VOXELS = 5


def region_series(store: str | Path, run: dict, atlas: Atlas) -> pd.DataFrame:
    """Mean signal of each label of a stored run, over the label's voxels in the brain.

    Nilearn's masker averages. It is given the brain's voxels in a row, (V, 1, 1, T), since an average does not depend
    on where voxels lie; the background, of which a store keeps nothing, so never enters.

    Args:
        store: the prepared store.
        run: the run's record.
        atlas: the labels.

    Returns:
        (T, labels), detrended and scaled to SD 1, columns named by label; labels with fewer than 5 voxels in the brain
        are left out.

    Raises:
        InputError: no label has that many.
    """
    voxels = read_voxels(store, run["run_id"])
    labels = labels_on(atlas, grid.AFFINE, grid.SHAPE).ravel()[voxels]
    numbers, counts = np.unique(labels[labels > 0], return_counts=True)
    numbers = numbers[counts >= FEWEST_VOXELS]
    if not len(numbers):
        raise InputError(
            f"{store}: no label of {atlas.source} has {FEWEST_VOXELS} voxels in the brain of {run['run_id']}"
        )
    kept = np.where(np.isin(labels, numbers), labels, 0).astype(np.int32)
    frames = read_values(store, run["run_id"], 0, run["frames"]).T  # (T, V) -> (V, T)
    image = nib.Nifti1Image(kept[:, None, None], np.eye(4))
    masker = NiftiLabelsMasker(image, detrend=True, standardize="zscore_sample", resampling_target=None)
    series = masker.fit_transform(nib.Nifti1Image(frames[:, None, None, :], np.eye(4)))
    return pd.DataFrame(series, columns=[atlas.names[int(number)] for number in numbers])


def participant_series(store: str | Path, runs: Sequence[dict], cache: Path, atlas: Atlas) -> dict[str, pd.DataFrame]:
    """Region series of each participant, runs one after another: T rows, a column per label that all participants have.

    The series of each run are kept in `cache` and read from there while the run and the atlas are the same.
    """
    tables: dict[str, list[pd.DataFrame]] = {}
    for run in runs:
        made_of = (run["source_sha256"], run["parameters_hash"], atlas.sha256)
        path = cache / f"{'-'.join([run['run_id'], *(sha256[:12] for sha256 in made_of)])}.csv"
        if not path.is_file():
            write_text(path, region_series(store, run, atlas).to_csv(index=False, float_format="%.6g"))
        tables.setdefault(run["participant_id"], []).append(pd.read_csv(path))
    everywhere = set.intersection(*(set(table.columns) for parts in tables.values() for table in parts))
    names = [name for name in atlas.names.values() if name in everywhere]
    if len(names) < 2:
        raise InputError(
            f"{store}: fewer than two labels of {atlas.source} are inside every brain, so there is no connectivity"
        )
    logger.info("Connectivity of %d of %d labels, those that every participant has", len(names), len(atlas.names))
    return {name: pd.concat(parts)[names] for name, parts in tables.items()}


def table_model(columns: pd.DataFrame, linear: BaseEstimator) -> BaseEstimator:
    """A linear model on a participants' table: categories one-hot, numbers imputed and scaled."""
    numbers = [name for name in columns if pd.api.types.is_numeric_dtype(columns[name])]
    categories = [name for name in columns if name not in numbers]
    encoder = ColumnTransformer(
        [
            ("number", make_pipeline(SimpleImputer(), StandardScaler()), numbers),
            ("category", OneHotEncoder(handle_unknown="ignore"), categories),
        ]
    )
    return make_pipeline(encoder, linear)


def participants_table(runs: Sequence[dict]) -> pd.DataFrame:
    """One row per participant: `site` and the other columns, with lower-case names."""
    rows = {
        run["participant_id"]: {"site": str(run["site"])}
        | {str(name).lower(): value for name, value in run["participant"].items()}
        for run in runs
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename(columns={"gender": "sex"})


def mean_motion(runs: Sequence[dict]) -> pd.DataFrame | None:
    """Mean framewise displacement (mm) of each participant, or None where it is not known.

    Taken from a column of the participants' table, else from the runs' own registration or fMRIPrep's confounds beside
    each BOLD file.
    """
    table = participants_table(runs)
    for name in MOTION_COLUMNS:
        if name in table:
            return table[[name]].astype(float).rename(columns={name: "mean_fd"})
    values: dict[str, list[float]] = {}
    for run in runs:
        if "registration" in run:  # which has measured it
            values.setdefault(run["participant_id"], []).append(run["mean_fd"])
            continue
        source = Path(run["source"])
        found = sorted(source.parent.glob(f"{run['run_id']}_desc-confounds_*.tsv"))
        if not found:
            return None
        if (value := mean_fd_in(found[0])) is None:
            return None
        values.setdefault(run["participant_id"], []).append(value)
    return pd.DataFrame({"mean_fd": {name: float(np.mean(fd)) for name, fd in values.items()}})


Features: TypeAlias = pd.DataFrame | dict[str, Any]


@dataclass(frozen=True)
class Given:
    """What a baseline may look at.

    Attributes:
        store: the prepared store.
        runs: records of the participants who have a label.
        cache: folder of the region series, which all folds share.
        task: what is predicted.
        atlas: whose labels connectivity is of.
        seed: of the inner folds.
        harmonise: take effects of sites off connectivity.
    """

    store: str | Path
    runs: Sequence[dict]
    cache: Path
    task: Task
    atlas: Atlas
    seed: int
    harmonise: bool = False


def _constant(given: Given) -> tuple[Features, BaseEstimator]:
    return participants_table(given.runs)[["site"]], given.task.constant()


def _columns(*names: str) -> Callable[[Given], tuple[Features, BaseEstimator]]:
    """Some columns of the participants' table, without the target itself."""

    def make(given: Given) -> tuple[Features, BaseEstimator]:
        table = participants_table(given.runs)
        columns = table[[name for name in names if name in table and name != given.task.column.lower()]]
        if columns.empty:
            raise InputError(f"{given.store}: the participants have no column {' or '.join(names)} beside the target")
        return columns, table_model(columns, given.task.linear(given.seed)[0])

    return make


def _head_motion(given: Given) -> tuple[Features, BaseEstimator]:
    motion = mean_motion(given.runs)
    if motion is None:
        raise InputError(
            f"{given.store}: no head motion is known; add a column mean_fd (mm) to participants.tsv and prepare again, "
            "keep fMRIPrep's confounds beside the BOLD files, or take head_motion off the baselines"
        )
    return motion, table_model(motion, given.task.linear(given.seed)[0])


def _connectivity(of_task: Callable[[Task, int], Linear]) -> Callable[[Given], tuple[Features, BaseEstimator]]:
    def make(given: Given) -> tuple[Features, BaseEstimator]:
        tables = participant_series(given.store, given.runs, given.cache, given.atlas)
        series: dict[str, Any] = {name: table.to_numpy() for name, table in tables.items()}
        if given.harmonise:
            sites = {run["participant_id"]: str(run["site"]) for run in given.runs}
            series = {name: (sites[name], courses) for name, courses in series.items()}
        model = ConnectivityModel(*of_task(given.task, given.seed), seed=given.seed, harmonise=given.harmonise)
        return series, model

    return make


@dataclass(frozen=True)
class Baseline:
    """A baseline.

    Attributes:
        make: features and model of what is given.
        classes: it can tell classes apart.
        numbers: it can predict a number.
        of_labels: it looks at the labels of an atlas.
    """

    make: Callable[[Given], tuple[Features, BaseEstimator]]
    classes: bool = True
    numbers: bool = True
    of_labels: bool = False

    def suits(self, kind: str) -> bool:
        """Whether it can be used for a kind of task."""
        return self.numbers if kind == "regression" else self.classes


BASELINES: dict[str, Baseline] = {
    "majority": Baseline(_constant, numbers=False),
    "training_mean": Baseline(_constant, classes=False),
    "site": Baseline(_columns("site")),
    "site_age_sex": Baseline(_columns("site", "age", "sex")),
    "head_motion": Baseline(_head_motion),
    "connectivity_logistic": Baseline(
        _connectivity(lambda task, seed: task.linear(seed)), numbers=False, of_labels=True
    ),
    "connectivity_svm": Baseline(
        _connectivity(lambda task, seed: (LinearSVC(random_state=seed), *task.linear(seed)[1:])),
        numbers=False,
        of_labels=True,
    ),
    "connectivity_ridge": Baseline(_connectivity(lambda task, seed: task.linear(seed)), classes=False, of_labels=True),
}
OF_LABELS = tuple(name for name, baseline in BASELINES.items() if baseline.of_labels)
"""Those that take an atlas, and whose features can be harmonised."""


def run_baseline(
    name: str,
    store: str | Path,
    splits_file: str | Path,
    folder: str | Path,
    cache: str | Path,
    resamples: int = 2000,
    seed: int = 0,
    target: Mapping[str, Any] | None = None,
    atlas: str = AAL3,
    harmonise: str | None = None,
) -> dict[str, dict[str, float]]:
    """Fit a baseline on the training set, fix its threshold on the validation set, and test it once.

    Args:
        name: one of `BASELINES`.
        store: the prepared store.
        splits_file: the split file.
        folder: where `subjects.tsv`, `scores.json` and `baseline.json` go.
        cache: folder of the region series, which all folds share.
        resamples: bootstrap resamples.
        seed: of the inner folds and of the bootstrap.
        target: `target`, `task` and `classes`, as for `bundle.data.targets.read_target`; the diagnosis if None.
        atlas: whose labels connectivity is of; see `bundle.anatomy.atlas.load_atlas`.
        harmonise: "combat" takes effects of sites off connectivity, see `bundle.heads.combat.Combat`; None: no.

    Returns:
        The table of `bundle.evaluation.subjects.score_table`.

    Raises:
        InputError: what the baseline needs is not known, it does not suit the task, or it cannot be harmonised.
    """
    wanted = read_target(store, **(target or {}))
    task = task_of(wanted, splits_file)
    if not BASELINES[name].suits(task.kind):
        raise InputError(f"the baseline {name} does not suit a {task.kind} target; {suitable(task.kind)}")
    if harmonise not in (None, COMBAT) or (harmonise and name not in OF_LABELS):
        raise InputError(
            f"harmonise is {COMBAT!r}, for one of {', '.join(OF_LABELS)}, but here it is {harmonise!r} for {name}"
        )
    runs = [run for run in read_manifest(store)["runs"] if run["participant_id"] in wanted.labels]
    given = Given(store, runs, Path(cache), task, load_atlas(atlas), seed, harmonise is not None)
    features, model = BASELINES[name].make(given)
    sites = {run["participant_id"]: str(run["site"]) for run in runs}
    sets = {
        subset: [participant for participant in members if participant in wanted.labels]
        for subset, members in load_splits(splits_file)["sets"].items()
    }
    if task.classes:
        least_class(np.array([wanted.labels[participant] for participant in sets["train"]]))
    tables = {}
    for subset in SETS:
        rows, labels = _select(features, sets[subset]), np.array([wanted.labels[p] for p in sets[subset]])
        labels = labels.astype(int) if task.classes else labels
        if subset == "train":
            model.fit(rows, labels)
            continue
        columns = {"participant_id": sets[subset], "site": [sites[p] for p in sets[subset]], "label": labels}
        tables[subset] = pd.DataFrame(columns)
        tables[subset][list(task.columns)] = task.predict(model, rows)
    # a constant score has no threshold to choose: the more frequent class of the training set is the answer
    threshold = 0.0 if name == "majority" else None
    table = write_test_scores(task, tables["validation"], tables["test"], folder, resamples, seed, threshold)
    facts: dict[str, Any] = {"baseline": name, "chosen": getattr(model, "best_params_", {})}
    facts["harmonise"] = harmonise
    facts["features"] = list(features) if isinstance(features, pd.DataFrame) else "connectivity"
    write_json(Path(folder) / "baseline.json", facts)
    return table


def suitable(kind: str) -> str:
    """Which baselines suit a kind of task, as advice."""
    return f"choose from {', '.join(name for name, baseline in BASELINES.items() if baseline.suits(kind))}"


def _select(features: Features, participants: Sequence[str]) -> Any:
    return (
        features.loc[list(participants)] if isinstance(features, pd.DataFrame) else [features[p] for p in participants]
    )
