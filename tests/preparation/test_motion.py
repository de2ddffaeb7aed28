"""Where a run's head motion is found, and that a table without it is no obstacle."""

import pytest

from bundle.preparation.motion import mean_fd, mean_fd_in

RUN = {"participant": {"age": 9}, "confounds": None}


def test_a_participants_column_wins_over_confounds(tmp_path):
    table = tmp_path / "confounds.tsv"
    table.write_text("rot_x\tframewise_displacement\n0\tn/a\n0\t0.1\n0\t0.3\n")
    assert mean_fd(RUN) is None
    assert mean_fd(RUN | {"confounds": table}) == pytest.approx(0.2)
    assert mean_fd({"participant": {"Mean_FD": "0.5"}, "confounds": table}) == 0.5
    assert mean_fd({"participant": {"mean_fd": None}, "confounds": None}) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("framewise_displacement,x\n0.1,1\n0.5,1\n", 0.3),
        ("framewise_displacement\n0.1\n", 0.1),
        ("x\ty\n1\t2\n", None),
        ("framewise_displacement\tx\nn/a\t1\n", None),
        ("", None),
    ],
)
def test_tables_of_every_kind(tmp_path, text, value):
    table = tmp_path / "table.tsv"
    table.write_text(text)
    assert mean_fd_in(table) == (None if value is None else pytest.approx(value))


def test_a_table_that_cannot_be_read_is_a_warning(tmp_path, caplog):
    assert mean_fd_in(tmp_path / "absent.tsv") is None
    (tmp_path / "words.tsv").write_text("framewise_displacement\tx\nfar\t1\n")
    assert mean_fd_in(tmp_path / "words.tsv") is None
    (tmp_path / "binary.tsv").write_bytes(b"\xff\xfe\x00\x81")
    assert mean_fd_in(tmp_path / "binary.tsv") is None
    assert caplog.text.count("tells no head motion") == 3
