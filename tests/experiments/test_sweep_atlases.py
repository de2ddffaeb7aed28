"""Sweeps over several atlases and kinds of connectivity: each has the labels of its own, and is made anew with them."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from small_stores import planted_store
from sweeps import Stages, small

from bundle.anatomy import atlas as atlas_module
from bundle.anatomy.atlas import load_atlas
from bundle.experiments import trial as module
from bundle.experiments.baselines import participant_series
from bundle.experiments.report import write_report
from bundle.experiments.sweep import baselines, plan_trials, read_sweep, run_sweep
from bundle.preparation.store import read_manifest


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return planted_store(tmp_path_factory.mktemp("data"), subjects=36, effect=2.0, frames=60, per_label=1, every=20)


@pytest.fixture(scope="module")
def dense_store(tmp_path_factory):
    """With enough voxels in each label for connectivity."""
    return planted_store(tmp_path_factory.mktemp("dense"), subjects=36, effect=2.0, frames=60, per_label=16, every=20)


@pytest.fixture
def calls(monkeypatch, store):
    """Stages that were run."""
    stages = Stages(store)
    monkeypatch.setattr(module, "run_config", stages)
    return stages


@pytest.fixture
def halves(tmp_path) -> Path:
    """A made-up atlas file: AAL3's labels, in groups of odd (left) and even (right) numbers."""
    atlas = load_atlas()
    image = nib.Nifti1Image(atlas.labels[::2, ::2, ::2].astype(np.int16), atlas.affine @ np.diag([2, 2, 2, 1]))
    path = tmp_path / "halves_dseg.nii.gz"
    nib.save(image, path)
    rows = "".join(f"{n}\tlabel {n}\t{'left' if n % 2 else 'right'}\n" for n in range(1, 171))
    path.with_name("halves_dseg.tsv").write_text(f"index\tname\tgroup\n{rows}")
    return path


def test_one_sweep_goes_over_atlases_given_by_name_and_by_file(dense_store, tmp_path, calls, monkeypatch, halves):
    monkeypatch.chdir(tmp_path)
    file = halves.name  # from the folder in which the sweep is started
    content = {
        "store": str(dense_store), "results": "results", "splits": {"folds": 3, "test": [0]}, "steps": [],
        "strategies": [
            "random_tube",
            {"mask": "region", "atlas": ["AAL3", "AAL116"], "regions": ["limbic"]},
            {"mask": "equal", "atlas": file, "regions": ["left", ["left", "right"]]},
            {"mask": "part_brain", "atlas": ["AAL116", file]},
        ],
        "baselines": [
            "majority", "connectivity_logistic", {"baseline": "connectivity_logistic", "atlas": ["AAL116", file]}
        ],
        "bootstrap_resamples": 20,
    }  # fmt: skip
    Path("sweep.json").write_text(json.dumps(content))
    sweep = read_sweep("sweep.json")
    trials = {trial.strategy.name: trial for trial in plan_trials(sweep)}
    assert list(trials) == [
        "majority", "connectivity_logistic", "AAL116_connectivity_logistic", "halves_dseg_connectivity_logistic",
        "random_tube", "AAL3_limbic", "AAL116_limbic", "halves_dseg_equal_left", "halves_dseg_equal_left_right",
        "AAL116_part_brain", "halves_dseg_part_brain",
    ]  # fmt: skip
    assert run_sweep(sweep) == []
    given = {call[2].split("__")[0]: set() for call in calls.calls}
    for (_, _, name), overrides in zip(calls.calls, calls.overrides, strict=True):
        given[name.split("__")[0]].add(overrides.get("atlas"))
    assert given == {
        "random_tube": {None}, "AAL3_limbic": {"AAL3"}, "AAL116_limbic": {"AAL116"}, "AAL116_part_brain": {"AAL116"},
        "halves_dseg_equal_left": {str(halves)}, "halves_dseg_equal_left_right": {str(halves)},
        "halves_dseg_part_brain": {str(halves)},
    }  # fmt: skip
    assert len({trial.pretraining for trial in trials.values()} - {""}) == 7
    for name in ("connectivity_logistic", "AAL116_connectivity_logistic", "halves_dseg_connectivity_logistic"):
        assert (Path(trials[name].folder) / "scores.json").is_file()
        sha256 = load_atlas(trials[name].atlas).sha256
        found = {name for path in Path("results/series").glob(f"*{sha256[:12]}.csv") for name in pd.read_csv(path)}
        assert found
        assert found <= set(load_atlas(trials[name].atlas).names.values())


