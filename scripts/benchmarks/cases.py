"""What is measured: networks, scans, clips and a store of the full size, or tiny ones for a quick check."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader, Dataset
from torch import Tensor

from bundle.anatomy import grid
from bundle.data.batches import PrepareBatch, keep_items
from bundle.data.clips import Clips, clips
from bundle.data.normalisation import Normalisation
from bundle.data.transforms import ReadClipd, ScatterClipd, TimeLastd
from bundle.networks.mamba import STATES
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.networks.swin_mamba import SwinMambaEncoder, WindowBlock
from bundle.networks.windows import fit_window
from bundle.preparation.store import write_run
from bundle.training.losses import masked_mse

FULL: dict[str, Any] = {}  # the network's defaults: 96 x 96 x 96 voxels, 20 frames, embedding 36
QUICK: dict[str, Any] = {
    "image_size": (24, 24, 24),
    "frames": 4,
    "embed_dim": 4,
    "depths": (2, 2),
    "window_size": (2, 2, 2, 4),
    "first_window_size": (2, 2, 2, 4),
}


@dataclass(frozen=True)
class Stage:
    """Shapes of the window blocks at one resolution.

    Attributes:
        channels: of a token.
        windows: per clip.
        volume: tokens of a window.
        grid: tokens along x, y, z and t.
        window: the same for one window.
        blocks: how many such blocks the encoder, and the masked autoencoder, have.
    """

    channels: int
    windows: int
    volume: int
    grid: tuple[int, ...]
    window: tuple[int, ...]
    blocks: tuple[int, int]


def stages(encoder: SwinMambaEncoder) -> list[Stage]:
    """The stages of an encoder; the decoder mirrors all but the last."""
    found = []
    for i, stage in enumerate(encoder.stages):
        shape = (*(size // 2**i for size in encoder.grid), encoder.frames)
        block: Any = stage.stack.blocks[0]  # type: ignore[index,union-attr]
        window, _ = fit_window(shape, block.window, block.shift)
        windows = int(np.prod([-(-size // width) for size, width in zip(shape, window, strict=True)]))
        channels = block.norm1.normalized_shape[0]
        depth = encoder.depths[i]
        both = depth if i == len(encoder.depths) - 1 else 2 * depth
        found.append(Stage(channels, windows, int(np.prod(window)), shape, window, (depth, both)))
    return found


def scan_arguments(windows: int, volume: int, channels: int, device: str = "cpu") -> list[Tensor]:
    """Arguments of a selective scan that require gradients: steps as softplus(N(-3, 1)), rates -1 ... -16."""
    draw = torch.Generator().manual_seed(0)
    inner = 2 * channels

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    delta = torch.nn.functional.softplus(normal(windows, volume, inner) - 3)
    decay = -torch.arange(1.0, STATES + 1).repeat(inner, 1)
    tensors = [normal(windows, volume, inner), delta, decay, normal(windows, volume, STATES)]
    tensors += [normal(windows, volume, STATES), normal(inner)]
    return [tensor.to(device).requires_grad_() for tensor in tensors]


def brain_like(size: tuple[int, ...]) -> Tensor:
    """A brain-like bool mask (X, Y, Z): the MNI152 brain on the full grid, else an ellipsoid."""
    if tuple(size) == grid.SHAPE:
        return torch.tensor(grid.mni_brain())
    axes = torch.meshgrid(*(torch.linspace(-1, 1, edge) for edge in size), indexing="ij")
    return torch.stack(axes).square().sum(0) < 0.6


def clip(encoder: SwinMambaEncoder, batch: int = 1, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Noise in a brain over a constant background, (B, 1, X, Y, Z, T), and a tube mask of a slab of it."""
    draw = torch.Generator(device).manual_seed(1)
    brain = brain_like(encoder.image_size).to(device)
    image = torch.full((batch, 1, *encoder.image_size, encoder.frames), -2.0, device=device)
    image[:, :, brain] = torch.randn(batch, 1, int(brain.sum()), encoder.frames, generator=draw, device=device)
    mask = torch.zeros(encoder.image_size, dtype=torch.bool, device=device)
    mask[encoder.image_size[0] // 3 :][: encoder.image_size[0] // 12] = True  # a slab, sagittal
    return image, (mask & brain).expand(batch, 1, *encoder.image_size)


def training_step(network: MaskedAutoencoder, batch: int = 1, device: str = "cpu", amp: bool = False) -> Callable:
    """A function that does one step of pretraining: forward, masked loss, backward, AdamW."""
    network = network.to(device).train()
    optimizer = torch.optim.AdamW((p for p in network.parameters() if p.requires_grad), lr=5e-5)
    image, mask = clip(network.encoder, batch, device)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            loss = masked_mse(network(image, mask), image, mask)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def forward_backward(module: torch.nn.Module, *inputs: Tensor) -> Callable:
    """A function that runs a module and the gradient of its mean square."""

    def run() -> None:
        module.zero_grad()
        module(*inputs).square().mean().backward()

    return run


def stage_block(stage: Stage) -> tuple[WindowBlock, Tensor]:
    """A shifted block and its tokens (1, x, y, z, t, c)."""
    return WindowBlock(stage.channels, stage.window, shifted=True), torch.randn(1, *stage.grid, stage.channels)


def synthetic_store(folder: Path, runs: int = 4, frames: int = 200, quick: bool = False) -> Clips:
    """Write noise as prepared runs of the MNI152 brain's voxels and list their clips of 20 frames."""
    voxels = np.flatnonzero(grid.mni_brain())[:: 50 if quick else 1]
    draw = np.random.default_rng(0)
    records = []
    for number in range(runs):
        name = f"sub-{number:02d}"
        record = {"run_id": name, "participant_id": name, "fill": -2.0, "frames": frames, "mean": 0.0, "sd": 1.0}
        values = draw.standard_normal((frames, len(voxels)), dtype=np.float32).astype(np.float16)
        moments = np.stack([draw.standard_normal(len(voxels)), np.full(len(voxels), 0.02)])  # anatomy, and a tSNR of 50
        write_run(folder, json.loads(json.dumps(record)), values, voxels, moments)
        records.append(record)
    return clips(records)


def read_all(folder: Path, items: Clips, batch: int, workers: int, device: str = "cpu", dense: bool = True) -> Callable:
    """A function that reads every clip with the training's loader and, if dense, makes batches on the device."""
    loader = DataLoader(Dataset(items, ReadClipd(folder)), batch_size=batch, num_workers=workers, collate_fn=keep_items)
    prepare = PrepareBatch([ScatterClipd(Normalisation("run", sd_floor=0.1, clip=5.0), device), TimeLastd()])

    def run() -> None:
        for batch_items in loader:
            if dense:
                prepare(batch_items, device)

    return run
