"""Released models: weights and record belong together, and say how the model is served."""

import json
from pathlib import Path

import pytest
import torch
from tasks import BINARY

from bundle.data.normalisation import Normalisation
from bundle.deploy.release import ReleasedModel, release
from bundle.errors import InputError
from bundle.heads.mean import Classifier
from bundle.preparation.chain import load_preparation
from bundle.training.checkpoints import save_checkpoint
from bundle.training.provenance import Provenance

SIZE = {"image_size": (48, 48, 48), "frames": 2, "embed_dim": 4, "depths": (1, 1, 1, 1)}


def released(folder: Path, **facts: object) -> tuple[Path, Classifier]:
    network = Classifier(**SIZE)
    made_with = {
        "config": {"precision": "bf16"},
        "preparation": load_preparation(new_tr=1.0).parameters(),
        "brain_masks": ["given"],
        "network": network.encoder.size,
        "task": BINARY.facts(),
        "normalisation": {"mode": "voxel", "sd_floor": 0.2, "clip": 4.0, "per_frame": True},
    }
    provenance = Provenance(**(made_with | facts))
    save_checkpoint({"network": network, "provenance": provenance}, folder / "best.pt")
    return release(folder / "best.pt", folder / "models"), network


def test_release_round_trip(tmp_path: Path):
    path, network = released(tmp_path)
    assert set(torch.load(path, weights_only=True)) == set(network.state_dict())  # flat, as the model zoo wants it
    model, twin = ReleasedModel(path), Classifier(**SIZE)
    model.load_into(twin)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name]), name
    assert model.precision == "bf16"
    assert model.task.facts() == BINARY.facts()
    assert model.normalisation == Normalisation("voxel", sd_floor=0.2, clip=4.0, per_frame=True)
    assert model.preparation.parameters() == load_preparation(new_tr=1.0).parameters()


def test_a_model_of_another_size_is_refused_by_name(tmp_path: Path):
    model = ReleasedModel(released(tmp_path)[0])
    with pytest.raises(InputError, match=r"model.json: was made with network#embed_dim 4, but here it is 8; give the"):
        model.load_into(Classifier(**(SIZE | {"embed_dim": 8})))


def test_weights_and_record_that_do_not_belong_together_are_refused(tmp_path: Path):
    path, _ = released(tmp_path)
    record = path.with_suffix(".json")
    content = json.loads(record.read_text())
    for change, words in (({"sha256": "0"}, "does not belong to"), ({"config": None}, "does not say its config")):
        changed = {key: value for key, value in (content | change).items() if value is not None}
        record.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=words):
            ReleasedModel(path)
    record.unlink()
    with pytest.raises(InputError, match="nobody knows"):
        ReleasedModel(path)
