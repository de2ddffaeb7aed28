"""One run cut in time: its parts are the run, and the table comes from the walk over them, on a tiny network.

Not covered: how much is rebuilt of real BOLD (docs/dynamics.md).
"""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from small_runs import coarse_signal, save_bold
from tiny_configs import TINY, run

from bundle.errors import InputError
from bundle.experiments import one_run
from bundle.files import ROOT


@pytest.fixture(scope="module")
def bold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bold(tmp_path_factory.mktemp("bold") / "run_bold.nii.gz", coarse_signal(200), tr=2.0)


def test_the_parts_are_the_run_in_order(bold: Path, tmp_path: Path):
    one_run.cut_in_time(bold, tmp_path)
    parts = [next(tmp_path.glob(f"sub-{name}/func/*_bold.nii.gz")) for name in ("train", "validation", "test")]
    images = [nib.load(part) for part in parts]
    assert [image.shape[3] for image in images] == [140, 20, 40]
    whole = nib.load(bold)
    np.testing.assert_allclose(np.concatenate([image.get_fdata() for image in images], 3), whole.get_fdata(), rtol=1e-6)
    for part, image in zip(parts, images, strict=True):
        np.testing.assert_array_equal(image.affine, whole.affine)
        assert json.loads((part.parent / part.name.replace(".nii.gz", ".json")).read_text())["RepetitionTime"] == 2.0


def test_each_normalisation_has_a_network_and_a_ridge_regression(
    bold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def in_this_process(run_id: str, configs: list[str], overrides: dict) -> None:
        calls.append(tuple(configs))
        run(*configs, **{name: str(value) if isinstance(value, Path) else value for name, value in overrides.items()})

    monkeypatch.setattr(one_run, "run_config", in_this_process)
    table = one_run.one_run(bold, tmp_path, TINY | {"clip_stride": 24}, "region", ["voxel"])
    assert calls == [("pretrain",), ("pretrain", "reconstruct"), ("pretrain", "reconstruct", "ridge")]
    assert set(table["model"]) == {"network", "ridge"}
    assert set(table["normalisation"]) == {"voxel"}
    assert table[table["region"] == "all"]["temporal_r2"].notna().all()
    assert (tmp_path / "one_run.csv").is_file()


def test_a_short_run_and_a_plan_without_pretraining_are_refused(tmp_path: Path):
    short = save_bold(tmp_path / "short_bold.nii.gz", coarse_signal(19), tr=2.0)
    with pytest.raises(InputError, match="19 frames"):
        one_run.cut_in_time(short, tmp_path / "parts")
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(InputError, match="no overrides of a pretraining"):
        one_run.pretraining_overrides(tmp_path / "plan.json")
    overrides = one_run.pretraining_overrides(ROOT / "configs" / "dynamics.json")
    assert overrides["clip_stride"] == overrides["frames"]
