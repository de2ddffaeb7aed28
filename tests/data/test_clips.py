"""Lists of clips that are made when they are asked for, against plain lists.

Not covered here: which runs a set has (test_batches.py).
"""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle.data.clips import clips, clips_of


def plain(runs: list[dict], frames: int, stride: int, whole_runs: bool, labels: dict | None) -> list[dict]:
    """The same list, of dictionaries: frame by frame, a clip begins at every stride-th that leaves room for it."""
    items = []
    for run in runs:
        item = {"run_id": run["run_id"], "participant_id": run["participant_id"]}
        item |= {} if labels is None else {"label": labels[run["participant_id"]]}
        starts = [start for start in range(run["frames"]) if start % stride == 0 and start + frames <= run["frames"]]
        items += [item | {"starts": starts}] if whole_runs else [item | {"start": start} for start in starts]
    return items


@st.composite
def cases(draw: st.DrawFn) -> tuple:
    frames, stride = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(frames, 40), max_size=6))
    names = draw(st.lists(st.text("aä-0", min_size=1, max_size=4), min_size=len(lengths), max_size=len(lengths)))
    runs = [
        {"run_id": f"run-{number}", "participant_id": name, "frames": length}
        for number, (name, length) in enumerate(zip(names, lengths, strict=True))
    ]
    labels = {name: float(number) / 3 for number, name in enumerate(names)} if draw(st.booleans()) else None
    return runs, frames, stride, draw(st.booleans()), labels


@given(case=cases(), bounds=st.tuples(*[st.none() | st.integers(-50, 50)] * 2, st.sampled_from([None, 1, 3, -1, -2])))
def test_it_is_the_plain_list(case: tuple, bounds: tuple):
    listed, expected = clips(*case), plain(*case)
    assert list(listed) == expected
    assert len(listed) == len(expected)
    assert listed[slice(*bounds)] == expected[slice(*bounds)]
    for place in range(-len(expected), len(expected)):
        assert listed[place] == expected[place]
        assert {key: type(value) for key, value in listed[place].items()} == {
            key: type(value) for key, value in expected[place].items()
        }
    for place in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            listed[place]
    assert list(pickle.loads(pickle.dumps(listed))) == expected  # as a loader's processes get it on a Mac
    assert listed.clip_count == sum(len(clips_of(item)) for item in expected)
