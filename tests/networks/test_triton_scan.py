"""The Triton kernels: their results in Triton's interpreter, and on a GPU where there is one.

And that they compile for A100 and H100 without spills.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bundle.errors import InputError
from scripts.benchmarks.kernels import ARCHITECTURES, HALF, NORMS, SINGLE, kernels, launched, usage

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


@needs_triton
@pytest.mark.parametrize("interpreted", ["1", "0"], ids=["in the interpreter", "on a GPU"])
def test_results(interpreted):
    if interpreted == "0" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    command = ("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/networks/interpreted_triton.py")
    done = python(*command, TRITON_INTERPRET=interpreted)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 20, done.stdout
    assert "skipped" not in done.stdout


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("what", ["scan", "convolution", *(f"norm of {channels}" for channels in NORMS)])
def test_nothing_is_spilled(what, way, dtype, architecture):
    kernel, constants, options = launched()[f"{what}, {way}"]
    found = usage(kernel, constants, options, architecture, dtype)
    assert found.spilled == 0
    assert 0 < found.registers <= options.get("maxnreg", 255)


@needs_triton
def test_spills_would_be_seen():
    kernel, constants, options = launched()["scan, backward"]
    assert usage(kernel, constants, options | {"maxnreg": 96}, 90, HALF).spilled > 0


def test_without_triton_the_command_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install triton"):
        kernels()


def test_a_cpu_never_imports_the_kernels():
    code = """
import sys, torch
from bundle.networks.mamba import Mamba
Mamba(4)(torch.randn(1, 3, 4)).sum().backward()
print("bundle.networks.triton_scan" in sys.modules)
"""
    done = python("-c", code)
    assert done.stdout.split() == ["False"], done.stderr
