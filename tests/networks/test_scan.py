"""The selective scan against the textbook loop, closed forms and numerical gradients.

Not covered: CUDA, and speed.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import NAMES, arguments, value_and_gradients

from bundle.networks import scan
from bundle.networks.scan import CHUNK, selective_scan, selective_scan_loop


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 5),
    length=st.integers(1, 3 * CHUNK + 1),
    channels=st.integers(1, 5),
    states=st.integers(1, 6),
    tile=st.sampled_from([1, 2 * CHUNK * 6 * 5, 1 << 20]),
    seed=st.integers(0, 100),
)
def test_equals_the_loop(rows, length, channels, states, tile, seed):
    """Values and all gradients, for any number of tiles, chunks and incomplete chunks."""
    tensors = arguments(rows, length, channels, states, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "CPU_TILE", tile)
        found = value_and_gradients(selective_scan, tensors)
    for name, ours, expected in zip(
        ("y", *NAMES), found, value_and_gradients(selective_scan_loop, tensors), strict=True
    ):
        torch.testing.assert_close(
            ours, expected, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_gradients_are_the_numerical_ones():
    assert torch.autograd.gradcheck(selective_scan, arguments(length=CHUNK + 2, rows=1, channels=2, states=2))


@pytest.mark.parametrize("scan_function", [selective_scan, selective_scan_loop])
def test_constant_coefficients_give_a_geometric_series(scan_function):
    """With u = B = C = 1 the state is delta (1 + g + ... + g^t), g = exp(delta A)."""
    length, step, rate, skip = 40, 0.1, -0.7, 0.25
    one = torch.ones(1, length, 1, dtype=torch.float64)
    y = scan_function(one, step * one, torch.tensor([[rate]]).double(), one, one, torch.tensor([skip]).double())
    gain = math.exp(step * rate)
    expected = [step * (1 - gain ** (t + 1)) / (1 - gain) + skip for t in range(length)]
    torch.testing.assert_close(y[0, :, 0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("scan_function", [selective_scan, selective_scan_loop])
def test_without_decay_the_state_is_a_running_sum(scan_function):
    u, delta, a, b, _, d = arguments(length=2 * CHUNK + 3, states=1)
    one = torch.ones_like(b)
    y = scan_function(u, delta, torch.zeros_like(a), one, one, torch.zeros_like(d))
    torch.testing.assert_close(y, (delta * u).cumsum(1))


def test_float32_is_as_exact_as_float32_can_be():
    exact = value_and_gradients(selective_scan_loop, arguments(8, 256, 12, 16))
    single = [tensor.detach().float().requires_grad_() for tensor in arguments(8, 256, 12, 16)]
    for ours, expected in zip(value_and_gradients(selective_scan, single), exact, strict=True):
        assert torch.dist(ours.double(), expected) < 1e-6 * expected.norm()


def test_strong_decay_neither_overflows_nor_loses_gradients():
    """exp(delta A) underflows to 0: sums in log space would give infinities here."""
    u, delta, a, b, c, d = arguments(length=64, dtype=torch.float32)
    results = value_and_gradients(selective_scan, [u, delta, (a * 1e4).detach().requires_grad_(), b, c, d])
    assert all(torch.isfinite(tensor).all() for tensor in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast_is_computed_in_float32(dtype):
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in arguments(length=40)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, *gradients = value_and_gradients(selective_scan, tensors)
    expected = selective_scan_loop(*(tensor.detach().double() for tensor in tensors))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert [gradient.dtype for gradient in gradients] == [dtype] * len(NAMES)


def test_only_one_state_per_chunk_is_kept_for_the_backward_pass():
    rows, length, channels, states = 2, 8 * CHUNK, 3, 4
    tensors = arguments(rows, length, channels, states)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        selective_scan(*tensors)
    assert sum(saved) == sum(tensor.numel() for tensor in tensors) + rows * length // CHUNK * states * channels


def test_a_kept_result_is_given_back_with_the_same_gradients():
    tensors, saved_states = arguments(length=CHUNK + 3), []
    first = value_and_gradients(lambda *t: selective_scan(*t, saved_states), tensors)
    assert [tuple(tensor.shape) for tensor in saved_states] == [(2, CHUNK + 3, 3), (2, 2, 4, 3)]
    assert not any(tensor.requires_grad for tensor in saved_states)  # else it would hold its own graph
    again = value_and_gradients(lambda *t: selective_scan(*t, saved_states), tensors)
    assert not saved_states
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
