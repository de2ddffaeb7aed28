"""The garbage collector around many records.

Not covered: `parallel_map`, see tests/preparation/test_prepare.py and tests/test_process.py.
"""

import gc
import weakref
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


class Node:
    """An object that refers to itself: the collector alone can free it."""

    def __init__(self) -> None:
        self.itself = self


def test_what_was_there_is_old_and_still_collected():
    frozen = gc.get_freeze_count()
    before = Node()
    seen = weakref.ref(before)
    with uncollected():
        kept = [[number] for number in range(1000)]
        within = weakref.ref(Node())
        assert within() is not None
    assert gc.get_freeze_count() <= frozen
    assert {id(one) for one in kept} <= {id(one) for one in gc.get_objects(generation=2)}
    del before
    gc.collect()
    assert seen() is None
    assert within() is None
