"""Released models: weights and record belong together, and say how the model is served."""

import json
from pathlib import Path

import pytest
import torch
from references import reference
from tasks import BINARY

from bundle.data.normalisation import Normalisation
from bundle.deploy.release import ReleasedModel, release
from bundle.errors import InputError
from bundle.heads.mean import Classifier
from bundle.preparation.chain import load_preparation
from bundle.training.checkpoints import load_checkpoint, save_checkpoint, write_checkpoint
from bundle.training.provenance import Provenance

PARTS = ["model.json", "model.pt", "reference.pt"]
SIZE = {"image_size": (48, 48, 48), "frames": 2, "embed_dim": 4, "depths": (1, 1, 1, 1)}


def checkpoint(folder: Path, knows: bool = True, **facts: object) -> tuple[Path, Classifier]:
    """A checkpoint of a training that has ended."""
    network = Classifier(**SIZE)
    made_with = {
        "config": {"precision": "bf16", "seed": 3, "network_def": {"_target_": "bundle.heads.mean.Classifier"}},
        "preparation": load_preparation(new_tr=1.0).parameters(),
        "brain_masks": ["given"],
        "network": network.encoder.size,
        "task": BINARY.facts(),
        "splits": "s",
        "data": "d",
        "normalisation": {"mode": "voxel", "sd_floor": 0.2, "clip": 4.0, "per_frame": True},
    }
    provenance = Provenance(**(made_with | facts))
    save_checkpoint({"network": network, "provenance": provenance}, folder / "best.pt")
    if knows:
        saved = load_checkpoint(folder / "best.pt")
        write_checkpoint(saved | {"reference": reference(BINARY)}, folder / "best.pt")
    return folder / "best.pt", network


def released(folder: Path) -> tuple[Path, Classifier]:
    path, network = checkpoint(folder)
    return release(path, folder / "models"), network


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
    (member,) = model.members
    assert member.reference["calibration"] == model.record["members"][0]["calibration"]
    assert model.record["members"][0]["seed"] == 3
    assert sorted(file.name for file in path.parent.iterdir()) == PARTS
    assert model.preparation.parameters() == load_preparation(new_tr=1.0).parameters()


def test_a_model_of_another_size_is_refused_by_name(tmp_path: Path):
    model = ReleasedModel(released(tmp_path)[0])
    with pytest.raises(InputError, match=r"model.json: was made with network#embed_dim 4, but here it is 8; give the"):
        model.load_into(Classifier(**(SIZE | {"embed_dim": 8})))


def test_weights_and_record_that_do_not_belong_together_are_refused(tmp_path: Path):
    path, _ = released(tmp_path)
    record = path.with_suffix(".json")
    content = json.loads(record.read_text())
    members = [content["members"][0] | {"sha256": "0"}]
    for change, words in (
        ({"members": members}, "does not belong to model.pt"),
        ({"reference_sha256": "0"}, "does not belong to reference.pt"),
        ({"config": None}, "does not say its config"),
    ):
        changed = {key: value for key, value in (content | change).items() if value is not None}
        record.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=words):
            ReleasedModel(path)
    record.unlink()
    with pytest.raises(InputError, match="nobody knows"):
        ReleasedModel(path)


def test_several_checkpoints_become_an_ensemble(tmp_path: Path):
    made = [checkpoint(tmp_path / str(seed), splits=str(seed)) for seed in range(3)]
    path = release([one for one, _ in made], tmp_path / "models")
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([*PARTS, "model_2.pt", "model_3.pt"])
    model, twin = ReleasedModel(path), Classifier(**SIZE)
    assert [one["splits"] for one in model.record["members"]] == ["0", "1", "2"]
    for number, (_, network) in enumerate(made):
        model.load_into(twin, number)
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, twin.state_dict()[name]), name
    path.with_name("model_2.pt").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"does not belong to model_2.pt"):
        ReleasedModel(path)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"task": BINARY.facts() | {"column": "sex"}}, "was made with task#column 'sex', but here it is 'diagnosis'"),
        ({"preparation": {"steps": []}}, "was made with preparation#"),
        (
            {"config": {"precision": "float32", "network_def": {"_target_": "bundle.heads.mean.Classifier"}}},
            "precision",
        ),
    ],
)
def test_networks_that_do_not_go_together_are_refused(tmp_path: Path, facts: dict, words: str):
    paths = [checkpoint(tmp_path / "one")[0], checkpoint(tmp_path / "two", **facts)[0]]
    with pytest.raises(InputError, match=words) as caught:
        release(paths, tmp_path / "models")
    assert "networks that differ in seed or fold only" in str(caught.value)
    assert not (tmp_path / "models").exists()


def test_a_training_that_has_not_ended_is_refused(tmp_path: Path):
    path, _ = checkpoint(tmp_path, knows=False)
    with pytest.raises(InputError, match="does not know its training subjects; give its training's command again"):
        release(path, tmp_path / "models")
