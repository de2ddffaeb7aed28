"""Readouts of frozen encoders and rivals on a small store: who is tested by what, against scikit-learn and nilearn.

Not covered: how large the scores are (docs/dynamics.md).
"""

from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from nilearn import signal
from small_stores import TR, planted_store, some_voxels, write_store

from bundle.anatomy import grid
from bundle.data.normalisation import Normalisation
from bundle.experiments import frozen
from bundle.experiments.auroc import WHAT, summarise
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


def test_a_large_coupling_is_seen_by_connectivity_of_all_but_patches_alone(tmp_path):
    folder = planted_store(tmp_path, subjects=30, effect=6.0, frames=200, every=8)
    design = Design({}, folds=3, sizes=[], shift=[], seed=0)
    rows = joined(connectivity_rows(design, folder, RIVALS)).assign(encoder="none", cohort="coupling", seed=0)
    table = summarise(rows, resamples=50).set_index(["readout", "shuffled"])["auroc"]
    for readout, least in (("labels", 0.9), ("groups", 0.9), ("components", 0.75), ("labels and patches", 0.9)):
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
    assert found["connectivity of labels and patches"] > 0.85
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


def test_a_pretrained_encoder_is_loaded_with_the_units_that_it_saw(tmp_path):
    network = MaskedAutoencoder(**SIZE)
    facts = Provenance(config={}, network=network.encoder.size, normalisation=VOXEL | {"per_frame": True})
    save_checkpoint({"network": network, "provenance": facts}, tmp_path / "best.pt")
    encoder, normalisation = load_frozen({"checkpoint": tmp_path / "best.pt"}, seed=0)
    assert normalisation == Normalisation("voxel", 0.1, 5.0, per_frame=True)
    for name, tensor in network.encoder.state_dict().items():
        assert torch.equal(tensor, encoder.state_dict()[name]), name
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


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
