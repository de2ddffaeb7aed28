"""`python -m scripts.benchmarks launches`: the operations that bring a clip from the store to the network, counted.

On a GPU each is a launch. Clips are prepared one after another, so this is what preparing a batch at once could save.
"""

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bundle.data.batches import PrepareBatch, keep_items
from bundle.data.normalisation import Normalisation
from bundle.data.transforms import ReadClipd, ScatterClipd, TimeLastd
from bundle.masking.transforms import AAL3ROIMaskd, RandomTokenMaskd, RegionAndTubesMaskd
from scripts.benchmarks.cases import synthetic_store
from scripts.benchmarks.measure import markdown

CLIPS = 8
SMALL = 16  # affines, and numbers by themselves, stay on the host
VIEWS = (
    "view",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "permute",
    "transpose",
    "detach",
    "alias",
    "expand",
    "unbind",
)


def launches(quick: bool = False) -> str:
    """Count for each kind of mask, voxel normalisation, 20 frames; noise in the MNI152 brain.

    Args:
        quick: tiny runs.
    """
    masks: dict[str, Callable[[dict], dict]] = {
        "regions": AAL3ROIMaskd("image", ["limbic"]),
        "a region and tubes": RegionAndTubesMaskd("image", "all"),
        "random tubes": RandomTokenMaskd("image", ratio=0.75, tube=True),
    }
    normalisation = Normalisation(mode="voxel", sd_floor=0.1, clip=5.0, per_frame=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        listed = synthetic_store(Path(folder), runs=1, quick=quick)
        read = ReadClipd(folder)
        items = keep_items([read(listed[0]) for _ in range(CLIPS)])
        for name, mask in masks.items():
            prepare = PrepareBatch([ScatterClipd(normalisation), mask, TimeLastd("image")])
            prepare([dict(item) for item in items])  # looks labels up, once
            with _Counted() as counted:
                prepare([dict(item) for item in items])
            rows.append([name, f"{counted.found.total() / CLIPS:.0f}"])
    return markdown(["mask", "operations on arrays, per clip"], rows)


class _Counted(TorchDispatchMode):
    """Within, counts operations that make or change arrays of more than `SMALL` values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        arrays = [value for value in (made, *args) if isinstance(value, Tensor) and value.numel() > SMALL]
        if arrays and name not in VIEWS:
            self.found[name] += 1
        return made
