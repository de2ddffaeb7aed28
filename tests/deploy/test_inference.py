"""Scores of new scans. Not covered: the way from NIfTI to the logits (test_configs.py)."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tasks import BINARY

from bundle.deploy.inference import Predictions
from bundle.preparation.transforms import CONSTANT


def predictions_of(folder, masks):
    """Predictions for runs with these brain masks, by a model whose training runs had theirs given."""
    runs = [{"run_id": name, "mask_source": mask, "parameters_hash": ""} for name, mask in masks.items()]
    manifest = {"format": 2, "parameters": {}, "parameters_hash": "", "runs": runs}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "summary.tsv").write_text("run_id\tstatus\treason\n" + "".join(f"{name}\tprepared\t\n" for name in masks))
    return Predictions(folder, folder, BINARY, {"brain_masks": ["given"]})


def test_a_participant_s_probability_is_the_sigmoid_of_the_mean_logit_of_all_clips(tmp_path):
    predictions = predictions_of(tmp_path, {"a": "mask.nii", "b": "mask.nii"})
    for names, logits in ((["b", "a"], [2.0, -1.0]), (["b"], [4.0])):
        output = {"pred": torch.tensor(logits)[:, None], "label": {"participant_id": names}}
        predictions(SimpleNamespace(state=SimpleNamespace(output=output)))
    predictions.report()
    table = pd.read_csv(tmp_path / "predictions.tsv", sep="\t").set_index("participant_id")
    assert table["logit"].to_dict() == {"a": -1.0, "b": 3.0}
    assert table["clips"].to_dict() == {"a": 1, "b": 2}
    assert table["probability"].tolist() == pytest.approx([1 / (1 + np.e), 1 / (1 + np.exp(-3))])


def test_a_run_whose_brain_mask_is_of_another_origin_is_warned_of(tmp_path, caplog):
    predictions = predictions_of(tmp_path, {"a": "mask.nii", "b": CONSTANT})
    output = {"pred": torch.zeros(2, 1), "label": {"participant_id": ["a", "b"]}}
    predictions(SimpleNamespace(state=SimpleNamespace(output=output)))
    predictions.report()
    assert list(json.loads((tmp_path / "predictions.json").read_text())["warnings"]) == ["b"]
    assert "b: the runs that the model was trained on have brain masks of another origin" in caplog.text
