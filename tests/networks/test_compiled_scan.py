"""The scan in C, built here as users build it, against the textbook loop in float64 and closed forms.

Not covered: compilers other than the one found here, and speed.
"""

import importlib
import logging
import math
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import NAMES, arguments, value_and_gradients
from torch._subclasses import FakeTensorMode

from bundle.networks import compiled, mamba
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.networks.scan import selective_scan, selective_scan_loop
from scripts.benchmarks.cases import QUICK, clip
from scripts.benchmarks.measure import compiled_scan
from scripts.benchmarks.table import table

SOURCE = Path(compiled.__file__).parent / "compiled_scan"
load = compiled.library.__wrapped__  # without the cache, and before conftest.py switches it off


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, built from a copy, as building leaves traces beside the source."""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if not any(map(shutil.which, (compiler, "cc", "gcc"))):
        pytest.skip("there is no C compiler")
    source, target = tmp_path_factory.mktemp("compiled_scan"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "scan.c"):
        shutil.copy(SOURCE / name, source)
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run([*command, "--target", str(target), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture
def library(installed: Path, monkeypatch: pytest.MonkeyPatch):
    """The scan is compiled; returns the library."""
    monkeypatch.syspath_prepend(installed)
    importlib.invalidate_caches()
    monkeypatch.setattr(compiled, "library", cache(load))
    assert compiled.library() is not None
    return compiled.library()


def single(tensors):
    return [tensor.detach().float().requires_grad_() for tensor in tensors]


def assert_equal_to_the_loop(tensors):
    """Relative to the largest value of each result, as a sum can cancel; the compiled scan must have run."""
    expected = value_and_gradients(selective_scan_loop, tensors)
    tensors = single(tensors)
    assert compiled.fits(*tensors)
    for name, ours, exact in zip(("y", *NAMES), value_and_gradients(selective_scan, tensors), expected, strict=True):
        limit = 3e-6 * float(exact.abs().max())
        torch.testing.assert_close(
            ours.double(), exact, rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}"
        )


SHAPES = [(1, 1, 1), (1, 16, 72), (2, 17, 73), (3, 31, 8), (1, 40, 144), (2, 33, 145), (4, 5, 71), (2, 256, 72)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("library")
def test_equals_the_loop(shape):
    assert_equal_to_the_loop(arguments(*shape, states=16))


def test_equals_the_loop_for_any_shape(library):
    @settings(deadline=None, max_examples=25)
    @given(rows=st.integers(1, 4), length=st.integers(1, 50), channels=st.integers(1, 150), seed=st.integers(0, 100))
    def check(rows, length, channels, seed):
        assert_equal_to_the_loop(arguments(rows, length, channels, 16, seed))

    check()


@pytest.mark.usefixtures("library")
def test_float32_is_as_exact_as_float32_can_be():
    exact = value_and_gradients(selective_scan_loop, arguments(8, 256, 12, 16))
    found = value_and_gradients(selective_scan, single(arguments(8, 256, 12, 16)))
    for ours, expected in zip(found, exact, strict=True):
        assert torch.dist(ours.double(), expected) < 1e-6 * expected.norm()


@pytest.mark.usefixtures("library")
def test_exponentials_are_exact_to_1e_7_and_end_in_zero_and_infinity():
    """With u = (1, 0), delta = (1, s), B = C = 1 and D = 0 the second token's y is the sum of exp(s A)."""
    exponents = torch.cat([torch.linspace(-100, 88, 20001), torch.tensor([-1e3, -1e9, -math.inf, 1e3, 1e9, math.inf])])
    d = len(exponents)
    u = torch.tensor([1.0, 0.0]).view(1, 2, 1).repeat(1, 1, d)
    a, ones = torch.zeros(d, 16), torch.ones(1, 2, 16)
    a[:, 0] = exponents  # a step of 1 keeps them as they are; the other 15 states decay at once
    a[:, 1:] = -math.inf
    y = selective_scan(u, torch.ones(1, 2, d), a, ones, ones, torch.zeros(d))[0, 1].double()
    exact = exponents.double().exp()
    # the exponent itself, times log2(e), is rounded twice: 2 ** -23 of it at most
    inside = slice(0, 20001)
    usual = exponents[inside] > -87  # above the least normal number
    error = ((y - exact)[inside] / exact[inside]).abs()[usual]
    assert (error < 2e-7 + exponents[inside][usual].abs() * 2**-23).all()
    assert (error[exponents[inside][usual].abs() < 1] < 3e-7).all()
    assert ((y - exact)[inside][~usual].abs() < 1e-38).all()
    assert torch.equal(y[20001:20004], torch.zeros(3).double())
    assert not torch.isfinite(y[20004:]).any()


@pytest.mark.usefixtures("library")
def test_strong_decay_neither_overflows_nor_loses_gradients():
    u, delta, a, b, c, d = single(arguments(length=64, states=16))
    results = value_and_gradients(selective_scan, [u, delta, (a * 1e4).detach().requires_grad_(), b, c, d])
    assert all(torch.isfinite(tensor).all() for tensor in results)


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("library")
def test_what_is_not_finite_stays_so(name, value):
    """Wherever the loop's result is not finite, ours is not; the first such argument stands at token 3, channel 1."""
    tensors = arguments(2, 20, 75, 16)
    with torch.no_grad():
        tensor = tensors[NAMES.index(name)]
        tensor[(0, 3, 1)[: tensor.ndim] if tensor.ndim == 3 else (1,)] = value
    exact = value_and_gradients(selective_scan_loop, tensors)
    found = value_and_gradients(selective_scan, single(tensors))
    assert name == "A" or not torch.isfinite(exact[0]).all()  # exp(-infinity) is 0
    for which, ours, expected in zip(("y", *NAMES), found, exact, strict=True):
        if math.isnan(value) or which == "y":
            assert not torch.isfinite(ours[~torch.isfinite(expected)]).any(), which


