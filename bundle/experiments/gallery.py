"""The pictures of the documentation, from a synthetic cohort's store and a network pretrained on it."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from monai.bundle import ConfigParser
from numpy.typing import NDArray

from bundle.anatomy import grid
from bundle.anatomy.atlas import REGIONS, Regions, labels_on, load_atlas
from bundle.data.normalisation import Normalisation
from bundle.data.splits import load_splits
from bundle.data.transforms import ReadClipd, ScatterClipd, TimeLastd
from bundle.errors import InputError
from bundle.evaluation.figures import mean_bold
from bundle.experiments.sweep import is_synthetic
from bundle.files import ROOT, config_file, written_whole
from bundle.masking.transforms import AAL3ROIMaskd
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.preparation.store import read_manifest
from bundle.training.checkpoints import load_checkpoint, saved_facts

mpl.use("Agg")  # pictures go to files, also on machines without a display

MASK_COLOUR = "#ff8c1a"
KINDS = ("region", "half", "equal", "random_tube", "random_random", "window_random")
"""Masks that `draw_kinds` shows: pretrain.json's own, and overlays of configs/masks."""
FRAMES_SHOWN = (2, 12)


def draw_all(store: str | Path, checkpoint: str | Path, folder: str | Path, run_id: str | None = None) -> None:
    """Write `method.png`, `regions.png` and `masks.png`.

    Args:
        store: the prepared store, with its split file.
        checkpoint: as for `draw_method`.
        folder: where the pictures go; made if absent.
        run_id: the run; None takes the first of a test subject.

    Raises:
        InputError: the runs are not from a synthetic cohort that is still there: no person is shown.
    """
    runs = read_manifest(store)["runs"]
    if not is_synthetic([run["source"] for run in runs]):
        raise InputError(f"{store}: the documentation shows synthetic runs only; give the store of a synthetic cohort")
    if run_id is None:
        tested = load_splits(Path(store) / "splits.json")["sets"]["test"]
        run_id = next(run["run_id"] for run in runs if run["participant_id"] in tested)
    folder = Path(folder)
    draw_method(store, run_id, checkpoint, folder / "method.png")
    draw_regions(store, run_id, folder / "regions.png")
    draw_kinds(store, run_id, folder / "masks.png")


def draw_method(store: str | Path, run_id: str, checkpoint: str | Path, png: str | Path) -> None:
    """Draw a region mask on a run's mean BOLD, and one of its frames: original, masked, rebuilt.

    All in the sagittal plane that holds most of the mask.

    Args:
        store: the prepared store.
        run_id: the run; one of a test subject shows what the network does with a brain that it has not seen.
        checkpoint: of a pretrained network; what it hides is what is drawn.
        png: picture to write.
    """
    saved = load_checkpoint(checkpoint)
    facts = saved_facts(saved, checkpoint)
    config = facts["config"]
    network = MaskedAutoencoder(**facts["network"], mask_token=config["mask_token"]).eval()
    network.load_state_dict(saved["network"])
    clip = _clip(store, run_id, config["frames"], Normalisation(**facts["normalisation"]))
    mask = AAL3ROIMaskd("image", config["regions"])(clip)["mask"]
    with torch.no_grad():
        rebuilt = network(clip["image"].as_tensor()[None], mask.as_tensor()[None])[0]
    frame = config["frames"] // 2
    hidden = mask[0].numpy().astype(bool)
    original, prediction = (image[-1, ..., frame].numpy() for image in (clip["image"], rebuilt))
    brain = clip["brain"][0].numpy().astype(bool)
    low, high = original[brain].min(), np.percentile(original[brain], 99)
    original = np.where(brain, original, low)
    prediction = np.where(brain, prediction, low)
    first = f"{' + '.join(config['regions'])} mask on mean BOLD"
    panels = {
        first: mean_bold(store, run_id).get_fdata(),
        "original": original,
        "masked": np.where(hidden, low, original),
        "rebuilt": np.where(hidden, prediction, original),
    }
    index = int(hidden.sum(axis=(1, 2)).argmax())  # the sagittal plane that holds most of the mask
    outline = _plane(hidden, 0, index)
    figure = Figure(figsize=(12, 3.15), facecolor="black", layout="constrained")
    for panel, (title, volume) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        limits = {} if title == first else {"vmin": low, "vmax": high}
        panel.imshow(_plane(volume, 0, index), cmap="gray", **limits)
        if title == first:
            _fill(panel, outline, MASK_COLOUR)
        else:
            panel.contour(outline, levels=[0.5], colors=MASK_COLOUR, linewidths=1)
        panel.set_title(title, color="white", fontsize=13)
        _crop(panel, _window(brain), 0)
    _finish(figure, png)


