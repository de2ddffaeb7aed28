"""How well a network rebuilds hidden regions of one real run's end, after it was trained on the run's beginning.

One subject proves little. What is asked is whether hidden regions of real BOLD follow from the rest at all (R² above
0), in which units, and how far a ridge regression gets.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from nibabel import Nifti1Image, save

from bundle.data.splits import SETS, save_splits, splits_of
from bundle.errors import InputError
from bundle.evaluation.reconstruction import regions_rebuilt
from bundle.experiments.trial import Strategy
from bundle.experiments.truth import prepared
from bundle.experiments.volumes import SPACE, in_mni, write_description
from bundle.files import write_json, write_text
from bundle.preparation.bold import open_bold
from bundle.process import run_config

logger = logging.getLogger(__name__)

ENDS = (0.7, 0.8, 1.0)
"""Where training, validation (which chooses the epoch) and test end, as shares of the run."""


def one_run(
    bold: str | Path, folder: str | Path, overrides: Mapping[str, Any], mask: str, modes: Sequence[str]
) -> pd.DataFrame:
    """Cut a run in time, pretrain on its beginning in each normalisation, and rebuild its end; run again, it goes on.

    The three parts are prepared as if they were of three participants, so that each is normalised by itself.

    Args:
        bold: a run in MNI space, NIfTI.
        folder: where everything goes.
        overrides: of pretrain.json.
        mask: what is hidden in training, as of a sweep's strategy.
        modes: normalisations.

    Returns:
        Rows of `normalisation`, `model` ("network" or "ridge"), `region` (with "all") and `temporal_r2` on the last
        fifth, each region hidden in turn.

    Raises:
        InputError: the run cannot be used.
    """
    folder = Path(folder).absolute()
    if not (folder / "splits.json").is_file():
        cut_in_time(bold, folder / "derivatives")
        prepared(folder / "derivatives", folder / "store", labels="optional")
        save_splits(splits_of({name: [f"sub-{name}"] for name in SETS}), folder / "splits.json")
    found = []
    for mode in modes:
        out = folder / mode
        given = {"dataset_dir": folder / "store", "splits_file": folder / "splits.json", "output_dir": out}
        given |= dict(overrides) | {"normalisation#mode": mode}
        configs = ["pretrain", *Strategy(mode, mask).overlays]
        run_config("pretrain", configs, given)
        run_config("run", [*configs, "reconstruct"], given)
        run_config("run", ["pretrain", "reconstruct", "ridge"], given)
        for model, place in (("network", "reconstruction"), ("ridge", "ridge")):
            table = regions_rebuilt(out / place / "reconstruction.csv")
            found.append(table.assign(normalisation=mode, model=model))
    result = pd.concat(found, ignore_index=True)[["normalisation", "model", "region", "temporal_r2"]]
    write_text(folder / "one_run.csv", result.to_csv(index=False, float_format="%.4f"))
    return result


def cut_in_time(bold: str | Path, folder: Path) -> None:
    """Write a run's parts (see `ENDS`) as sub-train, sub-validation and sub-test, like fMRIPrep derivatives.

    Raises:
        InputError: the run cannot be used, or is too short to be cut.
    """
    run = open_bold(bold)
    ends = [round(share * run.frames) for share in ENDS]
    if run.frames < 20:
        raise InputError(f"{bold} has {run.frames} frames, too few to cut a run into three")
    folder.mkdir(parents=True, exist_ok=True)
    write_description(folder, "One run, cut in time", "bundle.experiments.one_run.cut_in_time")
    for name, start, stop in zip(SETS, [0, *ends[:-1]], ends, strict=True):
        func = folder / f"sub-{name}" / "func"
        func.mkdir(parents=True, exist_ok=True)
        values = np.asarray(run.image.dataobj[..., start:stop], np.float32)
        image = in_mni(Nifti1Image(values, run.affine), run.tr)
        stem = f"sub-{name}_task-part_space-{SPACE}_desc-preproc_bold"
        write_json(func / f"{stem}.json", {"TaskName": "part", "RepetitionTime": run.tr})
        save(image, func / f"{stem}.nii.gz")


def pretraining_overrides(plan: str | Path) -> dict[str, Any]:
    """The overrides of pretrain.json in a plan such as configs/dynamics.json, with clips one after another.

    Raises:
        InputError: it has none.
    """
    try:
        overrides = dict(json.loads(Path(plan).read_text())["pretraining"]["overrides"])
        return overrides | {"clip_stride": overrides["frames"]}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{plan} has no overrides of a pretraining ({error}); see configs/dynamics.json") from error
