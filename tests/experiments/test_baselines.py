"""Baselines: series by NumPy and nilearn on the dense grid, no leak from test subjects, and the planted effect."""

import json
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nilearn import signal
from nilearn.connectome import ConnectivityMeasure
from nilearn.maskers import NiftiLabelsMasker
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.preprocessing import StandardScaler
from small_stores import planted_store, some_voxels
from tasks import BINARY

from bundle.anatomy import grid
from bundle.anatomy.atlas import labels_on, load_atlas
from bundle.data.splits import make_splits, save_splits
from bundle.errors import InputError
from bundle.experiments.baselines import (
    mean_motion,
    participants_table,
    region_series,
    run_baseline,
    table_model,
)
from bundle.heads import connectivity
from bundle.heads.combat import Combat
from bundle.heads.connectivity import ConnectivityModel
from bundle.preparation.store import (
    read_clip,
    read_manifest,
    read_moments,
    read_run,
    read_values,
    write_record,
    write_run,
)
from bundle.tasks.classes import PENALTIES


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    store = planted_store(folder, subjects=48, effect=4.0)
    save_splits(make_splits(read_manifest(store)["runs"], folds=3), folder / "splits.json")
    return store


def test_series_are_those_of_nilearn_on_the_dense_image(store):
    run = read_manifest(store)["runs"][0] | {"frames": 12}
    atlas = load_atlas()
    found = region_series(store, run, atlas)
    voxels, _ = some_voxels(6, 4)
    dense = np.zeros((np.prod(grid.SHAPE), 12), np.float32)
    dense[voxels] = read_values(store, run["run_id"], 0, 12).T
    labels = np.zeros(np.prod(grid.SHAPE), np.int32)
    labels[voxels] = labels_on(atlas, grid.AFFINE, grid.SHAPE).ravel()[voxels]  # in the brain only
    counts = np.bincount(labels)
    labels[counts[labels] < 5] = 0
    masker = NiftiLabelsMasker(nib.Nifti1Image(labels.reshape(grid.SHAPE), grid.AFFINE), standardize=False)
    expected = masker.fit_transform(nib.Nifti1Image(dense.reshape(*grid.SHAPE, 12), grid.AFFINE))
    cleaned = signal.clean(expected, detrend=True, standardize="zscore_sample")
    assert found.to_numpy() == pytest.approx(cleaned, abs=1e-4)
    assert list(found.columns) == [atlas.names[n] for n in np.unique(labels[labels > 0])]


def test_a_region_outside_one_brain_is_left_out_for_everyone(store, tmp_path):
    copy = shutil.copytree(store, tmp_path / "store")
    run = read_manifest(copy)["runs"][0]
    voxels, labels = some_voxels(6, 4)
    keep = labels != labels[0]
    frames = read_clip(copy, run["run_id"], 0, run["frames"])[:, keep]
    moments = read_moments(copy, run["run_id"])[:, keep]
    write_run(copy, run | {"voxels": int(keep.sum())}, frames, voxels[keep], moments)
    gone = load_atlas().names[int(labels[0])]
    assert gone not in region_series(copy, read_run(copy, run["run_id"]), load_atlas())
    assert run_baseline(
        "connectivity_logistic", copy, store.parent / "splits.json", tmp_path / "out", tmp_path / "series", resamples=50
    )


@pytest.mark.parametrize("name", ["connectivity_logistic", "connectivity_svm"])
def test_planted_effect_is_recovered(store, tmp_path, name):
    table = run_baseline(name, store, store.parent / "splits.json", tmp_path, store.parent / "series", resamples=200)
    assert table["auroc"]["low"] > 0.5


def test_without_an_effect_scores_are_at_chance(tmp_path):
    """Six cohorts, 16 test subjects each. False alarms of the two bounds: about 0.3 % and 0.02 %.

    The SD of one AUROC is 0.15, and an interval over 16 subjects covers the truth with 98 % (both simulated with scores
    that know nothing), so that fewer than 4 of 6 cover it with a probability of 0.02 %.
    """
    found = []
    for seed in range(100, 106):
        folder = tmp_path / str(seed)
        store = planted_store(folder, subjects=48, effect=0.0, seed=seed, every=12)
        save_splits(make_splits(read_manifest(store)["runs"], folds=3), folder / "splits.json")
        arguments = (store, folder / "splits.json", folder / "out", folder / "series")
        found.append(run_baseline("connectivity_logistic", *arguments, resamples=200)["auroc"])
    assert abs(np.mean([score["value"] for score in found]) - 0.5) < 3 * 0.15 / np.sqrt(6)
    assert sum(score["low"] <= 0.5 <= score["high"] for score in found) >= 4


