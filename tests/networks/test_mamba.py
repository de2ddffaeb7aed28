"""The Mamba layer: order of tokens, initial values, and which selective scan runs.

The numbers themselves are compared with the published ones in test_parity.py, our kernels with the loop in
test_triton_scan.py. Not covered: mamba-ssm's kernel, which needs CUDA; a stand-in with its axes and name is used.
"""

import logging
import sys
import types

import pytest
import torch
from torch.nn import functional

from bundle import networks
from bundle.errors import InputError
from bundle.networks import mamba
from bundle.networks.mamba import CHOICE, KERNEL, Mamba, around, kernels_for
from bundle.networks.scan import selective_scan, selective_scan_loop

FUSED = "mamba_ssm.ops.selective_scan_interface"


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    """Forget which kernels were chosen, so that every test sees the choice being made."""
    monkeypatch.delenv(CHOICE, raising=False)
    kernels_for.cache_clear()
    yield
    kernels_for.cache_clear()


@pytest.fixture
def no_triton(monkeypatch):
    """As if triton were not installed."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "bundle.networks.triton_scan", raising=False)
    monkeypatch.delattr(networks, "triton_scan", raising=False)


@pytest.fixture
def mamba_ssm(monkeypatch):
    """A stand-in with the signature and axes of mamba-ssm: u, delta (b, d, l), B, C (b, n, l)."""

    def selective_scan_fn(u, delta, a, b, c, d):
        assert all(tensor.is_contiguous() for tensor in (u, delta, b, c))
        u, delta, b, c = (tensor.transpose(1, 2) for tensor in (u, delta, b, c))
        return selective_scan_loop(u, delta, a, b, c, d).transpose(1, 2)

    for name in ("mamba_ssm", "mamba_ssm.ops", FUSED):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[FUSED].selective_scan_fn = selective_scan_fn


def test_a_token_sees_itself_and_those_before_it():
    torch.manual_seed(0)
    layer = Mamba(8).double()
    tokens = torch.randn(1, 20, 8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer, tokens)[0, :, :, 0]  # (l out, c, l in, c)
    influence = jacobian.abs().sum((1, 3))
    assert torch.equal(influence != 0, torch.ones(20, 20).tril().bool())


def test_sequences_do_not_mix():
    layer = Mamba(8)
    tokens = torch.randn(3, 10, 8)
    torch.testing.assert_close(layer(tokens)[1:2], layer(tokens[1:2]))


@pytest.mark.parametrize("length", [1, 2, 20])
def test_the_convolution_is_pytorchs_values_and_gradients(length):
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(6, 6, KERNEL, groups=6, padding=KERNEL - 1).double()
    x = torch.randn(3, length, 6, dtype=torch.float64, requires_grad=True)
    tensors = [x, conv.weight, conv.bias]
    expected = conv(x.transpose(1, 2))[..., :length].transpose(1, 2)  # the tail is padding
    weights = torch.randn_like(expected)
    found = mamba._CausalConv.apply(*tensors)
    torch.testing.assert_close(found, expected)
    for ours, wanted in zip(
        *(torch.autograd.grad((y * weights).sum(), tensors) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, wanted)


def test_the_convolution_of_half_precision_is_rounded_once():
    """bf16 input and float32 weights, as under autocast: the sum is float32's, the result and gradient bf16."""
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(6, 6, KERNEL, groups=6, padding=KERNEL - 1)
    x = torch.randn(3, 9, 6).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = mamba._CausalConv.apply(x, conv.weight, conv.bias)
    y.sum().backward()
    exact = conv(x.detach().float().transpose(1, 2))[..., :9].transpose(1, 2)
    assert y.dtype == x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=2**-8, atol=1e-6)  # half a unit in the last place is 2 ** -9


def test_one_token_in_closed_form():
    """With one token there is no state to carry: y = (delta (B . C) + D) u, gated."""
    torch.manual_seed(0)
    layer = Mamba(32)
    token = torch.randn(4, 1, 32)
    x, gate = (token @ layer.in_proj.weight.T).split(64, dim=-1)
    u = functional.silu(x * layer.conv1d.weight[:, 0, -1] + layer.conv1d.bias)
    step, b, c = (u @ layer.x_proj.weight.T).split([2, 16, 16], dim=-1)
    delta = torch.log1p(torch.exp(step @ layer.dt_proj.weight.T + layer.dt_proj.bias))
    y = (delta * (b * c).sum(-1, keepdim=True) + layer.D) * u
    torch.testing.assert_close(layer(token), (y * gate * torch.sigmoid(gate)) @ layer.out_proj.weight.T)


