"""The report of a results folder written by hand: sites of one class are kept and named, every trial has its curve."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from sklearn.metrics import accuracy_score, roc_auc_score
from tasks import BINARY, subjects_of

from bundle.anatomy.atlas import load_atlas
from bundle.anatomy.parcels import parcels_of
from bundle.data.splits import make_splits, save_splits
from bundle.evaluation.attribution import summarise
from bundle.evaluation.maps import draw
from bundle.evaluation.subjects import write_test_scores
from bundle.experiments.report import by_fold, curves_plot, one_class_folds, write_report
from bundle.experiments.statistics import compare, finished_trials, read_outcomes
from bundle.files import write_json
from bundle.pages import p_value

SEEDS = (0, 1)
STRATEGIES = ("random_tube", "limbic")


def cohort(**sites: tuple[int, int]) -> list[dict]:
    """Runs of sites given as (controls, cases)."""
    return [
        {"participant_id": f"{site}{dx}{i}", "site": site, "diagnosis": dx}
        for site, counts in sites.items()
        for dx, count in enumerate(counts)
        for i in range(count)
    ]


def leave_sites_out(results: Path, runs: list[dict]) -> Path:
    """Results of a leave-one-site-out sweep whose networks score at random."""
    where = {run["participant_id"]: run["site"] for run in runs}
    diagnosis = {run["participant_id"]: run["diagnosis"] for run in runs}
    rng, trials = np.random.default_rng(0), {}
    for site in sorted({run["site"] for run in runs}):
        splits = make_splits(runs, folds=3, test_site=site)
        save_splits(splits, results / "splits" / f"fold-{site}.json")
        for strategy in STRATEGIES:
            for seed in SEEDS:
                folder = results / "trials" / f"{strategy}__seed-{seed}__fold-{site}"
                sets = []
                for name in ("validation", "test"):
                    members = splits["sets"][name]
                    labels = np.array([diagnosis[p] for p in members])
                    sites = [where[p] for p in members]
                    sets.append(subjects_of(labels, rng.normal(size=len(labels)) + labels, members).assign(site=sites))
                write_test_scores(BINARY, *sets, folder, 20)
                rows = [("train", tag, step, rng.normal()) for tag in ("train_loss", "auroc") for step in range(5)]
                curves = pd.DataFrame(rows, columns=["stage", "tag", "step", "value"])
                curves.to_csv(folder / "curves.tsv", sep="\t", index=False)
                record = {"strategy": strategy, "kind": "network", "seed": seed, "fold": site, "sha256": "0"}
                record["settings"] = {"splits_file": f"/moved/since/splits/fold-{site}.json", "atlas": "AAL3"}
                record |= {"finished": True, "seconds": {"train": 1.0}, "versions": {"torch": "2"}}
                (folder / "trial.json").write_text(json.dumps(record))
                trials[folder.name] = "0"
    plan = {"trials": trials, "splits": {"folds": 3, "test": "sites"}, "seeds": SEEDS, "overrides": {}}
    data = {"synthetic": True, "participants": len(diagnosis), "runs": len(runs), "tr_in_s": [2.0]}
    data |= {"frames": {"least": 1, "most": 2}, "parameters_hash": "p", "by_site_and_group": []}
    data["target"] = {"column": "diagnosis", "kind": "binary", "classes": ["control", "adhd"], "missing": 0}
    (results / "sweep.json").write_text(json.dumps(plan))
    (results / "data.json").write_text(json.dumps(data))
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two ordinary sites, one of three controls and one of a single case."""
    runs = cohort(north=(7, 6), south=(6, 8), west=(3, 0), east=(0, 1))
    return leave_sites_out(tmp_path_factory.mktemp("results"), runs)


def test_sites_of_one_class_count_in_accuracy_and_give_no_pairs(results):
    tested = read_outcomes(results)
    table = compare(tested, resamples=200).set_index("strategy")
    assert table["subjects"].tolist() == [31, 31]
    for strategy in STRATEGIES:
        auroc, accuracy = [], []
        for seed in SEEDS:
            tables = {}
            for site in ("north", "south", "west", "east"):
                folder = results / "trials" / f"{strategy}__seed-{seed}__fold-{site}"
                threshold = json.loads((folder / "scores.json").read_text())["threshold"]
                rows = pd.read_csv(folder / "subjects.tsv", sep="\t")
                tables[site] = rows.assign(called=rows["logit"] > threshold)
            within = [roc_auc_score(tables[site]["label"], tables[site]["logit"]) for site in ("north", "south")]
            auroc.append(np.average(within, weights=[7 * 6, 6 * 8]))
            everyone = pd.concat(tables.values())
            accuracy.append(accuracy_score(everyone["label"], everyone["called"]))
        assert table.loc[strategy, "auroc"] == pytest.approx(np.mean(auroc))
        assert table.loc[strategy, "accuracy"] == pytest.approx(np.mean(accuracy))
    known = table.drop(columns=[c for c in table if c.split("_")[-1] in ("difference", "p", "holm")])
    assert known.notna().all(axis=None)
    assert table.loc["limbic"].notna().all()
    fold = by_fold(tested).set_index(["fold", "strategy"])
    assert fold.loc[["west", "east"], ["auroc", "balanced_accuracy"]].isna().all(axis=None)
    assert fold.loc[["north", "south"]].notna().all(axis=None)
    assert fold["accuracy"].notna().all()


