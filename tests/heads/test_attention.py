"""The attentive probe: what it weighs, against plain NumPy. Not covered: training (test of the configs)."""

import numpy as np
import pytest
import torch

from bundle.heads.attention import AttentionClassifier

SMALL = {"image_size": [24, 24, 24], "frames": 4, "embed_dim": 4, "depths": [1, 1]}
COUNTS = [2, 1, 3]


def clips(count=6):
    return torch.randn(count, 1, 24, 24, 24, 4, generator=torch.Generator().manual_seed(0))


def drawn(queries=2, **changes) -> AttentionClassifier:
    network = AttentionClassifier(queries=queries, **SMALL, **changes).double()
    torch.nn.init.normal_(network.queries)
    return network


@pytest.mark.parametrize("queries", [1, 3])
def test_a_run_is_a_softmax_weighted_mean_over_the_tokens_of_all_its_clips(queries: int):
    network = drawn(queries).train()
    tokens = network.encoder(clips().double()).flatten(2).mT.detach().numpy()  # (clips, tokens, c)
    flat = tokens.reshape(-1, tokens.shape[-1])
    z = (tokens - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-8)
    expected = []
    for run in np.split(z, np.cumsum(COUNTS)[:-1]):
        run = run.reshape(-1, run.shape[-1])
        weights = np.exp(run @ network.queries.detach().numpy().T / np.sqrt(run.shape[1]))
        means = (weights / weights.sum(0)).T @ run
        expected.append(means.ravel() @ network.head.weight.detach().numpy()[0] + network.head.bias.item())
    logits = network(clips().double(), COUNTS)
    assert logits.shape == (3, 1)
    np.testing.assert_allclose(logits[:, 0].detach().numpy(), expected, rtol=1e-8)


def test_a_query_of_zeros_is_the_plain_mean():
    network = AttentionClassifier(**SMALL).double().train()
    features = network.features(clips().double())
    z = torch.nn.functional.batch_norm(features.flatten(0, 1), None, None, training=True, eps=1e-8).view_as(features)
    torch.testing.assert_close(network(features), network.head(z.mean((0, 1)))[None])


def test_features_stand_for_their_images_and_runs_for_themselves():
    network = drawn().train()
    network(clips().double(), COUNTS)
    network.eval()
    together = network(clips().double(), COUNTS)
    torch.testing.assert_close(network(network.features(clips().double()), COUNTS), together)
    torch.testing.assert_close(network(clips().double()[2:3]), together[1:2])


def test_only_the_head_learns_and_the_encoder_stays_as_it_is():
    network = drawn().train()
    network(clips().double(), COUNTS).sum().backward()
    learnt = {name for name, value in network.named_parameters() if value.grad is not None}
    assert learnt == {"queries", "head.weight", "head.bias"}
    assert not any(module.training for module in network.encoder.modules())


def test_gradients_reach_the_image_once_the_encoder_is_not_frozen():
    network = drawn().eval().requires_grad_(False)
    network.freeze = False
    image = clips(2).double().requires_grad_()
    network(image).sum().backward()
    assert image.grad.abs().amax((1, 2, 3, 4, 5)).min() > 0
