"""The ridge regression beside a network runs from its overlay, on the tiny store."""

from pathlib import Path

import pandas as pd
from tiny_configs import run


def test_ridge_regression_needs_no_checkpoint_and_writes_the_same_table(store: Path, tmp_path: Path):
    seen = {"dataset_dir": str(store), "output_dir": str(tmp_path), "normalisation#mode": "voxel"}
    run("pretrain", "reconstruct", "ridge", **seen, subset="train", bootstrap_resamples=20)
    assert not (tmp_path / "best.pt").exists()
    table = pd.read_csv(tmp_path / "ridge" / "reconstruction.csv")
    groups = table[(table["level"] == "group") & (table["measure"] == "temporal_r2")].set_index("name")["value"]
    assert groups.notna().sum() >= 2
    assert groups.dropna().between(0, 1, inclusive="neither").all()  # on the clips that it was fitted to
