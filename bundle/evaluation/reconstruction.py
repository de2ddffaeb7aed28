"""How well a pretrained network rebuilds each region from the rest of the brain, over subjects.

Every strategy is measured with the same yardstick: each region in turn is hidden at every frame, whatever was hidden
in training. The squared error of z-scored BOLD is mostly static anatomy, so the temporal R² around each voxel's
mean goes with it.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.inferers import Inferer
from monai.transforms import Compose
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from bundle.anatomy.atlas import AAL3, Atlas, load_atlas
from bundle.anatomy.parcels import parcel_index, parcels_of
from bundle.errors import InputError
from bundle.evaluation.intervals import value_and_interval
from bundle.evaluation.maps import draw
from bundle.files import write_json, write_text
from bundle.training.metrics import MaskedMSE, TemporalR2

logger = logging.getLogger(__name__)

SUMS = ("squared", "count", "residual", "total")


def voxel_sums(prediction: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error, and residual and total temporal sum of squares around the clip's mean, of each voxel.

    Args:
        prediction: `(V, T)`.
        image: the same shape.

    Returns:
        Three tensors `(V,)`, float32, summed over T.
    """
    y = image - image.mean(-1, keepdim=True)
    p = prediction - prediction.mean(-1, keepdim=True)
    return (image - prediction).square().sum(-1), (y - p).square().sum(-1), y.square().sum(-1)


def label_sums(
    predict: Callable[..., Tensor],
    image: Tensor,
    brain: NDArray[np.bool_],
    labels: NDArray[np.int64],
    hidden: NDArray[np.int64],
    count: int,
) -> NDArray[np.float64]:
    """Hide each unit of a clip in turn, and sum its errors label by label, over voxels inside the brain.

    Args:
        predict: the network: image `(1, channels, X, Y, Z, T)` and keyword mask `(1, 1, X, Y, Z)` to what it rebuilds.
        image: `(1, channels, X, Y, Z, T)`, of which the last channel is rebuilt.
        brain: bool `(X, Y, Z)`.
        labels: position of each voxel's label, 1 to n, 0 for none.
        hidden: the unit, 1 to m, with which each voxel is hidden; 0 for none.
        count: the number of labels, n.

    Returns:
        `(n, 4)`: squared error, number of values, residual and total temporal sum of squares.
    """
    sums = np.zeros((count + 1, 4))
    for unit in range(1, int(hidden.max()) + 1):
        inside = hidden == unit
        prediction = predict(image, mask=torch.from_numpy(inside)[None, None].to(image.device))
        scored = inside & brain
        at = torch.from_numpy(scored).to(image.device)
        found = voxel_sums(prediction[0, 0][at].float(), image[0, -1][at].float())
        squared, residual, total = (part.double().cpu().numpy() for part in found)
        counts = np.full(len(squared), image.shape[-1], float)
        for column, values in enumerate((squared, counts, residual, total)):
            sums[:, column] += np.bincount(labels[scored], values, minlength=len(sums))
    return sums[1:]


def clip_sums(
    network: nn.Module,
    inferer: Inferer,
    item: dict[str, Any],
    labels: NDArray[np.int64],
    hidden: NDArray[np.int64],
    names: Sequence[str],
) -> pd.DataFrame:
    """`label_sums` of a clip (`image`, `brain`, `participant_id`): rows of `participant_id`, `name` and `SUMS`."""
    image = item["image"].as_tensor()[None].contiguous()  # (1, channels, X, Y, Z, T)
    brain = item["brain"].as_tensor()[0].bool().cpu().numpy()
    sums = label_sums(partial(inferer, network=network), image, brain, labels, hidden, len(names))
    table = pd.DataFrame(sums, columns=list(SUMS)).assign(name=list(names))
    return table.assign(participant_id=item["participant_id"])


