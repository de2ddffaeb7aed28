"""The BIDS App. Not covered: what the engine computes (test_configs.py), and how pages look."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from small_pages import addresses, of_class, read_page, text_of
from small_runs import coarse_signal, save_bold
from tiny_configs import run

from bundle.deploy import bids_app
from bundle.deploy.audit import check_log
from bundle.deploy.bids_app import AUDIT, run_participants, write_group
from bundle.deploy.inference import Predictions
from bundle.deploy.release import ReleasedModel, release
from bundle.deploy.reports import write_results
from bundle.deploy.results import read_results
from bundle.deploy.results_page import pdf
from bundle.errors import InputError
from bundle.files import ROOT, file_sha256, write_json
from scripts import serving
from scripts.__main__ import main

READOUT = {"network_def#components": {"group": [1]}}  # the tiny network has four channels
SPACE = "space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz"


@pytest.fixture(scope="module")
def checkpoint(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A readout of whole runs, on random weights."""
    folder = tmp_path_factory.mktemp("model")
    places = {"dataset_dir": str(store), "output_dir": str(folder)}
    run("train", "readouts/covariance", **places, **READOUT, encoder_checkpoint="random")
    return folder / "best.pt"


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Path:
    return release(checkpoint, checkpoint.parent / "models")


@pytest.fixture(scope="module")
def scans(derivatives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good participants, one with a second run that is too short, one whose TR is 0, and one without BOLD."""
    folder = tmp_path_factory.mktemp("scans")
    for name in ("sub-00", "sub-01", "sub-02", "sub-03"):
        shutil.copytree(derivatives / name, folder / name)
    shutil.copy(derivatives / "participants.tsv", folder)
    save_bold(folder / f"sub-02/func/sub-02_task-rest_run-2_{SPACE}", coarse_signal(frames=10, seed=50))
    save_bold(folder / f"sub-03/func/sub-03_task-rest_{SPACE}", coarse_signal(seed=51), tr=0)
    (folder / "sub-20" / "anat").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def out(scans: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both levels, of everybody."""
    folder = tmp_path_factory.mktemp("app") / "out"
    for level in (lambda: run_participants(scans, folder, model), lambda: write_group(scans, folder)):
        with pytest.raises(InputError, match=r"3 of 5 participants are not scored, or not with all runs.*sub-02"):
            level()
    return folder


def table_of(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False).set_index("participant_id")


def scored(out: Path, name: str) -> dict:
    return table_of(out / "phenotype" / f"{name}_prediction.tsv").loc[name].to_dict()


def test_the_app_gives_what_the_engine_gives_alone(out: Path, scans: Path, model: Path, tmp_path: Path):
    places = {"dataset_dir": str(scans), "output_dir": str(tmp_path), "checkpoint": str(model)}
    with pytest.raises(RuntimeError):  # some runs cannot be used
        run("inference", "readouts/covariance", kind="infer", **places, **READOUT)
    alone = table_of(tmp_path / "predictions.tsv")
    assert alone.index.tolist() == ["sub-00", "sub-01", "sub-02"]
    whole = table_of(out / "phenotype" / "prediction.tsv")
    pd.testing.assert_frame_equal(whole.loc[alone.index, alone.columns], alone.replace("", "n/a"))  # as BIDS has it
    for name in alone.index:
        assert scored(out, name) == whole.loc[name].to_dict()


def test_nobody_s_bad_scan_stops_the_others_and_everybody_has_a_row_and_a_page_that_says_why(out: Path):
    table = table_of(out / "phenotype" / "prediction.tsv")
    assert table["status"].tolist() == ["scored", "scored", "incomplete", "failed", "failed"]
    assert set(table.loc[["sub-03", "sub-20"]].drop(columns="status").to_numpy().ravel()) == {"n/a"}
    words = {"sub-02": "10 frames", "sub-03": "TR must be", "sub-20": "run fMRIPrep"}
    for name in table.index:
        page = text_of(read_page(out / f"{name}.html"))
        said = json.loads((out / "phenotype" / f"{name}_prediction.json").read_text())
        assert words.get(name, "Scored, with all runs") in page
        assert words.get(name, "") in said["reason"]
        assert said["model"]["sha256"] in page
        assert "not for diagnosis" in page
    group = text_of(read_page(out / "group.html"))
    assert all(word in group for word in (*table.index, *words.values()))


def test_pages_load_nothing_and_no_output_holds_a_path_of_the_machine(out: Path, scans: Path):
    for page in out.glob("*.html"):
        assert all(link.startswith(("data:image/", "sub-")) for link in addresses(read_page(page)))
    for path in out.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert str(scans) not in text, path
            assert str(out) not in text, path


def test_what_may_be_reported_of_everybody(out: Path, tmp_path: Path):
    """See test_reports.py; here that the app's own output is read, its pages' pictures too."""
    found = {result.participant: result for result in read_results(out)}
    rows = table_of(out / "phenotype" / "prediction.tsv")
    assert list(found) == rows.index.tolist()
    for name, result in found.items():
        assert result.absent == {"like": "", "n/a": "error"}.get(rows.loc[name, "flag"], "not-applicable")
        said = json.loads((out / "phenotype" / f"{name}_prediction.json").read_text())
        assert result.sha256 == (said["model"]["sha256"],)
    assert "1 of 2 runs could not be used." in found["sub-02"].remarks
    assert [len(found[name].pictures) for name in found] == [1, 1, 1, 0, 0]
    for result in found.values():
        assert pdf(result).startswith(b"%PDF")
    write_results(out, tmp_path, ["fhir"])
    assert len(list(tmp_path.glob("sub-*_fhir.json"))) == 5


def test_every_attempt_is_in_the_audit_log_by_hashes_and_without_names(out: Path, scans: Path, model: Path):
    lines = [json.loads(line) for line in (out / AUDIT).read_text().splitlines()]
    assert check_log(out / AUDIT)[0] == len(lines) == 5
    tables = [
        out / "phenotype" / f"{name}_prediction.tsv" for name in sorted(path.name for path in scans.glob("sub-*"))
    ]
    assert [line["output"] for line in lines] == [file_sha256(path) for path in tables]
    assert [line["status"] for line in lines] == ["scored", "scored", "incomplete", "failed", "failed"]
    assert {line["model"] for line in lines} == {file_sha256(model)}
    assert file_sha256(next((scans / "sub-00").rglob("*_bold.nii.gz"))) in lines[0]["inputs"]
    assert [len(line["inputs"]) for line in lines] == [2, 2, 3, 2, 0]
    assert "sub-" not in (out / AUDIT).read_text()


def test_the_same_input_twice_gives_the_same_bytes(out: Path, scans: Path, model: Path):
    again = out.with_name("again")
    run_participants(scans, again, model, ["00", "01"])
    written = sorted(path for path in again.rglob("*") if path.is_file() and path.name != AUDIT)  # which holds the time
    assert {path.suffix for path in written} >= {".tsv", ".json", ".html"}
    for path in written:
        assert path.read_bytes() == (out / path.relative_to(again)).read_bytes(), path


def test_it_needs_no_network_no_root_no_home_and_writes_only_where_it_was_told(
    scans: Path, model: Path, tmp_path: Path
):
    """As in a container that is started with --network none --read-only."""
    alone = ["unshare", "--user", "--map-user=1000", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody have a network of their own (unshare --user --net)")
    code = tmp_path / "code"
    for name in ("bundle", "configs", "scripts"):
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    places = [code, *code.rglob("*")]
    for path in places:
        path.chmod(0o555 if path.is_dir() else 0o444)
    (tmp_path / "tmp").mkdir()
    given = [scans, tmp_path / "out", "participant", "--participant_label", "00", "--model", model]
    told = {"HOME": "/nonexistent", "TMPDIR": str(tmp_path / "tmp"), "MPLCONFIGDIR": str(tmp_path / "tmp")}
    reach = "import socket; socket.create_connection(('127.0.0.1', 9), 1)"
    offline = subprocess.run([*alone, sys.executable, "-c", reach], capture_output=True, text=True)
    written = subprocess.run([*alone, "touch", code / "here"], capture_output=True, text=True)
    done = subprocess.run(
        [*alone, sys.executable, "-B", "-m", "scripts", "app", *map(str, given), "--work_dir", str(tmp_path / "work")],
        cwd=code, env={"PATH": os.environ["PATH"], **told}, capture_output=True, text=True,
    )  # fmt: skip
    for path in places:
        path.chmod(0o755)
    assert "Network is unreachable" in offline.stderr
    assert "Permission denied" in written.stderr
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "phenotype" / "sub-00_prediction.tsv").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code", "out", "tmp", "work"]


def test_the_output_is_valid_bids(out: Path, tmp_path: Path):
    """By the validator of BIDS, which runs offline."""
    program = Path(sys.executable).parent / "bids-validator-deno"
    if not program.is_file():
        pytest.skip("the validator of BIDS is not installed; pip install bids-validator-deno")
    done = subprocess.run([program, "--format", "json", out], capture_output=True, text=True)
    issues = json.loads(done.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []
    other = shutil.copytree(out, tmp_path / "other")
    shutil.copy(other / "phenotype" / "sub-00_prediction.tsv", other)
    assert subprocess.run([program, other], capture_output=True).returncode != 0  # it does look


def test_the_description_says_what_made_it_and_of_what(out: Path, scans: Path):
    said = json.loads((out / "dataset_description.json").read_text())
    assert said["DatasetType"] == "derivative"
    assert said["GeneratedBy"][0]["Name"] == "brain_fmri_roi_mae"
    assert (out / said["SourceDatasets"][0]["URL"]).resolve() == scans.resolve()
    (source,) = json.loads((out / "phenotype" / "sub-00_prediction.json").read_text())["Sources"]
    _, link, path = source.split(":")
    assert (out / said["DatasetLinks"][link] / path).is_file()
    assert (out / ".bidsignore").read_text().split() == ["*.html", AUDIT]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the participants whom the engine is run for."""
    names: list[str] = []
    score = bids_app._score
    monkeypatch.setattr(bids_app, "_score", lambda app, name, runs: names.append(name) or score(app, name, runs))
    return names


def test_it_goes_on_where_it_ended_and_does_again_what_has_changed(
    derivatives: Path, model: Path, checkpoint: Path, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
):
    own, out = tmp_path / "in", tmp_path / "out"
    for name in ("sub-00", "sub-01"):
        shutil.copytree(derivatives / name, own / name)
    page = bids_app.write_participant_page

    def killed(path: Path, *rest: object) -> None:
        if path.name == "sub-01.html":
            raise KeyboardInterrupt
        page(path, *rest)

    monkeypatch.setattr(bids_app, "write_participant_page", killed)
    with pytest.raises(KeyboardInterrupt):
        run_participants(own, out, model)
    monkeypatch.setattr(bids_app, "write_participant_page", page)
    assert not (out / "phenotype" / "sub-01_prediction.tsv").exists()
    calls.clear()
    run_participants(own, out, model)
    assert calls == ["sub-01"]
    before = {path: file_sha256(path) for path in out.rglob("*") if path.is_file()}
    run_participants(own, out, checkpoint)  # the same weights
    assert calls == ["sub-01"]
    assert before == {path: file_sha256(path) for path in out.rglob("*") if path.is_file()}
    save_bold(own / f"sub-00/func/sub-00_task-rest_{SPACE}", coarse_signal(seed=77))
    run_participants(own, out, model, ["sub-00", "01"])
    assert calls == ["sub-01", "sub-00"]
    run_participants(own, out, model, ["01"], options={"clip_stride": 10})
    assert calls == ["sub-01", "sub-00", "sub-01"]
    with pytest.raises(InputError, match="sub-00 and sub-01 were not scored by the same model with the same options"):
        write_group(own, out)
    write_group(own, out, ["sub-01"])
    assert table_of(out / "phenotype" / "prediction.tsv").index.tolist() == ["sub-01"]


def test_what_nobody_expected_stops_nobody_else(
    derivatives: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def report(self: Predictions) -> None:
        if self.outputs[0][0][0] == "sub-00":
            raise MemoryError("no room")
        of_the_engine(self)

    of_the_engine = Predictions.report
    monkeypatch.setattr(Predictions, "report", report)
    with pytest.raises(InputError, match=r"1 of 2 participants.*sub-00"):
        run_participants(derivatives, tmp_path / "out", model, ["00", "01"])
    assert scored(tmp_path / "out", "sub-00") == {"status": "failed"}
    assert scored(tmp_path / "out", "sub-01")["status"] == "scored"


def test_whatever_the_engine_gives_is_passed_on(
    derivatives: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def report(self: Predictions) -> None:
        of_the_engine(self)
        path = self.output_dir / "predictions.tsv"
        table = pd.read_csv(path, sep="\t").assign(strangeness=0.875, flag="beyond <b>reason</b>", none="")
        table.to_csv(path, sep="\t", index=False)
        about = json.loads(path.with_suffix(".json").read_text())
        about["columns"] |= {"strangeness": "how strange it is"}
        write_json(path.with_suffix(".json"), about | {"beside": {"a": 1}})

    of_the_engine, out = Predictions.report, tmp_path / "out"
    monkeypatch.setattr(Predictions, "report", report)
    run_participants(derivatives, out, model, ["00"])
    with pytest.raises(InputError, match=r"11 of 12 participants.*absent"):
        write_group(derivatives, out)
    for name in ("sub-00_prediction", "prediction"):
        row = table_of(out / "phenotype" / f"{name}.tsv").loc["sub-00"]
        assert row[["strangeness", "flag", "none"]].tolist() == ["0.875", "beyond <b>reason</b>", "n/a"]
        said = json.loads((out / "phenotype" / f"{name}.json").read_text())
        assert said["strangeness"] == {"Description": "how strange it is"}
    assert json.loads((out / "phenotype" / "sub-00_prediction.json").read_text())["beside"] == {"a": 1}
    for page in ("sub-00.html", "group.html"):
        assert all(word in text_of(read_page(out / page)) for word in ("0.875", "how strange", "beyond <b>reason</b>"))
    assert table_of(out / "phenotype" / "prediction.tsv")["status"].value_counts()["absent"] == 11


def test_what_the_engine_doubts_is_said_on_both_pages(derivatives: Path, model: Path, tmp_path: Path):
    """Runs without a mask, by a model whose training runs had theirs."""
    bold = derivatives / "sub-00" / "func" / f"sub-00_task-rest_{SPACE}"
    (tmp_path / "in" / "sub-00" / "func").mkdir(parents=True)
    shutil.copy(bold, tmp_path / "in" / "sub-00" / "func")
    run_participants(tmp_path / "in", tmp_path / "out", model)
    write_group(tmp_path / "in", tmp_path / "out")
    page, group = (read_page(tmp_path / "out" / name) for name in ("sub-00.html", "group.html"))
    assert "Scored, with all runs, but with a warning" in text_of(page)
    for element in (page, group):
        assert "brain masks of another origin" in text_of(element)
        assert of_class(element, "warned")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": ["00", "77"]}, "holds no folder sub-77"),
        ({"bids_dir": "nowhere"}, "nowhere is not a folder"),
        ({"model": "none.pt"}, "none.pt: no checkpoint here"),
        ({"out_dir": "in"}, "in is the input too"),
        ({"work_dir": "out/work"}, "is to be valid BIDS"),
        ({"options": {"clip_strid": 4}}, "--clip_strid: neither"),
        ({"options": {"dataset_dir": "x"}}, "--dataset_dir: neither"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    derivatives: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, words: str
):
    monkeypatch.chdir(tmp_path)
    Path("in").symlink_to(derivatives)
    with pytest.raises(InputError, match=words):
        run_participants(**({"bids_dir": "in", "out_dir": "out", "model": model} | changes))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_another_dataset_is_not_written_into(derivatives: Path, model: Path, tmp_path: Path):
    (tmp_path / "dataset_description.json").write_text('{"Name": "mine"}')
    with pytest.raises(InputError, match="is of another dataset"):
        run_participants(derivatives, tmp_path, model, ["00"])
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("_target_", "os.system", "no head of this bundle"),
        ("_target_", "bundle.process.run_config", "no head of this bundle"),
        ("level", "$__import__('os').abort()", "no head of this bundle"),
        ("atlas", "sha256 0", "was trained with another atlas than AAL3"),
    ],
)
def test_a_record_that_would_run_code_or_has_another_atlas_is_refused(
    model: Path, tmp_path: Path, entry: str, value: str, words: str
):
    shutil.copytree(model.parent, tmp_path, dirs_exist_ok=True)
    record = json.loads(model.with_suffix(".json").read_text())
    record["config"]["network_def"][entry] = value
    (tmp_path / "model.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=words):
        ReleasedModel(tmp_path / "model.pt").entries()


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        (["--participant_label", "01", "sub-02", "1e5", "--model", "m.pt"], ["01", "sub-02", "1e5"]),
        (["--model", "m.pt", "--participant_label", "01,002"], ["01", "002"]),
        (["--model=m.pt"], []),
    ],
)
def test_labels_are_text_with_blanks_or_commas_between(monkeypatch: pytest.MonkeyPatch, words: list, labels: list):
    given: list = []
    monkeypatch.setattr(serving, "run_participants", lambda *values: given.append(values))
    monkeypatch.setattr(sys, "argv", ["scripts", "app", "in", "out", "participant", *words, "--batch_size", "4"])
    main()
    assert given == [("in", "out", "m.pt", labels, None, "AAL3", {"batch_size": 4})]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["subject"], "must be participant or group"),
        (["participant"], "needs --model"),
        (["participant", "01", "--model", "m.pt"], "'01' is one word too many"),
        (["group", "--clip_stride", "4"], "--clip_stride: the level group"),
    ],
)
def test_a_command_line_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: list, sentence: str
):
    monkeypatch.setattr(sys, "argv", ["scripts", "app", "in", "out", *words])
    with pytest.raises(SystemExit):
        main()
    assert sentence in capsys.readouterr().err
