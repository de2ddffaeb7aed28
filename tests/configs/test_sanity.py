"""Trained by the configs on a planted effect: its regions come out on top, and shuffled labels give nothing.

The effect is static, in the brightness of limbic regions and cerebellum: see
`bundle.experiments.synthetic`. Only the seven regions are compared: the insula is small and lies in the windows of its
limbic neighbours, whose effect it so takes part in.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_stores import write_store
from tiny_configs import run

from bundle.anatomy import grid
from bundle.anatomy.atlas import REGIONS, labels_on, load_atlas
from bundle.data.splits import make_splits, save_splits
from bundle.experiments.synthetic import SITES, plan_cohort
from bundle.preparation.store import read_manifest

SETTINGS = {"max_epochs": 30, "batch_size": 8, "learning_rate": 0.01, "encoder_checkpoint": "random"}


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 participants of 4 frames: an anatomy that all share, brighter regions (d = 6), and noise."""
    labels = labels_on(load_atlas(), grid.AFFINE, grid.SHAPE).ravel()
    voxels = np.flatnonzero(labels > 0)
    coupled = np.isin(labels[voxels], [*REGIONS["limbic"], *REGIONS["cerebellum"]])
    anatomy = np.random.default_rng(0).normal(size=len(voxels))

    def signal(subject: dict, rng: np.random.Generator) -> np.ndarray:
        noise = 0.1 * rng.standard_normal((4, len(voxels)), dtype=np.float32)
        return anatomy + 4 * subject["intensity"] * coupled + noise  # (T, V); 0.02 of the mean are about 0.08 SD

    plan = plan_cohort(36, 6.0, 0, SITES, "intensity")
    store = write_store(tmp_path_factory.mktemp("bright"), plan, signal, voxels)
    save_splits(make_splits(read_manifest(store)["runs"], folds=3), store / "splits.json")
    return store


def attribution(store: Path, folder: Path, **overrides: object) -> pd.DataFrame:
    """How much each voxel of a region separates the groups, most first, for the classifier trained so."""
    settings = SETTINGS | {"dataset_dir": str(store), "output_dir": str(folder)} | overrides
    run("train", "published", **settings)
    run("train", "attribute", "published", **settings, baseline="cohort_mean", levels=["group"], gradient_steps=4)
    table = pd.read_csv(folder / "attribution" / "attribution.csv")
    table = table[table["name"].isin(REGIONS) & (table["measure"] == "separation_per_1000_voxels")]
    return table.sort_values("value", key=abs, ascending=False)


def test_regions_that_carry_the_effect_come_out_on_top(bright: Path, tmp_path: Path):
    table = attribution(bright, tmp_path)
    for method, part in table.groupby("method"):
        assert set(part["name"][:2]) == {"limbic", "cerebellum"}, method
        assert (part["low"][:2] > 0).all(), method
    scores = pd.read_csv(tmp_path / "attribution" / "attribution_subjects.csv")
    assert len(scores["participant_id"].unique()) == 12


def test_a_model_of_shuffled_labels_gives_nothing(bright: Path, tmp_path: Path):
    table = attribution(bright, tmp_path, label_shuffle_seed=0)
    top = table[table["name"].isin(["limbic", "cerebellum"])]
    assert len(top) == 4
    assert ((top["low"] < 0) & (top["high"] > 0)).all()
