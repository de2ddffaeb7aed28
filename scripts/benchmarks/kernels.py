"""What the Triton kernels take of a GPU, as NVIDIA's assembler reports it: no GPU is needed."""

import importlib.util
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle.errors import InputError
from scripts.benchmarks.measure import markdown

ARCHITECTURES = (80, 90)  # A100, H100
HALF, SINGLE = "bf16", "fp32"
# in float32 whatever the network computes in: states, weights, and parts of sums
ALWAYS_SINGLE = {"A", "D", "starts", "weight", "bias", "grad_A_D", "grad_B", "grad_C", "grad_taps"}
ALWAYS_SINGLE |= {"stream", "total", "grad_total", "grad_stream", "parts"}
NORMS = (36, 288)  # channels of the first and the last stage


@dataclass(frozen=True)
class Usage:
    """What a kernel takes.

    Attributes:
        registers: per thread.
        spilled: bytes per thread that did not fit into registers.
        shared: bytes of shared memory per program.
    """

    registers: int
    spilled: int
    shared: int


def launched() -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Each kernel with the compile-time constants and options that it is launched with."""
    from bundle.networks import triton_norm as norm
    from bundle.networks import triton_scan as ours

    found = {
        "scan, forward": (ours.walk, ours.WALK, ours.WALK_OPTIONS),
        "scan, backward": (ours.walk_back, ours.WALK_BACK, ours.WALK_BACK_OPTIONS),
        "convolution, forward": (ours.convolve_kernel, ours.CONVOLVE, ours.CONVOLVE_OPTIONS),
        "convolution, backward": (ours.convolve_back_kernel, ours.CONVOLVE, ours.CONVOLVE_OPTIONS),
    }
    for channels in NORMS:
        sizes, options = norm.constants(channels) | {"ADDS": True}, norm.options(channels)
        found[f"norm of {channels}, forward"] = (norm.add_norm, sizes, options)
        found[f"norm of {channels}, backward"] = (norm.add_norm_back, sizes | {"RESTS": True}, options)
    return found


def usage(kernel: Any, constants: dict[str, Any], options: dict[str, Any], architecture: int, dtype: str) -> Usage:
    """Compile a kernel as its launch would, for tensors of one type at aligned addresses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bundle.networks import triton_norm, triton_scan

    sizes = {*triton_scan.SIZES, *triton_norm.SIZES}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in sizes:
            return "i32"
        if name == "eps":
            return "fp32"
        return f"*{SINGLE if name in ALWAYS_SINGLE else dtype}"

    names = kernel.arg_names
    signature = {name: kind(name) for name in names}
    places = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, places, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"  # triton's own copy
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(word.split(":", 1) for word in text.split() if word.count(":") == 1 and word[-1].isdigit())
    return Usage(int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"]), compiled.metadata.shared)


def kernels() -> str:
    """Tabulate registers, spills and shared memory of every kernel, for A100 and H100.

    Raises:
        InputError: triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise InputError("triton is not installed: pip install triton")
    import triton

    rows = []
    for name, launch in launched().items():
        for dtype in (HALF, SINGLE):
            found = [usage(*launch, architecture, dtype) for architecture in ARCHITECTURES]
            cells = [f"{use.registers}, {use.spilled} B, {use.shared} B" for use in found]
            rows.append([f"{name}, {dtype}", str(launch[2]["num_warps"]), *cells])
    header = ["kernel", "warps of a program", *(f"sm_{architecture}" for architecture in ARCHITECTURES)]
    return (
        f"Triton {triton.__version__}: registers per thread, bytes spilled per thread, and shared memory per program, "
        "**compiled, not run**.\n\n" + markdown(header, rows)
    )
