"""The model `brain_fmri_roi_mae` of Brainmarks, found in its namespace package: no __init__.py may lie beside it.

See https://packaging.python.org/en/latest/guides/creating-and-discovering-plugins/#using-namespace-packages.
"""

import nibabel as nib
import templateflow.api as templateflow
from brainmarks.models.registry import register_model

from bundle.anatomy.atlas import AAL3
from bundle.deploy.brainmarks import RunEmbedder, SampleTransform, suite_model


@register_model
def brain_fmri_roi_mae(checkpoint: str | None = None, atlas: str = AAL3) -> tuple[SampleTransform, RunEmbedder]:
    """Transform and wrapper, see `bundle.deploy.brainmarks.suite_model`."""
    mask = templateflow.get("MNI152NLin6Asym", desc="brain", resolution=2, suffix="mask", extension="nii.gz")
    return suite_model(nib.Nifti1Image.from_filename(mask), checkpoint, atlas)
