"""Pictures of reconstructions while a network is trained."""

from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch.utils.tensorboard import SummaryWriter


class ReconstructionImages:
    """Validator's handler: original, masked and reconstructed slices of one clip, to TensorBoard.

    Args:
        writer: TensorBoard writer; its axis is the validator's epoch, which MONAI sets to the trainer's.
    """

    def __init__(self, writer: SummaryWriter) -> None:
        self.writer = writer

    def attach(self, engine: Engine) -> None:
        """Register with a validator."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Draw the first clip of the epoch's last batch."""
        output: Any = engine.state.output
        panel = reconstruction_panel(
            output["label"]["image"][0, 0], output["pred"][0, 0], output["label"]["mask"][0, 0]
        )
        self.writer.add_image("original | masked | reconstructed", panel, engine.state.epoch, dataformats="HW")


def reconstruction_panel(image: torch.Tensor, prediction: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """Three planes through the middle of the hidden voxels, at the frame nearest to the middle that hides any.

    Args:
        image: `(X, Y, Z, T)` z-scored BOLD on a RAS grid.
        prediction: reconstruction of the same shape.
        mask: bool `(X, Y, Z)` or `(X, Y, Z, T)`.

    Returns:
        Grey values in 0..1 (2nd to 98th percentile of the image), rows sagittal, coronal and axial, columns
        original, masked (hidden voxels black) and image with the hidden voxels reconstructed; superior (or, in
        the axial row, anterior) is up and the subject's left is on the left.
    """
    frame = image.shape[-1] // 2
    if mask.ndim == image.ndim and mask.any():
        frame = min(mask.flatten(0, -2).any(0).nonzero().flatten().tolist(), key=lambda other: abs(other - frame))
    hidden = (mask[..., frame] if mask.ndim == image.ndim else mask).cpu().numpy()
    original = image[..., frame].float().cpu().numpy()
    rebuilt = prediction[..., frame].float().cpu().numpy()
    low, high = np.percentile(original, [2, 98])
    columns = [original, np.where(hidden, low, original), np.where(hidden, rebuilt, original)]
    centre = [round(axis.mean()) for axis in np.nonzero(hidden)] if hidden.any() else [s // 2 for s in hidden.shape]
    rows = []
    for axis, index in enumerate(centre):
        planes = [np.flipud(np.take(volume, index, axis=axis).T) for volume in columns]
        rows.append(np.hstack(planes))
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 0), (0, width - row.shape[1])), constant_values=low) for row in rows]
    return np.clip((np.vstack(rows) - low) / max(high - low, 1e-6), 0, 1)
