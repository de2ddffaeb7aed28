"""Maps of each subject. Not covered: attributions and sums of errors themselves (test_attribution.py)."""

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from references import reference
from small_stores import some_voxels, write_store
from tasks import BINARY
from torch import nn

from bundle.anatomy import grid
from bundle.anatomy.atlas import labels_on, load_atlas
from bundle.data.normalisation import Normalisation
from bundle.deploy.maps import write_maps
from bundle.errors import InputError
from bundle.experiments.synthetic import SITES, plan_cohort
from bundle.files import file_sha256
from bundle.heads.mean import Classifier
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.preparation.store import read_clip, read_manifest, read_voxels
from bundle.training.checkpoints import load_checkpoint, save_checkpoint, write_checkpoint
from bundle.training.provenance import Provenance
from scripts.__main__ import main

SIZE = {"embed_dim": 4, "depths": [1, 1, 1, 1], "frames": 4}
ATLAS = load_atlas()
LABELS = labels_on(ATLAS, grid.AFFINE, grid.SHAPE)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two participants with one clip each, in a few voxels of every tenth label."""
    voxels, _ = some_voxels(per_label=4, every=10)
    plan = plan_cohort(4, 0.0, 0, SITES).head(2)
    return write_store(tmp_path_factory.mktemp("few"), plan, lambda _, rng: rng.normal(size=(4, len(voxels))), voxels)


def save(folder: Path, store: Path, network: nn.Module, **changes: object) -> Path:
    made = {"_target_": "bundle.heads.mean.Classifier", "outputs": 1, "freeze": True} | SIZE
    facts = {
        "config": {"precision": "float32", "network_def": made, "frames": 4, "clip_stride": 4, "whole_runs": False}
    }
    facts |= {"preparation": read_manifest(store)["parameters"], "network": network.encoder.size, "brain_masks": []}
    facts |= {"splits": "s", "data": "d"}
    facts |= {"normalisation": Normalisation("voxel", sd_floor=0.1, clip=5.0).facts(), "task": None}
    save_checkpoint({"network": network, "provenance": Provenance(**(facts | changes))}, folder / "best.pt")
    if (facts | changes)["task"] is not None:
        write_checkpoint(load_checkpoint(folder / "best.pt") | {"reference": reference(BINARY)}, folder / "best.pt")
    return folder / "best.pt"


@pytest.fixture
def classifier(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A classifier whose preparation is not that of configs/prepare.json, as the store's is not."""
    monkeypatch.setattr("bundle.deploy.release.rebuild_preparation", lambda *_: None)
    return save(tmp_path, store, Classifier(**SIZE), task=BINARY.facts())


def values_of(path: Path) -> np.ndarray:
    """The map's values, of a header that says where it is."""
    image = nib.load(path)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (4, 4)  # MNI152
    np.testing.assert_allclose(image.affine, grid.AFFINE)
    return image.get_fdata()


def test_a_subject_s_map_of_temporal_r2_is_that_of_its_own_frames(store, tmp_path):
    network = MaskedAutoencoder(**SIZE)
    table = write_maps(store, save(tmp_path, store, network), tmp_path / "maps")
    runs = read_manifest(store)["runs"]
    seen = np.unique(LABELS.ravel()[read_voxels(store, runs[0]["run_id"])])
    assert set(table["name"]) == {ATLAS.names[number] for number in seen}
    name, number = runs[1]["participant_id"], int(seen[1])
    group = next(own for own in ATLAS.groups.values() if number in own)
    expected = _r2(network, store, runs[1]["run_id"], number, group)
    own = table[(table["participant_id"] == name) & (table["name"] == ATLAS.names[number])]
    assert own["value"].item() == pytest.approx(expected, rel=1e-3)
    found = values_of(tmp_path / "maps" / f"{name}_temporal_r2.nii.gz")
    assert found[np.isin(LABELS, number)] == pytest.approx(expected, rel=1e-3)
    assert (found[~np.isin(LABELS, seen)] == 0).all()


def _r2(network: MaskedAutoencoder, store: Path, run_id: str, number: int, group: tuple[int, ...]) -> float:
    """Temporal R² of a label with its group hidden, by NumPy."""
    voxels = read_voxels(store, run_id)
    image = np.zeros((4, *grid.SHAPE), np.float32)
    image.reshape(4, -1)[:, voxels] = read_clip(store, run_id, 0, 4).astype(np.float32).clip(-5, 5)
    mask = torch.from_numpy(np.isin(LABELS, group))[None, None]
    with torch.no_grad():
        rebuilt = network.eval()(torch.from_numpy(np.moveaxis(image, 0, -1))[None, None], mask=mask)[0, 0].numpy()
    own = voxels[np.isin(LABELS.ravel()[voxels], number)]
    y, p = image.reshape(4, -1)[:, own], np.moveaxis(rebuilt, -1, 0).reshape(4, -1)[:, own]
    y, p = (part.astype(float) - part.mean(0, dtype=float) for part in (y, p))
    return 1 - ((y - p) ** 2).sum() / (y**2).sum()


def test_a_subject_s_maps_of_attribution_show_what_the_table_says(store, classifier, tmp_path, monkeypatch):
    folder = tmp_path / "maps"
    words = ["scripts", "maps", str(store), str(classifier), str(folder), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", words)
    main()
    table = pd.read_csv(folder / "maps.csv")
    assert set(table["method"]) == {"ablation", "integrated_gradients"}
    assert table["participant_id"].nunique() == 2
    for (name, method), part in table.groupby(["participant_id", "method"]):
        found = values_of(folder / f"{name}_{method}.nii.gz")
        for row in part.itertuples():
            numbers = ATLAS.groups.get(row.name, (33, 34))
            assert found[np.isin(LABELS, numbers)] == pytest.approx(row.value, rel=1e-5, abs=1e-12)
        assert (found[~np.isin(LABELS, list(ATLAS.names))] == 0).all()
    ablated = table[table["method"] == "ablation"].set_index(["participant_id", "name"])["value"].unstack()
    assert (ablated.drop(columns="insula").nunique() == 2).all()  # both have their own
    said = json.loads((folder / "maps.json").read_text())
    assert said["checkpoint_sha256"] == file_sha256(classifier)
    assert said["asked"]["level"] == "group"
    assert len(said["sources"]) == 2


def test_what_cannot_be_mapped_is_refused(store, classifier, tmp_path):
    for options, words in (({"level": "lobe"}, "--level must be label or group"), ({"baseline": "x"}, "baseline must")):
        with pytest.raises(InputError, match=words):
            write_maps(store, classifier, tmp_path / "maps", **options)
    other = save(tmp_path, store, MaskedAutoencoder(**SIZE), preparation={"tr": 2.0})
    with pytest.raises(InputError, match=r"made with preparation#tr 2.0, but here it is 0.8; prepare"):
        write_maps(store, other, tmp_path / "maps")
    assert not (tmp_path / "maps").exists()
