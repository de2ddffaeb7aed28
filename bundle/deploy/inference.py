"""Inference on new NIfTI files: prepare them, score their clips, average per participant, report."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ignite.engine import Engine, Events
from monai.engines import Evaluator

from bundle.anatomy.atlas import AAL3
from bundle.data.clips import Clips, clips, clips_of
from bundle.deploy.release import Member, ReleasedModel
from bundle.errors import InputError
from bundle.evaluation.reference import findings, hashes_of, percentile_of, seen_by
from bundle.files import metadata, versions, write_json, write_text
from bundle.preparation.acquisition import acquisition
from bundle.preparation.chain import Preparation
from bundle.preparation.prepare import prepare, refuse_failed_rows
from bundle.preparation.sources import find_runs
from bundle.preparation.store import read_manifest
from bundle.preparation.transforms import mask_kind
from bundle.tasks.scores import mean_outputs
from bundle.tasks.task import Floats, Task

logger = logging.getLogger(__name__)


REFUSED = ("failed", "excluded")
PACKAGES = ("torch", "monai", "numpy", "scipy", "nibabel", "nilearn")
COLUMNS = {
    "participant_id": "as in the table of runs, in the file's BIDS name, or the file's name",
    "clips": "number of clips that were averaged; of a model that scores whole runs, number of runs",
    "unlike": "how unlike the training subjects the participant is, 0 to 1: of subjects like these, at most a share of "
    "1 - unlike are as unlike; beyond n / (n + 1) of n training subjects it is extrapolated; 1: a TR or an origin of "
    "the brain mask that none of them had",
    "flag": "like; unlike, from flag_unlike on; or refused, without a score, from refuse_unlike on",
    "reasons": "in what the participant is that unlike",
    "known": "training or validation: the model was trained, or its epoch, threshold and temperature were chosen, on a "
    "run of the same content, so that the score is no test",
}
"""Beside those of the task, see `bundle.tasks.task.Task.describe`."""
LIMITS = {"low": "the least", "high": "the largest"}
OTHER_MASK = (
    "the runs that the model was trained on have brain masks of another origin (given, found in the run, registered), "
    "so that z-scores, and hence the probability, differ; give a mask where they had one"
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
) -> Clips:
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
    runs = find_runs(dataset_dir, labels="optional", native=preparation.native)
    rows = prepare(runs, store, replace(preparation, atlas=atlas))["rows"]
    refused = [row for row in rows if row["status"] in REFUSED]
    if len(refused) == len(rows):
        raise InputError(f"{dataset_dir}: none of the {len(rows)} runs can be used; the first: {refused[0]['reason']}")
    usable = {row["run_id"] for row in rows} - {row["run_id"] for row in refused}
    records = [run for run in read_manifest(store)["runs"] if run["run_id"] in usable]
    return clips(records, frames=frames, stride=stride, whole_runs=whole_runs)


def score(model: ReleasedModel, network: Any, evaluator: Evaluator, predictions: "Predictions") -> None:
    """Run the evaluator with each network of a released model, whose outputs `predictions` gathers."""
    network.eval()  # features are made before the evaluator sees to that
    for number in range(len(model.members)):
        model.load_into(network, number)
        predictions.begin()
        evaluator.run()


class Predictions:
    """Evaluator's handler: average the outputs of each participant's clips, and write what the task makes of them.

    `predictions.tsv` has a row per participant: what is predicted, with calibrated probabilities; how unlike the
    training subjects the participant is, and why; and whether the model has been trained on this very scan.
    `predictions.json` says beside it what the columns are, which runs could not be used or are doubtful, and why, and
    what the model and the software are, with the model's hash.

    Of an ensemble, outputs (divided by their temperatures) are averaged over its networks, the limits are the least and
    the largest of them, and who is like the training subjects of one network is like them.

    Args:
        output_dir: folder of both files.
        store: the store that `prepared_clips` filled; its summary names the runs that failed.
        task: what is predicted.
        model: what the released model was made with, its `model.json`.
        network: which is given features of clips, and weighs them.
        members: networks of the released model.
        flag_unlike: percentile, 0 to 1, from which a participant is flagged.
        refuse_unlike: percentile from which a participant gets no score; None: everybody gets one.

    Raises:
        InputError: a percentile is outside its range.
    """

    def __init__(
        self,
        output_dir: str | Path,
        store: str | Path,
        task: Task,
        model: Mapping[str, Any],
        network: Any,
        members: Sequence[Member],
        flag_unlike: float = 0.99,
        refuse_unlike: float | None = None,
    ) -> None:
        for name, level in (("flag_unlike", flag_unlike), ("refuse_unlike", refuse_unlike)):
            if level is not None and not 0 < level <= 1:
                raise InputError(f"{name} must be a percentile above 0 and up to 1, such as 0.999, not {level}")
        self.output_dir = Path(output_dir)
        self.store = Path(store)
        self.model = model
        self.task = task
        self.network = network
        self.members = members
        self.flag_unlike = flag_unlike
        self.refuse_unlike = refuse_unlike
        self.outputs: list[list[tuple[str, list[float]]]] = []
        self.features: list[dict[str, list[Floats]]] = []

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def begin(self) -> None:
        """From now on the outputs are those of the next network."""
        self.outputs.append([])
        self.features.append({})

    def __call__(self, engine: Engine) -> None:
        """Keep the outputs of a batch, and what they were weighed of."""
        output: Any = engine.state.output
        items: Any = engine.state.batch
        names = output["label"]["participant_id"]
        self.outputs[-1] += zip(names, output["pred"].float().tolist(), strict=True)
        rows = seen_by(self.network, output["image"], [len(clips_of(item)) for item in items])
        for name, row in zip(names, rows, strict=True):
            self.features[-1].setdefault(name, []).append(row)

    def report(self) -> None:
        """Write both files, then say which runs could not be used, and who got no score.

        Raises:
            InputError: at least one run could not be used, or one participant got no score (the others are in the
                table).
        """
        rows = pd.read_csv(self.store / "summary.tsv", sep="\t", keep_default_na=False).to_dict("records")
        scored = {row["run_id"] for row in rows if row["status"] not in REFUSED}
        records = [run for run in read_manifest(self.store)["runs"] if run["run_id"] in scored]
        kinds = {run["run_id"]: mask_kind(run) for run in records}
        warnings = {name: OTHER_MASK for name, kind in kinds.items() if kind not in self.model["brain_masks"]}
        table, said = self._scores()
        unlike = self._unlike(table["participant_id"], records)
        table = table.astype(object)
        refused = [one["flag"] == "refused" for one in unlike]
        table.loc[refused, list(said)] = None
        table = pd.concat([table, pd.DataFrame(unlike, table.index)], axis=1)
        reasons = {row["participant_id"]: row["reasons"] for row in table.to_dict("records") if row["flag"] != "like"}
        known = {row["participant_id"]: row["known"] for row in table.to_dict("records") if row["known"]}
        path = self.output_dir / "predictions.tsv"
        bundle = metadata()
        about = {
            "columns": {name: (COLUMNS | said)[name] for name in table},
            "intended_use": bundle["intended_use"],
            "refused_runs": {row["run_id"]: row["reason"] for row in rows if row["status"] in REFUSED},
            "refused_participants": {name: reasons[name] for name in table.loc[refused, "participant_id"]},
            "unlike_participants": reasons,
            "known_participants": known,
            "flag_unlike": self.flag_unlike,
            "refuse_unlike": self.refuse_unlike,
            "warnings": warnings,
            "model": self.model,
            "versions": {bundle["name"]: bundle["version"]} | versions(PACKAGES),
        }
        write_text(path, table.to_csv(sep="\t", index=False))
        write_json(path.with_suffix(".json"), about)
        for name, warning in warnings.items():
            logger.warning("%s: %s", name, warning)
        for name, why in reasons.items():
            logger.warning("%s is unlike the training subjects: %s", name, why)
        for name, where in known.items():
            logger.warning("%s: a run of this participant is in the %s set of the model", name, where)
        logger.info("Wrote the scores of %d participants to %s", len(table) - sum(refused), path)
        refuse_failed_rows(rows)
        if any(refused):
            first = next(iter(about["refused_participants"]))
            raise InputError(
                f"{sum(refused)} of {len(table)} participants are too unlike the training subjects to get a score; "
                f"the first is {first}: {reasons[first]} (all are in {path})"
            )

    def _scores(self) -> tuple[pd.DataFrame, dict[str, str]]:
        """The table of scores, and what its columns mean but the participant and the clips."""
        task = self.task
        said = task.describe()
        tables = [mean_outputs(own, member.task) for own, member in zip(self.outputs, self.members, strict=True)]
        outputs = np.stack([table[list(task.columns)].to_numpy(float) for table in tables])  # (members, n, k)
        fixed = [member.reference["calibration"] for member in self.members]
        heat = np.array([one["temperature"] for one in fixed])
        thresholds = np.array([one["threshold"] for one in fixed]) / heat
        calibrated = outputs / heat[:, None, None]
        table = tables[0][["participant_id"]].copy()
        table[list(task.columns)] = outputs.mean(0)
        table = table.assign(**task.decisions(calibrated.mean(0), float(thresholds.mean())))
        table = table[["participant_id", *said]]
        if len(self.members) > 1:
            each = [task.decisions(*one) for one in zip(calibrated, thresholds.tolist(), strict=True)]
            for name in task.limited:
                values = np.stack([one[name] for one in each]) if name in each[0] else outputs[..., 0]
                for end, limit in (("low", values.min(0)), ("high", values.max(0))):
                    table[f"{name}_{end}"] = limit
                    said[f"{name}_{end}"] = f"{LIMITS[end]} of the ensemble's {len(self.members)} networks"
        return table.assign(clips=tables[0]["clips"]), said

    def _unlike(self, participants: Iterable[str], records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Of each participant how unlike the training subjects, and whether the model has been trained on the scan."""
        found = []
        for name in participants:
            own = [run for run in records if run["participant_id"] == name]
            about, hashes = acquisition(self.store, own), hashes_of(self.store, own)
            each = [
                findings(member.reference, np.mean(features[name], axis=0), about)
                for member, features in zip(self.members, self.features, strict=True)
            ]
            nearest = min(each, key=percentile_of)
            percentile = percentile_of(nearest)
            least = min(self.flag_unlike, self.refuse_unlike or 1.0)
            refused = self.refuse_unlike is not None and percentile >= self.refuse_unlike
            sets = [
                where
                for where in ("training", "validation")
                if not all(hashes.isdisjoint(member.reference["hashes"][where]) for member in self.members)
            ]
            found.append(
                {
                    "unlike": percentile,
                    "flag": "refused" if refused else "unlike" if percentile >= self.flag_unlike else "like",
                    "reasons": "; ".join(one.words for one in nearest if one.percentile >= least),
                    "known": " and ".join(sets),
                }
            )
        return found
