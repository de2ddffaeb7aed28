"""Which regions a classifier uses: Captum's ablation and integrated gradients, per label and region of an atlas.

Both compare a clip with a baseline, the same clip without what is asked about. "temporal_mean": every voxel at its own
mean, so that a region is taken out by removing its signal over time, while its anatomy stays. "cohort_mean": every
voxel at its mean over all clips and frames, so that a region becomes that of the average subject: for effects that a
single frame shows. An attribution is in the network's output: of classes the logit of one of them, positive towards it;
of a regression SD of the training subjects' values.

Measures over subjects: `size`, the mean absolute attribution, which is above 0 for any network; and `separation`, the
class's mean minus the others' mean: the part of the difference between the groups' logits that comes from the region
(of a regression the slope over the value, per SD). Where a network has learnt nothing that holds for new subjects,
separation is 0 but for chance. `separation_per_1000_voxels` is the same for regions of 4 to 29 % of the brain: a large
region can separate more only because it is large. (Brighter regions also make all others darker, since runs are
z-scored over the whole brain.)
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from captum.attr import FeatureAblation, IntegratedGradients
from monai.inferers import Inferer
from monai.transforms import Compose
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from bundle.anatomy.atlas import AAL3, load_atlas
from bundle.anatomy.parcels import parcel_index, parcels_of
from bundle.data.clips import clips_of
from bundle.errors import InputError
from bundle.evaluation.intervals import value_and_interval
from bundle.evaluation.maps import draw
from bundle.files import write_text
from bundle.tasks.task import Task

logger = logging.getLogger(__name__)

LEVELS = ("group", "label")
BASELINES = ("temporal_mean", "cohort_mean")


def ablation(
    logit: Callable[[Tensor], Tensor], image: Tensor, without: Tensor, index: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """Change of the logit when a unit is taken out (Captum's `FeatureAblation`).

    Args:
        logit: maps images `(B, C, X, Y, Z, T)` to `(B,)`.
        image: one clip, `(1, channels, X, Y, Z, T)`, or the C clips of one run, `(1, C * channels, X, Y, Z, T)`.
        without: its baseline, of the same shape.
        index: unit of each voxel, `(X, Y, Z)`, 1 to n; 0 for none, which is ablated as a unit of its own.
        count: the number of units, n.

    Returns:
        `(n,)`: logit of the clip minus the logit with the unit as in the baseline; 0 for a unit without a voxel.
    """
    units_of = torch.from_numpy(index).to(image.device)
    with torch.no_grad():
        found = FeatureAblation(logit).attribute(image, baselines=without, feature_mask=units_of[None, None, ..., None])
    present, first = np.unique(index, return_index=True)  # a unit's attribution is repeated at all of its voxels
    values = np.zeros(count + 1)
    values[present] = found[0, 0, ..., 0].flatten()[torch.from_numpy(first).to(found.device)].double().cpu().numpy()
    return values[1:]


def gradients(
    logit: Callable[[Tensor], Tensor],
    image: Tensor,
    without: Tensor,
    indices: Sequence[NDArray[np.int64]],
    counts: Sequence[int],
    steps: int,
) -> list[NDArray[np.float64]]:
    """Integrated gradients (Captum), summed over each unit's voxels, frames and clips.

    Args:
        logit: maps images `(B, C, X, Y, Z, T)` to `(B,)`.
        image: one clip, `(1, channels, X, Y, Z, T)`, or the C clips of one run, `(1, C * channels, X, Y, Z, T)`.
        without: its baseline, of the same shape.
        indices: arrays as in `ablation`.
        counts: the number of units of each.
        steps: points on the path between the baseline and the clip.

    Returns:
        `(n,)` for each of `indices`.
    """
    found = IntegratedGradients(logit).attribute(image, baselines=without, n_steps=steps, internal_batch_size=1)
    voxels = found[0].sum((0, -1)).double().flatten().cpu().numpy()
    pairs = zip(indices, counts, strict=True)
    return [np.bincount(index.flatten(), voxels, minlength=count + 1).astype(float)[1:] for index, count in pairs]


def temporal_mean(image: Tensor) -> Tensor:
    """The clip `(..., T)` with every voxel at its own mean over time."""
    return image.mean(-1, keepdim=True).expand_as(image)


def cohort_mean(images: Iterable[Tensor], channels: int = 1) -> Tensor:
    """Mean of images `(1, C * channels, X, Y, Z, T)` over images, clips and frames, `(1, channels, X, Y, Z, 1)`."""
    total, count = None, 0
    for image in images:
        mean = image.double().unflatten(1, (-1, channels)).mean((1, -1)).unsqueeze(-1)
        total, count = mean if total is None else total + mean, count + 1
    assert total is not None, "no clip"
    return (total / count).float()


def summarise(subjects: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Size and separation of each unit with bootstrap intervals over subjects.

    Args:
        subjects: rows of `participant_id`, `label` (1 of the class that is looked for, else 0; or the standardised
            value), `method`, `level`, `name`, `voxels` (how many the unit has), `value`.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        Rows of `method`, `level`, `name`, `voxels`, `measure` (size, separation,
        separation_per_1000_voxels), `value`, `low`, `high`.
    """
    rows = []
    for (method, level), part in subjects.groupby(["method", "level"], sort=False):
        wide = part.pivot_table(index=["participant_id", "label"], columns="name", values="value", sort=False)
        values, label = wide.to_numpy(), wide.index.get_level_values("label").to_numpy()
        if _is_class(label):
            separation = value_and_interval(
                (values[label == 1], values[label == 0]), _difference, False, resamples, seed
            )
        else:
            joined = np.concatenate([values, label[:, None]], axis=1)
            separation = {
                key: found[:-1] for key, found in value_and_interval((joined,), _slope, False, resamples, seed).items()
            }
        measures = {
            "size": value_and_interval((np.abs(values),), _mean, paired=False, resamples=resamples, seed=seed),
            "separation": separation,
        }
        counts = part.drop_duplicates("name").set_index("name")["voxels"][wide.columns].to_numpy()
        per_voxels = {key: 1000 * values / np.maximum(counts, 1) for key, values in measures["separation"].items()}
        measures["separation_per_1000_voxels"] = per_voxels
        for measure, found in measures.items():
            names = {"method": method, "level": level, "name": wide.columns, "voxels": counts, "measure": measure}
            rows.append(pd.DataFrame(names | found))
    return pd.concat(rows, ignore_index=True)


def within_folds(subjects: pd.DataFrame) -> pd.DataFrame:
    """Values around the middle between their fold's two groups, for subjects that several networks have tested.

    Networks of different folds are not on one scale, and sites left out differ: where the share of a class differs
    between folds, a difference between folds would pass for one between classes. Of a regression the middle is the
    fold's mean.

    Args:
        subjects: rows as for `summarise`, with `fold` and `seed`.

    Returns:
        The rows with their values changed, without those of folds of one class.
    """
    unit = ["fold", "seed", "method", "level", "name"]
    if _is_class(subjects["label"].to_numpy()):
        means = subjects.pivot_table(index=unit, columns="label", values="value").reindex(columns=[0, 1])
        middle = means.mean(axis=1, skipna=False).rename("middle").reset_index()
    else:
        middle = subjects.groupby(unit)["value"].mean().rename("middle").reset_index()
    merged = subjects.merge(middle, on=unit, how="left")
    return merged.assign(value=merged["value"] - merged["middle"]).dropna(subset="middle").drop(columns="middle")


def _mean(values: NDArray, axis: int) -> NDArray:
    return values.mean(axis)


def _is_class(label: NDArray) -> bool:
    return bool(np.isin(label, (0, 1)).all())


def _difference(first: NDArray, second: NDArray, axis: int) -> NDArray:
    return first.mean(axis) - second.mean(axis)


def _slope(joined: NDArray, axis: int) -> NDArray:
    """Slope of each column over the last one, whose own is 1."""
    centred = joined - joined.mean(axis, keepdims=True)
    x = centred[..., -1:]
    return (centred * x).sum(axis) / (x * x).sum(axis)


def attributed(
    network: nn.Module,
    inferer: Inferer,
    clips: Sequence[dict[str, Any]],
    transforms: Sequence[Callable],
    task: Task,
    of_class: str | None = None,
    levels: Sequence[str] = LEVELS,
    steps: int = 16,
    baseline: str = "temporal_mean",
    atlas: str | Path = AAL3,
) -> pd.DataFrame:
    """Attributions of each subject, the means over the subject's clips; the arguments are those of `attribute`.

    Returns:
        Rows of `participant_id`, `label` (NaN where clips have none), `method`, `level`, `name`, `voxels`, `value`.

    Raises:
        InputError: there is no such baseline or class.
    """
    if baseline not in BASELINES:
        raise InputError(f"baseline must be one of {', '.join(BASELINES)}, not {baseline!r}")
    if of_class is not None and (task.outputs == 1 or of_class not in task.classes):
        known = (
            f"is one of {', '.join(task.classes)}" if task.outputs > 1 else "is for targets of three classes or more"
        )
        raise InputError(f"of_class {known}; it cannot be {of_class!r}")
    number = task.classes.index(of_class) if of_class is not None else task.outputs - 1
    loaded, prepare = load_atlas(atlas), Compose(transforms)
    members = {level: parcels_of(loaded, level) for level in LEVELS}
    index = {level: parcel_index(loaded, members[level]) for level in LEVELS}
    counts = [len(names) for names in members.values()]
    voxels = {level: np.bincount(index[level].flatten(), minlength=len(members[level]) + 1)[1:] for level in LEVELS}
    network.eval().requires_grad_(False)
    if hasattr(network, "freeze"):
        network.freeze = False  # type: ignore[assignment]  # else no gradient would reach the image through a frozen encoder

    differentiable = getattr(network, "differentiable", True)
    if not differentiable:
        logger.info("A logit of this readout has no gradient, so there is ablation only")
    whole_runs = "starts" in clips[0]

    def logit(image: Tensor) -> Tensor:
        of_clips = image.unflatten(1, (-1, channels))  # (B, C, channels, X, Y, Z, T)
        counts = ([of_clips.shape[1]] * len(image),) if whole_runs else ()
        return inferer(of_clips.flatten(0, 1), network, *counts)[:, number].float()

    def read(position: int) -> tuple[dict, Tensor]:
        items = [prepare(clip) for clip in clips_of(clips[position])]
        return items[0], torch.cat([torch.as_tensor(item["image"]).as_subclass(Tensor) for item in items])[None]

    def sought(item: dict) -> float:
        if "label" not in item:
            return float("nan")
        if not task.classes:
            return float(task.scaled(item["label"]))
        return float(item["label"] == (number if task.outputs > 1 else 1))

    channels = len(read(0)[0]["image"])
    common = None
    if baseline == "cohort_mean":
        common = cohort_mean((read(position)[1] for position in range(len(clips))), channels)
    tables = []
    for position in tqdm(range(len(clips)), desc="attribute to regions", unit="clip"):
        item, image = read(position)
        if common is None:
            without = temporal_mean(image)
        else:
            without = common.repeat(1, image.shape[1] // channels, 1, 1, 1, 1).expand_as(image)
        found: dict[tuple[str, str], NDArray[np.float64]] = {}
        if differentiable:
            summed = gradients(logit, image, without, list(index.values()), counts, steps)
            found = {("integrated_gradients", level): values for level, values in zip(LEVELS, summed, strict=True)}
        for level in levels:
            found["ablation", level] = ablation(logit, image, without, index[level], len(members[level]))
        for (method, level), values in found.items():
            names = {"method": method, "level": level, "name": list(members[level]), "voxels": voxels[level]}
            table = pd.DataFrame(names | {"value": values})
            tables.append(table.assign(participant_id=item["participant_id"], label=sought(item)))
    keys = ["participant_id", "label", "method", "level", "name", "voxels"]
    return pd.concat(tables).groupby(keys, sort=False, dropna=False)["value"].mean().reset_index()


def attribute(
    network: nn.Module,
    inferer: Inferer,
    clips: Sequence[dict[str, Any]],
    transforms: Sequence[Callable],
    task: Task,
    output_dir: str | Path,
    of_class: str | None = None,
    levels: Sequence[str] = LEVELS,
    steps: int = 16,
    baseline: str = "temporal_mean",
    atlas: str | Path = AAL3,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Attribute a classifier's logits to regions; the same for a frozen and a fine-tuned encoder.

    Writes `attribution_subjects.csv`, `attribution.csv` and, per method, a map in MNI space with pictures.

    Args:
        network: maps clips to logits `(B, 1)`; with whole runs it is also given the number of clips of each. Its
            attribute `differentiable` False, where it has one, leaves the integrated gradients out.
        inferer: runs it in the precision that it was trained in.
        clips: dataset of labelled clips, or whole runs, see `bundle.data.clips.split_clips`.
        task: what is predicted.
        transforms: from a clip to `image` `(channels, X, Y, Z, T)`, on the device.
        output_dir: folder of the files.
        of_class: name of the class whose logit is attributed; None: the last. Of two classes there is one logit.
        levels: ablate each "group" (9 passes per clip) and each "label" (167 passes).
        steps: of the integrated gradients; each is a forward and a backward pass.
        baseline: what a region is compared with, "temporal_mean" or "cohort_mean"; see the module.
        atlas: see `bundle.anatomy.atlas.load_atlas`.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        The table of `summarise`.

    Raises:
        InputError: there is no such baseline or class.
    """
    loaded = load_atlas(atlas)
    subjects = attributed(network, inferer, clips, transforms, task, of_class, levels, steps, baseline, atlas)
    summary = summarise(subjects, resamples, seed)
    output_dir = Path(output_dir)
    write_text(output_dir / "attribution_subjects.csv", subjects.to_csv(index=False))
    write_text(output_dir / "attribution.csv", summary.to_csv(index=False))
    for (method, measure), part in summary.groupby(["method", "measure"]):
        title = f"{str(method).replace('_', ' ')} against the {baseline} clip, {measure}, logits"
        draw(part, loaded, output_dir / f"{method}_{measure}", title)
    logger.info("Attribution of %d clips written to %s", len(clips), output_dir)
    return summary
