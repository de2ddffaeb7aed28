"""The audit log: whole lines, each of which holds the hash of the one before it. Not covered: a disk that lies."""

import errno
import json
import os
import subprocess
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle.deploy.audit import START, append_line, check_log
from bundle.errors import InputError
from bundle.files import WriteError


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "audit.jsonl"
    for number in range(3):
        append_line(path, {"status": "scored", "number": number})
    return path


def test_each_line_holds_the_hash_of_the_one_before_it(log: Path, tmp_path: Path):
    lines = log.read_text().splitlines()
    told = [START]
    for line in lines:  # sha256sum, as somebody without this software would check it
        (tmp_path / "line").write_text(line)
        found = subprocess.run(["sha256sum", tmp_path / "line"], capture_output=True, text=True, check=True)
        told.append(found.stdout.split()[0])
    assert [json.loads(line)["previous"] for line in lines] == told[:-1]
    assert [json.loads(line)["number"] for line in lines] == [0, 1, 2]
    assert check_log(log) == (3, told[-1])


@given(line=st.integers(0, 2), place=st.integers(0, 200), bit=st.integers(0, 7))
def test_no_bit_can_be_turned_unseen(tmp_path_factory: pytest.TempPathFactory, line: int, place: int, bit: int):
    path = tmp_path_factory.mktemp("log") / "audit.jsonl"
    for number in range(3):
        append_line(path, {"number": number})
    whole = check_log(path)
    lines = [bytearray(one) for one in path.read_bytes().splitlines()]
    lines[line][place % len(lines[line])] ^= 1 << bit
    path.write_bytes(b"\n".join(lines) + b"\n")
    if line < 2:
        with pytest.raises(InputError, match=r"audit.jsonl: line \d"):
            check_log(path)
    else:  # of the last line only the hash that was kept elsewhere can tell
        with suppress(InputError):
            assert check_log(path) != whole


@pytest.mark.parametrize("order", [[0, 2], [1, 0, 2], [0, 1, 1, 2], [1, 2]])
def test_lines_taken_out_put_in_or_exchanged_are_noticed(log: Path, order: list):
    lines = log.read_text().splitlines()
    log.write_text("".join(f"{lines[number]}\n" for number in order))
    with pytest.raises(InputError, match=r"line \d does not follow the line before it"):
        check_log(log)


def test_a_line_that_a_killed_process_left_is_reported_and_others_go_on_after_it(log: Path):
    whole = log.read_text()
    log.write_text(whole + '{"time": "2026')
    append_line(log, {"number": 4})
    lines = log.read_text().splitlines()
    assert len(lines) == 5
    assert json.loads(lines[-1])["previous"] == sha256(b'{"time": "2026').hexdigest()
    with pytest.raises(InputError, match="line 4 is not whole"):
        check_log(log)


@pytest.mark.parametrize("failing", [OSError(errno.ENOSPC, "No space left on device"), None])
def test_a_full_disk_leaves_the_log_as_it_was(log: Path, monkeypatch: pytest.MonkeyPatch, failing: OSError | None):
    before, write = log.read_bytes(), os.write

    def half(file: int, content: bytes) -> int:
        written = write(file, content[:10])
        if failing:
            raise failing
        return written

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(WriteError, match=r"audit.jsonl cannot be written \(No space left on device\)"):
        append_line(log, {"number": 3})
    assert log.read_bytes() == before


def _append_ten(path: Path, number: int) -> None:
    for _ in range(10):
        append_line(path, {"number": number})


def test_several_processes_may_write_at_once(tmp_path: Path):
    path = tmp_path / "audit.jsonl"
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(_append_ten, path, number) for number in range(3)]:
            done.result()
    assert check_log(path)[0] == 30


def test_a_log_that_is_not_there_is_one_sentence(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be read"):
        check_log(tmp_path / "audit.jsonl")