def test_initial_values_are_those_of_mamba_ssm():
    layer = Mamba(64)
    steps = functional.softplus(layer.dt_proj.bias)
    assert 1e-3 * 0.999 <= steps.min() < 5e-3 < 3e-2 < steps.max() <= 1e-1 * 1.001
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
    assert torch.equal(layer.D, torch.ones(128))
    assert layer.dt_proj.in_features == 4  # 64 / 16
    assert layer.dt_proj.weight.abs().max() <= 0.5  # 4 ** -0.5


def test_the_plain_scan_is_announced_once(caplog):
    layer = Mamba(4)
    with caplog.at_level(logging.INFO, logger=mamba.__name__):
        layer(torch.randn(1, 3, 4))
        layer(torch.randn(1, 3, 4))
    assert [record.message for record in caplog.records] == ["selective scan: plain PyTorch on cpu"]


def test_the_cpu_never_tries_the_kernels_of_cuda(monkeypatch):
    monkeypatch.setattr(mamba, "ON_CUDA", {})
    monkeypatch.setenv(CHOICE, "mamba-ssm")
    assert kernels_for("cpu").plain


def test_triton_comes_first_on_cuda(monkeypatch, caplog, mamba_ssm):
    ours = around(selective_scan_loop)
    monkeypatch.setitem(mamba.ON_CUDA, "triton", lambda: ours)
    with caplog.at_level(logging.INFO, logger=mamba.__name__):
        assert [kernels_for("cuda"), kernels_for("cuda")] == [ours, ours]
    assert caplog.messages == ["selective scan: triton on cuda"]
    assert list(mamba.ON_CUDA) == ["triton", "mamba-ssm", "pytorch"]


def test_mamba_ssm_is_used_where_there_is_no_triton_and_agrees(caplog, no_triton, mamba_ssm):
    shapes = [(2, 7, 6), (2, 7, 6), (6, 3), (2, 7, 3), (2, 7, 3), (6,), (2, 7, 6)]
    tensors = [torch.rand(shape) for shape in shapes]
    with caplog.at_level(logging.INFO, logger=mamba.__name__):
        kernels = kernels_for("cuda")
    assert not kernels.plain
    [message] = caplog.messages
    assert message.startswith("selective scan: mamba-ssm on cuda, as triton does not work here: import of triton")
    torch.testing.assert_close(kernels.scan(*tensors, None), around(selective_scan).scan(*tensors, None))


def test_mamba_ssm_can_be_chosen(monkeypatch, caplog, mamba_ssm):
    monkeypatch.setitem(mamba.ON_CUDA, "triton", lambda: pytest.fail("not asked for"))
    monkeypatch.setenv(CHOICE, "mamba-ssm")
    with caplog.at_level(logging.INFO, logger=mamba.__name__):
        kernels_for("cuda")
    assert caplog.messages == [f"selective scan: mamba-ssm on cuda, as {CHOICE} says"]


def test_plain_pytorch_can_be_chosen(monkeypatch):
    monkeypatch.setitem(mamba.ON_CUDA, "triton", lambda: pytest.fail("not asked for"))
    monkeypatch.setenv(CHOICE, "pytorch")
    assert kernels_for("cuda").plain


def test_a_choice_that_does_not_exist_or_work_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    monkeypatch.setenv(CHOICE, "mamba-ssm")
    with pytest.raises(InputError, match=f"{CHOICE} is mamba-ssm, which does not work here: .*mamba_ssm.*unset it"):
        kernels_for("cuda")
    monkeypatch.setenv(CHOICE, "cuda")
    with pytest.raises(InputError, match="must be one of triton, mamba-ssm, pytorch, not 'cuda'"):
        kernels_for("cuda")


def test_a_kernel_built_for_another_pytorch_is_reported_with_its_reason(monkeypatch, caplog, no_triton):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("mamba_ssm"):
                raise ImportError("selective_scan_cuda.so: undefined symbol: _ZN3c10")

    for name in [name for name in sys.modules if name.startswith("mamba_ssm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert kernels_for("cuda").plain
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "undefined symbol: _ZN3c10" in record.message


def test_a_machine_without_a_compiler_is_reported(monkeypatch, caplog):
    """Triton builds its launcher when a kernel first runs; that must not be in the middle of a training step."""
    pytest.importorskip("triton", reason="triton is not installed")
    from bundle.networks import triton_scan

    def fail(_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton_scan, "try_out", fail)
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    assert kernels_for("cuda").plain
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(
        "selective scan: pytorch on cuda, as triton does not work here: Failed to find C compiler, and mamba-ssm does"
    )


def test_missing_packages_are_said(monkeypatch, caplog, no_triton):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # as if not installed
    with caplog.at_level(logging.INFO, logger=mamba.__name__):
        assert kernels_for("cuda").plain
    [record] = caplog.records
    assert record.levelno == logging.INFO
    assert record.message.startswith("selective scan: pytorch on cuda, as triton does")
    assert ", and mamba-ssm does" in record.message
