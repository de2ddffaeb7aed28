"""The classifier: what is trained, and what its logit is. Not covered: training (test of the engines)."""

import pytest
import torch

from bundle.networks.classifier import Classifier

SMALL = {"image_size": [24, 24, 24], "frames": 4, "embed_dim": 4, "depths": [1, 1]}


def clips(batch=3):
    return torch.randn(batch, 1, 24, 24, 24, 4, generator=torch.Generator().manual_seed(0))


def test_a_frozen_encoder_stays_as_it_is():
    network = Classifier(**SMALL).train()
    before = {name: value.clone() for name, value in network.encoder.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0, weight_decay=0.1)
    network(clips()).sum().backward()
    optimizer.step()
    assert not any(module.training for module in network.encoder.modules())
    assert network.head.training
    assert all(torch.equal(value, before[name]) for name, value in network.encoder.state_dict().items())
    assert {name for name, value in network.named_parameters() if value.grad is not None} == {
        "head.weight",
        "head.bias",
    }


def test_fine_tuning_reaches_every_parameter():
    network = Classifier(freeze=False, **SMALL).train()
    network(clips()).sum().backward()
    assert network.encoder.training
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("freeze", [True, False])
def test_the_logit_is_linear_in_the_mean_token(freeze):
    network = Classifier(freeze=freeze, **SMALL)
    features = network.encoder(clips()).flatten(2)  # (b, c, tokens)
    expected = features.sum(2) / features.shape[2] @ network.head.weight.T + network.head.bias
    logits = network(clips())
    assert logits.shape == (3, 1)
    torch.testing.assert_close(logits, expected)


def test_no_graph_is_built_without_gradients():
    with torch.no_grad():
        assert not Classifier(freeze=False, **SMALL)(clips()).requires_grad
