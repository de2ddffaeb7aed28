"""Who is who: found where runs differ between people, at chance where nothing does."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_configs import run, sentence

from bundle.errors import InputError
from bundle.experiments.reidentification import FEATURES, pairs_of, ranks_of


def runs_of(people: int, each: int, frames: int, stride: int = 10) -> list[dict]:
    starts = list(range(0, frames - 10 + 1, stride))
    return [
        {"run_id": f"s{p}_run-{r}", "participant_id": f"s{p}", "starts": starts}
        for p in range(people)
        for r in range(each)
    ]


@given(frames=st.integers(60, 200), stride=st.integers(2, 10), gap=st.integers(0, 15))
def test_halves_never_meet_and_leave_a_gap(frames, stride, gap):
    gallery, probes, parts = pairs_of(runs_of(3, 1, frames, stride), 10, gap)
    assert parts == "halves"
    for first, second in zip(gallery, probes, strict=True):
        assert first.participant == second.participant
        assert first.frames == (first.clips[0]["start"], first.clips[-1]["start"] + 10)
        assert second.frames[0] - first.frames[1] >= gap
        assert min(len(first.clips), len(second.clips)) >= 2
        assert abs(len(first.clips) - len(second.clips)) <= 1


def test_two_runs_of_everybody_are_compared_whole_and_else_halves_of_one():
    gallery, probes, parts = pairs_of(runs_of(2, 2, 40), 10, 5)
    assert parts == "runs"
    assert [part.clips[0]["run_id"] for part in (*gallery, *probes)] == ["s0_run-0", "s1_run-0", "s0_run-1", "s1_run-1"]
    _, _, parts = pairs_of([*runs_of(2, 2, 60), *runs_of(3, 1, 60)[2:]], 10, 5)
    assert parts == "halves"


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (runs_of(1, 2, 60), "one of 1 participants cannot be told from others"),
        (runs_of(2, 1, 30), "s0_run-0 is too short for two halves of two clips"),
    ],
)
def test_too_little_is_refused(runs, message):
    with pytest.raises(InputError, match=message):
        pairs_of(runs, 10, 5)


@given(seed=st.integers(0, 10_000), people=st.integers(2, 9))
def test_ranks_are_those_of_brute_force(seed, people):
    rng = np.random.default_rng(seed)
    gallery, probes = rng.normal(size=(2, people, 4))
    expected = []
    for own, probe in enumerate(probes):
        centred = [row - gallery.mean(0) for row in (*gallery, probe)]
        cosine = [centred[-1] @ row / np.linalg.norm(centred[-1]) / np.linalg.norm(row) for row in centred[:-1]]
        expected.append(sum(cosine[other] >= cosine[own] for other in range(people) if other != own))
    assert ranks_of(gallery, probes).tolist() == expected


def test_features_that_are_all_alike_find_nobody():
    assert ranks_of(np.ones((5, 3)), np.ones((5, 3))).tolist() == [4] * 5


def test_the_config_names_whom_it_finds(store: Path, tmp_path: Path):
    """Every run of the tiny store is noise of its own over one brain: outlines are equal, and tell nothing."""
    options = {"dataset_dir": str(store), "output_dir": str(tmp_path), "clip_stride": 4}
    run("pretrain", **options)
    run("pretrain", "reidentify", **options, gap=2)
    table = pd.read_csv(tmp_path / "reidentification" / "reidentification.csv")
    assert table["features"].unique().tolist() == list(FEATURES)
    assert (table["parts"] == "halves").all()
    assert (table["participants"] == 4).all()
    assert table["chance"].tolist() == [0.25, 1.0] * 4
    assert ((table["low"] <= table["share"]) & (table["share"] <= table["high"])).all()
    outline = table[table["features"] == "brain mask"].set_index("rank")["share"]
    assert outline[1] == 0
    with pytest.raises(RuntimeError) as caught:
        run("pretrain", "reidentify", **options, gap=20)
    assert "is too short for two halves" in sentence(caught.value)
