"""Embeddings, against means over tokens by hand. Not covered: what the encoder computes (test_swin_mamba.py)."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_stores import some_voxels, write_store
from tiny_configs import TINY

from bundle.anatomy import grid
from bundle.anatomy.atlas import labels_on, load_atlas
from bundle.data.normalisation import Normalisation
from bundle.deploy.embed import _table, embed
from bundle.errors import InputError
from bundle.experiments.synthetic import SITES, plan_cohort
from bundle.files import file_sha256
from bundle.heads.adapted import AdaptedClassifier
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.preparation.store import read_clip, read_manifest, read_voxels
from bundle.training.checkpoints import save_checkpoint
from bundle.training.provenance import Provenance
from scripts.__main__ import main

pytest.importorskip("pyarrow", reason="pyarrow is not installed; pip install pyarrow")

SIZE = {"embed_dim": TINY["embed_dim"], "depths": TINY["depths"], "frames": 4}
UNITS = Normalisation("voxel", sd_floor=0.1, clip=5.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four participants with one run of two clips each, and a tail."""
    voxels, _ = some_voxels(per_label=1, every=40)
    plan = plan_cohort(4, 0.0, 0, SITES)
    return write_store(tmp_path_factory.mktemp("few"), plan, lambda _, rng: rng.normal(size=(11, len(voxels))), voxels)


def save(folder: Path, store: Path, network: torch.nn.Module, **changes: object) -> Path:
    facts = {"config": {"precision": "float32"}, "preparation": read_manifest(store)["parameters"]}
    facts |= {"network": network.encoder.size, "normalisation": UNITS.facts()}
    save_checkpoint({"network": network, "provenance": Provenance(**(facts | changes))}, folder / "best.pt")
    return folder / "best.pt"


@pytest.fixture(scope="module")
def network() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(**SIZE).eval()


@pytest.fixture(scope="module")
def checkpoint(store: Path, network: MaskedAutoencoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), store, network)


def tokens_of(network: MaskedAutoencoder, store: Path, run_id: str, stage: int) -> np.ndarray:
    """Tokens (clips, x, y, z, t, c) of a run's two clips of four frames; no voxel's SD is below the floor."""
    found = []
    for start in (0, 4):
        image = np.zeros((4, *grid.SHAPE), np.float32)
        values = read_clip(store, run_id, start, 4).astype(np.float32).clip(-5, 5)
        image.reshape(4, -1)[:, read_voxels(store, run_id)] = values
        with torch.no_grad():
            found.append(network.encoder.tokens(torch.from_numpy(np.moveaxis(image, 0, -1))[None, None], stage)[0])
    return torch.stack(found).double().numpy()


def features(table: pd.DataFrame) -> np.ndarray:
    return table.filter(like="feature_").to_numpy()


def test_a_subject_s_row_is_the_mean_token_of_all_clips(store, network, checkpoint, tmp_path):
    embed(store, checkpoint, tmp_path / "e.parquet")
    table = pd.read_parquet(tmp_path / "e.parquet")
    runs = read_manifest(store)["runs"]
    assert table["participant_id"].tolist() == [run["participant_id"] for run in runs]
    assert table["clips"].tolist() == [2, 2, 2, 2]
    expected = [tokens_of(network, store, run["run_id"], 4).mean((0, 1, 2, 3, 4)) for run in runs]
    assert features(table).shape == (4, 32)
    np.testing.assert_allclose(features(table), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("regions", ["group", "label"])
def test_a_region_s_row_is_the_mean_over_its_voxels_of_the_tokens_that_they_lie_in(
    store, network, checkpoint, tmp_path, regions
):
    table = embed(store, checkpoint, tmp_path / "e.parquet", per="run", regions=regions)
    run_id = table["run_id"][0]
    tokens = tokens_of(network, store, run_id, 1).mean((0, 4))  # (x, y, z, c)
    edge = grid.SHAPE[0] // len(tokens)
    voxels = tokens.repeat(edge, 0).repeat(edge, 1).repeat(edge, 2)
    atlas = load_atlas()
    labels = labels_on(atlas, grid.AFFINE, grid.SHAPE)
    wanted = {"cerebellum": atlas.groups["cerebellum"], "insula": (33, 34)}
    if regions == "label":
        wanted = {atlas.names[number]: (number,) for number in (1, 41, 77)}
    own = table[table["run_id"] == run_id].set_index("region")
    assert len(own) == (8 if regions == "group" else len(np.unique(labels)) - 1)
    for name, numbers in wanted.items():
        expected = voxels[np.isin(labels, numbers)].mean(0)
        np.testing.assert_allclose(features(own.loc[[name]])[0], expected, rtol=1e-4, atol=1e-5)


def test_a_subject_s_clips_count_alike_in_whichever_run_they_are():
    rows = [("a", "a1", np.array([[[1.0]], [[2.0]], [[3.0]]])), ("b", "b1", np.ones((1, 1, 1)))]
    rows += [("a", "a2", np.array([[[10.0]]]))]
    subjects = _table(rows, "subject", ["all"], None)
    assert subjects.to_dict("list") == {"participant_id": ["a", "b"], "clips": [4, 1], "feature_0": [4.0, 1.0]}
    runs = _table(rows, "run", ["all"], None)
    assert runs["run_id"].tolist() == ["a1", "b1", "a2"]
    assert runs["feature_0"].tolist() == [2.0, 1.0, 10.0]


def test_the_file_says_what_it_was_made_with_and_is_the_same_each_time(store, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["scripts", "embed", str(store), str(checkpoint), str(tmp_path / "a.parquet"), "--per", "run"]
    )
    main()
    embed(store, checkpoint, tmp_path / "b.parquet", per="run")
    assert file_sha256(tmp_path / "a.parquet") == file_sha256(tmp_path / "b.parquet")
    said = pd.read_parquet(tmp_path / "a.parquet").attrs
    assert said["checkpoint_sha256"] == file_sha256(checkpoint)
    assert said["facts"]["preparation"] == read_manifest(store)["parameters"]
    assert said["sources"] == {run["run_id"]: run["source_sha256"] for run in read_manifest(store)["runs"]}
    assert said["asked"] == {"per": "run", "regions": None, "stage": 4, "atlas": load_atlas().sha256}
    assert json.loads(json.dumps(said)) == said


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("e.csv", {}, "must end in .parquet"),
        ("e.parquet", {"per": "site"}, "--per must be subject or run"),
        ("e.parquet", {"regions": "lobe"}, "level must be one of label, group"),
        ("e.parquet", {"stage": 5}, "--stage must be 0 to 4"),
        ("e.parquet", {"checkpoint": "none.pt"}, "no checkpoint here"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(store, checkpoint, tmp_path, name, options, words):
    with pytest.raises(InputError, match=words):
        embed(**({"store": store, "checkpoint": checkpoint, "path": tmp_path / name} | options))
    assert list(tmp_path.iterdir()) == []


def test_a_store_prepared_otherwise_and_an_adapted_encoder_are_refused(store, network, tmp_path):
    (tmp_path / "a").mkdir()
    other = save(tmp_path / "a", store, network, preparation={"tr": 2.0})
    with pytest.raises(InputError, match=r"made with preparation#tr 2.0, but here it is 0.8; prepare"):
        embed(store, other, tmp_path / "e.parquet")
    for beside in ({"rank": 2}, {"prompts": 2}):
        adapted = save(tmp_path, store, AdaptedClassifier(**beside, **SIZE))
        with pytest.raises(InputError, match="works with LoRA or prompts beside it"):
            embed(store, adapted, tmp_path / "e.parquet")
