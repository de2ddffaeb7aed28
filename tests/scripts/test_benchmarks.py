"""The benchmarks run, count and draw; their figures are not tested, since they differ between machines.

Not covered: CUDA, mamba-ssm, torch.compile, and the full size.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from bundle.errors import InputError
from bundle.networks import mamba
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.networks.swin_mamba import SwinMambaEncoder
from scripts.benchmarks.background import background
from scripts.benchmarks.cases import QUICK, clip, scan_arguments, stages
from scripts.benchmarks.floor import block_counts, clip_counts
from scripts.benchmarks.formats import formats
from scripts.benchmarks.gpu import gpu, working
from scripts.benchmarks.launches import launches
from scripts.benchmarks.many_runs import STEPS, reading, step
from scripts.benchmarks.measure import (
    Measurement,
    ScanTimer,
    lean_loop,
    markdown,
    measure,
    published_loop,
    scan_with,
    seconds_text,
)
from scripts.benchmarks.redundancy_effect import difference, redundancy_effect
from scripts.benchmarks.report import SECTIONS, replace_section, report
from scripts.benchmarks.scaling import draw, memory, slope
from scripts.benchmarks.table import HEADER, table
from scripts.benchmarks.ways import augmentation, ratio, redundancy


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_the_table_has_every_case_and_no_failure():
    rows = cells(table(quick=True, repeats=2))
    assert rows[0] == HEADER
    assert all(len(row) == len(HEADER) for row in rows)
    names = "\n".join(row[0] for row in rows)
    for case in ("scan of stage 1", "block", "encoder, forward", "MAE training step", "checkpointing", "background"):
        assert case in names
    for case in ("bf16", "classifier inference", "TorchScript", "torch.export", "loading"):
        assert case in names
    assert not any("fails" in row[1] for row in rows)


def test_every_format_has_a_row_and_gives_what_the_network_gives():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; pip install -e .[formats]")
    rows = cells(formats(quick=True, repeats=1))[2:]
    assert [row[0] for row in rows] == ["network", "pt2", "onnx", "torchscript"]
    assert all(float(row[4]) < 1e-4 for row in rows[1:])


def test_the_gpu_command_runs_on_a_cpu_to_be_checked():
    rows = cells(gpu(device="cpu", quick=True, batches=(2,), repeats=1))
    assert [row[2] for row in rows[2:]] == ["none", "checkpointing", "skip_background"]
    parity = [float(value) for value in rows[2][-1].split(",")]
    assert max(parity) < 1e-2  # eight bits of mantissa


def test_kernels_have_rows_of_their_own_only_where_they_work(monkeypatch, caplog):
    """A package that is there but cannot be loaded must not lend its name to figures of the plain scan."""

    def broken():
        raise ImportError("undefined symbol")

    monkeypatch.setitem(mamba.ON_CUDA, "triton", broken)
    monkeypatch.setitem(mamba.ON_CUDA, "mamba-ssm", lambda: mamba.around(lean_loop))  # stands in for the kernel
    found = working("cuda")
    assert list(found) == ["mamba-ssm", "pytorch"]
    assert caplog.messages == ["no rows for triton, which does not work here: undefined symbol"]
    monkeypatch.setattr("scripts.benchmarks.gpu.working", lambda _: found)
    rows = cells(gpu(device="cpu", quick=True, batches=(1,), repeats=1))[2:]
    assert [row[0] for row in rows] == 3 * ["mamba-ssm"] + 3 * ["pytorch"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_says_so():
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-m", "scripts.benchmarks", "gpu"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr


def test_memory_is_that_of_a_process_of_its_own():
    rows = cells(memory(quick=True))[2:]
    assert [row[0] for row in rows] == ["as it is", "checkpointing", "skip_background"]
    assert all(float(row[3].removesuffix(" GiB")) > 0.1 for row in rows)  # Python and torch alone hold more


def test_skipping_the_background_is_compared_with_not_skipping():
    rows = cells(background(quick=True, steps=1))
    assert [float(value) for row in rows[2:5] for value in row[1:]]


def test_ways_of_pretraining_are_timed_side_by_side():
    for rows in (cells(augmentation(quick=True, repeats=1)), cells(redundancy(quick=True, repeats=1))):
        assert all(float(row[-1].split(" (")[0]) > 0 for row in rows[2:])
    found = ratio([Measurement((2.0, 6.0, 9.0), 0), Measurement((1.0, 2.0, 9.0), 0)])
    assert found == "2.00 (1.50 to 2.50)"


def test_what_prepares_a_clip_is_counted_for_each_mask():
    rows = cells(launches(quick=True))[2:]
    counts = {name: int(count) for name, count in rows}
    # at least: voxels and frames to the device, scaled, scattered, the brain's mask, and the stacks of the batch
    assert 5 < counts["regions"] < counts["a region and tubes"] < 100


def test_what_redundancy_dropout_does_is_compared_on_the_same_clips(store: Path, monkeypatch: pytest.MonkeyPatch):
    """At 4 mm whole regions are found by the affine; else none would be hidden, and there were no score."""
    monkeypatch.setattr("scripts.benchmarks.redundancy_effect.REGIONS", {"limbic": ()})
    rows = cells(redundancy_effect(str(store), rates=(0.0, 0.5), seeds=(0,), steps=1))[2:]
    assert [row[:2] for row in rows] == [[rate, kind] for rate in ("0", "0.5") for kind in ("tubes", "regions")]
    assert all(-100 < float(row[2]) <= 1 for row in rows)
    assert [bool(row[4]) for row in rows] == [False, False, True, True]
    assert difference(np.array([0.1, 0.2, 0.3])) == "+0.200 [-0.048, +0.448]"  # 4.303 (two degrees) times 0.1 / sqrt(3)


def test_products_are_counted_as_pytorch_counts_them():
    """FLOPs of matrix products against torch.utils.flop_counter, which sees every mm, addmm and bmm."""
    network = MaskedAutoencoder(**QUICK)
    image, mask = clip(network.encoder)
    from torch.utils.flop_counter import FlopCounterMode

    def states_free_scan(u, *_):  # the scan's own products are counted apart
        return u

    with scan_with(states_free_scan), FlopCounterMode(display=False) as counter:
        network(image, mask)
    by_operator = counter.get_flop_counts()["Global"]
    products = sum(flops for operator, flops in by_operator.items() if "conv" not in str(operator))
    assert clip_counts(network)["products"] == pytest.approx(products)


def test_exponentials_of_the_full_size():
    """The figure of a plain count: 320 windows x 256 tokens x 72 channels x 16 states."""
    stage = stages(SwinMambaEncoder())[0]
    assert block_counts(stage)["exponentials"] == 320 * 256 * 72 * 16
    assert [found.windows for found in stages(SwinMambaEncoder())] == [320, 40, 5, 5]


@pytest.mark.parametrize("loop", [published_loop, lean_loop])
def test_the_references_compute_the_same_and_are_left_behind(loop):
    network = MaskedAutoencoder(**QUICK)
    image, mask = clip(network.encoder)
    ours = network(image, mask)
    with scan_with(loop):
        torch.testing.assert_close(network(image, mask), ours)
    with scan_with(lambda u, *_: u * 0):
        assert not torch.allclose(network(image, mask), ours)
    assert torch.equal(network(image, mask), ours)


def test_peak_memory_is_that_of_the_case():
    def allocate():
        return torch.ones(64, 2**20)  # 256 MiB

    before = measure(lambda: None, 1).peak
    assert 0.9 * 2**28 < measure(allocate, 1).peak - before < 1.2 * 2**28
    assert measure(lambda: None, 1).peak - before < 2**26


def test_median_and_quartiles():
    found = Measurement((5.0, 1.0, 3.0, 2.0, 4.0), 0)
    assert (found.median, found.spread) == (3.0, 2.0)
    assert Measurement((2.0,), 0).spread == 0


def test_slope_of_a_power_law(tmp_path: Path):
    sizes = [1, 2, 4, 8]
    seconds = [3 * size**1.5 for size in sizes]
    assert slope(sizes, seconds) == pytest.approx(1.5)
    draw({"batch": (sizes, seconds, seconds)}, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes()[1:4] == b"PNG"


def test_tables_are_markdown():
    assert markdown(["a", "b"], [["x", "1"]]).splitlines() == ["| a | b |", "| :-- | --: |", "| x | 1 |"]
    assert (seconds_text(0.01234), seconds_text(12.34)) == ("12.3 ms", "12.3 s")


def test_scans_are_measured_on_arguments_that_a_network_makes():
    """Positive steps, negative rates, and the shapes that a hook sees in the network."""
    encoder = SwinMambaEncoder(**QUICK)
    seen = []

    def spy(*tensors):
        seen.append([tuple(tensor.shape) for tensor in tensors[:6]])
        return tensors[0]

    with scan_with(spy), torch.no_grad():
        encoder(clip(encoder)[0])
    stage = stages(encoder)[0]
    tensors = scan_arguments(stage.windows, stage.volume, stage.channels)
    assert [tuple(tensor.shape) for tensor in tensors] == seen[0]
    assert (tensors[1] > 0).all()
    assert (tensors[2] < 0).all()
    assert isinstance(encoder.stages[0], nn.Module)


def test_a_missing_gpu_is_the_users_to_solve():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(InputError, match="no CUDA device"):
        gpu()


def test_the_time_of_scans_is_part_of_the_step():
    network = MaskedAutoencoder(**QUICK)
    image, mask = clip(network.encoder)
    with ScanTimer() as timer:
        found = measure(lambda: network(image, mask).mean().backward(), 1, warmup=0)
    assert 0 < timer.seconds < found.median
    total = timer.seconds
    network(image, mask).mean().backward()
    assert timer.seconds == total  # no longer counted


def test_a_section_of_the_page_is_replaced_and_nothing_else(tmp_path: Path):
    page = tmp_path / "performance.md"
    page.write_text("a\n<!-- benchmarks floor -->\nold\n<!-- end -->\nb\n<!-- benchmarks gpu -->\nc\n<!-- end -->\n")
    replace_section(page, "floor", r"new \1 text")
    assert page.read_text().splitlines() == [
        "a", "<!-- benchmarks floor -->", r"new \1 text", "<!-- end -->", "b", "<!-- benchmarks gpu -->", "c",
        "<!-- end -->",
    ]  # fmt: skip
    with pytest.raises(InputError, match="has no section"):
        replace_section(page, "table", "")
    with pytest.raises(InputError, match="no section 'speed'"):
        report(["speed"], str(page))
    with pytest.raises(InputError, match="no section 'speed'"):
        report("speed", str(page))  # one section, as the command line gives it


def test_the_page_has_a_place_for_every_section():
    text = (Path(__file__).resolve().parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    for name in SECTIONS:
        assert text.count(f"<!-- benchmarks {name} -->\n") == 1
    assert text.count("<!-- end -->") == len(SECTIONS)


def test_every_step_with_many_runs_is_done(tmp_path: Path):
    for name in ("simulate", *STEPS):
        step(name, tmp_path, 60)
    table = pd.read_csv(tmp_path / "store" / "summary.tsv", sep="\t")
    assert table["status"].tolist() == ["current"] * 61  # none of the simulated runs, whose files are empty, was read


def test_what_a_clip_opens_and_reads_is_counted(tmp_path: Path):
    text = reading(tmp_path, quick=True)
    assert "A clip opens 4 files (frames.npy, voxels.npy, run.json, moments.npy)" in text
    assert len(cells(text)) == 2 + 6
