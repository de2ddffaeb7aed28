"""Pictures to look at: is the mask where the anatomy is?"""

from pathlib import Path

import matplotlib as mpl
import nibabel as nib
import numpy as np
from nilearn import plotting

from bundle.anatomy import grid
from bundle.anatomy.atlas import Atlas, Regions, labels_on, region_labels
from bundle.anatomy.parcels import dense
from bundle.files import written_whole
from bundle.preparation.store import read_moments, read_voxels

mpl.use("Agg")  # pictures go to files, also on machines without a display


def mean_bold(store: str | Path, run_id: str) -> nib.Nifti1Image:
    """Mean over time of a stored run, in the units of the file it came from, on the fixed grid; background 0."""
    mean, _ = read_moments(store, run_id)
    return nib.Nifti1Image(dense(mean.astype(np.float32), read_voxels(store, run_id)), grid.AFFINE)


def mask_overlay(store: str | Path, run_id: str, png: str | Path, regions: Regions, atlas: Atlas) -> None:
    """Draw the voxels of some regions over a stored run's mean BOLD.

    Args:
        store: the prepared store.
        run_id: the run.
        png: picture to write.
        regions: as for `bundle.anatomy.atlas.region_labels`.
        atlas: where the regions come from.
    """
    chosen = region_labels(regions, atlas)
    mask = np.isin(labels_on(atlas, grid.AFFINE, grid.SHAPE), chosen)
    display = plotting.plot_roi(
        nib.Nifti1Image(mask.astype(np.uint8), grid.AFFINE),
        bg_img=mean_bold(store, run_id),
        display_mode="mosaic",
        cut_coords=6,
        black_bg=True,
        cmap="autumn",
        alpha=0.6,
        vmin=1,  # else found slice by slice, with a warning where a slice has no voxel of the mask
        vmax=2,
        colorbar=False,
    )
    display.title(f"{regions} on the mean of {run_id}", size=9)
    with written_whole(Path(png)) as unfinished:
        display.savefig(str(unfinished), dpi=100)
    display.close()
