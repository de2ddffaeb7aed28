"""Every normalisation goes from pretraining to service on the tiny store, and no other is taken for it.

Not covered: the values that the network sees (tests/data/test_normalisation.py).
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_configs import run, sentence

from bundle.deploy.release import release
from bundle.training.checkpoints import load_checkpoint, saved_facts


@pytest.mark.parametrize(("mode", "channels"), [("voxel", 1), ("both", 2)])
def test_a_network_is_pretrained_trained_and_served_in_the_units_that_it_saw(
    store: Path, derivatives: Path, tmp_path: Path, capsys: pytest.CaptureFixture, mode: str, channels: int
):
    seen = {"dataset_dir": str(store), "normalisation#mode": mode}
    pretraining = seen | {"output_dir": str(tmp_path / "pretrain")}
    run("pretrain", **pretraining)
    said = "".join(capsys.readouterr())
    assert said.count("rebuilt no better over time than by a flat line") == 1  # after few steps, and said once
    run("pretrain", "reconstruct", **pretraining, bootstrap_resamples=20)
    rebuilt = pd.read_csv(tmp_path / "pretrain" / "reconstruction" / "reconstruction.csv")
    overall = rebuilt[rebuilt["level"] == "all"].set_index("measure")["value"]
    assert np.isfinite(overall[["mse", "temporal_r2"]]).all()

    training = seen | {
        "output_dir": str(tmp_path / "train"),
        "encoder_checkpoint": str(tmp_path / "pretrain" / "best.pt"),
    }
    run("train", **training)
    run("train", "evaluate", **training)
    facts = saved_facts(load_checkpoint(tmp_path / "train" / "best.pt"), "best.pt")
    assert facts["normalisation"]["mode"] == mode
    assert facts["network"]["in_channels"] == channels
    with pytest.raises(RuntimeError) as caught:
        run("train", **(training | {"normalisation#mode": "run", "output_dir": str(tmp_path / "other")}))
    assert ("mode 'voxel', but here it is 'run'" if channels == 1 else "in_channels 2") in sentence(caught.value)
    few = {"levels": ["group"], "gradient_steps": 1, "bootstrap_resamples": 20}
    run("train", "attribute", **training, **few, baseline="cohort_mean")
    assert (tmp_path / "train" / "attribution" / "attribution.csv").is_file()

    model = release(tmp_path / "train" / "best.pt", tmp_path / "models")
    service = {"dataset_dir": str(derivatives), "output_dir": str(tmp_path / "new"), "checkpoint": str(model)}
    run("inference", kind="infer", **service, in_channels=channels)
    served = pd.read_csv(tmp_path / "new" / "predictions.tsv", sep="\t").set_index("participant_id")["logit"]
    tested = pd.read_csv(tmp_path / "train" / "evaluation" / "subjects.tsv", sep="\t").set_index("participant_id")
    assert tested.index.tolist() == json.loads((store / "splits.json").read_text())["sets"]["test"]
    assert served[tested.index].to_numpy() == pytest.approx(tested["logit"].to_numpy(), rel=1e-3, abs=1e-4)
    if mode == "both":
        with pytest.raises(RuntimeError) as caught:
            run("inference", kind="infer", **service)
        assert "in_channels" in sentence(caught.value)
