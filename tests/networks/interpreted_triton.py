"""The Triton kernels in Triton's interpreter, or on a GPU: test_triton_scan.py runs this file in a process of its own.

Whether functions are interpreted is settled when triton is imported, and not for this process's other tests.
"""

import os

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scan_cases import arguments, value_and_gradients
from torch.nn import functional

from bundle.networks import mamba, triton_norm, triton_scan
from bundle.networks.mamba import KERNEL, STATES, Mamba, around
from bundle.networks.scan import selective_scan, selective_scan_loop
from bundle.networks.swin_mamba import WindowBlock
from bundle.networks.triton_scan import CHUNK, CONVOLVE, WALK
from scripts.benchmarks.measure import kernels_with

BLOCK = WALK["BLOCK"]
SCAN = ("y", "u", "step", "A", "B", "C", "D", "gate")
CONVOLUTION = ("y", "x", "weight", "bias")
NORM = ("total and y", "x", "added", "weight", "bias")
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
# of the largest value; seen in the interpreter: below 7e-7. A GPU's exponentials and quotients are off by 2 units in
# the last place; the interpreter, made to be so, is off by up to 5e-6.
AROUND_FLOAT32 = 3e-6 if DEVICE.type == "cpu" else 1e-5


def gated_scan(*tensors):
    return triton_scan.gated_scan(*(tensor.to(DEVICE) for tensor in tensors)).cpu()


def convolve(*tensors):
    return triton_scan.convolve(*(tensor.to(DEVICE) for tensor in tensors)).cpu()


def scan_arguments(rows=2, length=5, channels=3, seed=0):
    """Those of `selective_scan` in float64, steps before their softplus, and a gate."""
    u, delta, *rest = arguments(rows, length, channels, STATES, seed)
    draw = torch.Generator().manual_seed(seed + 1)
    gate = torch.randn(u.shape, generator=draw, dtype=u.dtype)
    step = torch.log(torch.expm1(delta.detach()))
    return [u, step.requires_grad_(), *rest, gate.requires_grad_()]


def loop(u, step, a, b, c, d, gate):
    return selective_scan_loop(u, functional.softplus(step), a, b, c, d) * functional.silu(gate)


def convolution_arguments(rows, length, channels, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = ((rows, length, channels), (channels, 1, KERNEL), (channels,))
    return [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]


def library(x, weight, bias):
    """PyTorch's convolution, on (b, d, l); the tail is padding."""
    y = functional.conv1d(x.transpose(1, 2), weight, bias, padding=KERNEL - 1, groups=x.shape[2])
    return functional.silu(y[..., : x.shape[1]]).transpose(1, 2)


def residual_norm(*tensors):
    """Sum and norm beside each other, so that both are asked for their gradients."""
    total, y = triton_norm.residual_norm(*(tensor.to(DEVICE) for tensor in tensors), 1e-5)
    return torch.cat([total, y.to(total.dtype)], -1).cpu()


def pytorchs_norm(x, added, weight, bias):
    total = x + added
    return torch.cat([total, functional.layer_norm(total, weight.shape, weight, bias)], -1)


def norm_arguments(rows, channels, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = ((rows, 3, channels), (rows, 3, channels), (channels,), (channels,))
    return [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]


def single(tensors, dtype=torch.float32):
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def assert_alike(names, found, expected, tolerance=AROUND_FLOAT32):
    for name, ours, exact in zip(names, found, expected, strict=True):
        limit = tolerance * float(exact.abs().max()) + 1e-30
        torch.testing.assert_close(
            ours.double(), exact.double(), rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}"
        )


@settings(max_examples=8)
@example(rows=1, length=1, channels=1, seed=0)
@example(rows=2, length=CHUNK, channels=BLOCK, seed=0)
@example(rows=2, length=2 * CHUNK + 3, channels=BLOCK + 1, seed=0)
@given(
    rows=st.integers(1, 3), length=st.integers(1, 2 * CHUNK + 1), channels=st.integers(1, 20), seed=st.integers(0, 99)
)
def test_scan_equals_the_loop(rows, length, channels, seed):
    tensors = scan_arguments(rows, length, channels, seed)
    assert_alike(SCAN, value_and_gradients(gated_scan, single(tensors)), value_and_gradients(loop, tensors))


@settings(max_examples=15)
@example(rows=2, length=2 * CONVOLVE["TOKENS"] + 1, channels=CONVOLVE["BLOCK"] + 1, seed=0)
@given(rows=st.integers(1, 3), length=st.integers(1, 20), channels=st.integers(1, 70), seed=st.integers(0, 99))
def test_convolution_equals_pytorchs(rows, length, channels, seed):
    tensors = convolution_arguments(rows, length, channels, seed)
    assert_alike(CONVOLUTION, value_and_gradients(convolve, single(tensors)), value_and_gradients(library, tensors))


@settings(max_examples=15)
@example(rows=1, channels=5, seed=0)
@example(rows=2, channels=triton_norm.TILE + 1, seed=0)
@example(rows=11, channels=36, seed=0)
@given(rows=st.integers(1, 8), channels=st.integers(5, 300), seed=st.integers(0, 99))
def test_norm_equals_pytorchs(rows, channels, seed):
    """Of few channels two may be nearly alike, and their norm then loses digits in any arithmetic."""
    tensors = norm_arguments(rows, channels, seed)
    found = value_and_gradients(residual_norm, single(tensors))
    assert_alike(NORM, found, value_and_gradients(pytorchs_norm, tensors))


def test_norm_walks_in_few_programs(monkeypatch):
    """Weights' gradients of all rows, however many a program takes; and of values far from zero."""
    monkeypatch.setattr(triton_norm, "PROGRAMS", 2)
    x, *rest = norm_arguments(40, 36)
    tensors = [(x + 10).detach().requires_grad_(), *rest]
    expected = value_and_gradients(pytorchs_norm, tensors)
    assert_alike(NORM, value_and_gradients(residual_norm, single(tensors)), expected)


def test_norm_without_a_sum():
    x, _, weight, bias = (tensor.to(DEVICE) for tensor in single(norm_arguments(5, 7)))
    for both in (False, True):
        ours, plain = (
            value_and_gradients(lambda *t, of=of: of(*t).cpu(), [x, weight, bias])
            for of in (
                lambda x, w, b, both=both: sum(triton_norm.residual_norm(x, None, w, b, 1e-5)[1 - both :]),
                lambda x, w, b, both=both: functional.layer_norm(x, (7,), w, b) + (x if both else 0),
            )
        )
        assert_alike(("y", "x", "weight", "bias"), ours, plain)


@pytest.mark.parametrize("half", [False, True])
def test_norm_comes_in_the_type_of_the_products(half):
    x, added, weight, bias = (tensor.to(DEVICE) for tensor in single(norm_arguments(5, 7)))
    added = single([added], torch.bfloat16)[0]
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
        total, y = triton_norm.residual_norm(x, added, weight, bias, 1e-5)
    assert (total.dtype, y.dtype) == (torch.float32, torch.bfloat16 if half else torch.float32)
    gradients = torch.autograd.grad((total.sum() + y.sum()), (x, added))
    assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.bfloat16]
    expected = functional.layer_norm(x + added, (7,), weight, bias)
    torch.testing.assert_close(y.float(), expected, rtol=2**-7 if half else 1e-5, atol=1e-5)


