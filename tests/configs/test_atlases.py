"""One `--atlas` that all obey: an atlas made here goes from the mask to the served model.

Not covered: what another atlas is worth on real data.
"""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from monai.bundle import ConfigWorkflow
from nilearn.datasets import load_mni152_brain_mask
from nilearn.image import resample_img
from tiny_configs import run, sentence

from bundle.anatomy.atlas import load_atlas, region_table
from bundle.deploy.release import release
from bundle.training.checkpoints import load_checkpoint, saved_facts

GROUPS = ["back", "front", "other"]  # as they come first in the table, and the rest
TINY_COVARIANCE = {"network_def#components": {"group": [1]}}  # the tiny network has four channels


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The brain in eight parts at 4 mm, stored LAS; those before the origin and behind it, but for one part."""
    affine = nib.affines.from_matvec(np.diag([-4.0, 4, 4]), (80, -120, -72))
    brain = resample_img(load_mni152_brain_mask(2), affine, (40, 50, 40), interpolation="nearest", force_resample=True,
                         copy_header=True)  # fmt: skip
    x, y, z = np.moveaxis(nib.affines.apply_affine(affine, np.moveaxis(np.indices(brain.shape), 0, -1)), -1, 0)
    labels = 1 + (x > 0) + 2 * (y > -20) + 4 * (z > 10)
    path = tmp_path_factory.mktemp("atlas") / "eight_res-4_dseg.nii.gz"
    nib.save(nib.Nifti1Image((labels * (brain.get_fdata() > 0)).astype(np.int16), affine), path)
    group = {number: ("front" if number in (3, 4, 7, 8) else "back") for number in range(1, 8)} | {8: "n/a"}
    rows = "".join(f"{number}\tpart{number}\t{name}\n" for number, name in group.items())
    path.with_name("eight_dseg.tsv").write_text(f"index\tname\tgroup\n{rows}")
    return str(path)


@pytest.fixture(scope="module")
def output(store: Path, atlas: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("obeyed")
    pretrain(store, folder, atlas)
    train(store, folder, atlas)
    train(store, folder, atlas, "evaluate")
    release(folder / "train" / "best.pt", folder / "models")
    return folder


def pretrain(store: Path, folder: Path, atlas: str, *overlays: str, **changes: object) -> ConfigWorkflow:
    settings = {"dataset_dir": str(store), "output_dir": str(folder / "pretrain"), "atlas": atlas, "clip_stride": 30}
    return run("pretrain", "masks/curriculum", *overlays, **(settings | {"bootstrap_resamples": 20} | changes))


def train(store: Path, folder: Path, atlas: str, *overlays: str, **changes: object) -> ConfigWorkflow:
    settings = {"dataset_dir": str(store), "output_dir": str(folder / "train"), "atlas": atlas}
    settings |= {"encoder_checkpoint": str(folder / "pretrain" / "best.pt"), "bootstrap_resamples": 20}
    return run("train", "readouts/covariance", *overlays, **(settings | TINY_COVARIANCE | changes))


def names_of(path: Path, level: str = "group") -> list[str]:
    table = pd.read_csv(path)
    return list(dict.fromkeys(table[table["level"] == level]["name"]))


def test_the_curriculum_draws_the_atlas_s_groups(output: Path, atlas: str):
    (shares,) = json.loads((output / "pretrain" / "curriculum.json").read_text()).values()
    assert len(shares) == 2
    facts = saved_facts(load_checkpoint(output / "pretrain" / "best.pt"), "best.pt")["config"]
    assert facts["atlas"] == facts["mask"]["atlas"] == f"sha256 {load_atlas(atlas).sha256}"


def test_reconstruction_is_by_the_atlas_s_groups(output: Path, store: Path, atlas: str):
    pretrain(store, output, atlas, "reconstruct")
    table = output / "pretrain" / "reconstruction" / "reconstruction.csv"
    assert names_of(table) == GROUPS
    assert names_of(table, "label") == [f"part{number}" for number in range(1, 9)]


def test_attribution_is_by_the_atlas_s_groups(output: Path, store: Path, atlas: str):
    train(store, output, atlas, "attribute", levels=["group"])
    table = pd.read_csv(output / "train" / "attribution" / "attribution.csv").drop_duplicates("name")
    assert table["name"].tolist() == GROUPS
    voxels = {row["region"]: row["voxels"] for row in region_table(load_atlas(atlas))}
    assert {
        name: number for name, number in zip(table["name"], table["voxels"], strict=True) if name != "other"
    } == voxels


def test_another_atlas_is_refused_when_the_network_is_tested(output: Path, store: Path):
    with pytest.raises(RuntimeError) as caught:
        train(store, output, "AAL3", "evaluate")
    assert "was made with atlas 'sha256 " in sentence(caught.value)


def test_a_model_is_served_with_its_atlas_alone(output: Path, derivatives: Path, atlas: str, tmp_path: Path):
    tested = pd.read_csv(output / "train" / "evaluation" / "subjects.tsv", sep="\t").set_index("participant_id")[
        "logit"
    ]
    (one,) = (derivatives / tested.index[0] / "func").glob("*_bold.nii.gz")
    settings = {"dataset_dir": str(one), "checkpoint": str(output / "models" / "model.pt")} | TINY_COVARIANCE
    run("inference", "readouts/covariance", kind="infer", **settings, output_dir=str(tmp_path / "own"), atlas=atlas)
    served = pd.read_csv(tmp_path / "own" / "predictions.tsv", sep="\t")
    assert served["logit"].item() == pytest.approx(tested.iloc[0], rel=1e-4, abs=1e-5)
    coverage = pd.read_csv(tmp_path / "own" / "store" / "summary.tsv", sep="\t").filter(like="coverage_")
    assert list(coverage) == ["coverage_back", "coverage_front"]
    with pytest.raises(RuntimeError) as caught:
        run("inference", "readouts/covariance", kind="infer", **settings, output_dir=str(tmp_path / "default"))
    assert "fitted with atlas" in sentence(caught.value)
    assert "--atlas" in sentence(caught.value)


def test_a_region_of_aal3_is_refused_by_another_atlas(store: Path, atlas: str, tmp_path: Path):
    with pytest.raises(RuntimeError) as caught:
        run("pretrain", dataset_dir=str(store), output_dir=str(tmp_path), atlas=atlas)
    assert "region 'limbic' is not in the atlas" in sentence(caught.value)
