"""Pictures of stored runs: drawn once, kept with the run, gone with it."""

import re

import numpy as np
import pytest
from matplotlib.image import imread
from small_runs import coarse_signal, run_of, save_bold

from bundle.anatomy import grid
from bundle.anatomy.atlas import AAL3, labels_on, load_atlas
from bundle.preparation.chain import load_preparation
from bundle.preparation.pictures import picture
from bundle.preparation.prepare import prepare
from bundle.preparation.store import read_run, read_voxels


def test_a_picture_shows_the_brain_bright_on_black(tmp_path):
    voxels = np.ravel_multi_index(np.mgrid[20:70, 30:80, 20:60].reshape(3, -1), (96, 96, 96))
    (tmp_path / "a.webp").write_bytes(picture(np.linspace(0, 1, len(voxels), dtype=np.float32), voxels, AAL3))
    image = imread(tmp_path / "a.webp")[..., :3].astype(float)
    assert image.shape == (260, 720, 3)
    assert image[:5].mean() < 5  # the rim
    assert image[100:150, 60:180].mean() > 60  # the block of voxels, in the sagittal view


def test_prepare_draws_each_stored_run_once_and_anew_when_it_changes(tmp_path):
    for seed, name in enumerate(("a", "b")):
        save_bold(tmp_path / f"{name}.nii.gz", coarse_signal(24, seed), tr=1.0)
    (tmp_path / "cut.nii.gz").write_bytes(b"damaged")
    runs = [run_of(tmp_path / f"{name}.nii.gz", f"sub-{name}") for name in ("a", "cut", "b")]
    prepare(runs, tmp_path / "store")
    assert not list(tmp_path.glob("store/runs/*/picture.webp"))
    prepare(runs, tmp_path / "store", pictures=True)  # those that were prepared without get one too
    drawn = {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("store/runs/*/picture.webp")}
    assert set(drawn) == {"sub-a", "sub-b"}
    assert len(re.findall("data:image/webp", (tmp_path / "store/report.html").read_text())) == 2
    save_bold(tmp_path / "a.nii.gz", coarse_signal(24, 9, mean=500.0), tr=1.0)
    prepare(runs, tmp_path / "store", pictures=True)
    after = {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("store/runs/*/picture.webp")}
    assert after["sub-a"] != drawn["sub-a"]
    assert after["sub-b"] == drawn["sub-b"]


def test_another_atlas_means_other_coverage_and_pictures_and_the_same_frames(tmp_path):
    save_bold(tmp_path / "a.nii.gz", coarse_signal(24, 0), tr=1.0)
    runs, store = [run_of(tmp_path / "a.nii.gz", "sub-a")], tmp_path / "store"
    prepare(runs, store, pictures=True)
    made = {path.name: path.stat().st_mtime_ns for path in (store / "runs" / "sub-a").iterdir()}
    other = load_preparation(atlas="AAL116")
    assert prepare(runs, store, other, pictures=True)["updated"] == 1
    after = {path.name: path.stat().st_mtime_ns for path in (store / "runs" / "sub-a").iterdir()}
    assert {name for name in made if made[name] != after[name]} == {"run.json", "picture.webp"}
    record = read_run(store, "sub-a")
    assert record["coverage_atlas"] == load_atlas("AAL116").sha256
    brain = np.zeros(np.prod(grid.SHAPE), bool)
    brain[read_voxels(store, "sub-a")] = True
    labels = labels_on(load_atlas("AAL116"), grid.AFFINE, grid.SHAPE).ravel()
    temporal = (labels >= 79) & (labels <= 90)  # Heschl_L to Temporal_Inf_R of AAL.txt
    assert record["coverage"]["temporal"] == pytest.approx(brain[temporal].mean())
    assert prepare(runs, store, other, pictures=True)["current"] == 1
