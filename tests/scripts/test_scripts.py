"""The command line: one sentence and a status that is not 0 for bad input; TSV for machines."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from small_runs import coarse_signal, save_bold

from bundle.evaluation.figures import mean_bold
from scripts import commands
from scripts.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def scripts(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    """The command line as a process, which takes seconds to import what it needs."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "scripts", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable:
    """The same in this process, in a folder of its own: gives the exit status, and what went to stdout and stderr."""

    def call_main(*arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["scripts", *arguments])
        status = 0
        try:
            main()
        except SystemExit as error:
            status = int(error.code or 0)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call_main


def test_regions_of_the_reference_atlas_are_table_1(shared: Path, capsys: pytest.CaptureFixture):
    """Rows and their order as in Table 1 of arXiv 2511.00443."""
    commands.regions(str(shared / "atlas" / "AAL3v1_res-02_dseg.nii.gz"))
    table = pd.read_csv(io.StringIO(capsys.readouterr().out), sep="\t")
    assert table.columns.tolist() == ["name", "voxels", "percent", "labels"]
    assert dict(zip(table["name"], table["voxels"], strict=True)) == {
        "frontal": 53985,
        "parietal": 30927,
        "temporal": 26584,
        "occipital": 26358,
        "cerebellum": 24414,
        "limbic": 12690,
        "subcortical": 7165,
    }
    assert table["labels"].tolist() == [
        "1-16,19-32",
        "61-74",
        "83-94",
        "47-60",
        "95-120",
        "17-18,37-46,151-156",
        "75-80,121-150,157-170",
    ]
    assert table["percent"].tolist() == [29.06, 16.65, 14.31, 14.19, 13.14, 6.83, 3.86]


def test_prepare_goes_on_past_a_bad_run_and_exits_with_1(tmp_path: Path):
    save_bold(tmp_path / "a_space-MNI152_bold.nii.gz", coarse_signal())
    save_bold(tmp_path / "b_space-MNI152_bold.nii.gz", coarse_signal(seed=1), tr=0)
    rows = ["participant_id\tbold\tsite\tdiagnosis", "sub-a\ta_space-MNI152_bold.nii.gz\tx\t0"]
    rows += ["sub-b\tb_space-MNI152_bold.nii.gz\tx\t1"]
    (tmp_path / "runs.tsv").write_text("\n".join(rows) + "\n")
    done = scripts("prepare", "runs.tsv", "store", folder=tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: 1 of 2 runs failed")
    assert "b_space-MNI152_bold.nii.gz" in last
    assert "--tr" in last
    assert "Traceback" not in done.stderr
    summary = pd.read_csv(tmp_path / "store" / "summary.tsv", sep="\t")
    assert summary["status"].tolist() == ["prepared", "failed"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["regions", "--atlas", "none.nii.gz"], "none.nii.gz"),
        (["prepare", "nowhere", "store"], "nowhere"),
        (["splits", "nowhere"], "nowhere"),
        (["release", "none.pt"], "none.pt"),
        (["convert", "none.pt", "out.pt"], "none.pt"),
        (["prepare", "20240101", "store"], "20240101 does not exist"),
        (["splits", "nowhere", "--folds", "x"], "--folds must be a number, not 'x'"),
        (["prepare", "nowhere", "store", "--high_pass", "0,01"], "--high_pass must be a number, not '0,01'"),
        (["overlay", "nowhere", "0010001", "mask.png"], "nowhere is not there"),
    ],
)
def test_bad_input_is_one_sentence_that_names_it(call: Callable, tmp_path: Path, arguments: list[str], words: str):
    status, printed = call(*arguments)
    assert status == 1
    assert printed.startswith("error: ")
    assert len(printed.splitlines()) == 1
    assert words in printed
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_flag_is_refused_before_anything_is_done(call: Callable, derivatives: Path, tmp_path: Path):
    status, printed = call("prepare", str(derivatives), "store", "--min_coverag", "0.9")
    assert status == 2
    assert "--min_coverag" in printed
    assert list(tmp_path.iterdir()) == []


def test_splits_writes_the_file_and_prints_counts(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    commands.splits(str(store), file=str(tmp_path / "s.json"), folds=3)
    table = pd.read_csv(io.StringIO(capsys.readouterr().out), sep="\t")
    assert table["participants"].sum() == 12
    assert set(table["set"]) == {"train", "validation", "test"}
    assert (tmp_path / "s.json").is_file()


def test_help_lists_what_a_command_takes_and_nothing_else(call: Callable):
    status, printed = call("splits", "--help")
    assert status == 0
    assert "scripts splits STORE <flags>" in printed


def test_a_site_whose_name_is_a_number_can_be_left_out(call: Callable, tmp_path: Path):
    rows = [
        {"run_id": f"{i}", "participant_id": f"{i}", "site": f"{i % 2}", "diagnosis": i // 2 % 2, "parameters_hash": ""}
        for i in range(24)
    ]
    manifest = {"format": 2, "parameters": {}, "parameters_hash": "", "runs": rows}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert call("splits", ".", "--folds", "3", "--test_site", "1")[0] == 0
    assert json.loads((tmp_path / "splits.json").read_text())["test_site"] == "1"


def test_overlay_draws_the_mask_over_the_mean_in_original_units(store: Path, tmp_path: Path):
    mean = mean_bold(store, "sub-00_task-rest")
    values = mean.get_fdata()[mean.get_fdata() != 0]
    assert np.median(values) == pytest.approx(1000, rel=0.01)  # what the fixture's files hold; the brain's rim is less
    np.testing.assert_allclose(mean.affine, [[2, 0, 0, -94], [0, 2, 0, -114], [0, 0, 2, -78], [0, 0, 0, 1]])
    commands.overlay(str(store), "sub-00_task-rest", str(tmp_path / "mask.png"))
    assert (tmp_path / "mask.png").read_bytes()[:4] == b"\x89PNG"


def test_synthesized_cohort_is_read_by_prepare(tmp_path: Path):
    commands.synthesize(str(tmp_path / "d"), subjects=6, duration_s=42)
    runs = pd.read_csv(tmp_path / "d" / "participants.tsv", sep="\t")
    assert len(runs) == 6
    assert len([nib.load(p) for p in (tmp_path / "d").glob("sub-*/func/*_bold.nii.gz")]) == 6
