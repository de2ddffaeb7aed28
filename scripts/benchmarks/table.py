"""The table of `python -m scripts.benchmarks`: ours beside the plain reference loop, in one process."""

import ctypes
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from bundle.heads.mean import Classifier
from bundle.networks import compiled as in_c
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.networks.scan import selective_scan
from bundle.networks.swin_mamba import SwinMambaEncoder
from scripts.benchmarks.cases import (
    FULL,
    QUICK,
    clip,
    forward_backward,
    read_all,
    scan_arguments,
    stage_block,
    stages,
    synthetic_store,
    training_step,
)
from scripts.benchmarks.measure import (
    GIB,
    Measurement,
    ScanTimer,
    compiled_scan,
    lean_loop,
    machine,
    markdown,
    measure,
    published_loop,
    say,
    scan_with,
    seconds_text,
)

HEADER = [
    "case",
    "median",
    "spread (IQR)",
    "peak memory",
    "published loop",
    "times faster",
    "lean loop",
    "times faster",
]
LOOPS = (published_loop, lean_loop)


def row(name: str, ours: Measurement, loops: Sequence[Measurement] = ()) -> list[str]:
    """One line of the table; `loops` as in LOOPS."""
    cells = [name, seconds_text(ours.median), seconds_text(ours.spread), f"{ours.peak / GIB:.2f} GiB"]
    for loop in loops:
        cells += [f"{seconds_text(loop.median)}, {loop.peak / GIB:.2f} GiB", f"{loop.median / ours.median:.1f}"]
    return cells + [""] * (len(HEADER) - len(cells))


def table(quick: bool = False, loop: bool = True, repeats: int = 5, compiled: bool = False) -> str:
    """Measure everything on the CPU, in plain PyTorch.

    Where the compiled scan is installed, rows of its own stand below those that it changes.

    Args:
        quick: tiny networks, to see that it works; the figures mean nothing.
        loop: also run the reference loops, once and without warm-up. At full size a training step of theirs
            takes minutes and many GiB.
        repeats: timed runs of each case of ours.
        compiled: also torch.compile, which needs a C++ compiler and about two minutes.
    """
    size = QUICK if quick else FULL
    library = in_c.library()
    scans = "plain PyTorch" if library is None else 'plain PyTorch, or C in rows marked "compiled scan"'
    lines = [f"{machine()} Scan: {scans}.", "", "| " + " | ".join(HEADER) + " |", markdown(HEADER, []).splitlines()[1]]
    say("\n".join(lines))
    with compiled_scan(None):
        for cells in _rows(size, loop, repeats, quick, compiled, library):
            lines.append("| " + " | ".join(cells) + " |")
            say(lines[-1])
    return "\n".join(lines)


def _compare(name: str, run: Callable[[], object], repeats: int, loop: bool) -> list[str]:
    ours = measure(run, repeats)
    loops = []
    for scan in LOOPS if loop else ():
        with scan_with(scan):
            loops.append(measure(run, 1, warmup=0))
    return row(name, ours, loops)


def _compiled_row(name: str, run: Callable[[], object], repeats: int, library: ctypes.CDLL | None) -> list[list[str]]:
    """The same with the compiled scan, where there is one."""
    if library is None:
        return []
    with compiled_scan(library):
        return [row(f"{name}, compiled scan", measure(run, repeats))]


def _rows(
    size: dict, loop: bool, repeats: int, quick: bool, compiled: bool, library: ctypes.CDLL | None
) -> Iterator[list[str]]:
    torch.manual_seed(0)
    encoder = SwinMambaEncoder(**size)
    yield from _scan_rows(encoder, repeats, loop, library)
    block, tokens = stage_block(stages(encoder)[0])
    yield _compare("block of stage 1, forward + backward", forward_backward(block, tokens), repeats, loop)
    image, _ = clip(encoder)
    inference = torch.no_grad()(encoder.forward)
    yield _compare("encoder, forward", lambda: inference(image), repeats, loop)
    yield from _compiled_row("encoder, forward", lambda: inference(image), repeats, library)
    yield _compare("encoder, forward, kept for a backward pass", partial(encoder, image), repeats, loop)
    yield _compare("encoder, forward + backward", forward_backward(encoder, image), repeats, loop)
    del block, tokens
    step = training_step(MaskedAutoencoder(**size))
    yield _compare("MAE training step", step, repeats, loop)
    yield _share_row(step, repeats)
    for cells in _compiled_row("MAE training step", step, repeats, library):
        yield cells
        with compiled_scan(library):
            yield _share_row(step, repeats)
    for name, option in (("checkpointing", "checkpointing"), ("background skipped", "skip_background")):
        network = MaskedAutoencoder(**size | {option: True})
        yield row(f"MAE training step, {name}", measure(training_step(network), repeats))
    step = training_step(MaskedAutoencoder(**size), amp=True)
    yield row("MAE training step, bf16 autocast", measure(step, repeats))
    yield from _classifier_rows(size, image, loop, repeats, compiled)
    yield from _loading_rows(quick, repeats)


