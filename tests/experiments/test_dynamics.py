"""What sees what: selections and scores against scikit-learn, a plan from cohort to table on a small store.

Not covered: how large the scores are (docs/dynamics.md), pretraining itself (tests/configs), painted cohorts
(test_painted.py).
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from nilearn import signal
from sklearn.metrics import roc_auc_score
from small_stores import TR, planted_store, some_voxels, write_store

from bundle.anatomy import grid
from bundle.data.normalisation import Normalisation
from bundle.errors import InputError
from bundle.experiments import dynamics, frozen
from bundle.experiments.auroc import WHAT, differences, summarise
from bundle.experiments.frozen import (
    CEILING,
    CONNECTIVITY,
    Design,
    connectivity_rows,
    encoder_rows,
    load_frozen,
    records_of,
)
from bundle.experiments.patterns import label_pattern
from bundle.experiments.signals import group_latents, label_signals, latents_of
from bundle.experiments.synthetic import SITES, plan_cohort
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.networks.swin_mamba import SwinMambaEncoder
from bundle.training.checkpoints import save_checkpoint
from bundle.training.provenance import Provenance

ROOT = Path(__file__).resolve().parents[2]
SIZE = {"embed_dim": 4, "depths": [1, 1], "frames": 16}
RIVALS = [*CONNECTIVITY, CEILING]
VOXEL = {"mode": "voxel", "sd_floor": 0.1, "clip": 5.0}
READOUTS = {
    "mean": {"kind": "mean"},
    "harmonised": {"kind": "mean", "harmonise": "combat"},
    "attention": {"kind": "attention"},
    "covariance": {"kind": "covariance", "stage": 1, "components": {"group": [1]}, "subtract": None},
}


def joined(made: Iterable[list[dict]]) -> pd.DataFrame:
    """The rows of all readouts."""
    return pd.DataFrame(chain.from_iterable(made))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return planted_store(tmp_path_factory.mktemp("dynamics"), subjects=18, effect=6.0, frames=48, per_label=2)


@pytest.fixture(scope="module")
def tested(store) -> pd.DataFrame:
    """All readouts of a random encoder."""
    design = Design(READOUTS, folds=3, sizes=[8], shift=["limbic"], seed=0)
    rows = joined(encoder_rows(design, store, {"size": SIZE, "normalisation": VOXEL}))
    return rows.assign(encoder="random", cohort="coupling", seed=0)


def test_every_subject_is_tested_once_in_every_way(tested, store):
    people = Counter(run["participant_id"] for run in records_of(store))
    found = {what: Counter(part["participant_id"]) for what, part in tested.groupby(WHAT)}
    ways = {(size, shuffled, shifted) for *_, size, shuffled, shifted in found}
    assert ways == {(0, False, False), (8, False, False), (0, True, False), (0, False, True)}
    assert {readout for _, _, readout, *_ in found} == set(READOUTS)
    assert {readout for _, _, readout, size, *_ in found if size} == set(READOUTS) - {"harmonised"}
    assert all(names == people for names in found.values())


def test_true_labels_are_those_of_the_store_and_shuffled_ones_keep_each_sites_share(tested, store):
    true = {run["participant_id"]: run["diagnosis"] for run in records_of(store)}
    sites = {run["participant_id"]: run["site"] for run in records_of(store)}
    plain, control = tested[~tested["shuffled"]], tested[tested["shuffled"]]
    assert (plain["label"] == plain["participant_id"].map(true)).all()
    assert not (control["label"] == control["participant_id"].map(true)).all()
    once = control.drop_duplicates("participant_id")
    shares = once.groupby(once["participant_id"].map(sites))["label"].mean()
    assert (
        shares.to_dict() == once["participant_id"].map(true).groupby(once["participant_id"].map(sites)).mean().to_dict()
    )


def test_a_harmonised_mean_is_that_of_combat_fitted_to_the_folds_training_subjects(store):
    """A site that a readout is not told of goes into the mean tokens of its subjects, and comes out again."""
    runs = records_of(store)
    rng = np.random.default_rng(0)
    labels = np.array([run["diagnosis"] for run in runs])
    sites = [run["site"] for run in runs]
    tokens = [torch.as_tensor(rng.normal(size=(2, 5, 3)) + label, dtype=torch.float32) for label in labels]
    moved = [own + 50.0 * (site == "west") for own, site in zip(tokens, sites, strict=True)]
    train, test = np.arange(12), np.arange(12, 18)

    def logits(rows: list) -> np.ndarray:
        given = list(zip(sites, rows, strict=True))
        return frozen._harmonised_mean(0, [given[i] for i in train], labels[train], [given[i] for i in test])

    np.testing.assert_allclose(logits(moved), logits(tokens), atol=1e-3)
    changed = [own if i in train else 2 * own for i, own in enumerate(tokens)]
    changed[12] = tokens[12]
    assert logits(changed)[0] == pytest.approx(logits(tokens)[0])  # other test subjects do not matter


def test_a_large_coupling_is_seen_by_connectivity_of_labels_groups_and_components(tmp_path):
    folder = planted_store(tmp_path, subjects=30, effect=6.0, frames=200, every=8)
    design = Design({}, folds=3, sizes=[], shift=[], seed=0)
    rows = joined(connectivity_rows(design, folder, RIVALS)).assign(encoder="none", cohort="coupling", seed=0)
    table = summarise(rows, resamples=50).set_index(["readout", "shuffled"])["auroc"]
    for readout, least in (("labels", 0.9), ("groups", 0.9), ("components", 0.75)):
        readout = f"connectivity of {readout}"
        assert table[readout, False] > least
        assert table[readout, True] < 0.8


def test_a_pattern_inside_labels_is_seen_by_its_own_connectivity_and_by_patches_and_not_by_labels(tmp_path):
    voxels, labels = some_voxels(per_label=12, every=4)
    numbers = np.unique(labels)
    mm = nib.affines.apply_affine(grid.AFFINE, np.stack(np.unravel_index(voxels, grid.SHAPE), axis=-1))
    pattern = label_pattern(mm, labels, np.ones(len(voxels)))

    def bold(subject: dict, rng: np.random.Generator) -> np.ndarray:
        latents, inner = (group_latents(subject[name], 200, TR, rng) for name in ("coupling_z", "pattern_z"))
        place = np.searchsorted(numbers, labels)
        course = label_signals(latents, numbers, TR, rng)[:, place] + 2 * pattern * latents_of(inner, numbers)[:, place]
        return course + rng.standard_normal(course.shape)

    folder = write_store(tmp_path, plan_cohort(30, 6.0, 0, SITES, "pattern"), bold, voxels)
    rows = joined(connectivity_rows(Design({}, folds=3, sizes=[], shift=[], seed=0), folder, RIVALS))
    table = summarise(rows.assign(encoder="none", cohort="pattern", seed=0), resamples=50)
    found = table[~table["shuffled"]].set_index("readout")["auroc"]
    assert found["connectivity of planted patterns"] > 0.9
    assert found["connectivity of patches"] > 0.85
    assert found["connectivity of labels"] < 0.75


def test_patches_are_the_encoders_and_hold_voxels_of_one_group():
    groups = np.random.default_rng(0).integers(0, 4, grid.SHAPE)
    patches, group_of = frozen._patches(groups)
    edge = SwinMambaEncoder(embed_dim=24, depths=[1, 1, 1, 1], frames=8).patch_size
    place = np.indices(grid.SHAPE) // edge
    np.testing.assert_array_equal(patches > 0, groups > 0)
    seen: dict[int, tuple] = {}
    for voxel in map(tuple, np.random.default_rng(1).integers(0, grid.SHAPE, (5000, 3))):
        if groups[voxel]:
            whose = (*place[(slice(None), *voxel)], groups[voxel])
            assert seen.setdefault(patches[voxel], whose) == whose
            assert group_of[patches[voxel] - 1] == groups[voxel]
    assert len(set(seen.values())) == len(seen)
    assert len(group_of) == 3 * (grid.SHAPE[0] // edge) ** 3  # all groups are everywhere


def test_mean_courses_are_those_of_nilearn_voxel_by_voxel():
    rng = np.random.default_rng(0)
    frames, numbers = rng.normal(size=(30, 50)), rng.integers(0, 4, 50)
    numbers[numbers == 2] = 0
    found = frozen._means(frames, numbers, 4)
    for number in (1, 3):
        expected = signal.clean(frames[:, numbers == number].mean(1)[:, None], standardize="zscore_sample")[:, 0]
        np.testing.assert_allclose(found[:, number - 1], expected, atol=1e-12)
    assert not found[:, [1, 3]].any()


def test_a_readout_is_given_training_subjects_with_their_labels_and_never_those_that_it_scores(store):
    runs = records_of(store)
    names = [run["participant_id"] for run in runs]
    true = {run["participant_id"]: run["diagnosis"] for run in runs}
    sizes = Counter()

    def readout(given: list, labels: np.ndarray, test: list) -> np.ndarray:
        asked = [name.removesuffix(" shifted") for name in test]
        assert set(given).isdisjoint(asked)
        shuffled = [true[name] for name in given] != labels.tolist()
        sizes[len(given), len(test), shuffled] += 1
        if len(given) == 8:
            assert labels.sum() == 4
        return np.zeros(len(test))

    design = Design({}, folds=3, sizes=[8], shift=["limbic"], seed=0)
    rows = {False: names, True: [f"{name} shifted" for name in names]}
    found = pd.DataFrame(frozen._tested(design, runs, rows, readout))
    assert sizes == {(8, 6, False): 3, (12, 12, False): 3, (12, 6, True): 3}
    plain = found[(found["size"] == 0) & ~found["shifted"]]
    site = plain["participant_id"].map({run["participant_id"]: run["site"] for run in runs})
    shares = plain.groupby(["shuffled", site, "label", "fold"]).size().unstack("fold", fill_value=0)
    assert len(shares) == 2 * len(set(site)) * 2
    assert (shares.max(axis=1) - shares.min(axis=1) <= 1).all()  # of either labels, in every fold


def made_up(cohort: str, seeds: int, subjects: int, shift: float, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(seeds):
        for person in range(subjects):
            label = person % 2
            row = {"cohort": cohort, "encoder": "e", "readout": "r", "size": 0, "shuffled": False, "shifted": False}
            fold = person // 2 % 3
            logit = shift * label + rng.normal() + 10 * fold  # folds are on scales of their own
            rows.append(
                row | {"seed": number, "fold": fold, "participant_id": f"{person}", "label": label, "logit": logit}
            )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("cohort", ["coupling", "painted"])
def test_the_auroc_is_scikit_learns_within_each_seed_and_fold(cohort):
    rows = made_up(cohort, seeds=3, subjects=30, shift=1.0)
    [found] = summarise(rows, resamples=200).to_dict("records")
    parts = [part for _, part in rows.groupby(["seed", "fold"])]
    expected = [roc_auc_score(part["label"], part["logit"]) for part in parts]  # all folds are of one size
    assert found["seeds"] == 3
    if cohort == "coupling":
        assert found["auroc"] == pytest.approx(np.mean(expected))
    else:  # a subject's mean over the seeds
        assert found["auroc"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert found["low"] < found["auroc"] < found["high"]


def test_seeds_of_the_painted_cohort_are_the_same_subjects_and_do_not_narrow_its_interval():
    one = made_up("painted", seeds=1, subjects=40, shift=0.8)
    copies = pd.concat([one.assign(seed=seed) for seed in range(5)])
    width = {
        name: tuple(summarise(rows, 400).loc[0, ["low", "high"]])
        for name, rows in {"one": one, "five": copies, "others": copies.assign(cohort="coupling")}.items()
    }
    assert width["five"] == pytest.approx(width["one"])
    low, high = width["others"]
    assert high - low < 0.7 * (width["one"][1] - width["one"][0])


def test_a_difference_is_of_the_same_subjects():
    good, bad = made_up("coupling", 2, 40, 2.0), made_up("coupling", 2, 40, 0.0).assign(encoder="other")
    rows = pd.concat([good, bad])
    what = {"cohort": "coupling", "readout": "r"}
    pairs = [({**what, "encoder": "e"}, {**what, "encoder": other}) for other in ("other", "e")]
    found = differences(rows, pairs, resamples=200)
    both = summarise(rows, 50).set_index("encoder")["auroc"]
    assert found["difference"].tolist() == [pytest.approx(both["e"] - both["other"]), 0.0]
    assert found.loc[0, "low"] > 0
    assert (found.loc[1, "low"], found.loc[1, "high"]) == (0, 0)
    assert found.loc[0, ["first", "second"]].tolist() == ["e: r", "other: r"]


def test_a_pretrained_encoder_is_loaded_with_the_units_that_it_saw(tmp_path):
    network = MaskedAutoencoder(**SIZE)
    facts = Provenance(config={}, network=network.encoder.size, normalisation=VOXEL | {"per_frame": True})
    save_checkpoint({"network": network, "provenance": facts}, tmp_path / "best.pt")
    encoder, normalisation = load_frozen({"checkpoint": tmp_path / "best.pt"}, seed=0)
    assert normalisation == Normalisation("voxel", 0.1, 5.0, per_frame=True)
    for name, tensor in network.encoder.state_dict().items():
        assert torch.equal(tensor, encoder.state_dict()[name]), name
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


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


def test_covariance_and_shifts_are_of_the_design_s_atlas_and_the_mean_is_of_none(tested, store):
    """AAL116 has limbic regions and groups of other voxels than AAL3."""
    readouts = {name: READOUTS[name] for name in ("mean", "covariance")}
    design = Design(readouts, folds=3, sizes=[], shift=["limbic"], seed=0, atlas="AAL116")
    rows = joined(encoder_rows(design, store, {"size": SIZE, "normalisation": VOXEL}))
    key = ["readout", "shuffled", "shifted", "fold", "participant_id"]
    ours = tested[tested["size"] == 0].set_index(key)["logit"]
    same = {
        (name, shifted): np.array_equal(part["logit"], ours.loc[part.set_index(key).index])
        for (name, shifted), part in rows.query("not shuffled").groupby(["readout", "shifted"])
    }
    assert {what for what, equal in same.items() if equal} == {("mean", False)}


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
