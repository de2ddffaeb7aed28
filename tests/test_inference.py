"""Scores of new scans. Not covered: the way from NIfTI to the logits (test_configs.py)."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from bundle.inference import Predictions


def test_pitfall_16_a_participant_s_probability_is_the_sigmoid_of_the_mean_logit_of_all_clips(tmp_path):
    (tmp_path / "model.json").write_text("{}")
    predictions = Predictions(tmp_path, tmp_path, tmp_path / "model.pt")
    (tmp_path / "summary.tsv").write_text("run_id\tstatus\treason\n")
    for names, logits in ((["b", "a"], [2.0, -1.0]), (["b"], [4.0])):
        output = {"pred": torch.tensor(logits)[:, None], "label": {"participant_id": names}}
        predictions(SimpleNamespace(state=SimpleNamespace(output=output)))
    predictions.report()
    table = pd.read_csv(tmp_path / "predictions.tsv", sep="\t").set_index("participant_id")
    assert table["logit"].to_dict() == {"a": -1.0, "b": 3.0}
    assert table["clips"].to_dict() == {"a": 1, "b": 2}
    assert table["probability"].tolist() == pytest.approx([1 / (1 + np.e), 1 / (1 + np.exp(-3))])
