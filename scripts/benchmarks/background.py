"""What skipping background windows saves, and what it changes."""

import time
from typing import Any

import torch

from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.networks.swin_mamba import halve
from bundle.networks.windows import Windows, fit_window
from bundle.training.losses import masked_mse
from scripts.benchmarks.cases import FULL, QUICK, clip, stages
from scripts.benchmarks.measure import machine, markdown

HEADER = ["", "all windows", "background skipped"]


def background(quick: bool = False, steps: int = 20, device: str = "cpu", learning_rate: float = 1e-3) -> str:
    """Train twice from the same weights on the same smooth clips, with and without skipping, and compare.

    The clips are standing waves in the brain of random phase, which can be told from their surroundings. The
    loss is the masked MSE of a further clip that was not trained on.

    Args:
        quick: tiny networks.
        steps: training steps of each network, batch 1.
        device: "cpu" or "cuda".
        learning_rate: of AdamW.
    """
    size = QUICK if quick else FULL
    results = {skip: _train(skip, size, steps, device, learning_rate) for skip in (False, True)}
    plain, skipped = results[False], results[True]
    rows = [
        [f"held-out masked MSE after {steps} steps", f"{plain['after']:.4f}", f"{skipped['after']:.4f}"],
        ["the same, weights trained with all windows", f"{plain['after']:.4f}", f"{plain['exchanged']:.4f}"],
        ["the same, untrained", f"{plain['before']:.4f}", f"{skipped['before']:.4f}"],
        ["seconds per step", f"{plain['seconds']:.3g}", f"{skipped['seconds']:.3g}"],
        ["windows run, per stage", "100 %", _occupied(size)],
    ]
    return machine(device) + "\n\n" + markdown(HEADER, rows)


def _train(skip: bool, size: dict, steps: int, device: str, learning_rate: float) -> dict[str, float]:
    torch.manual_seed(0)
    network = MaskedAutoencoder(**size, skip_background=skip).to(device)
    optimizer = torch.optim.AdamW((p for p in network.parameters() if p.requires_grad), lr=learning_rate)

    def test(skipping: bool) -> float:
        network.encoder.skip_background = skipping
        image, mask = _waves(network, -1, device)
        with torch.no_grad():
            value = masked_mse(network(image, mask), image, mask).item()
        network.encoder.skip_background = skip
        return value

    before = test(skip)
    start = time.perf_counter()
    for number in range(steps):
        image, mask = _waves(network, number, device)
        optimizer.zero_grad()
        masked_mse(network(image, mask), image, mask).backward()
        optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / steps
    return {"before": before, "after": test(skip), "exchanged": test(not skip), "seconds": seconds}


def _waves(network: MaskedAutoencoder, number: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One clip of standing waves of 24 to 48 voxels and a few frames, and its mask."""
    image, mask = clip(network.encoder, device=device)
    draw = torch.Generator().manual_seed(number + 1000)
    x, y, z, t = (torch.arange(edge, device=device) for edge in image.shape[2:])
    phases, lengths = torch.rand(4, generator=draw) * 6.28, 24 + 24 * torch.rand(4, generator=draw)
    axes = zip((x, y, z, t), lengths, phases, strict=True)
    waves = [torch.cos(6.28 * axis / float(length) + float(phase)) for axis, length, phase in axes]
    signal = waves[0][:, None, None, None] + waves[1][:, None, None] + waves[2][:, None] + waves[3]
    brain = image[0, 0, ..., :1] != image[0, 0, 0, 0, 0, 0]
    return torch.where(brain, signal, image[0, 0]).expand_as(image), mask


def _occupied(size: dict) -> str:
    """Per stage, the share of unshifted and shifted windows that hold brain."""
    encoder = MaskedAutoencoder(**size, skip_background=True).encoder
    image, _ = clip(encoder)
    brain = encoder.brain_tokens(image)
    assert brain is not None
    shares = []
    for number, stage in enumerate(stages(encoder)):
        if number:
            brain = halve(brain)
        texts = []
        blocks: Any = encoder.stages[number].stack.blocks  # type: ignore[union-attr]
        for block in blocks[:2]:
            window, shift = fit_window(stage.grid, block.window, block.shift)
            layout = Windows(stage.grid, window, shift, torch.device("cpu"))
            places = brain.view(1, *brain.shape, 1, 1).expand(1, *stage.grid, 1)
            texts.append(f"{100 * layout.cut(places).any(dim=(1, 2)).float().mean():.0f}")
        shares.append("/".join(texts))
    return ", ".join(shares) + " % (unshifted/shifted)"
