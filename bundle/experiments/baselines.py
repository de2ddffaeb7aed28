"""What a foundation model has to beat, on the very same splits: majority, site+age+sex, connectivity, head motion.

Each baseline is a scikit-learn classifier with one row per participant. It is fitted, and its settings are chosen, on
the training participants alone; the threshold comes from the validation participants, and the test participants are
scored once, as for the networks.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import nibabel as nib
import numpy as np
import pandas as pd
from nilearn import signal
from nilearn.maskers import NiftiLabelsMasker
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.compose import ColumnTransformer
from sklearn.dummy import DummyClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import LinearSVC

from bundle.anatomy import grid
from bundle.anatomy.atlas import AAL3, Atlas, labels_on, load_atlas
from bundle.data.splits import SETS, load_splits
from bundle.errors import InputError
from bundle.evaluation.subjects import write_test_scores
from bundle.files import write_json, write_text
from bundle.heads.connectivity import ConnectivityClassifier, least_class
from bundle.preparation.motion import MOTION_COLUMNS, mean_fd_in
from bundle.preparation.store import read_manifest, read_values, read_voxels

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
    masker = NiftiLabelsMasker(
        nib.Nifti1Image(kept[:, None, None], np.eye(4)), standardize=False, resampling_target=None
    )
    series = masker.fit_transform(nib.Nifti1Image(frames[:, None, None, :], np.eye(4)))
    cleaned = signal.clean(series, detrend=True, standardize="zscore_sample")
    return pd.DataFrame(cleaned, columns=[atlas.names[int(number)] for number in numbers])


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


def table_classifier(columns: pd.DataFrame) -> BaseEstimator:
    """Logistic regression on a participants' table: categories one-hot, numbers imputed and scaled."""
    numbers = [name for name in columns if pd.api.types.is_numeric_dtype(columns[name])]
    categories = [name for name in columns if name not in numbers]
    encoder = ColumnTransformer(
        [
            ("number", make_pipeline(SimpleImputer(), StandardScaler()), numbers),
            ("category", OneHotEncoder(handle_unknown="ignore"), categories),
        ]
    )
    return make_pipeline(encoder, LogisticRegression(max_iter=1000))


