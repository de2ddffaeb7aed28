"""Subject splits: disjoint, stratified, seeded, tamper-evident."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle.data.splits import (
    SETS,
    check_participants,
    count_table,
    load_splits,
    make_splits,
    save_all_splits,
    save_splits,
)
from bundle.errors import InputError


def cohort(per_group: int, sites: int = 3) -> list[dict]:
    return [
        {"participant_id": f"sub-{site}{dx}{i:03d}", "site": f"site{site}", "diagnosis": dx}
        for site in range(sites)
        for dx in (0, 1)
        for i in range(per_group)
    ]


def test_ten_folds_give_8_to_1_to_1_within_every_site_and_diagnosis():
    splits = make_splits(cohort(20), folds=10)
    rows = count_table(splits, cohort(20))
    assert {(r["set"], r["participants"]) for r in rows} == {("train", 16), ("validation", 2), ("test", 2)}
    assert len(rows) == 3 * 3 * 2  # every set holds every site and diagnosis


@settings(max_examples=25, deadline=None)
@given(per_group=st.integers(4, 12), sites=st.integers(1, 4), folds=st.integers(3, 4), seed=st.integers(0, 10**6))
def test_every_participant_is_in_one_set_and_is_tested_once_over_all_folds(per_group, sites, folds, seed):
    runs = cohort(per_group, sites)
    tested: Counter[str] = Counter()
    for fold in range(folds):
        sets = make_splits(runs, folds=folds, fold=fold, seed=seed)["sets"]
        everyone = [p for name in SETS for p in sets[name]]
        assert sorted(everyone) == sorted(r["participant_id"] for r in runs)
        tested.update(sets["test"])
    assert set(tested.values()) == {1}
    assert len(tested) == len(runs)


def test_same_seed_same_sets_and_other_seed_other_sets():
    runs = cohort(20)
    assert make_splits(runs, seed=3) == make_splits(list(reversed(runs)), seed=3)
    assert make_splits(runs, seed=3)["sets"] != make_splits(runs, seed=4)["sets"]


def test_several_runs_of_a_participant_stay_in_one_set():
    runs = cohort(10)
    assert make_splits(runs + runs, folds=5) == make_splits(runs, folds=5)


def test_leave_one_site_out_tests_the_whole_site_and_only_it():
    runs = cohort(8)
    sets = make_splits(runs, folds=4, test_site="site1")["sets"]
    assert sets["test"] == sorted(r["participant_id"] for r in runs if r["site"] == "site1")


@pytest.mark.parametrize("odd", [[0, 0, 0], [1]])
@pytest.mark.parametrize("name", ["west", ""])
def test_a_site_of_one_class_or_without_a_name_is_left_out_like_any_other(odd, name):
    extra = [{"participant_id": f"x{i}", "site": name, "diagnosis": dx} for i, dx in enumerate(odd)]
    sets = make_splits(cohort(8) + extra, folds=4, test_site=name)["sets"]
    assert sets["test"] == [row["participant_id"] for row in extra]
    assert len(sets["train"]) + len(sets["validation"]) == len(cohort(8))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"folds": 2}, "folds must be 3 or more"),
        ({"folds": 5, "fold": 5}, "fold must be 0 to 4"),
        ({"folds": 40}, "smaller --folds"),
        ({"folds": 9}, "smaller --folds"),
        ({"test_site": "nowhere"}, "sites are"),
    ],
)
def test_impossible_splits_are_refused_in_one_sentence(kwargs, words):
    with pytest.raises(InputError, match=words):
        make_splits(cohort(5), **kwargs)


def test_rows_of_one_participant_that_disagree_are_refused():
    runs = cohort(10)
    with pytest.raises(InputError, match="has two values of 'diagnosis', 0 and 1"):
        make_splits([*runs, runs[0] | {"diagnosis": 1 - runs[0]["diagnosis"]}])
    with pytest.raises(InputError, match="has two sites, site0 and elsewhere"):
        make_splits([*runs, runs[0] | {"site": "elsewhere"}])


def test_file_round_trip_and_participants_check(tmp_path):
    runs = cohort(10)
    splits = make_splits(runs)
    save_splits(splits, tmp_path / "deep" / "splits.json")
    loaded = load_splits(tmp_path / "deep" / "splits.json")
    assert loaded == splits
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["splits.json"]
    ids = {r["participant_id"] for r in runs}
    check_participants(loaded, ids, "splits.json")
    with pytest.raises(InputError, match="sub-new of the store is in no set"):
        check_participants(loaded, ids | {"sub-new"}, "splits.json")
    with pytest.raises(InputError, match="is not in the store"):
        check_participants(loaded, sorted(ids)[1:], "splits.json")


def move(sets: dict) -> None:
    sets["train"].append(sets["test"].pop())


def leak(sets: dict) -> None:
    sets["train"].append(sets["test"][0])


@pytest.mark.parametrize(("change", "words"), [(move, "sha256"), (leak, "both train and test")])
def test_edited_files_are_refused(tmp_path, change, words):
    splits = make_splits(cohort(10))
    change(splits["sets"])
    (tmp_path / "s.json").write_text(json.dumps(splits))
    with pytest.raises(InputError, match=words):
        load_splits(tmp_path / "s.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sets": 3}'])
def test_files_that_are_no_split_file_are_refused(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(InputError, match="not a split file"):
        load_splits(tmp_path / "s.json")


def test_absent_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no split file"):
        load_splits(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("by_site", "names"),
    [(False, [f"fold-{fold}.json" for fold in range(4)]), (True, [f"site-site{site}.json" for site in range(3)])],
)
def test_all_folds_or_all_sites_test_everyone_once(tmp_path, by_site, names):
    counts = save_all_splits(cohort(8), tmp_path, folds=4, seed=1, by_site=by_site)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    splits = [load_splits(tmp_path / name) for name in names]
    tested = [participant for made in splits for participant in made["sets"]["test"]]
    assert sorted(tested) == sorted(run["participant_id"] for run in cohort(8))
    if by_site:
        assert [{p[4] for p in made["sets"]["test"]} for made in splits] == [{"0"}, {"1"}, {"2"}]
    assert sum(row["participants"] for row in counts) == len(names) * len(cohort(8))
    assert {row["file"] for row in counts} == set(names)


def test_one_site_cannot_be_left_out(tmp_path):
    with pytest.raises(InputError, match="only the site site0"):
        save_all_splits(cohort(8, sites=1), tmp_path, folds=4, by_site=True)
