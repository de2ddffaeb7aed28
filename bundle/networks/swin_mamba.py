"""The Shifted-Window Mamba encoder for 4D fMRI (NeuroSTORM, arXiv 2506.11167; region masking, arXiv 2511.00443).

Inside the network a batch is (b, x, y, z, t, c): a grid of tokens, channels last. One token is a patch of
6 x 6 x 6 voxels at one frame.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bundle.errors import InputError
from bundle.networks.graphs import written_down
from bundle.networks.mamba import STATES, Mamba, kernels_for
from bundle.networks.redundancy import RedundancyDropout, check_rate
from bundle.networks.scan import rows_per_tile
from bundle.networks.windows import Windows, fit_window

ORIENTATIONS = ("RAS", "LAS")
QUIET = 0.1
"""Of two channels the first is anatomy, which would drown the second's courses: pretraining would go on predicting a
flat line (docs/dynamics.md)."""


class WindowBlock(nn.Module):
    """LayerNorm, Mamba inside windows, residual; LayerNorm, MLP (4 x wide), residual.

    A shifted block moves the windows by half a window along each axis, on the grid padded with zeros at its
    end and taken as periodic. There is no attention, hence no mask between the two sides of a seam.

    All of it is local to a window, so it runs on as many windows at once as the cache holds. With the plain
    scan the backward pass recomputes everything but the scan, which takes longest; with checkpointing the
    scan as well.

    In training, `redundancy_dropout` is the share of a window's tokens to which nothing of Mamba is added
    (`bundle.networks.redundancy`).
    """

    def __init__(
        self,
        channels: int,
        window: Sequence[int],
        shifted: bool,
        checkpointing: bool = False,
        redundancy_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.window = tuple(window)
        self.shift = tuple(width // 2 if shifted else 0 for width in window)
        self.checkpointing = checkpointing
        self.redundancy_dropout = redundancy_dropout
        self.norm1 = nn.LayerNorm(channels)
        self.mamba = Mamba(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, tokens: Tensor, brain: Tensor | None = None) -> Tensor:
        """Map (b, x, y, z, t, c) to the same shape.

        Args:
            tokens: the grid of tokens.
            brain: bool (x, y, z); windows without any True token are left as they are. None runs all windows.
        """
        batch, *grid, _ = tokens.shape
        window, shift = fit_window(grid, self.window, self.shift)
        layout = Windows(grid, window, shift, tokens.device)
        windows = layout.cut(tokens)
        real = None if layout.real is None else layout.real.repeat(batch, 1, 1)
        sides = layout.sides() if self._drops() else None
        sides = None if sides is None else sides.repeat(batch, 1)
        if brain is None:
            return layout.join(self._run(windows, window, real, sides))
        places = brain.to(tokens.device).view(1, *brain.shape, 1, 1).expand(batch, *grid, 1)
        run = layout.cut(places).any(dim=(1, 2))
        if written_down():  # which windows hold brain differs from image to image: run all, and take those
            return layout.join(self._run(windows, window, real, sides).where(run.view(-1, 1, 1), windows))
        (chosen,) = run.nonzero(as_tuple=True)
        blank, side = (None if each is None else each[chosen] for each in (real, sides))
        done = self._run(windows[chosen], window, blank, side)
        return layout.join(windows.index_copy(0, chosen, done.to(windows.dtype)))

    def _drops(self) -> bool:
        return self.training and self.redundancy_dropout > 0

    def _run(self, windows: Tensor, window: tuple[int, ...], real: Tensor | None, sides: Tensor | None) -> Tensor:
        """Run all windows (n, l, c), some at a time; `real` (n, l, 1) is False for padding, `sides` as in `Windows`."""
        if written_down():  # one tile, or what is written down would repeat itself for each
            return self._tile(windows, real, None)
        channels = windows.shape[-1]
        tiles = math.ceil(len(windows) / rows_per_tile(windows.device, STATES, 2 * channels)) or 1
        blanks = [None] * tiles if real is None else real.chunk(tiles)
        parts = [None] * tiles if sides is None else sides.chunk(tiles)
        results = [
            self._tile(tile, blank, RedundancyDropout(self.redundancy_dropout, window, side) if self._drops() else None)
            for tile, blank, side in zip(windows.chunk(tiles), blanks, parts, strict=False)
        ]
        return results[0] if len(results) == 1 else torch.cat(results)

    def _tile(self, windows: Tensor, real: Tensor | None, drop: RedundancyDropout | None) -> Tensor:
        keeps = torch.is_grad_enabled() and not written_down()
        if keeps and (kernels_for(windows.device.type).plain or self.checkpointing):
            saved: list[Tensor] | None = None if self.checkpointing else []
            return checkpoint(self._mix, windows, real, drop, saved, use_reentrant=False, preserve_rng_state=False)
        return self._mix(windows, real, drop)

    def _mix(
        self,
        windows: Tensor,
        real: Tensor | None,
        drop: RedundancyDropout | None,
        saved_states: list[Tensor] | None = None,
    ) -> Tensor:
        norm = kernels_for(windows.device.type).norm
        windows, normal = norm(self.norm1, windows, None)
        if real is not None:
            normal = normal.where(real, 0)
        mixed = self.mamba(normal, saved_states)
        windows, normal = norm(self.norm2, windows, mixed if drop is None else drop(mixed))
        return windows + self.mlp(normal)


class PatchMerging(nn.Module):
    """Halve the grid in space: 8 neighbours become one token of twice the channels. Time stays."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8 * channels)
        self.reduce = nn.Linear(8 * channels, 2 * channels, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (b, x, y, z, t, c) to (b, x/2, y/2, z/2, t, 2c)."""
        b, x, y, z, t, c = tokens.shape
        tokens = tokens.reshape(b, x // 2, 2, y // 2, 2, z // 2, 2, t, c)
        tokens = tokens.permute(0, 1, 3, 5, 7, 2, 4, 6, 8).flatten(5)  # (b, x/2, y/2, z/2, t, 8c)
        return self.reduce(self.norm(tokens))


class BlockStack(nn.Module):
    """Window blocks at one resolution; every second one is shifted, unless `shifted` is False."""

    def __init__(
        self,
        channels: int,
        depth: int,
        window: Sequence[int],
        shifted: bool = True,
        checkpointing: bool = False,
        redundancy_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            WindowBlock(channels, window, shifted and index % 2 == 1, checkpointing, redundancy_dropout)
            for index in range(depth)
        )

    def forward(self, tokens: Tensor, brain: Tensor | None = None) -> Tensor:
        """Map (b, x, y, z, t, c) to the same shape; `brain` as in `WindowBlock`."""
        for block in self.blocks:
            tokens = block(tokens, brain)
        return tokens


class EncoderStage(nn.Module):
    """Add the absolute embeddings of place and time, then run the blocks; `merge` makes the next stage's tokens."""

    def __init__(self, channels: int, grid: Sequence[int], frames: int, stack: BlockStack, merge: bool) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.empty(*grid, 1, channels))  # (x, y, z, 1, c)
        self.time = nn.Parameter(torch.empty(frames, channels))  # (t, c)
        nn.init.trunc_normal_(self.place, std=0.02)
        nn.init.trunc_normal_(self.time, std=0.02)
        self.stack = stack
        self.merge = PatchMerging(channels) if merge else nn.Identity()

    def forward(self, tokens: Tensor, brain: Tensor | None = None) -> Tensor:
        """Map (b, x, y, z, t, c) to the same shape; t may be below the frames, and `brain` is as in `WindowBlock`."""
        return self.stack(tokens + self.place + self.time[: tokens.shape[4]], brain)


