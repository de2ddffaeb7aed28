"""Inference on new NIfTI files: prepare them, score their clips, average per participant, report."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from ignite.engine import Engine, Events

from bundle.anatomy.atlas import AAL3
from bundle.data.clips import clips
from bundle.errors import InputError
from bundle.files import ROOT, versions, write_json, write_text
from bundle.preparation.chain import Preparation
from bundle.preparation.prepare import prepare, refuse_failed_rows
from bundle.preparation.sources import find_runs
from bundle.preparation.store import read_manifest
from bundle.preparation.transforms import mask_kind
from bundle.tasks.scores import mean_outputs
from bundle.tasks.task import Task

logger = logging.getLogger(__name__)


REFUSED = ("failed", "excluded")
PACKAGES = ("torch", "monai", "numpy", "scipy", "nibabel", "nilearn")
COLUMNS = {
    "participant_id": "as in the table of runs, in the file's BIDS name, or the file's name",
    "clips": "number of clips that were averaged; of a model that scores whole runs, number of runs",
}
"""Beside those of the task, see `bundle.tasks.task.Task.describe`."""
OTHER_MASK = (
    "the runs that the model was trained on have brain masks of another origin (given, or found in the run), so that "
    "z-scores, and hence the probability, differ; give a mask where they had one"
)


def remove_earlier(output_dir: str | Path) -> None:
    """Remove the predictions of an earlier call, so that none is taken for this one's where it ends early."""
    for name in ("predictions.tsv", "predictions.json"):
        Path(output_dir, name).unlink(missing_ok=True)


def prepared_clips(
    dataset_dir: str | Path,
    store: str | Path,
    frames: int,
    stride: int,
    preparation: Preparation,
    whole_runs: bool = False,
    atlas: str = AAL3,
) -> list[dict]:
    """Prepare the runs of a folder or table and list their clips; `Predictions.report` names those that failed.

    Args:
        dataset_dir: one NIfTI file, a folder of them, BIDS derivatives, or a table of runs (see
            `bundle.preparation.sources.find_runs`); labels are not needed.
        store: where the prepared runs go; those that are there already and current are used as they are.
        frames: frames per clip.
        stride: frames between the starts of two clips.
        preparation: the one that the model was trained with.
        whole_runs: list runs instead, see `bundle.data.clips.clips`.
        atlas: of whose groups the coverage is reported.

    Raises:
        InputError: no run could be prepared.
    """
    rows = prepare(find_runs(dataset_dir, labels="optional"), store, replace(preparation, atlas=atlas))["rows"]
    refused = [row for row in rows if row["status"] in REFUSED]
    if len(refused) == len(rows):
        raise InputError(f"{dataset_dir}: none of the {len(rows)} runs can be used; the first: {refused[0]['reason']}")
    usable = {row["run_id"] for row in rows} - {row["run_id"] for row in refused}
    runs = [run for run in read_manifest(store)["runs"] if run["run_id"] in usable]
    return clips(runs, frames=frames, stride=stride, whole_runs=whole_runs)


class Predictions:
    """Evaluator's handler: average the outputs of each participant's clips, and write what the task makes of them.

    `predictions.tsv` has a row per participant. `predictions.json` says beside it what the columns
    are, which runs could not be used or are doubtful, and why, and what the model and the software are, with the
    model's hash.

    Args:
        output_dir: folder of both files.
        store: the store that `prepared_clips` filled; its summary names the runs that failed.
        task: what is predicted.
        model: what the released model was made with, its `model.json`.
    """

    def __init__(self, output_dir: str | Path, store: str | Path, task: Task, model: Mapping[str, Any]) -> None:
        self.output_dir = Path(output_dir)
        self.store = Path(store)
        self.model = model
        self.task = task
        self.outputs: list[tuple[str, list[float]]] = []

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Keep the outputs of a batch."""
        output: Any = engine.state.output
        names = output["label"]["participant_id"]
        self.outputs += zip(names, output["pred"].float().tolist(), strict=True)

    def report(self) -> None:
        """Write both files, then say which runs could not be used.

        Raises:
            InputError: at least one run could not be used (the others are in the table).
        """
        task = self.task
        said = {name: meaning for name, meaning in task.describe().items() if name in task.served}
        table = task.table(mean_outputs(self.outputs, task), 0.0)[["participant_id", *said, "clips"]]
        path = self.output_dir / "predictions.tsv"
        rows = pd.read_csv(self.store / "summary.tsv", sep="\t", keep_default_na=False).to_dict("records")
        scored = {row["run_id"] for row in rows if row["status"] not in REFUSED}
        kinds = {run["run_id"]: mask_kind(run) for run in read_manifest(self.store)["runs"] if run["run_id"] in scored}
        warnings = {name: OTHER_MASK for name, kind in kinds.items() if kind not in self.model["brain_masks"]}
        metadata = json.loads((ROOT / "configs" / "metadata.json").read_text())
        about = {
            "columns": {name: (COLUMNS | said)[name] for name in table},
            "intended_use": metadata["intended_use"],
            "refused_runs": {row["run_id"]: row["reason"] for row in rows if row["status"] in REFUSED},
            "warnings": warnings,
            "model": self.model,
            "versions": {metadata["name"]: metadata["version"]} | versions(PACKAGES),
        }
        write_text(path, table.to_csv(sep="\t", index=False))
        write_json(path.with_suffix(".json"), about)
        for name, warning in warnings.items():
            logger.warning("%s: %s", name, warning)
        logger.info("Wrote the scores of %d participants to %s", len(table), path)
        refuse_failed_rows(rows)