def _scan_rows(encoder: SwinMambaEncoder, repeats: int, loop: bool, library: ctypes.CDLL | None) -> Iterator[list[str]]:
    for number, stage in enumerate(stages(encoder), 1):
        tensors = scan_arguments(stage.windows, stage.volume, stage.channels)
        shape = f"{stage.windows} windows, {stage.volume} tokens, {2 * stage.channels} channels"

        def forward(scan: Callable, tensors: list[torch.Tensor] = tensors) -> None:
            with torch.no_grad():
                scan(*tensors, None)

        def both(scan: Callable, tensors: list[torch.Tensor] = tensors) -> None:
            torch.autograd.grad(scan(*tensors, None).sum(), tensors)

        for name, run in (("forward", forward), ("forward + backward", both)):
            ours = measure(partial(run, selective_scan), repeats)
            loops = [measure(partial(run, scan), 1, warmup=0) for scan in (LOOPS if loop else ())]
            case = f"scan of stage {number} ({shape}), {name}"
            yield row(case, ours, loops)
            yield from _compiled_row(case, partial(run, selective_scan), repeats, library)


def _share_row(step: Callable[[], object], repeats: int) -> list[str]:
    """How much of a training step the scans take."""
    with ScanTimer() as timer:
        found = measure(step, repeats, warmup=0)
    share = timer.seconds / sum(found.seconds)
    return [f"of which scans: {100 * share:.0f} %", seconds_text(share * found.median), *[""] * (len(HEADER) - 2)]


def _classifier_rows(size: dict, image: torch.Tensor, loop: bool, repeats: int, compiled: bool) -> Iterator[list[str]]:
    """Inference: eager, then each exported or compiled form, or why there is none."""
    classifier = Classifier(**size).eval()

    def infer(model: Callable) -> Callable:
        return lambda: torch.no_grad()(model)(image)

    yield _compare("classifier inference, eager", infer(classifier), repeats, loop)
    forms: dict[str, Callable] = {
        "TorchScript (trace)": lambda: torch.jit.trace(classifier, image, check_trace=False),
        "torch.export": lambda: torch.export.export(classifier, (image,)).module(),
        "torch.compile": lambda: torch.compile(classifier),
    }
    with torch.no_grad():
        expected = classifier(image)
    for name, make in forms.items():
        if name == "torch.compile" and not compiled:
            continue
        # torch.compile would unroll the tokens of every scan: it is kept out of the graph
        scan = torch.compiler.disable(selective_scan) if name == "torch.compile" else selective_scan
        with warnings.catch_warnings(), torch.no_grad(), scan_with(scan):
            warnings.simplefilter("ignore")  # tracing warns of every shape that is read as a number
            try:
                model = make()
                torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-4)
            except (RuntimeError, AssertionError, torch._dynamo.exc.TorchDynamoException) as error:
                yield [
                    f"classifier inference, {name}",
                    f"fails: {str(error).splitlines()[0][:120]}",
                    *[""] * (len(HEADER) - 2),
                ]
                continue
            found = measure(infer(model), repeats)
        yield row(f"classifier inference, {name}", found)


def _loading_rows(quick: bool, repeats: int) -> Iterator[list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        items = synthetic_store(Path(folder), runs=1 if quick else 4, frames=40 if quick else 200, quick=quick)
        for workers, dense in ((0, False), (2, False), (0, True), (2, True)):
            run = read_all(Path(folder), items, batch=4, workers=workers, dense=dense)
            found = measure(run, min(repeats, 3))
            what = "loading and placing on the grid, on the CPU," if dense else "loading"
            name = f"{what} {len(items)} clips, {workers} workers: {len(items) / found.median:.1f} clips/s"
            yield row(name, found)
