"""Scores of new scans. Not covered: the way from NIfTI to the logits (tests/configs)."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from references import cohort, reference
from scipy.special import expit
from small_stores import TR, some_voxels
from tasks import BINARY

from bundle.deploy.inference import Predictions
from bundle.deploy.release import Member
from bundle.errors import InputError
from bundle.evaluation.reference import reference_of
from bundle.preparation.acquisition import acquisition
from bundle.preparation.scaling import zscore
from bundle.preparation.store import content_sha256, read_manifest, write_manifest, write_run
from bundle.preparation.transforms import CONSTANT
from bundle.tasks.regression import Regression
from bundle.tasks.task import Task

NAMES = ("a", "b")
VOXELS, _ = some_voxels(4, 6)


class Weighs(torch.nn.Module):
    """A head that weighs its features as they are."""

    def seen(self, features: torch.Tensor, counts: list[int]) -> torch.Tensor:
        return features


@pytest.fixture
def folder(tmp_path):
    """A store of two participants, a run each, of which b's has no brain mask."""
    for number, name in enumerate(NAMES):
        values = np.random.default_rng(number).normal(1000, 50, (30, len(VOXELS))).astype(np.float32)
        z, moments, mean, sd = zscore(values)
        about = {"run_id": name, "participant_id": name, "source_sha256": name * 64, "parameters_hash": "", "tr_in": TR}
        about |= {"mean": mean, "sd": sd, "mask_source": CONSTANT if name == "b" else "mask.nii", "mean_fd": None}
        write_run(tmp_path, about, z, VOXELS, moments)
    write_manifest(tmp_path, {}, "")
    (tmp_path / "summary.tsv").write_text("run_id\tstatus\treason\na\tprepared\t\nb\tprepared\t\n")
    return tmp_path


def known(folder, task: Task = BINARY, temperature: float = 1.0, threshold: float = 0.0, **changes: object) -> dict:
    """A reference whose training subjects were scanned as a was."""
    record = next(run for run in read_manifest(folder)["runs"] if run["run_id"] == "a")
    about = acquisition(folder, [record]) | {"motion": None}
    rows, others = ([one._replace(acquisition=about) for one in cohort(n, 2, n)] for n in (20, 6))
    made = reference_of(rows, others, task)
    made["calibration"] |= {"temperature": temperature, "threshold": threshold}
    return made | changes


def served(folder, logits, members, task: Task = BINARY, features=((0.0, 0.0), (0.0, 0.0)), **options: object):
    """The table of predictions of a and b from the outputs of each network, and what is written beside it."""
    networks = [Member({}, task, one) for one in members]
    predictions = Predictions(folder, folder, task, {"brain_masks": ["given", CONSTANT]}, Weighs(), networks, **options)
    for own in logits:
        predictions.begin()
        for clip in own:
            output = {"pred": torch.tensor(clip)[:, None], "label": {"participant_id": list(NAMES)}}
            output["image"] = torch.tensor(features)
            items = [{"run_id": name, "start": 0} for name in NAMES]
            predictions(SimpleNamespace(state=SimpleNamespace(output=output, batch=items)))
    try:
        predictions.report()
    finally:
        about = json.loads((folder / "predictions.json").read_text())
        table = pd.read_csv(folder / "predictions.tsv", sep="\t", keep_default_na=False).set_index("participant_id")
        assert list(about["columns"]) == ["participant_id", *table.columns]
    return table, about


def test_a_probability_is_the_sigmoid_of_the_mean_logit_of_all_clips_over_the_temperature(folder):
    table, _ = served(folder, [[[-1.0, 2.0], [-1.0, 4.0]]], [known(folder, temperature=2.0, threshold=-1.5)])
    assert table["logit"].to_dict() == {"a": -1.0, "b": 3.0}
    assert table["clips"].to_dict() == {"a": 2, "b": 2}
    assert table["probability"].tolist() == pytest.approx(expit([-0.5, 1.5]).tolist())
    assert table["predicted"].tolist() == [1, 1]  # both above the threshold, which is one of logits


def test_an_ensemble_averages_and_says_its_limits(folder):
    members = [known(folder, temperature=2.0, threshold=1.0), known(folder, temperature=1.0, threshold=-3.0)]
    table, _ = served(folder, [[[2.0, 4.0]], [[-4.0, 1.0]]], members)
    assert table["logit"].tolist() == [-1.0, 2.5]
    assert table["probability"].tolist() == pytest.approx(expit([-1.5, 1.5]).tolist())
    assert table["probability_low"].tolist() == pytest.approx(expit([-4, 1]).tolist())
    assert table["probability_high"].tolist() == pytest.approx(expit([1, 2]).tolist())
    assert table["predicted"].tolist() == [0, 1]  # threshold (0.5 - 3) / 2 of the calibrated logits -1.5 and 1.5


