"""The classifier: what is trained, and what its logit is. Not covered: training (test of the engines)."""

import numpy as np
import pytest
import torch

from bundle.heads.mean import Classifier

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
def test_the_logit_is_linear_in_the_standardised_mean_token(freeze):
    # float64, because three clips differ little, and rounding errors are divided by that difference
    network = Classifier(freeze=freeze, **SMALL).double().train()
    pooled = network.encoder(clips().double()).flatten(2).detach().numpy().mean(2)  # (b, c)
    z = (pooled - pooled.mean(0)) / np.sqrt(pooled.var(0) + 1e-8)
    expected = z @ network.head.weight.T.detach().numpy() + network.head.bias.detach().numpy()
    logits = network(clips().double())
    assert logits.shape == (3, 1)
    np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=1e-9, atol=1e-12)


def test_features_stand_for_their_images():
    network = Classifier(**SMALL).train()
    network(clips())
    network.eval()
    torch.testing.assert_close(network(network.features(clips())), network(clips()))


def test_the_statistics_of_a_frozen_encoder_weigh_all_batches_alike():
    network = Classifier(**SMALL).train()
    batches = [clips(4).roll(shift, 2) * (1 + shift) for shift in range(3)]
    for batch in batches:
        network(batch)
    means = np.stack([network.features(batch).numpy().mean(0) for batch in batches])
    np.testing.assert_allclose(network.norm.running_mean.numpy(), means.mean(0), rtol=1e-4, atol=1e-6)


def test_one_clip_alone_is_standardised_by_what_was_seen_before():
    network = Classifier(**SMALL).train()
    network(clips())
    before = network.norm.running_mean.clone()
    alone = network(clips()[:1])
    assert torch.equal(network.norm.running_mean, before)
    torch.testing.assert_close(alone, network.eval()(clips())[:1])


def test_no_graph_is_built_without_gradients():
    with torch.no_grad():
        assert not Classifier(freeze=False, **SMALL)(clips()).requires_grad