@pytest.mark.parametrize("harmonise", [None, "combat"])
def test_test_subjects_labels_change_no_logit_and_no_threshold(store, tmp_path, harmonise):
    splits = make_splits(read_manifest(store)["runs"], folds=3)
    copy = shutil.copytree(store, tmp_path / "store")
    for run in read_manifest(copy)["runs"]:
        if run["participant_id"] in splits["sets"]["test"]:
            write_record(copy, run | {"diagnosis": 1 - run["diagnosis"]})
    manifest = read_manifest(copy)
    for run in manifest["runs"]:
        run["diagnosis"] = read_run(copy, run["run_id"])["diagnosis"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    series = store.parent / "series"
    results = []
    for where, out in ((store, tmp_path / "a"), (copy, tmp_path / "b")):
        arguments = (where, store.parent / "splits.json", out, series)
        run_baseline("connectivity_logistic", *arguments, resamples=20, harmonise=harmonise)
        subjects = pd.read_csv(out / "subjects.tsv", sep="\t")
        results.append((subjects, json.loads((out / "scores.json").read_text())["threshold"]))
    (first, one), (second, two) = results
    assert first["logit"].tolist() == second["logit"].tolist()
    assert one == two
    assert (first["label"] == 1 - second["label"]).all()


def test_few_cases_are_shared_out_over_fewer_inner_folds_and_one_is_too_few(monkeypatch):
    """With an inner fold that lacks cases every setting would score NaN, and the first of the list be "chosen"."""
    rng = np.random.default_rng(0)
    asked = []
    monkeypatch.setattr(connectivity, "StratifiedKFold", lambda n, **more: asked.append(n) or StratifiedKFold(n))
    for cases, inner in ((3, 3), (8, 5)):
        labels = np.repeat([1, 0], [cases, 9])
        series = [rng.normal(size=(40, 4)) for _ in labels]
        model = ConnectivityModel(*BINARY.linear(0)).fit(series, labels)
        assert asked[-1] == inner
        assert np.isfinite(model.decision_function(series)).all()
    with pytest.raises(InputError, match="holds 9 of class 0, 1 of class 1"):
        ConnectivityModel(*BINARY.linear(0)).fit(series[:10], np.repeat([1, 0], [1, 9]))


def test_the_classifier_in_the_span_of_the_rows_is_the_one_on_all_features():
    """Against a grid search of scikit-learn on the connectivity itself, scaled."""
    rng = np.random.default_rng(1)
    labels = np.arange(24) % 2
    series = [rng.normal(size=(60, 8)) + label * rng.normal(size=(60, 1)) * np.eye(8)[:3].sum(0) for label in labels]
    sites = ["a", "b", "c"] * 8
    for kind, harmonise in (("correlation", False), ("tangent", False), ("tangent", True)):
        classifier = LogisticRegression(max_iter=5000, tol=1e-8)
        given = list(zip(sites, series, strict=True)) if harmonise else series
        model = ConnectivityModel(classifier, {"C": PENALTIES}, "roc_auc", 3, [kind], harmonise=harmonise)
        model.fit(given[:16], labels[:16])
        measure = ConnectivityMeasure(kind=kind, vectorize=True, discard_diagonal=True, standardize=False)
        scaler = StandardScaler()
        rows, new = measure.fit_transform(series[:16]), measure.transform(series[16:])
        if harmonise:
            combat = Combat().fit(rows, sites[:16], labels[:16, None].astype(float))
            rows, new = combat.transform(rows, sites[:16]), combat.transform(new, sites[16:])
        rows = scaler.fit_transform(rows)
        folds = StratifiedKFold(5, shuffle=True, random_state=3)
        search = GridSearchCV(classifier, {"C": PENALTIES}, scoring="roc_auc", cv=folds)
        search.fit(rows, labels[:16])
        expected = search.decision_function(scaler.transform(new))[:, None]
        assert model.best_params_ == {"kind": kind} | search.best_params_
        np.testing.assert_allclose(model.decision_function(given[16:]), expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(model.decision_function(given[16:17]), expected[:1], rtol=1e-3, atol=1e-4)


def of_two_sites(rng: np.random.Generator, share: float) -> tuple[list[tuple[str, np.ndarray]], np.ndarray]:
    """Sites and courses of 120 participants each: site b has more of a signal that all regions share, and this share of
    cases (a has the others), in whom two regions vary together."""
    rows, labels = [], []
    for site, common, cases in (("a", 0.3, 1 - share), ("b", 0.8, share)):
        for number in range(120):
            label = int(number < round(120 * cases))
            courses = rng.normal(size=(120, 6)) + common * rng.normal(size=(120, 1))
            courses[:, :2] += 0.5 * label * rng.normal(size=(120, 1))
            rows.append((site, courses))
            labels.append(label)
    return rows, np.array(labels)


def test_where_cases_come_from_another_site_in_the_test_harmonised_connectivity_still_tells_them():
    """A model that has learnt the site as well is then misled."""
    rng = np.random.default_rng(2)
    (train, labels), (test, truth) = of_two_sites(rng, 0.85), of_two_sites(rng, 0.15)
    plain = ConnectivityModel(*BINARY.linear(0)).fit([courses for _, courses in train], labels)
    harmonised = ConnectivityModel(*BINARY.linear(0), harmonise=True).fit(train, labels)
    without = roc_auc_score(truth, plain.decision_function([courses for _, courses in test])[:, 0])
    assert roc_auc_score(truth, harmonised.decision_function(test)[:, 0]) > max(0.75, without + 0.1)


@pytest.mark.parametrize("harmonise", [None, "combat"])
def test_a_number_is_predicted_from_connectivity_in_its_units(store, tmp_path, harmonise):
    splits = make_splits(read_manifest(store)["runs"], folds=3, target="age")
    save_splits(splits, tmp_path / "splits.json")
    arguments = (store, tmp_path / "splits.json", tmp_path, store.parent / "series")
    run_baseline("connectivity_ridge", *arguments, resamples=20, target={"target": "age"}, harmonise=harmonise)
    ages = {run["participant_id"]: run["participant"]["age"] for run in read_manifest(store)["runs"]}
    subjects = pd.read_csv(tmp_path / "subjects.tsv", sep="\t")
    assert subjects["label"].tolist() == [ages[name] for name in subjects["participant_id"]]
    assert subjects["predicted"].between(min(ages.values()), max(ages.values())).all()
    assert json.loads((tmp_path / "baseline.json").read_text())["harmonise"] == harmonise


def test_only_connectivity_is_harmonised_and_only_by_combat(store, tmp_path):
    for name, harmonise in (("site", "combat"), ("connectivity_svm", "scaling")):
        with pytest.raises(InputError, match="harmonise is 'combat', for one of connectivity_logistic"):
            run_baseline(name, store, store.parent / "splits.json", tmp_path, tmp_path, harmonise=harmonise)


def test_a_site_left_out_cannot_be_harmonised(store, tmp_path):
    save_splits(make_splits(read_manifest(store)["runs"], folds=3, test_site="west"), tmp_path / "splits.json")
    arguments = (store, tmp_path / "splits.json", tmp_path, store.parent / "series")
    with pytest.raises(InputError, match="16 participants are of sites without training participants, such as west"):
        run_baseline("connectivity_logistic", *arguments, harmonise="combat")


def test_majority_scores_the_share_of_the_more_frequent_class(store, tmp_path):
    table = run_baseline("majority", store, store.parent / "splits.json", tmp_path, tmp_path, resamples=50)
    assert table["auroc"]["value"] == 0.5
    assert table["balanced_accuracy"]["value"] == 0.5


def test_site_age_and_sex_are_all_that_is_used(store, tmp_path):
    run_baseline("site_age_sex", store, store.parent / "splits.json", tmp_path, tmp_path, resamples=50)
    assert json.loads((tmp_path / "baseline.json").read_text())["features"] == ["site", "age", "sex"]


def test_gaps_and_new_sites_are_no_obstacle():
    train = pd.DataFrame({"site": ["a", "b"] * 10, "age": [8.0, np.nan] * 10, "sex": ["F", "M"] * 10})
    model = table_model(train, BINARY.linear(0)[0]).fit(train, [0, 1] * 10)
    new = pd.DataFrame({"site": ["a", "c"], "age": [8.0, 9.0], "sex": ["F", "M"]})
    assert model.predict(new)[0] == 0


def test_head_motion_from_a_column_or_from_fmriprep_or_not_at_all(store, tmp_path):
    runs = read_manifest(store)["runs"][:2]
    assert mean_motion(runs) is None
    with pytest.raises(InputError, match="mean_fd"):
        run_baseline("head_motion", store, store.parent / "splits.json", tmp_path, tmp_path)
    named = [run | {"participant": {"Mean_FD": 0.25}} for run in runs]
    assert mean_motion(named)["mean_fd"].tolist() == [0.25, 0.25]
    sources = []
    for run in runs:
        folder = tmp_path / run["run_id"]
        folder.mkdir()
        table = pd.DataFrame({"framewise_displacement": [np.nan, 0.1, 0.3]})
        table.to_csv(folder / f"{run['run_id']}_desc-confounds_timeseries.tsv", sep="\t", na_rep="n/a", index=False)
        (9 * table).to_csv(folder / f"{run['run_id']}0_desc-confounds_timeseries.tsv", sep="\t", index=False)  # run-10
        sources.append(run | {"source": str(folder / "bold.nii.gz")})
    assert mean_motion(sources)["mean_fd"].tolist() == pytest.approx([0.2, 0.2])


def test_columns_are_found_in_any_case():
    runs = [{"participant_id": "a", "site": 1, "diagnosis": 0, "participant": {"Age": 9, "Gender": 1}}]
    assert list(participants_table(runs)) == ["site", "age", "sex"]