def test_no_windows_at_all():
    """As where no window of a batch holds brain."""
    cases = (scan_arguments(0), gated_scan, 3), (convolution_arguments(0, 5, 3), convolve, 3)
    for tensors, function, channels in (*cases, (norm_arguments(0, 3), residual_norm, 6)):
        y, *gradients = value_and_gradients(function, single(tensors))
        assert y.numel() == 0
        assert y.shape[2] == channels
        assert not any(gradient.any() for gradient in gradients)


def test_a_long_window():
    tensors = scan_arguments(1, 130, 3)
    assert_alike(SCAN, value_and_gradients(gated_scan, single(tensors)), value_and_gradients(loop, tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    """Activations in half precision, weights in float32, as under autocast; exact up to the rounding of each result."""
    unit = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]  # in the last place: the interpreter cuts bf16 off

    def mixed(tensors):
        return [tensor if tensor.ndim < 3 or tensor.shape[1] == 1 else single([tensor], dtype)[0] for tensor in tensors]

    for names, function, reference, tensors in (
        (SCAN, gated_scan, loop, scan_arguments(2, 11, 5)),
        (CONVOLUTION, convolve, library, convolution_arguments(2, 11, 5)),
    ):
        halves = mixed(single(tensors))
        y = function(*halves)
        weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(dtype)
        gradients = torch.autograd.grad((y * weights).sum(), halves)
        exact = [tensor.detach().double().requires_grad_() for tensor in halves]
        expected_y = reference(*exact)
        expected = torch.autograd.grad((expected_y * weights.double()).sum(), exact)
        assert y.dtype == dtype
        assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in halves]
        for name, ours, true in zip(names, (y, *gradients), (expected_y, *expected), strict=True):
            torch.testing.assert_close(
                ours.double(), true, rtol=unit, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_steps_keep_their_digits():
    """With one token y = softplus(step) (B . C) u silu(gate): steps from 1e-13 to 30, each to float32's rounding.

    A GPU's exp(x) is 2 to the power of x log2(e), which float32 rounds: by 30 * 2**-24 at most.
    """
    step = torch.linspace(-30, 30, 61).view(1, 1, -1)
    one, weights = torch.ones_like(step), torch.ones(1, 1, STATES)
    y = gated_scan(one, step, -torch.ones(61, STATES), weights, weights, torch.zeros(61), one)
    expected = functional.softplus(step.double(), threshold=100) * STATES * functional.silu(one.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-6 if DEVICE.type == "cpu" else 3e-6, atol=0)


def test_strong_decay_neither_overflows_nor_loses_gradients():
    u, step, a, *rest = single(scan_arguments(length=20))
    results = value_and_gradients(gated_scan, [u, step, (a * 1e4).detach().requires_grad_(), *rest])
    assert all(torch.isfinite(tensor).all() for tensor in results)


def test_what_is_not_a_number_stays_so():
    tensors = single(scan_arguments(2, 9, 3))
    with torch.no_grad():
        tensors[0][0, 3, 1] = torch.nan
    y = gated_scan(*tensors)
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[0, 3:, 1] = True
    assert torch.equal(y.isnan(), expected)


def test_halves_of_a_projection_and_scattered_tokens_give_the_same():
    """`chunk` and `split` return views; their gradients come back in the shape of the views."""
    u, step, a, b, c, d, gate = (tensor.to(DEVICE) for tensor in single(scan_arguments(2, 10, 5)))
    both, weights = torch.cat([u, gate], -1), torch.cat([b, b[..., :1], c], -1)
    left, right = both.chunk(2, dim=-1)
    b_view, _, c_view = weights.split([STATES, 1, STATES], dim=-1)
    late = step.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()  # tokens before windows
    views = [left, late, a, b_view, c_view, d, right]
    assert not any(view.is_contiguous() for view in (left, late, b_view, c_view, right))
    for ours, plain in zip(
        value_and_gradients(gated_scan, views),
        value_and_gradients(gated_scan, [u, step, a, b, c, d, gate]),
        strict=True,
    ):
        assert torch.equal(ours, plain)
    x, weight, bias = (tensor.to(DEVICE) for tensor in single(convolution_arguments(2, 10, 5)))
    view = torch.cat([x, x], -1).chunk(2, dim=-1)[1]
    for ours, plain in zip(
        value_and_gradients(convolve, [view, weight, bias]),
        value_and_gradients(convolve, [x, weight, bias]),
        strict=True,
    ):
        assert torch.equal(ours, plain)


def test_every_part_is_written_and_two_runs_give_the_same_bits():
    """Memory comes filled with what is not a number, so that nothing left unwritten stays unseen."""
    tensors = single(scan_arguments(2, 11, BLOCK + 3))
    taps, norms = single(convolution_arguments(2, 11, BLOCK + 3)), single(norm_arguments(9, 37))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        cases = ((gated_scan, tensors), (convolve, taps), (residual_norm, norms))
        runs = [[each for case in cases for each in value_and_gradients(*case)] for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(tensor).all() for tensor in runs[0])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_double_precision_is_refused():
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        gated_scan(*scan_arguments())
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        convolve(*convolution_arguments(1, 1, 1))
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        residual_norm(*norm_arguments(1, 1))


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch):
    """Our kernels as CUDA gets them."""
    monkeypatch.setattr(triton_scan, "try_out", lambda _: None)
    return mamba._triton()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_train_alike_with_both(ours, checkpointing):
    """A block of a network, with padding, in float32, and in bf16 autocast as far as bf16 allows."""
    block = WindowBlock(4, (2, 2, 2, 4), shifted=True, checkpointing=checkpointing).to(DEVICE)
    tokens = torch.randn(1, 2, 2, 2, 3, 4).to(DEVICE)
    results = []
    for kernels, half in ((around(selective_scan), False), (ours, False), (ours, True)):
        block.zero_grad()
        with kernels_with(kernels), torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
            output = block(tokens)
            output.float().square().mean().backward()
        results.append([output.detach(), *(parameter.grad.clone() for parameter in block.parameters())])
    assert_alike(range(len(results[0])), results[1], results[0], 1e-5)
    for exact, rounded in zip(results[0], results[2], strict=True):
        assert torch.dist(exact, rounded.float()) < 0.05 * exact.norm()


