"""An encoder in Brainmarks, a suite that evaluates fMRI encoders (Lane et al. 2025, arXiv 2510.13768; version 0.1.1).

The suite finds models in its namespace package. Ours is `plugins/brainmarks/models/brain_fmri_roi_mae.py`, thin over
this file. A sample of the suite is a run on the MNI152 2 mm box, in RAS: "bold" (T, D), the D voxels of a brain mask in
(Z, Y, X) order, each by its own mean and SD over the run; "mean" and "std" (1, D), 0 where a voxel does not vary; and
"tr" in seconds.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bundle.anatomy import grid
from bundle.anatomy.atlas import AAL3
from bundle.data.normalisation import Normalisation
from bundle.data.transforms import ScatterClipd, TimeLastd
from bundle.deploy.embed import plain_encoder
from bundle.errors import InputError
from bundle.heads.covariance import CovarianceReadout, correlation_of_labels
from bundle.heads.pooling import pool
from bundle.networks.precision import autocast
from bundle.preparation.bold import TR_RANGE
from bundle.preparation.scaling import resample_tr, run_moments, zscore
from bundle.preparation.transforms import Item
from bundle.training.checkpoints import load_checkpoint, saved_facts

logger = logging.getLogger(__name__)

SHAPE = (91, 109, 91)
AFFINE: NDArray[np.float64] = nib.affines.from_matvec(np.diag([2.0] * 3), (-90.0, -126.0, -72.0))
"""The suite's box: voxels along x, y and z, and voxel to world, mm (`brainmarks.readers`)."""
CHECKPOINT = "BRAIN_FMRI_CHECKPOINT"
"""Environment variable that names the checkpoint where no argument does, as in the suite's own test."""
PUBLISHED_TR = 0.8
CLEANING = ("confounds", "max_fd", "high_pass", "low_pass")


def onto_grid(mask: nib.Nifti1Image) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of a sample's voxels lie on our grid, and where: the box is cropped and padded, nothing is interpolated.

    Args:
        mask: the suite's brain mask; above 0 is brain.

    Returns:
        (V,) positions in the last axis of a sample; (V,) flat C-order indices into `grid.SHAPE`.
    """
    brain = grid.nearest(np.asarray(mask.dataobj) > 0, mask.affine, AFFINE, SHAPE)
    places = np.argwhere(brain.T)[:, ::-1]  # (Z, Y, X) order, as x, y, z
    ours = nib.affines.apply_affine(np.linalg.inv(grid.AFFINE) @ AFFINE, places)
    ours = np.rint(ours).astype(np.int64)
    inside = np.all((ours >= 0) & (ours < grid.SHAPE), axis=1)
    return np.flatnonzero(inside), np.ravel_multi_index(tuple(ours[inside].T), grid.SHAPE)


class SampleTransform:
    """Bring a sample of the suite to our grid, TR and scale, as `configs/prepare.json` brings a run.

    "bold", "mean" and "std" become "bold" (T', V) float16, each voxel by its own mean and SD after resampling;
    "moments" (2, V) float32, these in units of the run's z; and "fill", the run's least z. Voxels that do not vary are
    background: their SD is 0. What is shorter than a window goes on with each voxel's mean, since the suite's own test
    has 16 frames. All else in the sample stays.

    Args:
        columns: (V,) positions of the voxels to be kept.
        voxels: D, how many there are in a sample.
        tr: the wanted TR, seconds.
        frames: of a window.
    """

    def __init__(self, columns: NDArray[np.int64], voxels: int, tr: float, frames: int) -> None:
        self.columns, self.voxels, self.tr, self.frames = columns, voxels, tr, frames

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Transform.

        Raises:
            InputError: the sample has voxels of another mask, no usable TR, or no signal.
        """
        tr = float(sample["tr"])
        if not TR_RANGE[0] <= tr <= TR_RANGE[1]:
            raise InputError(f"a sample's TR must be {TR_RANGE[0]} to {TR_RANGE[1]} seconds, not {tr}")
        bold, mean, sd = (torch.as_tensor(sample[name]).float().numpy() for name in ("bold", "mean", "std"))
        if bold.shape[1] != self.voxels:
            raise InputError(f"a sample has {bold.shape[1]} voxels, but the brain mask of the suite {self.voxels}")
        raw = bold[:, self.columns] * sd[:, self.columns] + mean[:, self.columns]
        varies = np.ptp(raw, axis=0) > 0
        if not varies.any():
            raise InputError("no voxel of a sample varies over time; it holds no signal")
        raw = resample_tr(raw, tr, self.tr)
        z, moments, whole_mean, whole_sd = zscore(raw[:, varies])
        frames = np.zeros((max(len(raw), self.frames), len(self.columns)), np.float16)
        frames[: len(raw), varies] = z
        scaled = np.zeros((2, len(self.columns)), np.float32)
        scaled[:, varies] = run_moments(moments, {"mean": whole_mean, "sd": whole_sd})
        fill = np.float32((raw[:, varies].min() - whole_mean) / whole_sd)
        rest = {key: value for key, value in sample.items() if key not in ("mean", "std")}
        return rest | {"bold": torch.from_numpy(frames), "moments": torch.from_numpy(scaled), "fill": fill}


class RunEmbedder(nn.Module):
    """Embed whole runs: one mean token per window as "patch", how regions fluctuate together as "cls".

    A readout that was fitted gives its vector in tangent space. Without one there is nothing to be fitted to, so
    `correlation_of_labels` takes its place, which no label has supervised.

    Args:
        readout: the encoder, and where its tokens are read; fitted or not.
        normalisation: units of what the encoder sees.
        voxels: (V,) flat indices into `grid.SHAPE` of a transformed sample's voxels.
        precision: "float32" or "bf16", whatever the suite asks for.
    """

    __space__ = "mni"
    voxels: Tensor

    def __init__(
        self, readout: CovarianceReadout, normalisation: Normalisation, voxels: NDArray[np.int64], precision: str
    ) -> None:
        super().__init__()
        self.readout, self.normalisation, self.precision = readout, normalisation, precision
        self.register_buffer("voxels", torch.from_numpy(voxels), persistent=False)

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor | None, None, Tensor]:
        """Map a batch of transformed samples to the suite's [cls, reg, patch].

        Returns:
            (B, 1, D) float32, or None for runs of one window, of which nothing is left when the mean over windows is
            taken off; None, as there are no registers; and (B, windows, c) float32. All windows are used, side by side,
            the tail left out. Gradients go through "patch" alone.
        """
        runs = [self._run(*run) for run in zip(batch["bold"], batch["moments"], batch["fill"], strict=True)]
        patch = torch.stack([tokens for tokens, _ in runs])
        if patch.shape[1] == 1:
            logger.warning("Runs of one window have no cls: two are needed to tell fluctuations from time's embedding")
            return None, None, patch
        return torch.stack([self._vector(features) for _, features in runs])[:, None].to(patch.device), None, patch

    def _run(self, frames: Tensor, moments: Tensor, fill: Tensor) -> tuple[Tensor, Tensor]:
        """Mean tokens (C, c) and labels' tokens (C, T, L, c) of a run's windows."""
        varies = moments[1] > 0
        length, device = self.readout.encoder.frames, frames.device
        scatter = ScatterClipd(self.normalisation, device)
        tokens, features = [], []
        for start in range(0, len(frames) - length + 1, length):
            item: Item = {"frames": frames[start : start + length, varies], "moments": moments[:, varies]}
            item |= {"voxels": self.voxels[varies], "fill": fill}
            image = TimeLastd()(scatter(item))["image"].as_tensor()[None]
            with autocast(self.precision, device):
                stages = list(self.readout.encoder.all_tokens(image))
            tokens.append(stages[-1].float().mean((1, 2, 3, 4)))
            features.append(pool(stages[self.readout.stage].detach(), self.readout.shares))
        return torch.cat(tokens), torch.cat(features)

    def _vector(self, features: Tensor) -> Tensor:
        if self.readout.fitted:
            return torch.as_tensor(self.readout.vectors(features)[0], dtype=torch.float32)
        return correlation_of_labels(features)