def test_harmonised_connectivity_is_a_baseline_of_its_own_and_has_the_site_beside_it(dense_store, tmp_path):
    harmonised = {"baseline": "connectivity_logistic", "harmonise": "combat"}
    settings = {"strategies": [], "splits": {"folds": 3, "test": [0]}}
    sweep = small(dense_store, tmp_path, baselines=["connectivity_logistic", harmonised], **settings)
    trials = {trial.strategy.name: trial for trial in plan_trials(sweep)}
    assert list(trials) == ["site", "connectivity_logistic", "connectivity_logistic_combat"]
    assert len({trial.sha256 for trial in trials.values()}) == 3
    assert run_sweep(sweep) == []
    facts = {name: json.loads((Path(trial.folder) / "baseline.json").read_text()) for name, trial in trials.items()}
    assert {name: own["harmonise"] for name, own in facts.items()} == {
        "site": None, "connectivity_logistic": None, "connectivity_logistic_combat": "combat",
    }  # fmt: skip
    over = small(dense_store, tmp_path, baselines=["site", harmonised | {"atlas": ["AAL3", "AAL116"]}], **settings)
    names = ["site", "AAL3_connectivity_logistic_combat", "AAL116_connectivity_logistic_combat"]
    assert [own.name for own in baselines(over)] == names


def test_connectivity_is_of_the_labels_of_its_atlas(dense_store, tmp_path, halves):
    """Of a coarser copy of AAL3, whose labels have other names."""
    run = read_manifest(dense_store)["runs"][0]
    own = participant_series(dense_store, [run], tmp_path / "series", load_atlas(halves))[run["participant_id"]]
    aal3 = participant_series(dense_store, [run], tmp_path / "series", load_atlas())[run["participant_id"]]
    assert all(name.startswith("label ") for name in own)
    numbers = {name: number for number, name in load_atlas().names.items()}
    assert {f"label {numbers[name]}" for name in aal3} >= set(own)
    assert len(list((tmp_path / "series").iterdir())) == 2  # one does not pass for the other


def test_another_table_beside_the_same_image_makes_trials_anew(store, tmp_path, calls, halves):
    strategies = [{"mask": "region", "atlas": str(halves), "regions": ["left"]}]
    rivals = ["majority", {"baseline": "connectivity_logistic", "atlas": str(halves)}]
    sweep = small(store, tmp_path, strategies=strategies, baselines=rivals, splits={"folds": 3, "test": [0]})
    before = {trial.strategy.name: trial for trial in plan_trials(sweep)}
    other = tmp_path / "other"
    other.mkdir()
    for name in ("halves_dseg.nii.gz", "halves_dseg.tsv"):
        shutil.copyfile(tmp_path / name, other / name)
    table = other / "halves_dseg.tsv"
    table.write_text(table.read_text().replace("label 41\tleft", "label 41\tright"))
    halves.unlink()
    halves.symlink_to(other / halves.name)
    halves.with_name(table.name).unlink()
    halves.with_name(table.name).symlink_to(table)
    atlas_module._load.cache_clear()  # a later process
    after = {trial.strategy.name: trial for trial in plan_trials(sweep)}
    assert {name for name in before if before[name].sha256 != after[name].sha256} == set(before) - {"majority"}
    assert before["halves_dseg_left"].pretraining != after["halves_dseg_left"].pretraining


def test_the_report_has_a_table_of_regions_for_each_atlas(store, tmp_path, calls, monkeypatch, halves):
    monkeypatch.setattr(module, "run_config", with_reconstruction(calls))
    strategies = [{"mask": "region", "atlas": "AAL116", "regions": ["limbic"]},
                  {"mask": "region", "atlas": str(halves), "regions": ["left", "right"]}]  # fmt: skip
    sweep = small(store, tmp_path, strategies=strategies, splits={"folds": 3, "test": [0]}, steps=["reconstruct"])
    assert run_sweep(sweep) == []
    text = write_report(sweep.results, resamples=20).with_name("report.md").read_text()
    lines = text.splitlines()
    headers = {
        line.split(", ")[1].split(" – ")[0]: lines[number + 2]
        for number, line in enumerate(lines)
        if line.startswith("## Reconstruction of each region from the rest: temporal R²")
    }
    groups = " | ".join([*load_atlas("AAL116").groups, "insula"])
    assert headers == {
        "AAL116": f"| strategy | {groups} | all |",
        "halves_dseg.nii.gz": "| strategy | left | right | all |",
    }
    regions = pd.read_csv(Path(sweep.results) / "regions.csv")
    assert set(regions["strategy"]) == {"AAL116_limbic", "halves_dseg_left", "halves_dseg_right"}


def with_reconstruction(stage):
    """The stage, which also writes what reconstruct.json writes: an error of 1 per label of the atlas."""

    def run(run_id, configs, overrides, *rest):
        stage(run_id, configs, overrides, *rest)
        if "reconstruct" in configs:
            folder = Path(overrides["output_dir"]) / "reconstruction"
            folder.mkdir(parents=True, exist_ok=True)
            rows = [
                {"participant_id": who, "name": name, "squared": 1.0, "count": 1.0, "residual": 1.0, "total": 2.0}
                for who in "ab"
                for name in load_atlas(overrides["atlas"]).names.values()
            ]
            pd.DataFrame(rows).to_csv(folder / "reconstruction_subjects.csv", index=False)
            (folder / "reconstruction.json").write_text('{"masked_mse": 1.0, "temporal_r2": 0.5}')

    return run