def test_report_names_the_sites_of_one_class(results):
    assert one_class_folds(read_outcomes(results)) == ["east (1 adhd)", "west (3 control)"]
    html = write_report(results, resamples=20).read_text()
    for text in (html, (results / "report.md").read_text()):
        assert "Sites whose test subjects are of one class" in text
        assert "east (1 adhd), west (3 control)" in text


def test_a_reconstruction_without_r2_is_a_dash_in_the_report(results):
    """Where the hidden voxels of all clips are constant over time."""
    for name, r2 in (("limbic", None), ("random_tube", 0.25)):
        folder = results / "trials" / f"{name}__seed-0__fold-north" / "pretrain" / "reconstruction"
        write_json(folder / "reconstruction.json", {"masked_mse": 0.5, "temporal_r2": r2})
    write_report(results, resamples=20)
    lines = (results / "report.md").read_text().splitlines()
    for name, ending in (("limbic", "| – | 0.5000 |"), ("random_tube", "| 0.250 | 0.5000 |")):
        (row,) = [line for line in lines if line.startswith(f"| {name} |")]
        assert row.endswith(ending)


def test_no_p_value_is_zero():
    assert [p_value(p) for p in (1e-9, 0.00099, 0.001, 0.0416, 1.0, np.nan)] == [
        "<0.001", "<0.001", "0.001", "0.042", "1.000", "–"
    ]  # fmt: skip


def test_a_report_without_such_sites_is_silent_about_them(tmp_path):
    folder = leave_sites_out(tmp_path, cohort(north=(6, 6), south=(6, 6)))
    plan = json.loads((folder / "sweep.json").read_text())
    del plan["splits"]["test"]  # it has a default
    (folder / "sweep.json").write_text(json.dumps(plan))
    assert "of one class" not in write_report(folder, resamples=20).read_text()


def test_where_every_site_has_one_class_accuracy_is_all_there_is(results):
    tested = {
        name: own.select([p for p in own.participants if p[0] in "we"]) for name, own in read_outcomes(results).items()
    }
    table = compare(tested, resamples=50).set_index("strategy")
    assert table["auroc"].isna().all()
    assert np.isnan(table.loc["limbic", "auroc_p"])
    assert 0 < table.loc["limbic", "accuracy_p"] <= 1


def test_subjects_of_one_class_have_no_separation_and_no_map_of_zeros_claims_one(tmp_path):
    atlas = load_atlas()
    names = [(level, name) for level in ("group", "label") for name in parcels_of(atlas, level)]
    rows = [(f"s{i}", 0, "ablation", *name, 100, 1.0 + i) for i in range(3) for name in names]
    columns = ["participant_id", "label", "method", "level", "name", "voxels", "value"]
    table = summarise(pd.DataFrame(rows, columns=columns), 20, 0).set_index("measure")
    assert table.loc["separation", ["value", "low", "high"]].isna().all(axis=None)
    assert (table.loc["size", "value"] == 2).all()
    draw(table.loc["separation"], atlas, tmp_path / "separation", "logits")
    assert not list(tmp_path.iterdir())


def test_each_fold_and_seed_has_a_line_of_its_own_and_each_strategy_an_entry(results):
    figure = curves_plot(finished_trials(results), "train", "")
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["train_loss", "auroc"]
    for axes in panels:
        assert len(axes.lines) == len(STRATEGIES) * len(SEEDS) * 4
        assert len({line.get_color() for line in axes.lines}) == len(STRATEGIES)
        for line in axes.lines:
            assert line.get_xdata().tolist() == [0, 1, 2, 3, 4]  # a zigzag would run through several trials
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(STRATEGIES)
    plt.close(figure)
    assert curves_plot(finished_trials(results), "pretrain", "") is None