def plain(tensor: Tensor) -> Tensor:
    """The tensor without MONAI's metadata, which some operations of the scan do not take."""
    return tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor


def halve(brain: Tensor) -> Tensor:
    """Halve a bool grid (x, y, z): True where any of 8 neighbours is."""
    x, y, z = brain.shape
    return brain.view(x // 2, 2, y // 2, 2, z // 2, 2).amax((1, 3, 5))


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
        in_channels: 1, or 2: the second channel is embedded by weights of its own. With zeros there (see
            `bundle.training.checkpoints.load_encoder`) weights of a network of one channel give the same result. The
            first channel's weights begin at `QUIET` of what they are alone.
        patch_size: edge of a patch in voxels.
        embed_dim: channels of the first stage; doubled by every later one.
        depths: blocks per stage.
        window_size: tokens of a window along x, y, z and t.
        first_window_size: the same for the first stage.
        full_last_stage: the last stage's windows span the whole space (and window_size[3] frames), unshifted;
            else it is like the others.
        checkpointing: recompute each block in the backward pass, scan included: less memory, more time.
        skip_background: leave windows without any brain as they are, in every block: at full size a sixth to a
            third of those of the first stage. Changes results: background tokens hold a constant and
            embeddings, not zero, and windows of later blocks mix them with the brain's; see
            docs/performance.md.
        orientation: direction of x in the images that the weights were trained on. Input is always RAS. With
            "LAS" it is mirrored on the way in and the result mirrored back. (Mirrored weights would not do
            the same: Mamba reads a window's tokens in one direction of x.)
        redundancy_dropout: in training, the share of each window's tokens that every block's Mamba leaves as they are:
            tokens that are much like their neighbours, see `bundle.networks.redundancy`. It has no weights.
    """

    def __init__(
        self,
        image_size: Sequence[int] = (96, 96, 96),
        frames: int = 20,
        in_channels: int = 1,
        patch_size: int = 6,
        embed_dim: int = 36,
        depths: Sequence[int] = (2, 2, 6, 2),
        window_size: Sequence[int] = (4, 4, 4, 4),
        first_window_size: Sequence[int] = (4, 4, 4, 4),
        full_last_stage: bool = True,
        checkpointing: bool = False,
        orientation: str = "RAS",
        skip_background: bool = False,
        redundancy_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        stages = len(depths)
        _check_arguments(image_size, patch_size * 2 ** (stages - 1), window_size, first_window_size, orientation)
        if in_channels not in (1, 2):
            raise InputError(f"in_channels must be 1 or 2, not {in_channels}.")
        # what two networks must share to exchange weights and mean the same by them; fit for JSON
        self.size: dict[str, Any] = {
            "image_size": list(image_size),
            "frames": frames,
            "in_channels": in_channels,
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
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.grid = tuple(size // patch_size for size in image_size)
        self.channels = embed_dim * 2 ** (stages - 1)  # of the result
        self.depths = tuple(depths)
        self.window_size = tuple(window_size)
        self.checkpointing = checkpointing
        self.orientation = orientation
        self.skip_background = skip_background
        self.patch_embedding = nn.Linear(patch_size**3, embed_dim)
        if in_channels == 2:
            self.second_embedding = nn.Linear(patch_size**3, embed_dim, bias=False)
            with torch.no_grad():
                self.patch_embedding.weight.mul_(QUIET)
        self.stages = nn.ModuleList()
        for i, depth in enumerate(depths):
            grid = [size // 2**i for size in self.grid]
            last = i == stages - 1
            window = first_window_size if i == 0 else window_size
            if last and full_last_stage:
                window = (*grid, window_size[3])
            channels = embed_dim * 2**i
            shifted = not (last and full_last_stage)
            stack = BlockStack(channels, depth, window, shifted, checkpointing, check_rate(redundancy_dropout))
            self.stages.append(EncoderStage(channels, grid, frames, stack, merge=not last))

    def forward(self, image: Tensor) -> Tensor:
        """Encode (B, in_channels, X, Y, Z, T), T at most `frames`, to features (B, channels, x, y, z, T).

        Raises:
            InputError: the shape does not fit the network.
        """
        return self.tokens(image, len(self.stages)).permute(0, 5, 1, 2, 3, 4)

    def tokens(self, image: Tensor, stage: int) -> Tensor:
        """Return the tokens of one stage for images (B, 1, X, Y, Z, T), in their orientation.

        Args:
            image: T at most `frames`.
            stage: 0: the embedded patches, which know neither place nor time; k: what the blocks of the k-th stage
                return, before patches are merged. The last one is what `forward` returns.

        Returns:
            (B, x, y, z, T, c): of stage 1 as many and as wide as of stage 0; of each later one half as many along x, y
            and z, and twice as wide.

        Raises:
            InputError: there is no such stage, or the shape does not fit the network.
        """
        self.tokens_of(stage)
        return next(islice(self.all_tokens(image), stage, None))

    def all_tokens(self, image: Tensor) -> Iterator[Tensor]:
        """The `tokens` of stage 0, 1, and so on, each computed when it is asked for."""
        for tokens in self._walk(self.embed(image), self.brain_tokens(image)):
            yield self.mirror(tokens, axis=1)

    def tokens_of(self, stage: int) -> tuple[int, int]:
        """Edge of a token in voxels, and its channels, at a stage of `tokens`.

        Raises:
            InputError: there is no such stage.
        """
        if not 0 <= stage <= len(self.stages):
            raise InputError(f"stage must be 0 to {len(self.stages)}, as the network has stages, not {stage}")
        merged = 2 ** max(stage - 1, 0)
        return self.patch_size * merged, self.channels * merged // 2 ** (len(self.stages) - 1)

    def embed(self, image: Tensor) -> Tensor:
        """Turn (B, in_channels, X, Y, Z, T) into tokens (B, x, y, z, T, c) in the orientation of the weights."""
        image = plain(image)
        expected = (self.in_channels, *self.image_size)
        if image.ndim != 6 or image.shape[1:5] != expected or not 1 <= image.shape[5] <= self.frames:
            raise InputError(
                f"The network takes images (B, {', '.join(map(str, expected))}, T) with T from 1 to "
                f"{self.frames}, not {tuple(image.shape)}; change the image or the network's image_size, frames and "
                "in_channels."
            )
        image = self.mirror(image, axis=2)
        tokens = self.patch_embedding(split_patches(image[:, :1], self.patch_size))
        if self.in_channels == 2:
            tokens = tokens + self.second_embedding(split_patches(image[:, 1:], self.patch_size))
        return tokens

    def brain_tokens(self, image: Tensor) -> Tensor | None:
        """Where the images (B, in_channels, X, Y, Z, T) hold brain, bool (x, y, z), or None if windows are not skipped.

        The background holds one value at all its voxels and frames, so a patch with two values has brain. The
        result is the union over the batch, in the orientation of the weights.
        """
        if not self.skip_background:
            return None
        patches = split_patches(self.mirror(image[:, :1], axis=2), self.patch_size)  # (b, x, y, z, t, voxels)
        return (patches != patches[:, :, :, :, :1, :1]).flatten(4).any(-1).any(0)

    def encode(self, tokens: Tensor, brain: Tensor | None = None) -> Tensor:
        """Run the stages: (B, x, y, z, T, c) to (B, x/8, y/8, z/8, T, 8c) with four stages.

        Args:
            tokens: from `embed`.
            brain: from `brain_tokens`.
        """
        *_, last = self._walk(tokens, brain)
        return last

    def _walk(self, tokens: Tensor, brain: Tensor | None) -> Iterator[Tensor]:
        """The tokens that go into the first stage, and those that each stage's blocks return, not merged yet."""
        yield tokens
        for level, stage in enumerate(self.stages):
            tokens = stage(tokens, brain)
            yield tokens
            tokens = stage.get_submodule("merge")(tokens)
            if brain is not None and level < len(self.stages) - 1:
                brain = halve(brain)

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
