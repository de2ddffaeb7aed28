"""A plan of what sees what, from cohorts to tables, with stores made without images.

Not covered: how large the scores are (docs/dynamics.md), pretraining itself (tests/configs), painted cohorts
(test_painted.py).
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from small_stores import planted_store

from bundle.errors import InputError
from bundle.experiments import dynamics
from bundle.experiments.frozen import (
    CEILING,
    CONNECTIVITY,
    Design,
    records_of,
)
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.training.checkpoints import save_checkpoint
from bundle.training.provenance import Provenance

ROOT = Path(__file__).resolve().parents[2]
SIZE = {"embed_dim": 4, "depths": [1, 1], "frames": 16}
RIVALS = [*CONNECTIVITY, CEILING]
VOXEL = {"mode": "voxel", "sd_floor": 0.1, "clip": 5.0}
READOUTS = {kind: {"kind": kind} for kind in ("mean", "attention", "covariance")}


def plan_file(folder: Path, **changes: object) -> Path:
    plan = {
        "results": str(folder / "results"),
        "cohorts": ["coupling"],
        "seeds": [0, 1],
        "encoders": {"random": {"size": SIZE, "normalisation": VOXEL}},
        "readouts": {"covariance": READOUTS["covariance"]},
        "synthetic": {"subjects": 24, "effect": 6.0, "duration_s": 60.0},
        "folds": 3,
    }
    (folder / "plan.json").write_text(json.dumps(plan | changes))
    return folder / "plan.json"


@pytest.fixture
def made() -> list[list[str]]:
    """Readouts that were made together, call by call."""
    return []


@pytest.fixture
def small_cohorts(monkeypatch, made) -> list[int]:
    """Cohorts of stores made without images; returns the seeds that were asked for."""
    asked = []

    def make(plan, folder: Path, cohort: str, seed: int) -> Path:
        asked.append(seed)
        return planted_store(folder, plan.synthetic["subjects"], plan.synthetic["effect"], seed, frames=48, per_label=5)

    def rows(readouts: Iterable[str], folder: Path) -> Iterator[list[dict]]:
        ways = {"size": 0, "shuffled": False, "shifted": False, "fold": 0, "logit": 0.0}
        who = [{"participant_id": run["participant_id"], "label": run["diagnosis"]} for run in records_of(folder)]
        return ([ways | person | {"readout": readout} for person in who] for readout in readouts)

    def of_encoder(design: Design, folder: Path, settings: dict) -> Iterator[list[dict]]:
        made.append(list(design.readouts))
        return rows(design.readouts, folder)

    def of_rivals(design: Design, folder: Path, rivals: list[str]) -> Iterator[list[dict]]:
        made.append(rivals)
        return rows(rivals, folder)

    monkeypatch.setattr(dynamics, "encoder_rows", of_encoder)
    monkeypatch.setattr(dynamics, "connectivity_rows", of_rivals)
    monkeypatch.setattr(dynamics, "_store", make)
    return asked


def test_a_plan_is_run_once_and_goes_on_where_cells_are_missing(tmp_path, small_cohorts, made):
    plan = dynamics.read_plan(plan_file(tmp_path))
    rows = dynamics.run_plan(plan)
    assert small_cohorts == [0, 1]
    assert not list((tmp_path / "results" / "cohorts").glob("*/"))  # images and stores are gone
    assert set(zip(rows["encoder"], rows["readout"], strict=True)) == {
        ("random", "covariance"),
        *(("none", rival) for rival in RIVALS),
    }
    assert set(rows["seed"]) == {0, 1}
    assert made == [RIVALS, ["covariance"]] * 2
    next((tmp_path / "results" / "cells").glob("coupling_seed-1/none-connectivity_of_groups-*.csv")).unlink()
    made.clear()
    pd.testing.assert_frame_equal(dynamics.run_plan(plan), rows)
    assert small_cohorts == [0, 1, 1]
    assert made == [["connectivity of groups"]]
    shutil.rmtree(tmp_path / "results" / "cohorts")
    pd.testing.assert_frame_equal(dynamics.run_plan(plan), rows)
    assert not (tmp_path / "results" / "cohorts").exists()  # what is finished is not locked, and nothing is written


def test_tables_and_picture_are_of_all_that_was_tested(tmp_path, small_cohorts):
    encoders = {"random": {"size": SIZE, "normalisation": VOXEL}}
    encoders["other"] = {"size": SIZE, "normalisation": VOXEL | {"clip": 4.0}, "against": "random"}
    plan = dynamics.read_plan(plan_file(tmp_path, encoders=encoders))
    scores, compared = dynamics.write_tables(plan, dynamics.run_plan(plan), resamples=20)
    own = [("random", "covariance"), ("other", "covariance")]
    assert sorted(zip(scores["encoder"], scores["readout"], strict=True)) == sorted(
        [*own, *(("none", rival) for rival in RIVALS)]
    )
    assert scores["seeds"].tolist() == [2] * len(scores)
    against = {f"none: {rival}" for rival in RIVALS}
    assert set(compared.loc[compared["first"] == "random: covariance", "second"]) == against
    assert set(compared.loc[compared["first"] == "other: covariance", "second"]) == against | {"random: covariance"}
    results = tmp_path / "results"
    assert pd.read_csv(results / "dynamics.csv")["auroc"].tolist() == [0.5] * len(scores)  # all logits are 0
    assert len(pd.read_csv(results / "dynamics_differences.csv")) == len(compared)
    with Image.open(results / "dynamics.png") as picture:
        picture.verify()


def test_a_new_readout_or_other_tests_of_it_leave_what_is_there(tmp_path, small_cohorts, made):
    mean, shifted = {"kind": "mean"}, {"shift": ["limbic"]}
    covariance = READOUTS["covariance"]
    dynamics.run_plan(dynamics.read_plan(plan_file(tmp_path, seeds=[0])))
    for changes, expected in (
        ({"readouts": {"covariance": covariance, "mean": mean}}, [["mean"]]),
        ({"readouts": {"covariance": covariance | {"stage": 0}}}, [["covariance"]]),
        (shifted, [["covariance"]]),  # connectivity is not shifted
        (shifted | {"cohorts": ["pattern"]}, [RIVALS, ["covariance"]]),
        ({"cohorts": ["pattern"]}, []),  # nor is this cohort
        ({"folds": 2}, [RIVALS, ["covariance"]]),
        ({"synthetic": {"subjects": 30, "effect": 6.0, "duration_s": 60.0}}, [RIVALS, ["covariance"]]),
        ({"encoders": {"other": {"size": SIZE, "normalisation": VOXEL | {"mode": "run"}}}}, [["covariance"]]),
    ):
        made.clear()
        rows = dynamics.run_plan(dynamics.read_plan(plan_file(tmp_path, **{"seeds": [0]} | changes)))
        assert made == expected, changes
        assert len(rows[rows["encoder"] == "none"].groupby("readout")) == len(RIVALS)


def test_what_an_encoder_ended_before_it_was_interrupted_is_kept(tmp_path, small_cohorts, made, monkeypatch):
    plan = dynamics.read_plan(plan_file(tmp_path, seeds=[0], readouts=READOUTS))
    of_encoder = dynamics.encoder_rows

    def interrupted(*given: object) -> Iterator[list[dict]]:
        for rows in of_encoder(*given):
            if rows[0]["readout"] == "attention":
                raise KeyboardInterrupt
            yield rows

    monkeypatch.setattr(dynamics, "encoder_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dynamics.run_plan(plan)
    monkeypatch.setattr(dynamics, "encoder_rows", of_encoder)
    made.clear()
    assert set(dynamics.run_plan(plan)["readout"]) == {*READOUTS, *RIVALS}
    assert made == [["attention", "covariance"]]


def test_two_commands_with_one_folder_of_results_make_each_cohort_once(tmp_path, small_cohorts):
    plan = dynamics.read_plan(plan_file(tmp_path))
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(dynamics.run_plan, [plan, plan])
    assert sorted(small_cohorts) == [0, 1]
    pd.testing.assert_frame_equal(one, other)


def test_another_atlas_makes_cells_of_its_own_and_leaves_those_of_aal3(tmp_path, small_cohorts):
    rows = dynamics.run_plan(dynamics.read_plan(plan_file(tmp_path, seeds=[0])))
    assert len(rows) == len(dynamics.run_plan(dynamics.read_plan(plan_file(tmp_path, seeds=[0], atlas="AAL3"))))
    assert small_cohorts == [0]
    dynamics.run_plan(dynamics.read_plan(plan_file(tmp_path, seeds=[0], atlas="AAL116")))
    assert small_cohorts == [0, 0]


@pytest.mark.parametrize("which", ["dynamics_large", "dynamics_painted"])
def test_the_other_plans_take_the_encoders_that_the_first_pretrains(monkeypatch, which):
    monkeypatch.chdir(ROOT)
    plan, other = (dynamics.read_plan(f"configs/{name}.json") for name in ("dynamics", which))
    assert list(other.encoders) == list(plan.encoders)
    for name, settings in other.encoders.items():
        if "checkpoint" in settings:
            assert dynamics._checkpoint(other, name).absolute() == dynamics._checkpoint(plan, name)
        else:
            assert settings == plan.encoders[name]
        assert settings.get("against") == plan.encoders[name].get("against")
    assert other.readouts["covariance of groups"] == plan.readouts["covariance of groups"]


def test_pretrained_encoders_are_compared_by_what_they_rebuild_with_the_one_that_the_plan_names(tmp_path):
    encoders = {
        "plain": {"mask": "region_tubes"},
        "wide": {"mask": "region_tubes", "against": "plain"},
        "limbic": {"mask": "region", "against": "random"},
        "random": {"size": SIZE, "normalisation": VOXEL},
    }
    pretraining = {"subjects": 60, "seed": 7, "duration_s": 60.0, "overrides": {}}
    plan = dynamics.read_plan(plan_file(tmp_path, cohorts=[], encoders=encoders, pretraining=pretraining))
    for name, residual in (("plain", 3.0), ("wide", 1.0)):
        sums = {"squared": 1.0, "count": 1.0, "residual": residual, "total": 4.0, "name": "Hippocampus_L"}
        table = pd.DataFrame([sums | {"participant_id": p} for p in ("01", "02", "03")])
        path = tmp_path / "results" / "pretraining" / name / "reconstruction" / "reconstruction_subjects.csv"
        path.parent.mkdir(parents=True)
        table.to_csv(path, index=False)
    found = dynamics.rebuilt_differences(plan, resamples=20)
    assert (set(found["encoder"]), set(found["against"])) == ({"wide"}, {"plain"})
    by_region = found.set_index("region")
    for region in ("all", "limbic"):  # 0.75 of R² against 0.25
        assert by_region.loc[region, ["difference", "low", "high"]].tolist() == [0.5, 0.5, 0.5]


def test_the_plan_of_windows_takes_the_encoder_that_the_objectives_pretrain(monkeypatch):
    monkeypatch.chdir(ROOT)
    objectives, plan, first = (
        dynamics.read_plan(f"configs/{name}.json") for name in ("objectives", "dynamics_windows", "dynamics")
    )
    name = "windows of much space"
    assert dynamics._checkpoint(plan, name).absolute() == dynamics._checkpoint(objectives, name)
    assert plan.pretraining is None
    assert objectives.pretraining is not None
    given = objectives.pretraining["overrides"] | objectives.encoders[name]["overrides"]
    random = plan.encoders[plan.encoders[name]["against"]]
    assert random["size"] == {key: given[of] for key, of in {
        "embed_dim": "embed_dim", "depths": "depths", "frames": "frames", "window_size": "network_def#window_size",
        "first_window_size": "network_def#first_window_size",
    }.items()}  # fmt: skip
    assert random["normalisation"]["mode"] == given["normalisation#mode"]
    assert (plan.readouts, plan.synthetic, plan.folds) == (first.readouts, first.synthetic, first.folds)


def test_the_plan_of_both_channels_differs_from_the_first_in_the_second_channel_alone():
    plan, first = (dynamics.read_plan(ROOT / "configs" / f"{name}.json") for name in ("dynamics_both", "dynamics"))
    run, both = plan.encoders["random, run"], plan.encoders["random, both"]
    assert run == first.encoders["random, run"]
    assert both["size"] == run["size"] | {"in_channels": 2}
    assert both["normalisation"] == run["normalisation"] | {"mode": "both"}
    assert plan.readouts == {name: first.readouts[name] for name in ("mean", "attention", "covariance")}
    assert (plan.seeds, plan.synthetic, plan.folds) == (first.seeds, first.synthetic, first.folds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cohorts": ["age"]}, "cohorts are nothing, .* or painted, not 'age'"),
        ({"subject": 3}, "not a plan"),
        ({"synthetic": None}, "'coupling' needs duration_s, effect, subjects in the plan's 'synthetic'"),
        ({"synthetic": {"subjects": 24, "effect": 1.0}}, "'coupling' needs duration_s in"),
        ({"cohorts": ["painted"]}, "'painted' needs atlas, participants, series in the plan's 'painted'"),
        ({"encoders": {"a": {"mask": "region"}}}, "'a' needs duration_s, overrides, seed, subjects in the plan's 'pre"),
        ({"readouts": {"a": {"kind": "attention", "harmonise": "combat"}}}, "'a': harmonise is 'combat', and belongs"),
        ({"readouts": {"a": {"kind": "mean", "harmonise": "other"}}}, "'a': harmonise is 'combat', and belongs"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        dynamics.read_plan(plan_file(tmp_path, **changes))


def test_pretraining_is_asked_for_with_the_plans_settings(tmp_path, small_cohorts, monkeypatch):
    calls = []

    def pretrain(run_id, configs, overrides):
        calls.append((run_id, configs, overrides))
        if "reconstruct" in configs:
            path = overrides["output_dir"] / ("ridge" if "ridge" in configs else "reconstruction")
            path.mkdir()
            rows = [("temporal_r2", "all", "all", 0.2, 0.1, 0.3), ("temporal_r2", "group", "limbic", 0.1, 0.0, 0.2)]
            rows += [("temporal_r2", "label", "Insula_L", 9, 9, 9), ("masked_mse", "all", "all", 9, 9, 9)]
            columns = ["measure", "level", "name", "value", "low", "high"]
            pd.DataFrame(rows, columns=columns).to_csv(path / "reconstruction.csv", index=False)
            return
        network = MaskedAutoencoder(**SIZE)
        facts = Provenance(config={}, network=network.encoder.size, normalisation=VOXEL)
        save_checkpoint({"network": network, "provenance": facts}, overrides["output_dir"] / "best.pt")

    def cohort(folder: Path, subjects: int, planted: str, effect: float, seed: int, duration_s: float) -> Path:
        assert (subjects, planted, effect, seed, duration_s) == (60, "nothing", 0.0, 7, 60.0)
        return planted_store(folder, subjects, effect, seed, frames=48, per_label=5)

    monkeypatch.setattr(dynamics, "run_config", pretrain)
    monkeypatch.setattr(dynamics, "prepared_cohort", cohort)
    changes = {"mask_ratio": 0.5, "normalisation#mode": "run"}
    encoders = {"my encoder": {"mask": "random_tube", "overrides": changes}}
    pretraining = {"subjects": 60, "seed": 7, "duration_s": 60.0, "overrides": {"max_epochs": 2}}
    path = plan_file(tmp_path, seeds=[0], encoders=encoders, pretraining=pretraining)
    rows = dynamics.run_plan(dynamics.read_plan(path))
    assert set(rows["encoder"]) == {"none", "my encoder"}
    masked = ["pretrain", "masks/random_tube"]
    wanted = [("pretrain", masked), ("run", [*masked, "reconstruct"]), ("run", ["pretrain", "reconstruct", "ridge"])]
    assert [(run_id, configs) for run_id, configs, _ in calls] == wanted
    overrides = calls[0][2]
    assert calls[1][2] == overrides
    assert (overrides["max_epochs"], overrides["mask_ratio"]) == (2, 0.5)
    ridge = {name: value for name, value in overrides.items() if name != "mask_ratio"}  # which its mask does not have
    assert calls[2][2] == ridge
    assert ridge["normalisation#mode"] == "run"
    assert overrides["dataset_dir"] == tmp_path / "results" / "pretraining" / "store"
    found = dynamics.rebuilt(dynamics.read_plan(path))
    assert found["by"].tolist() == ["network"] * 2 + ["ridge regression"] * 2
    assert set(found["encoder"]) == {"my encoder"}
    assert found["region"].tolist() == ["all", "limbic"] * 2
    assert found["temporal_r2"].tolist() == [0.2, 0.1] * 2
    dynamics.run_plan(dynamics.read_plan(path))
    assert [run_id for run_id, *_ in calls[3:]] == ["pretrain"]  # goes on, and what was rebuilt is there
    only = dynamics.read_plan(plan_file(tmp_path, cohorts=[], encoders=encoders, pretraining=pretraining))
    assert all(table.empty for table in dynamics.write_tables(only, dynamics.run_plan(only)))
    written = pd.read_csv(tmp_path / "results" / "dynamics_r2.csv")
    pd.testing.assert_frame_equal(written, found)
    assert pd.read_csv(tmp_path / "results" / "dynamics_r2_differences.csv").empty  # one encoder alone