def test_our_kernels_run_in_a_layer(ours, monkeypatch):
    calls = []
    for name in ("gated_scan", "convolve"):
        way = getattr(triton_scan, name)
        monkeypatch.setattr(triton_scan, name, lambda *t, way=way, name=name: calls.append(name) or way(*t))
    with kernels_with(ours):
        Mamba(4).to(DEVICE)(torch.randn(1, 2, 4).to(DEVICE))
    assert calls == ["convolve", "gated_scan"]


def test_a_graph_never_loses_the_scan(ours):
    """Traced and exported layers run with other input, so what Triton does must not be left out of them."""
    layer, tokens = Mamba(4).eval().to(DEVICE), torch.randn(1, 5, 4).to(DEVICE)
    with kernels_with(ours), torch.no_grad():
        expected = layer(tokens / 2)
        exported = torch.export.export(layer, (tokens,)).module()
        traced = torch.jit.trace(layer, tokens, check_trace=False)
        for found in (exported, traced):
            torch.testing.assert_close(found(tokens / 2), expected, rtol=1e-4, atol=1e-6)


def test_trying_out_works_and_refuses_an_old_triton(monkeypatch):
    triton_scan.try_out(DEVICE)
    monkeypatch.setattr(triton_scan, "OLDEST", (99, 0))
    with pytest.raises(ImportError, match=r"older than 99\.0"):
        triton_scan.try_out(DEVICE)