def test_an_ensemble_of_regressions_puts_each_network_into_its_own_units(folder):
    tasks = [Regression("age", mean=10.0, sd=2.0), Regression("age", mean=20.0, sd=1.0)]
    made = [reference(task, columns=2) for task in tasks]
    shared = known(folder, tasks[0])
    made = [shared | {"calibration": one["calibration"]} for one in made]
    predictions = Predictions(
        folder, folder, tasks[0], {"brain_masks": ["given", CONSTANT]}, Weighs(),
        [Member({}, task, one) for task, one in zip(tasks, made, strict=True)],
    )  # fmt: skip
    for _ in tasks:
        predictions.begin()
        output = {"pred": torch.tensor([[1.0], [0.0]]), "label": {"participant_id": list(NAMES)}}
        items = [{"run_id": name, "start": 0} for name in NAMES]
        state = SimpleNamespace(output=output | {"image": torch.zeros(2, 2)}, batch=items)
        predictions(SimpleNamespace(state=state))
    predictions.report()
    table = pd.read_csv(folder / "predictions.tsv", sep="\t")
    assert table["predicted"].tolist() == [16.5, 15.0]
    assert table["predicted_low"].tolist() == [12.0, 10.0]
    assert table["predicted_high"].tolist() == [21.0, 20.0]


def test_who_is_unlike_is_flagged_with_the_reason_and_by_choice_gets_no_score(folder, caplog):
    logits, members = [[[8.0, 8.0]]], [known(folder)]
    table, about = served(folder, logits, members)
    assert table["flag"].to_dict() == {"a": "like", "b": "unlike"}
    assert table.loc["a", "reasons"] == ""
    assert "the brain mask's origin is 'voxels constant over time'" in table.loc["b", "reasons"]
    assert list(about["unlike_participants"]) == ["b"]
    assert "b is unlike the training subjects" in caplog.text

    with pytest.raises(
        InputError, match=r"1 of 2 participants are too unlike .* the first is b: .*the brain mask's origin"
    ):
        served(folder, logits, members, refuse_unlike=0.999)
    table = pd.read_csv(folder / "predictions.tsv", sep="\t").set_index("participant_id")
    assert table["flag"].to_dict() == {"a": "like", "b": "refused"}
    assert table.loc["b", ["probability", "logit", "predicted"]].isna().all()
    assert table.loc["a", "probability"] == pytest.approx(expit(8.0))
    about = json.loads((folder / "predictions.json").read_text())
    assert list(about["refused_participants"]) == ["b"]


def test_features_that_no_training_subject_had_are_flagged_in_both_directions(folder):
    for far in (40.0, -40.0):
        table, _ = served(folder, [[[0.0, 0.0]]], [known(folder)], features=((far, 0.0), (0.0, 0.0)))
        assert table.loc["a", "flag"] == "unlike"
        assert "what the network reads" in table.loc["a", "reasons"]


def test_who_is_like_the_subjects_of_one_network_of_an_ensemble_is_like_them(folder):
    strict = known(folder, tr=[9.0])
    alone, _ = served(folder, [[[0.0, 0.0]]], [strict])
    both, _ = served(folder, [[[0.0, 0.0]], [[0.0, 0.0]]], [strict, known(folder)])
    assert (alone.loc["a", "flag"], both.loc["a", "flag"]) == ("unlike", "like")


def test_a_scan_of_the_training_set_is_noticed_by_its_content_or_its_file(folder):
    hashes = {"training": [content_sha256(folder, "a")], "validation": ["b" * 64]}
    table, about = served(folder, [[[0.0, 0.0]]], [known(folder, hashes=hashes)])
    assert table["known"].to_dict() == {"a": "training", "b": "validation"}
    assert about["known_participants"] == {"a": "training", "b": "validation"}


@pytest.mark.parametrize("options", [{"flag_unlike": 99}, {"refuse_unlike": 0}])
def test_a_percentile_outside_its_range_is_refused(folder, options):
    with pytest.raises(InputError, match="must be a percentile above 0 and up to 1"):
        served(folder, [[[0.0, 0.0]]], [known(folder)], **options)


def test_a_run_whose_brain_mask_is_of_another_origin_is_warned_of(folder, caplog):
    predictions = Predictions(
        folder, folder, BINARY, {"brain_masks": ["given"]}, Weighs(), [Member({}, BINARY, known(folder))]
    )
    predictions.begin()
    output = {"pred": torch.zeros(2, 1), "label": {"participant_id": list(NAMES)}, "image": torch.zeros(2, 2)}
    items = [{"run_id": name, "start": 0} for name in NAMES]
    predictions(SimpleNamespace(state=SimpleNamespace(output=output, batch=items)))
    predictions.report()
    assert list(json.loads((folder / "predictions.json").read_text())["warnings"]) == ["b"]
    assert "b: the runs that the model was trained on have brain masks of another origin" in caplog.text
