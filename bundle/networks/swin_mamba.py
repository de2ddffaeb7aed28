"""The Shifted-Window Mamba encoder for 4D fMRI (NeuroSTORM, arXiv 2506.11167; region masking, arXiv 2511.00443).

Inside the network a batch is (b, x, y, z, t, c): a grid of tokens, channels last. One token is a patch of
6 x 6 x 6 voxels at one frame.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bundle.errors import InputError
from bundle.networks.mamba import Mamba

ORIENTATIONS = ("RAS", "LAS")


def fit_window(
    grid: Sequence[int], window: Sequence[int], shift: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shrink the window to the grid, without a shift, along every axis where the grid is not larger."""
    fits = [size > width for size, width in zip(grid, window, strict=True)]
    return (
        tuple(width if fit else size for size, width, fit in zip(grid, window, fits, strict=True)),
        tuple(step if fit else 0 for step, fit in zip(shift, fits, strict=True)),
    )


def split_windows(tokens: Tensor, window: Sequence[int]) -> Tensor:
    """Cut (b, x, y, z, t, c) into windows (b * windows, volume, c), both in raster order, t fastest."""
    b, *grid, c = tokens.shape
    pairs = [size for full, width in zip(grid, window, strict=True) for size in (full // width, width)]
    # (b, nx, wx, ny, wy, nz, wz, nt, wt, c) -> (b, nx, ny, nz, nt, wx, wy, wz, wt, c)
    return tokens.reshape(b, *pairs, c).permute(0, 1, 3, 5, 7, 2, 4, 6, 8, 9).reshape(-1, math.prod(window), c)


def join_windows(windows: Tensor, window: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Undo `split_windows`: (b * windows, volume, c) to (b, *grid, c)."""
    counts = [full // width for full, width in zip(grid, window, strict=True)]
    c = windows.shape[-1]
    # (b, nx, ny, nz, nt, wx, wy, wz, wt, c) -> (b, nx, wx, ny, wy, nz, wz, nt, wt, c)
    return windows.reshape(-1, *counts, *window, c).permute(0, 1, 5, 2, 6, 3, 7, 4, 8, 9).reshape(-1, *grid, c)


class WindowBlock(nn.Module):
    """LayerNorm, Mamba inside windows, residual; LayerNorm, MLP (4 x wide), residual.

    A shifted block moves the windows by half a window along each axis, on the grid padded with zeros at its
    end and taken as periodic. There is no attention, hence no mask between the two sides of a seam.
    """

    def __init__(self, channels: int, window: Sequence[int], shifted: bool) -> None:
        super().__init__()
        self.window = tuple(window)
        self.shift = tuple(width // 2 if shifted else 0 for width in window)
        self.norm1 = nn.LayerNorm(channels)
        self.mamba = Mamba(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (b, x, y, z, t, c) to the same shape."""
        tokens = tokens + self._mix(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))

    def _mix(self, tokens: Tensor) -> Tensor:
        _, *grid, _ = tokens.shape
        window, shift = fit_window(grid, self.window, self.shift)
        missing = [-size % width for size, width in zip(grid, window, strict=True)]
        if any(missing):
            # functional.pad counts from the last axis: c, t, z, y, x
            tokens = functional.pad(tokens, (0, 0, *(pad for m in reversed(missing) for pad in (0, m))))
        padded = tokens.shape[1:5]
        axes = (1, 2, 3, 4)
        if any(shift):
            tokens = tokens.roll([-step for step in shift], axes)
        tokens = join_windows(self.mamba(split_windows(tokens, window)), window, padded)
        if any(shift):
            tokens = tokens.roll(shift, axes)
        x, y, z, t = grid
        return tokens[:, :x, :y, :z, :t]


class PatchMerging(nn.Module):
    """Halve the grid in space: 8 neighbours become one token of twice the channels. Time stays."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8 * channels)
        self.reduce = nn.Linear(8 * channels, 2 * channels, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (b, x, y, z, t, c) to (b, x/2, y/2, z/2, t, 2c)."""
        corners = itertools.product((0, 1), repeat=3)
        neighbours = torch.cat([tokens[:, i::2, j::2, k::2] for i, j, k in corners], dim=-1)
        return self.reduce(self.norm(neighbours))


class BlockStack(nn.Module):
    """Window blocks at one resolution; every second one is shifted, unless `shifted` is False."""

    def __init__(
        self, channels: int, depth: int, window: Sequence[int], shifted: bool = True, checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.blocks = nn.ModuleList(
            WindowBlock(channels, window, shifted=shifted and index % 2 == 1) for index in range(depth)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (b, x, y, z, t, c) to the same shape."""
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return tokens


class EncoderStage(nn.Module):
    """Add the absolute embeddings of place and time, then run the blocks and merge patches if asked."""

    def __init__(self, channels: int, grid: Sequence[int], frames: int, stack: BlockStack, merge: bool) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.empty(*grid, 1, channels))  # (x, y, z, 1, c)
        self.time = nn.Parameter(torch.empty(frames, channels))  # (t, c)
        nn.init.trunc_normal_(self.place, std=0.02)
        nn.init.trunc_normal_(self.time, std=0.02)
        self.stack = stack
        self.merge = PatchMerging(channels) if merge else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (b, x, y, z, t, c) to itself, or to (b, x/2, y/2, z/2, t, 2c); t may be below the frames."""
        tokens = tokens + self.place + self.time[: tokens.shape[4]]
        return self.merge(self.stack(tokens))


def split_patches(image: Tensor, size: int) -> Tensor:
    """Cut (b, 1, X, Y, Z, t) into patches (b, x, y, z, t, size**3), voxels in raster order, z fastest."""
    b, _, x, y, z, t = image.shape
    image = image.reshape(b, x // size, size, y // size, size, z // size, size, t)
    return image.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(5)


def join_patches(patches: Tensor, size: int) -> Tensor:
    """Undo `split_patches`: (b, x, y, z, t, size**3) to (b, 1, X, Y, Z, t)."""
    b, x, y, z, t, _ = patches.shape
    patches = patches.reshape(b, x, y, z, t, size, size, size).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return patches.reshape(b, 1, x * size, y * size, z * size, t)


class SwinMambaEncoder(nn.Module):
    """Encode a clip of BOLD frames.

    Args:
        image_size: voxels along x, y and z; each a multiple of patch_size * 2 ** (stages - 1).
        frames: the longest clip.
        patch_size: edge of a patch in voxels.
        embed_dim: channels of the first stage; doubled by every later one.
        depths: blocks per stage.
        window_size: tokens of a window along x, y, z and t.
        first_window_size: the same for the first stage.
        full_last_stage: the last stage's windows span the whole space (and window_size[3] frames), unshifted;
            else it is like the others.
        checkpointing: recompute each block in the backward pass: less memory, more time.
        orientation: direction of x in the images that the weights were trained on. Input is always RAS. With
            "LAS" it is mirrored on the way in and the result mirrored back. (Mirrored weights would not do
            the same: Mamba reads a window's tokens in one direction of x.)
    """

    def __init__(
        self,
        image_size: Sequence[int] = (96, 96, 96),
        frames: int = 20,
        patch_size: int = 6,
        embed_dim: int = 36,
        depths: Sequence[int] = (2, 2, 6, 2),
        window_size: Sequence[int] = (4, 4, 4, 4),
        first_window_size: Sequence[int] = (4, 4, 4, 4),
        full_last_stage: bool = True,
        checkpointing: bool = False,
        orientation: str = "RAS",
    ) -> None:
        super().__init__()
        stages = len(depths)
        _check_arguments(image_size, patch_size * 2 ** (stages - 1), window_size, first_window_size, orientation)
        self.size = {  # what two networks must share to exchange weights and mean the same by them; fit for JSON
            "image_size": list(image_size),
            "frames": frames,
            "patch_size": patch_size,
            "embed_dim": embed_dim,
            "depths": list(depths),
            "window_size": list(window_size),
            "first_window_size": list(first_window_size),
            "full_last_stage": full_last_stage,
            "orientation": orientation,
        }
        self.image_size = tuple(image_size)
        self.frames = frames
        self.patch_size = patch_size
        self.grid = tuple(size // patch_size for size in image_size)
        self.channels = embed_dim * 2 ** (stages - 1)  # of the result
        self.depths = tuple(depths)
        self.window_size = tuple(window_size)
        self.checkpointing = checkpointing
        self.orientation = orientation
        self.patch_embedding = nn.Linear(patch_size**3, embed_dim)
        self.stages = nn.ModuleList()
        for i, depth in enumerate(depths):
            grid = [size // 2**i for size in self.grid]
            last = i == stages - 1
            window = first_window_size if i == 0 else window_size
            if last and full_last_stage:
                window = (*grid, window_size[3])
            channels = embed_dim * 2**i
            shifted = not (last and full_last_stage)
            stack = BlockStack(channels, depth, window, shifted, checkpointing)
            self.stages.append(EncoderStage(channels, grid, frames, stack, merge=not last))

    def forward(self, image: Tensor) -> Tensor:
        """Encode (B, 1, X, Y, Z, T), T at most `frames`, to features (B, channels, x, y, z, T).

        Raises:
            InputError: the shape does not fit the network.
        """
        features = self.encode(self.embed(image))
        return self.mirror(features, axis=1).permute(0, 5, 1, 2, 3, 4)

    def embed(self, image: Tensor) -> Tensor:
        """Turn (B, 1, X, Y, Z, T) into tokens (B, x, y, z, T, c) in the orientation of the weights."""
        expected = (1, *self.image_size)
        if image.ndim != 6 or image.shape[1:5] != expected or not 1 <= image.shape[5] <= self.frames:
            raise InputError(
                f"The network takes images (B, {', '.join(map(str, expected))}, T) with T from 1 to "
                f"{self.frames}, not {tuple(image.shape)}; change the image or the network's image_size and frames."
            )
        return self.patch_embedding(split_patches(self.mirror(image, axis=2), self.patch_size))

    def encode(self, tokens: Tensor) -> Tensor:
        """Run the stages: (B, x, y, z, T, c) to (B, x/8, y/8, z/8, T, 8c) with four stages."""
        for stage in self.stages:
            tokens = stage(tokens)
        return tokens

    def mirror(self, tensor: Tensor, axis: int) -> Tensor:
        """Flip x, which is `axis`, if the weights want LAS."""
        return tensor.flip(axis) if self.orientation == "LAS" else tensor


def _check_arguments(
    image_size: Sequence[int], multiple: int, window: Sequence[int], first: Sequence[int], orientation: str
) -> None:
    """Raise InputError for arguments that no network fits."""
    if len(image_size) != 3 or any(size < 1 or size % multiple for size in image_size):
        raise InputError(
            f"image_size must be three multiples of {multiple} (patch_size * 2 ** (stages - 1)), not {image_size}."
        )
    for name, size in (("window_size", window), ("first_window_size", first)):
        if len(size) != 4 or min(size) < 1:
            raise InputError(f"{name} must be four positive numbers of tokens (x, y, z, t), not {size}.")
    if orientation not in ORIENTATIONS:
        raise InputError(f"orientation must be one of {ORIENTATIONS}, not {orientation!r}.")
