"""The scripts of docs/cluster: bash reads them, and what they start exists and takes its options.

They run with programs of the same names that write down how they were called. Not covered: Slurm itself.
"""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from bundle.command_line import refuse_unknown_options

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "docs" / "cluster").glob("*.sh"))
SLURM = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "7"}
FAKES = {
    "torchrun": 'eval "$FIRST"; env >"$CALLS/env"\n'
    'printf "%q " "$@" >"$CALLS/new"; mv "$CALLS/new" "$CALLS/started"; eval "$THEN"',
    "srun": 'printf "%q " "$@" >"$CALLS/srun"; while [[ $1 == -* ]]; do shift; done; exec "$@"',
    "scontrol": 'echo "$@" >>"$CALLS/scontrol"; [[ $1 == requeue ]] || printf "n1\\nn2\\n"',
}


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the programs write down how they were called."""
    (tmp_path / "bin").mkdir()
    for name, body in FAKES.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path))
    monkeypatch.setenv("FIRST", "")
    monkeypatch.setenv("THEN", "")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_starts_a_training_that_exists(script: Path, calls: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    subprocess.run(["bash", "-n", str(script)], check=True)
    given = ["STORE", "OUT"] if script.name == "slurm.sh" else ["HEAD", "STORE", "OUT"]
    subprocess.run([str(script), *given], check=True)
    options = parse_args(shlex.split((calls / "started").read_text()))
    assert options.module
    assert options.training_script == "monai.bundle"
    words = options.training_script_args
    refuse_unknown_options(words)
    flags = dict(zip(words[2::2], words[3::2], strict=True))
    assert flags == {
        "--config_file": "['configs/pretrain.json','configs/multi_gpu.json']",
        "--dataset_dir": "STORE",
        "--output_dir": "OUT",
    }
    assert all(Path(name).is_file() for name in ("configs/pretrain.json", "configs/multi_gpu.json"))
    if script.name == "slurm.sh":
        assert (options.nnodes, options.nproc_per_node, options.rdzv_endpoint) == ("2", "4", "n1:29500")
    else:
        assert (options.nnodes, options.rdzv_endpoint) == ("1:4", "HEAD:29500")
    own_store = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in (calls / "env").read_text().splitlines()
    assert own_store or not int(options.max_restarts)


def test_slurm_s_signal_lets_the_training_end_and_queues_the_job_again(calls: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FIRST", 'trap "echo ended >$CALLS/ended; exit 1" TERM')
    monkeypatch.setenv("THEN", "while true; do sleep 0.05; done")
    script = ROOT / "docs" / "cluster" / "slurm.sh"
    process = subprocess.Popen([str(script), "STORE", "OUT"], cwd=ROOT)
    while not (calls / "started").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(120) == 0
    assert (calls / "ended").read_text() == "ended\n"
    assert (calls / "scontrol").read_text().splitlines()[-1] == "requeue 7"


def test_slurm_s_options_are_read_by_slurm():
    """They stand before the first command, where sbatch looks for them."""
    lines = (ROOT / "docs" / "cluster" / "slurm.sh").read_text().splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH "))
    assert all(line.startswith("#") for line in lines[:last])
    assert "#SBATCH --signal=B:USR1@300" in lines
