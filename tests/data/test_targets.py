"""Columns as targets: told from their values, or refused in one sentence."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle.data.splits import SETS, count_table, make_splits
from bundle.data.targets import strata_of, target_of
from bundle.errors import InputError


def runs_of(values: list, column: str = "group", sites: int = 1) -> list[dict]:
    return [
        {"participant_id": f"s{i:03d}", "site": f"site{i % sites}", "diagnosis": None, "participant": {column: value}}
        for i, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("values", "kind", "classes"),
    [
        (["patient", "control", "control"], "binary", ("control", "patient")),
        ([1, 2, 2], "binary", ("1", "2")),
        ([1.0, 2.0, math.nan, None, "n/a"], "binary", ("1", "2")),  # how pandas writes whole numbers beside gaps
        ([True, False], "binary", ("False", "True")),
        (["b", "a", "c"] * 4, "multiclass", ("a", "b", "c")),
        ([9.5, 10.0, 11.0], "regression", ()),
        (list(range(21)), "regression", ()),
    ],
)
def test_plain_columns_say_what_they_are(values, kind, classes):
    target = target_of(runs_of(values), "group")
    assert (target.kind, target.classes) == (kind, classes)
    assert len(target.labels) + len(target.missing) == len(values)


def test_labels_are_positions_in_the_classes_or_the_values():
    target = target_of(runs_of(["c", None, "a", "b"] * 4), "group", classes=["b", "c", "a"])
    assert [target.labels.get(f"s{i:03d}") for i in range(4)] == [1, None, 2, 0]
    assert target.missing == ("s001", "s005", "s009", "s013")
    ages = target_of(runs_of([8.25, 30, None]), "group", task="regression")
    assert ages.labels == {"s000": 8.25, "s001": 30.0}


def test_classes_choose_and_order_and_leave_the_others_out():
    values = ["TDC", "ADHD-Combined", "ADHD-Inattentive", "ADHD-Hyperactive/Impulsive"]
    target = target_of(runs_of(values, "DX"), "DX", classes=["TDC", "ADHD-Inattentive"])
    assert target.kind == "binary"
    assert target.labels == {"s000": 0.0, "s002": 1.0}
    assert target.missing == ("s001", "s003")


@pytest.mark.parametrize(
    ("word", "label"),
    [("0", 0), (1, 1), ("1.0", 1), ("Control", 0), ("TDC", 0), ("adhd", 1), ("ADHD-Combined", 1), (" ADHD ", 1)],
)
def test_words_of_adhd_200_are_control_and_adhd(word, label):
    runs = [run | {"diagnosis": value} for run, value in zip(runs_of([0] * 3), (word, "tdc", "adhd"), strict=True)]
    target = target_of(runs)
    assert target.classes == ("control", "adhd")
    assert target.labels["s000"] == label


def test_a_diagnosis_of_other_words_is_taken_as_it_is():
    runs = [run | {"diagnosis": word} for run, word in zip(runs_of([0] * 2), ("autism", "control"), strict=True)]
    assert target_of(runs).classes == ("autism", "control")
    assert target_of(runs, classes=["control", "autism"]).labels == {"s000": 1.0, "s001": 0.0}


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([1, 2, 3], {}, "whole numbers, which may be classes or amounts; say which, with --task"),
        (["a", "a"], {}, "'group' is a for everybody"),
        ([2.5, 2.5], {"task": "regression"}, "is 2.5 for everybody"),
        ([None, math.nan], {}, "has no value; fill in the participants' table"),
        ([f"p{i % 60}" for i in range(70)], {}, "has 60 classes for 70 participants; is it an amount"),
        (["a", "b", "c"] * 4, {"task": "binary"}, "has 3 values, such as a, b, c; name two of them with --classes"),
        (["a", "b"], {"task": "multiclass"}, "has two values, a and b; that is --task binary"),
        (["1.5", "tall"], {"task": "regression"}, "holds 'tall', which is no finite number"),
        ([1.0, math.inf], {"task": "regression"}, "holds 'inf', which is no finite number"),
        (["a", "b"], {"classes": ["a", "x"]}, "has no value 'x'; there are a, b"),
        (["a", "b"], {"classes": ["a", "a"]}, "cannot have one class twice"),
        ([1.5, 2.5], {"task": "regression", "classes": ["1.5"]}, "which has no classes"),
        (["a", "b"], {"task": "ranking"}, "task must be one of binary, multiclass, regression, not 'ranking'"),
    ],
)
def test_what_cannot_be_a_target_is_refused(values, options, message):
    with pytest.raises(InputError, match=message):
        target_of(runs_of(values), "group", **options)


def test_an_absent_column_is_refused_with_its_neighbours_and_capitals_do_not_matter():
    runs = runs_of([8.5, 9.0], "Age")
    assert target_of(runs, "age").kind == "regression"
    with pytest.raises(InputError, match="no column 'Aeg'; there are Age"):
        target_of(runs, "Aeg")
    both = [run | {"participant": {"Age": 1, "AGE": 2}} for run in runs]
    with pytest.raises(InputError, match="no column 'age'"):
        target_of(both, "age")


def test_two_values_of_one_participant_are_refused():
    first, second = runs_of([8.5, 9.0], "age")
    with pytest.raises(InputError, match=r"participant s000 has two values of 'age', 8\.5 and 9\.0"):
        target_of([first, second | {"participant_id": "s000"}], "age")


@settings(max_examples=30, deadline=None)
@given(ages=st.lists(st.integers(60, 220), min_size=60, max_size=90), folds=st.integers(3, 5), seed=st.integers(0, 99))
def test_splits_of_a_number_hold_all_parts_of_every_sites_range(ages, folds, seed):
    """Each site's values in order, cut into equal parts: every part is dealt evenly over the folds."""
    runs = runs_of([age / 10 for age in ages], "age", sites=2)
    if len(set(ages)) < 2:
        return
    sets = make_splits(runs, folds, seed=seed, target="age", task="regression")["sets"]
    for site in ("site0", "site1"):
        own = sorted((r["participant"]["age"], r["participant_id"]) for r in runs if r["site"] == site)
        for part in np.array_split([name for _, name in own], 4):
            counts = [len(set(part.tolist()) & set(sets[name])) for name in SETS]
            assert sum(counts) == len(part)
            assert all(len(part) // folds <= count <= -(-len(part) // folds) for count in counts[1:])


def test_few_participants_are_cut_into_fewer_parts():
    strata = strata_of(runs_of([float(i) + 0.5 for i in range(12)], "age", sites=2), "age", fewest=3)
    assert set(strata.values()) == {(f"site{s}", f"part {p} of 2") for s in (0, 1) for p in (1, 2)}
    assert strata["s000"] == ("site0", "part 1 of 2")
    assert strata["s011"] == ("site1", "part 2 of 2")


def test_who_has_no_value_is_dealt_out_too():
    runs = runs_of(["a", "b", None] * 6)
    rows = count_table(make_splits(runs, 3, target="group"), runs, target="group")
    assert {(row["set"], row["group"], row["participants"]) for row in rows} == {
        (name, group, 2) for name in SETS for group in ("a", "b", "n/a")
    }


def test_without_any_diagnosis_sites_alone_are_split_by():
    runs = runs_of([None] * 12, sites=2)
    assert set(strata_of(runs).values()) == {("site0", "n/a"), ("site1", "n/a")}
    with pytest.raises(InputError, match="no column 'age'"):
        strata_of(runs, "age")