def subject_sums(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Sums over each subject's clips, from `clip_sums`."""
    return pd.concat(tables).groupby(["participant_id", "name"], sort=True)[list(SUMS)].sum().reset_index()


def summarise(subjects: pd.DataFrame, atlas: Atlas, resamples: int, seed: int) -> pd.DataFrame:
    """MSE and temporal R² of each label, each group and the whole, with bootstrap intervals over subjects.

    Args:
        subjects: rows of `participant_id`, `name` (label) and `SUMS`.
        atlas: whose labels they are.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        Rows of `level` (label, group, all), `name`, `measure` (mse, temporal_r2), `value`, `low`, `high`.
    """
    rows = []
    for level, names, (squared, count, residual, total) in _by_level(subjects, atlas):
        measures = {"mse": ((squared, count), _ratio), "temporal_r2": ((residual, total), _explained)}
        for measure, (samples, statistic) in measures.items():
            found = value_and_interval(samples, statistic, paired=True, resamples=resamples, seed=seed)
            rows.append(pd.DataFrame({"level": level, "name": names, "measure": measure, **found}))
    return pd.concat(rows, ignore_index=True)


def differences(first: pd.DataFrame, second: pd.DataFrame, atlas: Atlas, resamples: int, seed: int) -> pd.DataFrame:
    """Temporal R² of one network minus another's, with bootstrap intervals over the subjects, who are the same.

    Args:
        first: rows as for `summarise`.
        second: the same subjects' in the same units.
        atlas: whose labels they are.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        Rows of `region` (with "all"), `difference`, `low` and `high`.

    Raises:
        InputError: they are of other subjects.
    """
    if one_sided := set(first["participant_id"]) ^ set(second["participant_id"]):
        raise InputError(f"{min(one_sided)} was rebuilt by one network only; rebuild the same subjects with both")
    rows = []
    for (level, names, mine), (_, _, others) in zip(_by_level(first, atlas), _by_level(second, atlas), strict=True):
        if level != "label":
            samples = (*mine[2:], *others[2:])
            found = value_and_interval(samples, _difference, paired=True, resamples=resamples, seed=seed)
            rows.append(pd.DataFrame({"region": names, **found}))
    return pd.concat(rows, ignore_index=True).rename(columns={"value": "difference"})


def _by_level(subjects: pd.DataFrame, atlas: Atlas) -> Iterator[tuple[str, list[str], list[NDArray[np.float64]]]]:
    """Of labels, groups and the whole: the level, its names, and each of `SUMS` (subjects in order, names)."""
    labels = parcels_of(atlas, "label")
    wide = subjects.pivot_table(index="participant_id", columns="name", values=list(SUMS), aggfunc="sum")
    sums = [wide[name].reindex(columns=list(labels)).fillna(0).to_numpy() for name in SUMS]
    levels = {"label": labels, "group": parcels_of(atlas, "group"), "all": {"all": tuple(atlas.names)}}
    position = {number: column for column, number in enumerate(atlas.names)}
    for level, members in levels.items():
        columns = [[position[number] for number in numbers] for numbers in members.values()]
        yield level, list(members), [np.stack([part[:, c].sum(1) for c in columns], 1) for part in sums]


def _ratio(above: NDArray, below: NDArray, axis: int) -> NDArray:
    below = below.sum(axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above.sum(axis) / below, np.nan)


def _explained(residual: NDArray, total: NDArray, axis: int) -> NDArray:
    return 1 - _ratio(residual, total, axis)


def _difference(residual: NDArray, total: NDArray, others: NDArray, others_total: NDArray, axis: int) -> NDArray:
    return _explained(residual, total, axis) - _explained(others, others_total, axis)


def regions_rebuilt(path: str | Path) -> pd.DataFrame:
    """Of a `reconstruction.csv`, `region` (with "all"), `temporal_r2`, `low` and `high`; labels are left out."""
    table = pd.read_csv(path)
    table = table[(table["measure"] == "temporal_r2") & (table["level"] != "label")]
    names = {"name": "region", "value": "temporal_r2"}
    return table.rename(columns=names)[[*names.values(), "low", "high"]]


@torch.no_grad()
def evaluate_reconstruction(
    network: nn.Module,
    inferer: Inferer,
    clips: Sequence[dict[str, Any]],
    transforms: Sequence[Callable],
    output_dir: str | Path,
    hide_by: str = "group",
    atlas: str | Path = AAL3,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Evaluate a pretrained network: with its own strategy's masks, and hiding each region or label in turn.

    Writes `reconstruction_subjects.csv` (sums per participant and label), `reconstruction.csv` (labels, groups
    and all, with intervals), `reconstruction.json` (the strategy's own scores) and maps of the temporal R².

    Args:
        network: a `MaskedAutoencoder`.
        inferer: runs it in the precision that it was trained in.
        clips: dataset of clips as `ReadClipd` gives them.
        transforms: to `image` `(channels, X, Y, Z, T)`, `brain` and `mask`, that of the strategy, on the device.
        output_dir: folder of the files.
        hide_by: hide a whole "group" at a time (8 passes per clip), or a "label" (166 passes).
        atlas: see `bundle.anatomy.atlas.load_atlas`.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        `masked_mse` and `temporal_r2` with the strategy's own masks.
    """
    network.eval()
    loaded, prepare = load_atlas(atlas), Compose(transforms)
    members = parcels_of(loaded, "label")
    labels, hidden = parcel_index(loaded, members), parcel_index(loaded, parcels_of(loaded, hide_by))
    own = {"masked_mse": MaskedMSE(), "temporal_r2": TemporalR2()}
    tables = []
    for position in tqdm(range(len(clips)), desc="rebuild regions", unit="clip"):
        item = prepare(clips[position])
        image = item["image"].as_tensor()[None].contiguous()  # (1, channels, X, Y, Z, T)
        target = {"image": image[:, -1:], "mask": item["mask"].as_tensor()[None]}
        prediction = inferer(image, network, target["mask"])
        for metric in own.values():
            metric.update((prediction, target))
        tables.append(clip_sums(network, inferer, item, labels, hidden, list(members)))
    subjects = subject_sums(tables)
    summary = summarise(subjects, loaded, resamples, seed)
    output_dir = Path(output_dir)
    write_text(output_dir / "reconstruction_subjects.csv", subjects.to_csv(index=False))
    write_text(output_dir / "reconstruction.csv", summary.to_csv(index=False))
    draw(summary[summary["measure"] == "temporal_r2"], loaded, output_dir / "reconstruction_r2", "temporal R²")
    scores = {name: float(metric.compute()) for name, metric in own.items()}
    facts = {"hidden_by": hide_by, "clips": len(clips), "participants": subjects["participant_id"].nunique()}
    write_json(output_dir / "reconstruction.json", scores | facts)
    logger.info("Reconstruction of %d clips: %s; written to %s", len(clips), scores, output_dir)
    return scores