def participants_table(runs: Sequence[dict]) -> pd.DataFrame:
    """One row per participant: `site`, `diagnosis` and the other columns, with lower-case names."""
    rows = {
        run["participant_id"]: {"site": str(run["site"]), "diagnosis": run["diagnosis"]}
        | {str(name).lower(): value for name, value in run["participant"].items()}
        for run in runs
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename(columns={"gender": "sex"})


def mean_motion(runs: Sequence[dict]) -> pd.DataFrame | None:
    """Mean framewise displacement (mm) of each participant, or None where it is not known.

    Taken from a column of the participants' table, else from fMRIPrep's confounds beside each BOLD file.
    """
    table = participants_table(runs)
    for name in MOTION_COLUMNS:
        if name in table:
            return table[[name]].astype(float).rename(columns={name: "mean_fd"})
    values: dict[str, list[float]] = {}
    for run in runs:
        source = Path(run["source"])
        found = sorted(source.parent.glob(f"{run['run_id']}_desc-confounds_*.tsv"))
        if not found:
            return None
        if (value := mean_fd_in(found[0])) is None:
            return None
        values.setdefault(run["participant_id"], []).append(value)
    return pd.DataFrame({"mean_fd": {name: float(np.mean(fd)) for name, fd in values.items()}})


Features: TypeAlias = pd.DataFrame | dict[str, NDArray]


def _majority(store: str | Path, runs: Sequence[dict], cache: Path, seed: int) -> tuple[Features, BaseEstimator]:
    return participants_table(runs)[["site"]], DummyClassifier(strategy="prior")


def _site_age_sex(store: str | Path, runs: Sequence[dict], cache: Path, seed: int) -> tuple[Features, BaseEstimator]:
    table = participants_table(runs)
    columns = table[[name for name in ("site", "age", "sex") if name in table]]
    return columns, table_classifier(columns)


def _head_motion(store: str | Path, runs: Sequence[dict], cache: Path, seed: int) -> tuple[Features, BaseEstimator]:
    motion = mean_motion(runs)
    if motion is None:
        raise InputError(
            f"{store}: no head motion is known; add a column mean_fd (mm) to participants.tsv and prepare again, keep "
            "fMRIPrep's confounds beside the BOLD files, or take head_motion off the baselines"
        )
    return motion, table_classifier(motion)


def _connectivity(classifier: Callable[[int], BaseEstimator]) -> Callable:
    def make(
        store: str | Path, runs: Sequence[dict], cache: Path, seed: int, atlas: str
    ) -> tuple[Features, BaseEstimator]:
        tables = participant_series(store, runs, cache, load_atlas(atlas))
        return {name: table.to_numpy() for name, table in tables.items()}, ConnectivityClassifier(
            classifier(seed), seed
        )

    return make


BASELINES: dict[str, Callable[..., tuple[Features, BaseEstimator]]] = {
    "majority": _majority,
    "site_age_sex": _site_age_sex,
    "head_motion": _head_motion,
    "connectivity_logistic": _connectivity(lambda seed: LogisticRegression(max_iter=5000, random_state=seed)),
    "connectivity_svm": _connectivity(lambda seed: LinearSVC(random_state=seed)),
}
"""Name to a function that returns the features of each participant and the classifier."""
OF_LABELS = ("connectivity_logistic", "connectivity_svm")
"""Those that take an atlas."""


def run_baseline(
    name: str,
    store: str | Path,
    splits_file: str | Path,
    folder: str | Path,
    cache: str | Path,
    resamples: int = 2000,
    seed: int = 0,
    atlas: str = AAL3,
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
        atlas: whose labels connectivity is of; see `bundle.anatomy.atlas.load_atlas`.

    Returns:
        The table of `bundle.evaluation.subjects.subjects.score_table`.

    Raises:
        InputError: a participant has no diagnosis, or what the baseline needs is not known.
    """
    runs = read_manifest(store)["runs"]
    diagnosis = participants_table(runs)["diagnosis"]
    if diagnosis.isna().any():
        raise InputError(f"{store}: {diagnosis.index[diagnosis.isna()][0]} has no diagnosis; add it and prepare again")
    own = {"atlas": atlas} if name in OF_LABELS else {}
    features, model = BASELINES[name](store, runs, Path(cache), seed, **own)
    sets = load_splits(splits_file)["sets"]
    rows = {subset: (_select(features, sets[subset]), diagnosis[sets[subset]].to_numpy(int)) for subset in SETS}
    least_class(rows["train"][1])
    model.fit(*rows["train"])
    tables = {
        subset: pd.DataFrame(
            {"participant_id": sets[subset], "label": rows[subset][1], "logit": _logits(model, rows[subset][0])}
        )
        for subset in ("validation", "test")
    }
    # a constant score has no threshold to choose: the more frequent class of the training set is the answer
    threshold = 0.0 if name == "majority" else None
    table = write_test_scores(tables["validation"], tables["test"], folder, resamples, seed, threshold)
    facts: dict[str, Any] = {"baseline": name, "chosen": getattr(model, "best_params_", {})}
    facts["features"] = list(features) if isinstance(features, pd.DataFrame) else "connectivity"
    write_json(Path(folder) / "baseline.json", facts)
    return table


def _select(features: Features, participants: Sequence[str]) -> Any:
    return (
        features.loc[list(participants)] if isinstance(features, pd.DataFrame) else [features[p] for p in participants]
    )


def _logits(model: BaseEstimator, rows: Any) -> NDArray[np.float64]:
    """Signed score of each row, above 0 for "case": the distance to the boundary, or the log odds."""
    if hasattr(model, "decision_function"):
        return model.decision_function(rows)
    log = model.predict_log_proba(rows)  # (n, 2)
    return log[:, 1] - log[:, 0]
