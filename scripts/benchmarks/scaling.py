"""Time and memory of a training step against batch, frames and grid, on log-log axes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from bundle.networks.masked_autoencoder import MaskedAutoencoder
from scripts.benchmarks.cases import training_step
from scripts.benchmarks.measure import GIB, machine, markdown, measure

mpl.use("Agg")

AXES: dict[str, list] = {"batch": [1, 2, 4], "frames": [4, 8, 12, 20], "edge": [48, 96, 144]}
QUICK_AXES: dict[str, list] = {"batch": [1, 2], "frames": [4, 8], "edge": [48]}
BASE = {"batch": 1, "frames": 8, "edge": 96}
HEADER = ["axis", "value", "voxels x frames x batch", "median step", "spread (IQR)", "peak memory"]


def one(
    batch: int, frames: int, edge: int, embed_dim: int = 36, repeats: int = 3, device: str = "cpu", **options: Any
) -> dict:
    """Measure one training step; run in a process of its own, so that peak memory is this case's alone.

    Args:
        batch: clips.
        frames: of a clip.
        edge: voxels along x, y and z.
        embed_dim: channels of the first stage.
        repeats: timed steps.
        device: "cpu" or "cuda".
        **options: of `SwinMambaEncoder`, such as checkpointing.
    """
    network = MaskedAutoencoder(image_size=(edge, edge, edge), frames=frames, embed_dim=embed_dim, **options)
    found = measure(training_step(network, batch, device, amp=device == "cuda"), repeats, device=device)
    return {"seconds": found.median, "spread": found.spread, "peak": found.peak}


def slope(x: list[float], y: list[float]) -> float:
    """Exponent p of the least-squares fit y = a x**p."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def scaling(
    output: str = "docs/scaling.png", quick: bool = False, device: str = "cpu", axes: dict[str, list] | None = None
) -> str:
    """Measure each axis with the others at batch 1, 8 frames and 96 voxels along each edge, and draw it.

    Args:
        output: the PNG.
        quick: fewer points, embedding 4, one run each.
        device: "cpu" or "cuda".
        axes: values along each axis, in place of the usual ones.
    """
    chosen = axes or (QUICK_AXES if quick else AXES)
    rows, curves = [], {}
    for axis, values in chosen.items():
        points = []
        for value in values:
            case = {**BASE, axis: value, "device": device} | ({"embed_dim": 4, "repeats": 1} if quick else {})
            points.append(_in_a_process(case))
            volume = case["batch"] * case["frames"] * case["edge"] ** 3
            seconds, spread, peak = (points[-1][name] for name in ("seconds", "spread", "peak"))
            rows.append(
                [axis, str(value), f"{volume:.3g}", f"{seconds:.3g} s", f"{spread:.2g} s", f"{peak / GIB:.2f} GiB"]
            )
        # the size of the problem is the cube of the edge
        sizes = [value**3 if axis == "edge" else value for value in values]
        curves[axis] = (sizes, [p["seconds"] for p in points], [p["peak"] / GIB for p in points])
    fits = [
        f"{axis}{' cubed' if axis == 'edge' else ''}: time ~ size^{slope(x, s):.2f}, memory ~ size^{slope(x, m):.2f}"
        for axis, (x, s, m) in curves.items()
        if len(x) > 1
    ]
    draw(curves, Path(output))
    return machine(device) + "\n\n" + markdown(HEADER, rows) + "\n\n" + "; ".join(fits) + "."


def memory(quick: bool = False) -> str:
    """Measure the full-size training step at batch 1, as it is and with the options that save memory or work.

    Args:
        quick: 48 voxels along each edge, 4 frames, embedding 4, one run each.
    """
    case = {"batch": 1, "frames": 20, "edge": 96}
    case |= {"frames": 4, "edge": 48, "embed_dim": 4, "repeats": 1} if quick else {}
    rows = []
    for name in ("", "checkpointing", "skip_background"):
        found = _in_a_process(case | ({name: True} if name else {}))
        seconds = (f"{found[key]:.3g} s" for key in ("seconds", "spread"))
        rows.append([name or "as it is", *seconds, f"{found['peak'] / GIB:.2f} GiB"])
    return machine() + "\n\n" + markdown(["training step", "median", "spread (IQR)", "peak memory"], rows)


def _in_a_process(case: dict) -> dict:
    code = f"import json; from scripts.benchmarks.scaling import one; print(json.dumps(one(**{case!r})))"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def draw(curves: dict[str, tuple[list, list, list]], path: Path) -> None:
    """Draw time and memory against each axis, log-log, with the fitted slope, to a PNG."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, (sizes, *both) in curves.items():
        x = np.asarray(sizes, float)
        for panel, values in zip(panels, both, strict=True):
            label = f"{axis}{' cubed' if axis == 'edge' else ''}"
            if len(x) > 1:
                label += f", slope {slope(list(x), values):.2f}"
            panel.loglog(x / x[0], values, "o-", label=label)
    for panel, title in zip(panels, ("seconds per training step", "peak memory, GiB"), strict=True):
        panel.set(xlabel="size relative to the smallest", ylabel=title)
        panel.grid(which="both", alpha=0.3)
        panel.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
