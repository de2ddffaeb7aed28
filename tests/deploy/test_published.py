"""The converter: every published tensor is mapped or named. Values are tested in test_parity.py."""

import json
import re

import pytest
import torch

from bundle.deploy.published import RENAMES, convert_published, load_published
from bundle.errors import InputError
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.networks.swin_mamba import SwinMambaEncoder


@pytest.fixture
def published(shared):
    """A published masked autoencoder: its state dict and its settings."""
    case = torch.load(shared / "parity" / "mae_random.pt", weights_only=True)
    return dict(case["state_dict"]), dict(case["config"])


def test_every_tensor_is_mapped_once(published):
    state_dict, config = published
    converted = convert_published(state_dict, config)
    assert converted.network is MaskedAutoencoder
    assert set(converted.report.mapped) == set(state_dict)
    assert set(converted.report.mapped.values()) == set(converted.state_dict)
    for theirs, ours in converted.report.mapped.items():
        assert torch.equal(
            converted.state_dict[ours].flatten().sort().values, state_dict[theirs].flatten().sort().values
        )
    converted.network(**json.loads(json.dumps(converted.arguments))).load_state_dict(converted.state_dict)


def test_the_lightning_file_holds_the_same_weights(shared, published):
    converted = load_published(shared / "parity" / "mae_random_lightning.ckpt")
    expected = convert_published(*published)
    assert converted.arguments == expected.arguments
    assert converted.report == expected.report
    assert all(torch.equal(value, expected.state_dict[name]) for name, value in converted.state_dict.items())


def test_published_weights_are_taken_as_las_unless_told_otherwise(published):
    assert convert_published(*published).arguments["orientation"] == "LAS"
    assert convert_published(*published, orientation="RAS").arguments["orientation"] == "RAS"


def test_an_encoder_without_decoder(shared):
    case = torch.load(shared / "parity" / "enc_full.pt", weights_only=True)
    assert convert_published(case["state_dict"], case["config"]).network is SwinMambaEncoder


@pytest.mark.parametrize("absent", [["atlas_mask_token"], ["atlas_mask_token", "window_mask_token"]])
def test_mask_tokens_of_older_checkpoints_are_named_and_initial(published, caplog, absent):
    state_dict, config = published
    older = {name: value for name, value in state_dict.items() if name not in absent}
    converted = convert_published(older, config)
    assert sorted(converted.report.missing) == absent
    assert all(name in caplog.text for name in absent)
    network = converted.network(**converted.arguments)
    initial = network.mask_tokens["region"].clone()
    network.load_state_dict(converted.state_dict)
    assert torch.equal(network.mask_tokens["region"], initial)


def test_parts_outside_the_network_are_named(published, caplog):
    state_dict, config = published
    lightning = {f"model.{name}": value for name, value in state_dict.items()}
    extra = {"output_head.weight": torch.zeros(1), "model.atlas_map": torch.zeros(4, 4, 4)}
    converted = convert_published({"state_dict": {**lightning, **extra}, "hyper_parameters": config})
    assert sorted(converted.report.left_over) == ["atlas_map", "output_head.weight"]
    assert "output_head.weight" in caplog.text


@pytest.mark.parametrize("name", ["layers.0.blocks.1.mamba.D", "patch_embed.fc.weight", "norm_up.bias"])
def test_a_missing_tensor_is_refused(published, name):
    state_dict, config = published
    del state_dict[name]
    with pytest.raises(InputError, match=rf"1 tensors are missing.*{name}"):
        convert_published(state_dict, config)


def test_a_part_that_this_network_does_not_have_is_refused(published):
    state_dict, config = published
    state_dict["layers.0.blocks.0.prompt"] = torch.zeros(1, 2, 12)
    with pytest.raises(InputError, match=r"layers\.0\.blocks\.0\.prompt"):
        convert_published(state_dict, config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depths": (2, 2, 2, 4)}, "tensors are missing"),
        ({"depths": (2, 2, 1, 2)}, "belong to no part"),
        ({"embed_dim": 24}, "has the shape"),
        ({"img_size": (48, 48, 48, 8)}, "has the shape"),
        ({"window_size": (2, 2, 2, 2)}, "window_mask_token has the shape"),
        ({"patch_size": (6, 6, 6, 2)}, "patch_size"),
        ({"in_chans": 2}, "in_chans = 2 is not supported"),
        ({"spatial_mask": None}, "spatial_mask"),
    ],
)
def test_settings_that_do_not_fit_are_refused(published, changes, words):
    state_dict, config = published
    with pytest.raises(InputError, match=words):
        convert_published(state_dict, {**config, **changes})


def test_unknown_settings_are_refused(published):
    state_dict, config = published
    del config["last_layer_full_MSA"]
    with pytest.raises(InputError, match="last_layer_full_MSA"):
        convert_published(state_dict, config)
    with pytest.raises(InputError, match="img_size"):
        convert_published(state_dict)


class Unsafe:
    """An object that only an unsafe load would build."""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("missing", "No such file"),
        ("garbage", "no checkpoint"),
        ("truncated", "damaged"),
        ("empty", "damaged"),
        ("unsafe", "Python objects"),
        ("list", "holds a list"),
    ],
)
def test_unreadable_files_are_refused_by_name(tmp_path, content, words):
    path = tmp_path / "published.ckpt"
    if content in {"garbage", "empty"}:
        path.write_bytes(b"not a checkpoint" if content == "garbage" else b"")
    elif content != "missing":
        torch.save({"state_dict": {}, "callbacks": Unsafe()} if content == "unsafe" else [1], path)
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=rf"published\.ckpt.*{words}"):
        load_published(path)


def test_every_rename_is_used(published):
    """A rule that renames nothing would be dead code."""
    names = list(MaskedAutoencoder(**convert_published(*published).arguments).state_dict())
    for pattern, replacement in RENAMES:
        renamed = [re.sub(pattern, replacement, name) for name in names]
        assert renamed != names, pattern
        names = renamed
