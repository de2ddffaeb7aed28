"""A picture of a run to look at: is the brain where the atlas takes it to be?"""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import nibabel as nib
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from nilearn import plotting

from bundle.anatomy import grid
from bundle.anatomy.atlas import labels_on, load_atlas
from bundle.anatomy.parcels import dense
from bundle.files import write_bytes
from bundle.preparation.register import template
from bundle.preparation.store import read_moments, read_run, read_voxels

mpl.use("Agg")  # pictures go to files, also on machines without a display


def region_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour, as in HTML, for each region by its name."""
    few = len(names) <= colormaps["Set1"].N
    palette = colormaps["Set1"](range(len(names))) if few else colormaps["turbo"](np.linspace(0, 1, len(names)))
    return {name: to_hex(colour) for name, colour in zip(names, palette, strict=True)}


def stored_picture(store: str | Path, atlas: str, run_id: str) -> bytes:
    """The picture of a stored run; drawn once and kept in the run's folder, so that it goes when the run is replaced.

    Args:
        store: the store's folder.
        atlas: as for `picture`.
        run_id: the run.

    Raises:
        InputError: the store holds no such run.
        WriteError: it cannot be kept.
    """
    path = Path(store) / "runs" / run_id / "picture.webp"
    if not path.is_file():
        mean, _ = read_moments(store, run_id)
        registered = "registration" in read_run(store, run_id)
        write_bytes(path, picture(mean, read_voxels(store, run_id), atlas, registered))
    return path.read_bytes()


def picture(values: np.ndarray, voxels: np.ndarray, atlas: str, registered: bool = False) -> bytes:
    """Draw in-brain values (V,) with contours of their brain mask (white) and of the atlas's groups (colours).

    Args:
        values: the values.
        voxels: (V,) flat C-order indices into `grid.SHAPE`.
        atlas: see `bundle.anatomy.atlas.load_atlas`.
        registered: draw the edges of the MNI152 template's brain and ventricles (cyan), on which those of a run that
            was registered here should lie.

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
    loaded = load_atlas(atlas)
    labels = labels_on(loaded, grid.AFFINE, grid.SHAPE)
    for name, colour in region_colours(list(loaded.groups)).items():
        region = np.isin(labels, loaded.groups[name]).astype(np.float32)
        display.add_contours(_image(region), levels=[0.5], colors=[colour], linewidths=0.8)
    if registered:
        display.add_contours(_image(template()), levels=[0.3], colors="cyan", linewidths=0.5)
    file = io.BytesIO()
    figure.savefig(file, dpi=100, facecolor="black", format="webp", pil_kwargs={"quality": 75})
    return file.getvalue()


def _image(values: np.ndarray) -> nib.Nifti1Image:
    return nib.Nifti1Image(values, grid.AFFINE)
