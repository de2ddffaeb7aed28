"""Tracking: what `--tracking mlflow` adds shapes nothing, and MLflow gets every metric (where it is installed)."""

from pathlib import Path

import pytest
from tiny_configs import run, workflow

from bundle.training.provenance import resolved_config


def test_tracking_is_no_part_of_what_made_a_checkpoint(store: Path, tmp_path: Path):
    """So a training can be resumed with it and without it."""
    parsers = [
        workflow("pretrain", dataset_dir=str(store), output_dir=str(tmp_path), **more).parser
        for more in ({}, {"tracking": "mlflow"})
    ]
    plain, tracked = (resolved_config(parser) for parser in parsers)
    assert len(parsers[1]["train"]["handlers"]) == len(parsers[0]["train"]["handlers"]) + 1
    assert tracked == plain


def test_mlflow_gets_the_metrics_of_steps_and_epochs(store: Path, tmp_path: Path):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    run("pretrain", dataset_dir=str(store), output_dir=str(tmp_path), tracking="mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlruns.db'}")
    [found] = client.search_runs([client.get_experiment_by_name("monai_experiment").experiment_id])
    speed = {"clips_per_second", "waiting_for_data", "memory_gib", "hours_left"}
    assert speed | {"train_masked_mse", "val_masked_mse", "val_temporal_r2_limbic"} <= set(found.data.metrics)
    assert len(client.get_metric_history(found.info.run_id, "train_loss")) == 4
    assert list((tmp_path / "tensorboard").iterdir())  # as always
