"""The garbage collector around many records. Not covered: `parallel_map`, see tests/preparation/test_prepare.py."""

import gc
from contextlib import suppress

import pytest

from bundle.workers import uncollected


@pytest.mark.parametrize("before", [True, False])
def test_the_collector_rests_within_and_is_afterwards_as_it_was(before: bool):
    was = gc.isenabled()
    try:
        (gc.enable if before else gc.disable)()
        with suppress(KeyError), uncollected():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == before
    finally:
        (gc.enable if was else gc.disable)()


def test_what_was_there_is_left_alone_and_what_comes_later_is_collected():
    gc.unfreeze()
    with uncollected():
        kept = [[number] for number in range(1000)]
    assert gc.get_freeze_count() > len(kept)
    later: list = []
    later.append(later)  # a cycle
    number = id(later)
    assert any(id(one) == number for one in gc.get_objects())
    del later
    assert gc.collect() >= 1
