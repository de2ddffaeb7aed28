"""The masked autoencoder: hide tokens, encode, decode, and predict the voxels of every patch."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from bundle.errors import InputError
from bundle.networks.swin_mamba import BlockStack, SwinMambaEncoder, halve, join_patches, plain, split_patches

MASK_TOKENS = ("region", "random", "window")
HIDE = ("any", "majority")


class PatchExpanding(nn.Module):
    """Double the grid in space: each token becomes 8 neighbours of half the channels. Time stays."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, 4 * channels, bias=False)
        self.norm = nn.LayerNorm(channels // 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (b, x, y, z, t, c) to (b, 2x, 2y, 2z, t, c/2)."""
        b, x, y, z, t, c = tokens.shape
        tokens = self.expand(tokens).reshape(b, x, y, z, t, 2, 2, 2, c // 2)
        tokens = tokens.permute(0, 1, 5, 2, 6, 3, 7, 4, 8)  # (b, x, 2, y, 2, z, 2, t, c/2)
        return self.norm(tokens.reshape(b, 2 * x, 2 * y, 2 * z, t, c // 2))


class DecoderStage(nn.Module):
    """Expand patches to the given channels, then run the blocks."""

    def __init__(self, channels: int, stack: BlockStack) -> None:
        super().__init__()
        self.expand = PatchExpanding(2 * channels)
        self.stack = stack

    def forward(self, tokens: Tensor, brain: Tensor | None = None) -> Tensor:
        """Map (b, x, y, z, t, 2c) to (b, 2x, 2y, 2z, t, c)."""
        return self.stack(self.expand(tokens), brain)


class Decoder(nn.Module):
    """Mirror of the encoder without position embeddings: expand patches, then window blocks, per stage."""

    def __init__(
        self,
        embed_dim: int,
        depths: tuple[int, ...],
        window_size: tuple[int, ...],
        patch_size: int,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for i in reversed(range(len(depths) - 1)):
            channels = embed_dim * 2**i
            stack = BlockStack(channels, depths[i], window_size, checkpointing=checkpointing)
            self.stages.append(DecoderStage(channels, stack))
        self.norm = nn.LayerNorm(embed_dim)
        self.predict = nn.Linear(embed_dim, patch_size**3)

    def forward(self, tokens: Tensor, brain: Tensor | None = None) -> Tensor:
        """Map features (b, x, y, z, t, c) to patches (b, 8x, 8y, 8z, t, voxels) with four stages.

        Args:
            tokens: the encoder's result.
            brain: bool (8x, 8y, 8z), as in `WindowBlock`, at the resolution of the patches.
        """
        levels = [brain]
        for _ in self.stages[1:]:
            levels.append(None if levels[-1] is None else halve(levels[-1]))
        for stage, level in zip(self.stages, reversed(levels), strict=True):
            tokens = stage(tokens, level)
        return self.predict(self.norm(tokens))


class MaskedAutoencoder(nn.Module):
    """Reconstruct a clip of which some tokens are hidden.

    Three learnt mask tokens exist, as in the published checkpoints. Only the one named by `mask_token` is used
    and trained; the others are kept, so that checkpoints can be exchanged.

    Args:
        mask_token: "region" and "random" replace every hidden token by one vector; "window" by one vector for
            each place in the window of `window_size` tokens.
        hide: a token is hidden when "any" of its voxels is masked, or the "majority" (more than half).
        **encoder: the arguments of `SwinMambaEncoder`.
    """

    def __init__(self, mask_token: str = "region", hide: str = "any", **encoder: Any) -> None:
        super().__init__()
        if mask_token not in MASK_TOKENS:
            raise InputError(f"mask_token must be one of {MASK_TOKENS}, not {mask_token!r}.")
        if hide not in HIDE:
            raise InputError(f"hide must be one of {HIDE}, not {hide!r}.")
        self.hide = hide
        self.encoder = SwinMambaEncoder(**encoder)
        embed_dim = self.encoder.patch_embedding.out_features
        window = self.encoder.window_size
        self.mask_tokens = nn.ParameterDict(
            {
                "random": torch.zeros(embed_dim),
                "window": torch.zeros(*window, embed_dim),  # (x, y, z, t, c)
                "region": torch.zeros(embed_dim),
            }
        )
        for name, token in self.mask_tokens.items():
            token.requires_grad_(name == mask_token)  # a parameter without gradient stops distributed training
        self.mask_token = mask_token
        self.decoder = Decoder(
            embed_dim, self.encoder.depths, window, self.encoder.patch_size, self.encoder.checkpointing
        )

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Reconstruct every voxel of an image from its tokens that are not hidden.

        Args:
            image: (B, in_channels, X, Y, Z, T).
            mask: bool, True where masked, (B, 1, X, Y, Z) for all frames or (B, 1, X, Y, Z, T).

        Returns:
            The reconstruction of the image's last channel, (B, 1, X, Y, Z, T).

        Raises:
            InputError: a shape does not fit the network or the image.
        """
        return self.reconstruct(image, self.hidden_tokens(image, mask))

    def hidden_tokens(self, image: Tensor, mask: Tensor) -> Tensor:
        """Find the tokens (B, x, y, z, T), or (B, x, y, z, 1) for all frames, that a voxel mask hides."""
        b, _, x, y, z, t = image.shape
        if mask.shape not in {(b, 1, x, y, z), (b, 1, x, y, z, t)}:
            raise InputError(
                f"The mask of an image {tuple(image.shape)} must be {(b, 1, x, y, z)} or {(b, 1, x, y, z, t)}, "
                f"not {tuple(mask.shape)}."
            )
        mask = plain(mask).bool()
        patches = split_patches(mask.unsqueeze(-1) if mask.ndim == 5 else mask, self.encoder.patch_size)
        return patches.any(-1) if self.hide == "any" else 2 * patches.sum(-1) > patches.shape[-1]

    def reconstruct(self, image: Tensor, hidden: Tensor) -> Tensor:
        """Reconstruct the last channel of (B, in_channels, X, Y, Z, T); `hidden` is (B, x, y, z, T or 1)."""
        tokens = self.encoder.embed(image)
        brain = self.encoder.brain_tokens(image)
        hidden = self.encoder.mirror(hidden, axis=1).unsqueeze(-1)  # (B, x, y, z, T or 1, 1)
        tokens = torch.where(hidden, self._filling(tokens).to(tokens.dtype), tokens)
        patches = self.decoder(self.encoder.encode(tokens, brain), brain)
        return self.encoder.mirror(join_patches(patches, self.encoder.patch_size), axis=2)

    def _filling(self, tokens: Tensor) -> Tensor:
        """Mask tokens to put in the place of `tokens` (B, x, y, z, t, c): (c,) or (x, y, z, t, c)."""
        filling = self.mask_tokens[self.mask_token]
        if self.mask_token != "window":
            return filling
        x, y, z, t = grid = tokens.shape[1:5]
        repeats = [math.ceil(size / width) for size, width in zip(grid, filling.shape[:4], strict=True)]
        return filling.repeat(*repeats, 1)[:x, :y, :z, :t]
