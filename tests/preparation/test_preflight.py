"""Preflight, the reports, and coverage: what is said of good, bad, doubtful and doubled runs.

Not covered here: how pictures look (only that they are drawn).
"""

import base64
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from small_runs import COARSE_AFFINE, coarse_brain, coarse_signal, run_of, save_bold

from bundle.anatomy.atlas import REGIONS
from bundle.errors import InputError
from bundle.preparation import store
from bundle.preparation.chain import load_preparation
from bundle.preparation.preflight import preflight
from bundle.preparation.prepare import prepare


@pytest.fixture
def files(tmp_path):
    """A good run, one that ends above the cerebellum, one with 5 frames, and a copy of the last."""
    save_bold(tmp_path / "good.nii.gz", coarse_signal(24), tr=2.0)
    high = coarse_signal(24, seed=1)
    z = np.arange(high.shape[2]) * 8.0 + COARSE_AFFINE[2, 3]
    high[:, :, z < -25] = 0
    save_bold(tmp_path / "high.nii.gz", high, tr=2.0)
    save_bold(tmp_path / "short.nii.gz", coarse_signal(5, seed=2), tr=2.0)
    save_bold(tmp_path / "double.nii.gz", coarse_signal(24, seed=3), tr=2.0)
    shutil.copy(tmp_path / "double.nii.gz", tmp_path / "copy.nii.gz")
    return tmp_path


def runs_in(folder, *names):
    return [run_of(folder / f"{name}.nii.gz", f"sub-{name}") for name in names]


def test_every_run_is_described_and_nothing_is_stored(files):
    runs = runs_in(files, "good", "high", "short", "double", "copy")
    runs[0] |= {"diagnosis": None}
    rows = {row["run_id"]: row for row in preflight(runs, files / "report", pictures=False)}
    good = rows["sub-good"]
    assert (good["status"], good["axcodes_in"], good["space"], good["voxel_mm"]) == (
        "ready",
        "RAS",
        "MNI152",
        "8 x 8 x 8",
    )
    assert (good["tr_in"], good["frames_in"], good["frames"]) == (2.0, 24, 58)  # 46 s: 0, 0.8 ... 45.6 s
    assert good["mni_overlap"] > 0.8
    assert all(good[f"coverage_{region}"] > 0.8 for region in REGIONS)
    assert good["warnings"] == ""
    assert re.search(r"less than 50% of cerebellum \d+%", rows["sub-high"]["warnings"])
    assert "but 20 are needed" in rows["sub-short"]["reason"]
    assert "same content as sub-copy" in rows["sub-double"]["reason"]
    assert {path.name for path in files.iterdir() if path.is_dir()} == {"report"}
    assert {path.name for path in (files / "report").iterdir()} == {"preflight.html", "preflight.tsv"}


def test_the_page_and_the_table_agree_and_the_worst_come_first(files):
    rows = preflight(runs_in(files, "good", "high", "short"), files / "report")
    page = (files / "report/preflight.html").read_text()
    table = pd.read_csv(files / "report/preflight.tsv", sep="\t")
    assert table["run_id"].tolist() == [row["run_id"] for row in rows] == ["sub-good", "sub-high", "sub-short"]
    assert re.findall(r'<article class="card (\w+)', page) == ["failed", "warned", "good"]
    pictures = [base64.b64decode(code) for code in re.findall(r"data:image/webp;base64,([^\"]+)", page)]
    assert len(pictures) == 2  # none of the run that failed
    assert all(picture[8:12] == b"WEBP" for picture in pictures)
    assert not re.search(r"""(src|href)=["']?https?:""", page)  # nothing is fetched


def test_text_from_files_is_not_markup(files):
    run = runs_in(files, "good")[0] | {"participant_id": "<script>alert(1)</script>"}
    preflight([run], files / "report", pictures=False)
    assert "<script>alert" not in (files / "report/preflight.html").read_text()


def test_low_coverage_warns_or_excludes_by_choice(files, caplog):
    runs = runs_in(files, "good", "high")
    summary = prepare(runs, files / "store")
    assert (summary["prepared"], summary["excluded"]) == (2, 0)
    assert "cerebellum" in summary["rows"][1]["warnings"]
    assert "sub-high covers less than 50% of cerebellum" in caplog.text
    before = (files / "store/runs/sub-good/frames.npy").stat().st_mtime_ns
    summary = prepare(runs, files / "store", load_preparation(on_low_coverage="exclude"))  # takes it out again
    assert (summary["current"], summary["excluded"], summary["failed"]) == (1, 1, 0)
    assert "cerebellum" in summary["rows"][1]["reason"]
    assert (files / "store/runs/sub-good/frames.npy").stat().st_mtime_ns == before
    assert [run["run_id"] for run in store.read_manifest(files / "store")["runs"]] == ["sub-good"]
    summary = prepare(runs, files / "new", load_preparation(on_low_coverage="exclude"))
    assert (summary["prepared"], summary["excluded"]) == (1, 1)
    assert 'class="card excluded' in (files / "new/report.html").read_text()
    summary = prepare(runs, files / "any", load_preparation(on_low_coverage="exclude", min_coverage=0))
    assert summary["prepared"] == 2


def test_coverage_is_the_share_of_the_regions_voxels(files):
    assert coarse_brain().any()
    row = preflight(runs_in(files, "high"), files / "report", pictures=False)[0]
    assert row["coverage_cerebellum"] < 0.5 < row["coverage_frontal"]


@pytest.mark.parametrize("bad", [{"min_coverage": 2}, {"on_low_coverage": "ignore"}])
def test_bad_choices_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        load_preparation(**bad)


def test_nothing_to_look_at_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no runs"):
        preflight([], tmp_path)
