"""Redundancy dropout against brute force, in windows of all sizes: whole, cut at the border, and across the seam.

Not covered: whether it helps; see docs/training.md.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle.errors import InputError
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.networks.redundancy import REACH, RedundancyDropout, draw, redundancy
from bundle.networks.swin_mamba import SwinMambaEncoder, WindowBlock
from bundle.networks.windows import Windows, fit_window

CPU = torch.device("cpu")
SMALL = {"image_size": [24, 24, 24], "frames": 6, "embed_dim": 4, "depths": [2, 2], "window_size": [2, 2, 2, 4]}
sizes = st.tuples(*[st.integers(1, 5)] * 4)


def windows_by_hand(grid, window, shift) -> list[list[tuple]]:
    """Places of the grid by window: the padded grid is periodic, and window w of an axis holds (i - shift) // width."""
    periods = [-(-size // width) * width for size, width in zip(grid, window, strict=True)]
    members: dict[tuple, list[tuple]] = {}
    for place in itertools.product(*map(range, grid)):
        rolled = [(i - step) % period for i, step, period in zip(place, shift, periods, strict=True)]
        members.setdefault(tuple(i // width for i, width in zip(rolled, window, strict=True)), []).append(place)
    return list(members.values())


def redundancy_by_hand(tokens: np.ndarray, grid, window, shift) -> np.ndarray:
    """(f_temp + f_spat) / 2 of each place, with neighbours told by their coordinates in the grid."""
    found = np.zeros(grid)
    for places in windows_by_hand(grid, window, shift):
        inside = np.stack([tokens[place] for place in places])
        scores = inside @ inside.T / np.sqrt(inside.shape[1])
        attention = np.exp(scores - scores.max(1, keepdims=True))
        attention /= attention.sum(1, keepdims=True)
        for i, one in enumerate(places):
            best = {"space": 0.0, "time": 0.0}
            for j, other in enumerate(places):
                apart = np.abs(np.subtract(one, other))
                if one == other or apart.max() > REACH:
                    continue
                if apart[3] == 0:
                    best["space"] = max(best["space"], attention[i, j])
                elif not apart[:3].any():
                    best["time"] = max(best["time"], attention[i, j])
            found[one] = sum(best.values()) / 2
    return found


@settings(deadline=None, max_examples=25)
@given(grid=sizes, window=sizes, shifted=st.booleans(), seed=st.integers(0, 100))
def test_redundancy_is_that_of_the_definition_in_windows_of_any_size(grid, window, shifted, seed):
    window, shift = fit_window(grid, window, [width // 2 if shifted else 0 for width in window])
    layout = Windows(grid, window, shift, CPU)
    tokens = torch.randn(1, *grid, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = layout.join(redundancy(layout.cut(tokens), window, layout.sides()).unsqueeze(-1))
    expected = redundancy_by_hand(tokens[0].numpy(), grid, window, shift)
    assert found[0, ..., 0].numpy() == pytest.approx(expected, abs=1e-6)
    assert (expected <= 1).all()


@settings(deadline=None, max_examples=25)
@given(grid=sizes, window=sizes, shifted=st.booleans(), rate=st.floats(0.05, 0.9))
def test_the_share_is_dropped_in_every_window_and_never_what_has_no_neighbours(grid, window, shifted, rate):
    window, shift = fit_window(grid, window, [width // 2 if shifted else 0 for width in window])
    layout = Windows(grid, window, shift, CPU)
    mixed = layout.cut(torch.randn(1, *grid, 3, dtype=torch.float64))
    dropped = layout.join(RedundancyDropout(rate, window, layout.sides())(mixed)).eq(0).all(-1)[0].numpy()
    lonely = redundancy_by_hand(layout.join(mixed)[0].numpy(), grid, window, shift) == 0
    for places in windows_by_hand(grid, window, shift):
        there, alone = (np.array([what[place] for place in places]) for what in (dropped, lonely))
        assert there.sum() == min(round(rate * len(places)), (~alone).sum())
        assert not (there & alone).any()


def test_like_neighbours_are_redundant_and_others_are_not():
    """A window of unlike tokens but for two that are neighbours, and two that are alike but far apart."""
    tokens = 9 * torch.eye(64).reshape(1, 4, 4, 4, 1, 64).flatten(1, 4)
    pairs = {"beside": (0, 1), "far": (16, 63)}
    for one, other in pairs.values():
        tokens[0, other] = tokens[0, one]
    found = redundancy(tokens, (4, 4, 4, 1))[0]
    assert found[list(pairs["beside"])].tolist() == pytest.approx([0.25, 0.25], abs=0.01)  # half the attention, halved
    assert found[list(pairs["far"])].max() < 0.01


def test_one_token_is_drawn_in_proportion_to_its_redundancy():
    weights = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])
    drawn = draw(weights.expand(20_000, 5), rate=0.2)
    assert (drawn.sum(1) == 1).all()
    assert drawn.float().mean(0).numpy() == pytest.approx(weights.numpy(), abs=0.02)  # six standard errors


def test_a_repeated_pass_drops_the_same_and_another_one_does_not():
    mixed = torch.randn(6, 32, 4)
    drop = RedundancyDropout(0.5, (2, 2, 2, 4), None)
    first = drop(mixed)
    torch.manual_seed(1)
    assert torch.equal(drop(mixed), first)
    assert not torch.equal(RedundancyDropout(0.5, (2, 2, 2, 4), None)(mixed), first)


def test_the_published_defaults_run():
    """First windows of 2 and others of 4 tokens on a last grid of 2: where the published code fails."""
    network = MaskedAutoencoder(
        embed_dim=4, depths=[1, 1, 1, 2], frames=6, first_window_size=[2] * 4, full_last_stage=False,
        redundancy_dropout=0.5,
    )  # fmt: skip
    image = torch.randn(1, 1, 96, 96, 96, 6)
    mask = torch.zeros(1, 1, 96, 96, 96, dtype=torch.bool)
    mask[..., :12] = True
    network(image, mask).square().mean().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def autoencoder(**changes) -> tuple[MaskedAutoencoder, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    network = MaskedAutoencoder(**{**SMALL, **changes})
    mask = torch.zeros(2, 1, 24, 24, 24, dtype=torch.bool)
    mask[..., :8] = True
    return network, torch.randn(2, 1, 24, 24, 24, 6), mask


def test_evaluation_and_a_rate_of_zero_change_nothing():
    (plain, image, mask), (dropping, *_) = autoencoder(), autoencoder(redundancy_dropout=0.3)
    dropping.load_state_dict(plain.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(dropping.eval()(image, mask), plain.eval()(image, mask))
        assert torch.equal(plain.train()(image, mask), plain.eval()(image, mask))
        assert not torch.allclose(dropping.train()(image, mask), plain(image, mask))
    assert dropping.encoder.size == plain.encoder.size
    assert {block.redundancy_dropout for block in blocks(dropping.decoder)} == {0.0}
    assert {block.redundancy_dropout for block in blocks(dropping.encoder)} == {0.3}


def blocks(network) -> list[WindowBlock]:
    return [module for module in network.modules() if isinstance(module, WindowBlock)]


@pytest.mark.parametrize("skip_background", [False, True])
def test_gradients_are_those_without_recomputation(skip_background, monkeypatch):
    """Blocks that are run again for their gradients, with or without the scan, drop the same tokens."""

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        network, image, mask = autoencoder(
            redundancy_dropout=0.3, checkpointing=checkpointing, skip_background=skip_background
        )
        image[:, :, :12] = -2.0  # background
        torch.manual_seed(5)
        network.train()(image, mask).square().mean().backward()
        return [parameter.grad for parameter in network.parameters() if parameter.requires_grad]

    kept, again = gradients(False), gradients(True)
    monkeypatch.setattr("bundle.networks.swin_mamba.checkpoint", lambda function, *given, **_: function(*given))
    whole = gradients(False)
    for one, two, three in zip(kept, again, whole, strict=True):
        torch.testing.assert_close(one, three)
        torch.testing.assert_close(two, three)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    block = WindowBlock(3, (2, 2, 1, 3), shifted=True, redundancy_dropout=0.3).double()
    tokens = torch.randn(1, 3, 2, 2, 4, 3, dtype=torch.float64, requires_grad=True)

    def run(tokens: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)  # the same tokens are dropped
        return block(tokens)

    assert torch.autograd.gradcheck(run, (tokens,))


def test_what_mamba_gives_to_a_dropped_token_gets_no_gradient():
    mixed = torch.randn(4, 32, 5, requires_grad=True)
    dropped = RedundancyDropout(0.25, (2, 2, 2, 4), None)(mixed)
    dropped.sum().backward()
    assert torch.equal(mixed.grad, (dropped != 0).float())
    assert (dropped == 0).all(-1).sum(1).tolist() == [8] * 4


def test_draws_follow_the_seed_of_torch():
    network, image, mask = autoencoder(redundancy_dropout=0.3)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            results.append(network.train()(image, mask))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(InputError, match="redundancy_dropout must be 0"):
        SwinMambaEncoder(**SMALL, redundancy_dropout=rate)


def test_half_precision_drops_as_many(monkeypatch):
    network, image, mask = autoencoder(redundancy_dropout=0.3)
    counts = []
    plain = RedundancyDropout.__call__

    def spy(self, mixed):
        result = plain(self, mixed)
        counts.append((int((~self.kept).sum()), self.kept.numel()))
        return result

    monkeypatch.setattr(RedundancyDropout, "__call__", spy)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        network.train()(image, mask)
    in_half, counts[:] = list(counts), []
    with torch.no_grad():
        network.train()(image, mask)
    assert in_half == counts
    assert counts