@pytest.mark.usefixtures("library")
def test_any_number_of_threads_gives_the_same_bits():
    tensors, results = single(arguments(7, 50, 200, 16)), []
    try:
        for threads in (1, 2, 2, 2, 5):
            torch.set_num_threads(threads)
            results.append(value_and_gradients(selective_scan, tensors))
    finally:
        torch.set_num_threads(1)
    for found in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], found, strict=True))


@pytest.mark.usefixtures("library")
def test_memory_may_lie_in_any_order_and_anywhere():
    tensors = single(arguments(3, 20, 30, 16))

    def scattered(tensor):  # last axis first, and four bytes after an aligned address
        moved = torch.empty(tensor.numel() + 1)[1:].view(tensor.shape[::-1]).permute(*reversed(range(tensor.ndim)))
        return moved.copy_(tensor.detach()).requires_grad_()

    others = [scattered(tensor) for tensor in tensors]
    assert compiled.fits(*others)
    assert not others[0].is_contiguous()
    weights = torch.randn(3, 30, 20).transpose(1, 2)  # so is the gradient
    for one, two in zip(
        *(torch.autograd.grad((selective_scan(*t) * weights).sum(), t) for t in (tensors, others)), strict=True
    ):
        assert torch.equal(one, two)


@pytest.mark.usefixtures("library")
def test_what_does_not_fit_goes_the_plain_way():
    double = arguments(2, 20, 5, 16)
    assert not compiled.fits(*double)
    torch.testing.assert_close(selective_scan(*double), selective_scan_loop(*double))
    few = single(arguments(2, 20, 5, 4))
    assert not compiled.fits(*few)
    torch.testing.assert_close(selective_scan(*few), selective_scan_loop(*few))
    for place in range(6):  # one channel, token or state less
        tensors = single(arguments(2, 20, 5, 16))
        tensors[place] = tensors[place][..., :-1]
        assert not compiled.fits(*tensors)


@pytest.mark.usefixtures("library")
def test_a_graph_never_loses_the_scan():
    """Traced and exported networks run with other input, so what C does must not be left out of them."""
    network = MaskedAutoencoder(**QUICK).encoder.eval()
    image, _ = clip(network)
    with torch.no_grad():
        exported = torch.export.export(network, (image,)).module()
        torch.testing.assert_close(exported(image / 2), network(image / 2), rtol=1e-4, atol=1e-5)
        traced = torch.jit.trace(network, image, check_trace=False)
        torch.testing.assert_close(traced(image / 2), network(image / 2), rtol=1e-4, atol=1e-5)
    with FakeTensorMode():
        assert selective_scan(*(torch.empty(t.shape) for t in arguments(states=16))).shape == (2, 5, 3)


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, {"skip_background": True}], ids=str)
def test_networks_train_alike_with_both(library, options, monkeypatch):
    calls = []
    for name in ("walk", "walk_back"):
        way = getattr(compiled, name)
        monkeypatch.setattr(compiled, name, lambda *t, way=way, name=name: calls.append(name) or way(*t))
    network = MaskedAutoencoder(**QUICK | options)
    image, mask = clip(network.encoder)
    results = []
    for chosen in (None, library):
        network.zero_grad()
        with compiled_scan(chosen):
            output = network(image, mask)
            output.square().mean().backward()
        results.append([output.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    assert calls.count("walk") == calls.count("walk_back") * (2 if "checkpointing" in options else 1) > 0
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.usefixtures("library")
def test_a_kept_result_is_given_back_with_the_same_gradients():
    tensors, saved_states = single(arguments(length=19, states=16)), []
    first = value_and_gradients(lambda *t: selective_scan(*t, saved_states), tensors)
    assert [tuple(tensor.shape) for tensor in saved_states] == [(2, 19, 3), (2, 2, 16, 3)]
    again = value_and_gradients(lambda *t: selective_scan(*t, saved_states), tensors)
    assert not saved_states
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


@pytest.mark.usefixtures("library")
def test_it_is_announced_once(caplog):
    mamba.kernels_for.cache_clear()
    with caplog.at_level(logging.INFO, logger=mamba.__name__):
        for _ in range(2):
            mamba.kernels_for("cpu")
    mamba.kernels_for.cache_clear()
    assert caplog.messages == ["selective scan: compiled C on cpu"]


@pytest.mark.usefixtures("library")
def test_a_library_of_another_version_is_refused(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "VERSION", -1)
    assert load() is None
    assert "not -1; install bundle/networks/compiled_scan again" in caplog.text


def test_a_broken_library_is_said(tmp_path, monkeypatch, caplog):
    (tmp_path / f"{compiled.PACKAGE}{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"no library")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert load() is None
    assert "the compiled scan cannot be loaded" in caplog.text


def test_without_it_there_is_none(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert load() is None


@pytest.mark.usefixtures("library")
def test_the_table_has_rows_of_its_own_for_it():
    text = table(quick=True, loop=False, repeats=1)
    assert 'Scan: plain PyTorch, or C in rows marked "compiled scan".' in text.splitlines()[0]
    for case in ("forward", "forward + backward", "encoder, forward", "MAE training step"):
        assert f"{case}, compiled scan |" in text
    assert text.count("of which scans") == 2