def draw_regions(store: str | Path, run_id: str, png: str | Path) -> None:
    """Draw the seven regions on a run's mean BOLD, in axial planes.

    Args:
        store: the prepared store.
        run_id: the run.
        png: picture to write.
    """
    labels = labels_on(load_atlas(), grid.AFFINE, grid.SHAPE)
    mean = mean_bold(store, run_id).get_fdata()
    window = _window(mean != 0)
    colours = mpl.colormaps["tab10"](range(len(REGIONS)))
    figure = Figure(figsize=(12, 3.3), facecolor="black", layout="constrained")
    axes = figure.subplots(1, 5)
    for panel, height in zip(axes, (-38, -18, 2, 26, 50), strict=True):
        index = round(float((height - grid.AFFINE[2, 3]) / grid.AFFINE[2, 2]))
        panel.imshow(_plane(mean, 2, index), cmap="gray")
        for (_, numbers), colour in zip(REGIONS.items(), colours, strict=True):
            _fill(panel, _plane(np.isin(labels, numbers), 2, index), colour)
        panel.set_title(f"z = {height} mm", color="white", fontsize=11)
        _crop(panel, window, 2)
    names = [mpl.patches.Patch(color=colour, label=name) for name, colour in zip(REGIONS, colours, strict=True)]
    figure.legend(
        handles=names, loc="outside lower center", ncols=len(names), frameon=False, labelcolor="white", fontsize=11
    )
    _finish(figure, png)


def draw_kinds(store: str | Path, run_id: str, png: str | Path, regions: Regions = "limbic") -> None:
    """Draw what each kind of mask hides of one clip, at two frames, in the axial plane that holds most of it.

    Args:
        store: the prepared store.
        run_id: the run.
        png: picture to write.
        regions: for the kinds that take some.
    """
    clip = _clip(store, run_id, 20, Normalisation("voxel", sd_floor=0.1, clip=5.0))  # of which only the brain is used
    mean, brain = mean_bold(store, run_id).get_fdata(), clip["brain"][0].numpy().astype(bool)
    figure = Figure(figsize=(12, 4.9), facecolor="black", layout="constrained")
    axes = figure.subplots(2, len(KINDS))
    for column, kind in enumerate(KINDS):
        mask = _mask_of(kind, regions)(clip)["mask"][0].numpy().astype(bool)
        most = mask if mask.ndim == 3 else mask[..., FRAMES_SHOWN[0]]
        index = int((most & brain).sum(axis=(0, 1)).argmax())
        for row, frame in enumerate(FRAMES_SHOWN):
            hidden = mask if mask.ndim == 3 else mask[..., frame]
            axes[row, column].imshow(_plane(mean, 2, index), cmap="gray")
            _fill(axes[row, column], _plane(hidden, 2, index), MASK_COLOUR)
            if row == 0:
                axes[row, column].set_title(kind, color="white", fontsize=12)
            axes[row, 0].set_ylabel(f"frame {frame}", color="white", fontsize=11)
    _finish(figure, png)


def _mask_of(kind: str, regions: Regions) -> AAL3ROIMaskd:
    """The mask that pretrain.json draws under an overlay of configs/masks; "region" is its own."""
    files = [config_file("pretrain")] + ([] if kind == "region" else [config_file(f"masks/{kind}")])
    config = ConfigParser(ConfigParser.load_config_files([str(file) for file in files]))
    config.update({"bundle_root": str(ROOT)})
    if config["regions"] is not None:
        config.update({"regions": regions})
    return config.get_parsed_content("mask")


def _clip(store: str | Path, run_id: str, frames: int, normalisation: Normalisation) -> dict:
    """The first clip of a run: "image" (channels, X, Y, Z, T) and "brain" (1, X, Y, Z)."""
    item = ReadClipd(store, frames)({"run_id": run_id, "start": 0})
    return TimeLastd("image")(ScatterClipd(normalisation)(item))


def _plane(volume: NDArray, axis: int, index: int) -> NDArray:
    """One plane of a RAS volume, superior (of an axial plane, anterior) up and the subject's left on the left."""
    return np.flipud(np.take(volume, index, axis=axis).T)


def _window(brain: NDArray) -> list[tuple[int, int]]:
    """First and last index of a brain along each axis, with a margin."""
    return [(int(where.min()) - 3, int(where.max()) + 3) for where in np.nonzero(brain)]


def _crop(panel: mpl.axes.Axes, window: list[tuple[int, int]], axis: int) -> None:
    """Show the brain only, in a plane as `_plane` cuts it."""
    across, up = (other for other in range(3) if other != axis)
    last = grid.SHAPE[up] - 1
    panel.set(xlim=window[across], ylim=(last - window[up][0], last - window[up][1]))


def _fill(panel: mpl.axes.Axes, hidden: NDArray, colour: str | tuple) -> None:
    colours = np.zeros((*hidden.shape, 4))
    colours[hidden] = mpl.colors.to_rgba(colour, 0.6)
    panel.imshow(colours)


def _finish(figure: Figure, png: str | Path) -> None:
    for panel in figure.axes:
        panel.set(xticks=[], yticks=[], facecolor="black")
        for spine in panel.spines.values():
            spine.set_visible(False)
    figure.text(0.995, 0.01, "SYNTHETIC data", color="#9aa4ae", fontsize=9, ha="right")
    with written_whole(Path(png)) as unfinished:
        figure.savefig(unfinished, dpi=100)
