"""Two trainings that differ in anything that shapes the weights never share a checkpoint.

Overlays are taken in pairs, and every entry of the configs is changed in turn. Not covered: that entries said not to
shape weights do not; `CANNOT_SHAPE` gives the reason for each.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser
from tiny_configs import CONFIGS, ROOT

from bundle.anatomy.atlas import load_atlas
from bundle.errors import InputError
from bundle.training.provenance import CANNOT_SHAPE, Provenance, entries, parser_at_work, resolved_config

MASKS = sorted(path.stem for path in (CONFIGS / "masks").glob("*.json"))
VARIANTS = [
    ("pretrain",),
    ("pretrain", "demo"),
    ("pretrain", "augment"),
    *(("pretrain", f"masks/{name}") for name in MASKS),
]


def merged(*names: str) -> dict[str, Any]:
    return ConfigParser.load_config_files([str(CONFIGS / f"{name}.json") for name in names])


def facts(config: dict[str, Any], folder: str = "store") -> Provenance:
    parser = ConfigParser(json.loads(json.dumps(config)))
    parser.update({"bundle_root": str(ROOT), "dataset_dir": folder, "output_dir": folder})
    parser.parse()
    return Provenance(config=resolved_config(parser))


@pytest.mark.parametrize(("one", "other"), itertools.combinations(VARIANTS, 2), ids=lambda names: names[-1])
def test_no_two_overlays_share_a_checkpoint(one: tuple[str, ...], other: tuple[str, ...]):
    first, second = facts(merged(*one)), facts(merged(*other))
    with pytest.raises(InputError, match="was made with"):
        second.require(first.facts, "last.pt")
    first.require(facts(merged(*one)).facts, "last.pt")


def leaves(content: Any, path: tuple = ()) -> Iterator[tuple]:
    if isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from leaves(content[key], (*path, key))
    else:
        yield path


def changed(value: Any) -> Any:
    """Another value: of an expression, the same with another text; of a reference, a word."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"$({value[1:]}) or 0" if value.startswith("$") else f"{value.strip('@%')} other"


@pytest.mark.parametrize("name", ["pretrain", "train"])
def test_a_change_of_any_entry_is_seen_unless_it_is_named(name: str):
    config = merged(name)
    before = facts(config).facts["config"]
    seen, unseen = [], []
    for path in leaves(config):
        twin = json.loads(json.dumps(config))
        place = twin
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = changed(place[path[-1]])
        entry = "#".join(map(str, path))
        if path[0] in ("imports", "bundle_root", "dataset_dir", "output_dir"):  # the test sets the folders itself
            continue
        (seen if facts(twin).facts["config"] != before else unseen).append(entry)
    named = [entry for entry in unseen if any(entry == key or entry.startswith(f"{key}#") for key in CANNOT_SHAPE)]
    # an expression of plain values counts by its value, which the change above leaves as it is
    by_value = ["precision", "train#preprocessing#random", "outputs"]
    assert sorted(set(unseen) - set(named) - set(by_value)) == []
    assert len(seen) > 60
    assert not [entry for entry in seen if entry in CANNOT_SHAPE]


@pytest.mark.parametrize("entry", ["mask#where", "mask_ratio", "mask#tube", "clip_stride", "precision", "val_interval"])
def test_what_was_not_seen_once_is_refused_by_name_with_both_values(entry: str):
    config = merged("pretrain", "masks/random_random")
    parser = ConfigParser(json.loads(json.dumps(config)))
    other = {"mask#where": "brain", "mask_ratio": 0.5, "mask#tube": True, "clip_stride": 7, "precision": "bf16"}
    was = facts(config)
    parser[entry] = other.get(entry, 3)
    before = dict(entries(was.facts["config"]))[entry]
    with pytest.raises(InputError) as caught:
        facts(parser.config).require(was.facts, "last.pt")
    assert str(caught.value).startswith(
        f"last.pt: was made with {entry} {before!r}, but here it is {other.get(entry, 3)!r}"
    )


def test_folders_do_not_count_and_files_count_by_their_content(tmp_path: Path):
    config = merged("pretrain")
    facts(config, "here").require(facts(config, "there").facts, "last.pt")
    for name, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / f"{name}.txt").write_text(content)
    first, same, other = (facts(config | {"regions": str(tmp_path / f"{name}.txt")}) for name in "abc")
    same.require(first.facts, "last.pt")
    with pytest.raises(InputError, match="was made with regions 'sha256 6b86"):
        other.require(first.facts, "last.pt")


def test_an_atlas_counts_by_its_labels_names_and_groups_wherever_it_lies(tmp_path: Path):
    labels = np.zeros((20, 20, 20), np.int16)
    labels[:10], labels[10:] = 1, 2
    tables = {"a": ["x", "y"], "b": ["x", "y"], "grouped": ["x", "x"], "renamed": ["x", "y"]}
    config, made = merged("pretrain", "masks/region_tubes"), {}
    for name, groups in tables.items():
        nib.save(
            nib.Nifti1Image(labels, nib.affines.from_matvec(np.eye(3), (-10, -30, 10))), tmp_path / f"{name}.nii.gz"
        )
        second = "two" if name == "renamed" else "b"
        (tmp_path / f"{name}.tsv").write_text(f"index\tname\tgroup\n1\ta\t{groups[0]}\n2\t{second}\t{groups[1]}\n")
        made[name] = facts(config | {"atlas": str(tmp_path / f"{name}.nii.gz")})
    made["b"].require(made["a"].facts, "last.pt")
    for name in ("grouped", "renamed"):
        with pytest.raises(InputError, match="was made with atlas 'sha256 "):
            made[name].require(made["a"].facts, "last.pt")
    aal3 = facts(config).facts["config"]
    assert aal3["atlas"] == aal3["mask"]["atlas"] == f"sha256 {load_atlas().sha256}"


def test_a_fact_that_one_side_lacks_is_a_difference_unless_it_may_be_more():
    first, more = Provenance(config={"seed": 0}), Provenance(config={"seed": 0, "ratio": 0.1})
    with pytest.raises(InputError, match=r"made with ratio nothing, but here it is 0\.1"):
        more.require(first.facts, "last.pt")
    more.require(first.facts, "last.pt", more_is_fine=True)
    with pytest.raises(InputError, match=r"made with ratio 0\.1, but here it is nothing"):
        first.require(more.facts, "last.pt", more_is_fine=True)


def test_the_parser_at_work_is_the_one_that_makes_the_entry():
    config = {"seed": 3, "found": {"_target_": "bundle.training.provenance.parser_at_work"}, "again": "$@found"}
    parser = ConfigParser(config)
    assert parser.get_parsed_content("again") is parser
    with pytest.raises(RuntimeError, match="cannot be made outside"):
        parser_at_work()
