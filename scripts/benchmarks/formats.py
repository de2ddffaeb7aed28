"""What files of a classifier cost: to write, on the disk, and to run, beside the network itself."""

import tempfile
import time
from pathlib import Path

import torch

from bundle.deploy.formats import FORMATS, Served
from bundle.heads.mean import Classifier
from scripts.benchmarks.cases import FULL, QUICK, clip
from scripts.benchmarks.measure import machine, markdown, measure, seconds_text

HEADER = ["one clip", "median", "spread (IQR)", "times the network", "largest difference", "written in", "MiB"]


@torch.no_grad()
def formats(quick: bool = False, repeats: int = 5) -> str:
    """Write a classifier as PT2, ONNX and TorchScript, and time each, loaded from its file, beside the network.

    Args:
        quick: a tiny network.
        repeats: timed runs of each.
    """
    torch.manual_seed(0)
    served = Served(Classifier(**(QUICK if quick else FULL))).eval()
    image, _ = clip(served.network.encoder)  # type: ignore[arg-type]
    expected = served(image)
    own = measure(lambda: served(image), repeats)
    rows = [["network", seconds_text(own.median), seconds_text(own.spread), "1", "", "", ""]]
    with tempfile.TemporaryDirectory() as folder:
        for name, form in FORMATS.items():
            path = Path(folder) / f"model{form.suffix}"
            start = time.perf_counter()
            form.save(served, torch.cat([image, image]), path)
            written = time.perf_counter() - start
            run = form.load(path)
            difference = float((run(image) - expected).abs().max())
            found = measure(lambda run=run: run(image), repeats)  # type: ignore[misc]
            cells = [seconds_text(found.median), seconds_text(found.spread), f"{found.median / own.median:.2f}"]
            cells += [f"{difference:.1g}", seconds_text(written), f"{path.stat().st_size / 2**20:.1f}"]
            rows.append([name, *cells])
    return machine() + "\n\n" + markdown(HEADER, rows)
