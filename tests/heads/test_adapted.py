"""Additions beside a frozen encoder: nothing changes at the start, and only they are trained."""

import pytest
import torch
from torch import nn

from bundle.errors import InputError
from bundle.heads.adapted import SCALE, AdaptedClassifier, LowRank
from bundle.heads.mean import Classifier

SIZE = {"image_size": (48, 48, 48), "frames": 2, "embed_dim": 4, "depths": (1, 1, 1, 1)}


def both(**changes: int) -> tuple[Classifier, AdaptedClassifier]:
    """A plain classifier, and an adapted one with the same weights."""
    plain, adapted = Classifier(**SIZE), AdaptedClassifier(**SIZE, **changes)
    adapted.load_state_dict(plain.state_dict(), strict=False)
    return plain.eval(), adapted.eval()


def test_low_rank_updates_begin_at_nothing_and_are_then_what_the_paper_says():
    plain, adapted = both(rank=2)
    image = torch.randn(2, 1, 48, 48, 48, 2)
    assert torch.equal(adapted.features(image), plain.features(image))
    assert len(adapted.updates) == 4 * 4  # in_proj, out_proj and two layers of the MLP of four blocks
    layer = nn.Linear(5, 3)
    update = LowRank(layer, 2)
    nn.init.normal_(update.up.weight)
    x = torch.randn(7, 5)
    merged = layer.weight + SCALE * update.up.weight @ update.down.weight
    assert torch.allclose(layer(x) + update(x), nn.functional.linear(x, merged, layer.bias), atol=1e-6)


def test_an_update_of_a_layer_is_an_update_of_its_weight():
    """The hooks are where they belong: the encoder with merged weights gives the same."""
    plain, adapted = both(rank=2)
    with torch.no_grad():
        for update in adapted.updates.values():
            nn.init.normal_(update.up.weight, std=0.1)
        for name, layer in plain.encoder.named_modules():
            if (key := name.replace(".", "_")) in adapted.updates:
                update = adapted.updates[key]
                layer.weight += SCALE * update.up.weight @ update.down.weight
        image = torch.randn(1, 1, 48, 48, 48, 2)
        assert torch.allclose(adapted.features(image), plain.features(image), atol=1e-5)


def test_prompts_are_read_before_every_window_and_dropped():
    plain, adapted = both(prompts=3)
    image = torch.randn(1, 1, 48, 48, 48, 2)
    with torch.no_grad():
        found = adapted.features(image)
        assert not torch.allclose(found, plain.features(image))
        tokens = torch.randn(5, 8, 4)
        block, prompts = adapted.encoder.stages[0].stack.blocks[0], next(iter(adapted.prompts.values()))
        twin = plain.encoder.stages[0].stack.blocks[0]
        whole = twin.mamba(torch.cat([prompts.tokens.expand(5, -1, -1), tokens], dim=1))
        assert torch.equal(block.mamba(tokens), whole[:, 3:])


@pytest.mark.parametrize("changes", [{"rank": 2}, {"prompts": 2}, {"rank": 1, "prompts": 1}])
def test_only_additions_and_head_are_trained(changes):
    _, network = both(**changes)
    before = {name: tensor.clone() for name, tensor in network.encoder.state_dict().items()}
    parameters = [p for p in network.parameters() if p.requires_grad]
    added = sum(p.numel() for part in (network.updates, network.prompts, network.head) for p in part.parameters())
    assert sum(p.numel() for p in parameters) == added
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    network.train()
    for _ in range(2):  # the first step moves `up` away from zero, the second one `down` too
        optimizer.zero_grad()
        network(torch.randn(3, 1, 48, 48, 48, 2)).square().sum().backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
    for name, tensor in network.encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_state_dict_is_served_by_a_twin():
    _, network = both(rank=2, prompts=2)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    twin = AdaptedClassifier(**SIZE, rank=2, prompts=2).eval()
    twin.load_state_dict(network.state_dict(), strict=True)
    image = torch.randn(1, 1, 48, 48, 48, 2)
    assert torch.equal(twin(image), network(image))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rank": 2, "freeze": False}, "freeze must be true"), ({}, "rank or prompts must be 1 or more, not 0 and 0")],
)
def test_what_adapts_nothing_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        AdaptedClassifier(**SIZE, **changes)