def suite_model(
    mask: nib.Nifti1Image, checkpoint: str | None = None, atlas: str = AAL3
) -> tuple[SampleTransform, RunEmbedder]:
    """The suite's transform and wrapper of an encoder of ours.

    Args:
        mask: the suite's brain mask.
        checkpoint: best.pt of a pretraining or a training, or of `python -m scripts convert`; None: the environment
            variable `CHECKPOINT` names it.
        atlas: of the regions that "cls" reads; see `bundle.anatomy.atlas.load_atlas`.

    Raises:
        InputError: no checkpoint is named, it cannot be used, or its readout was fitted to another atlas.
    """
    path = checkpoint or os.environ.get(CHECKPOINT)
    if not path:
        raise InputError(f"no checkpoint is named; give model_kwargs.checkpoint, or the variable {CHECKPOINT}")
    saved = load_checkpoint(path)
    facts = saved_facts(saved, path)
    readout = _readout(saved, facts, path, atlas)
    steps = {step["step"]: step for step in facts.get("preparation", {}).get("steps", [])}
    if cleaning := {
        name: value for name, value in steps.get("CleanSignalsd", {}).items() if value and name in CLEANING
    }:
        logger.warning("%s: was trained on runs cleaned by %s; the suite's are taken as they are", path, cleaning)
    columns, voxels = onto_grid(mask)
    tr = steps["ResampleTRd"]["tr"] if "ResampleTRd" in steps else PUBLISHED_TR
    transform = SampleTransform(columns, int((np.asarray(mask.dataobj) > 0).sum()), tr, readout.encoder.frames)
    precision = facts.get("config", {}).get("precision", "float32")
    return transform, RunEmbedder(readout, Normalisation(**facts["normalisation"]), voxels, precision)


def _readout(saved: Mapping[str, Any], facts: Mapping[str, Any], path: str, atlas: str) -> CovarianceReadout:
    """A checkpoint's own covariance readout; of any other checkpoint its encoder, under one that is not fitted."""
    fitted = saved["network"].get("_extra_state", {})
    if "fitted" in fitted:
        settings = {name: value for name, value in fitted["settings"].items() if name != "atlas"}
        readout = CovarianceReadout(**settings, atlas=atlas, **facts["network"])
        readout.load_state_dict(saved["network"], strict=True)
        return readout
    readout = CovarianceReadout(atlas=atlas, **facts["network"])
    readout.encoder.load_state_dict(plain_encoder(saved, facts, path).state_dict())
    return readout
