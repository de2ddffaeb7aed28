"""A picture of a run to look at: is the brain where the atlas takes it to be?"""

import io
from pathlib import Path

import matplotlib as mpl
import nibabel as nib
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from nilearn import plotting

from bundle.anatomy import atlas, grid
from bundle.anatomy.parcels import dense
from bundle.files import write_bytes
from bundle.preparation.store import read_moments, read_voxels

mpl.use("Agg")  # pictures go to files, also on machines without a display

REGION_COLOURS = {name: to_hex(colormaps["Set1"](number)) for number, name in enumerate(atlas.REGIONS)}


def stored_picture(store: str | Path, run_id: str) -> bytes:
    """The picture of a stored run; drawn once and kept in the run's folder, so that it goes when the run is replaced.

    Raises:
        InputError: the store holds no such run.
        WriteError: it cannot be kept.
    """
    path = Path(store) / "runs" / run_id / "picture.webp"
    if not path.is_file():
        mean, _ = read_moments(store, run_id)
        write_bytes(path, picture(mean, read_voxels(store, run_id)))
    return path.read_bytes()


def picture(values: np.ndarray, voxels: np.ndarray) -> bytes:
    """Draw in-brain values (V,) with contours of their brain mask (white) and of the seven regions (colours).

    Returns:
        A WebP file's bytes, about 15 kB: a page of 1,000 runs holds as many pictures.
    """
    volume = dense(values.astype(np.float32), voxels, fill=values.min())
    brain = dense(np.ones(len(voxels), np.float32), voxels)
    figure = Figure(figsize=(7.2, 2.6), facecolor="black")
    display = plotting.plot_anat(
        _image(volume), figure=figure, display_mode="ortho", cut_coords=(-24, -30, -10), cmap="gray", colorbar=False,
        draw_cross=False, black_bg=True, dim=0,
    )  # fmt: skip
    display.add_contours(_image(brain), levels=[0.5], colors="white", linewidths=0.7)
    labels = atlas.labels_on(atlas.load_atlas(), grid.AFFINE, grid.SHAPE)
    for name, members in atlas.REGIONS.items():
        region = np.isin(labels, members).astype(np.float32)
        display.add_contours(_image(region), levels=[0.5], colors=[REGION_COLOURS[name]], linewidths=0.8)
    file = io.BytesIO()
    figure.savefig(file, dpi=100, facecolor="black", format="webp", pil_kwargs={"quality": 75})
    return file.getvalue()


def _image(values: np.ndarray) -> nib.Nifti1Image:
    return nib.Nifti1Image(values, grid.AFFINE)
