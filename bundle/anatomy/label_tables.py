"""Tables of labels: what the numbers of a label image are called, and which group each is in."""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from bundle.errors import InputError

OTHER = "other"
"""What the labels of no group are called together, where nothing else is known of them."""
ALL = "all"
"""The word for all groups."""
_NONE = ("", "n/a", "N/A", "nan")  # of no group; BIDS writes n/a


class Groups(NamedTuple):
    """Groups of labels.

    Attributes:
        members: label numbers of each group, by its name, in the table's order.
        rest: what the labels of no group are called together.
    """

    members: dict[str, tuple[int, ...]]
    rest: str


class LabelTable(NamedTuple):
    """What a label table says.

    Attributes:
        names: name of each label number, in the table's order.
        groups: its groups; None where it has no column `group`.
    """

    names: dict[int, str]
    groups: Groups | None


def read_table(table: Path) -> LabelTable:
    """Read names and groups of labels; label 0 is left out.

    Args:
        table: lines of `number name`, tab or blanks between; further fields (colours, codes) are ignored. A header may
            say where they stand: `name`, `index`, `value` or `aal_value` for the number, and `group` (empty or n/a for
            a label of no group).

    Raises:
        InputError: the table does not exist, a line is not like that or repeats a number or name, or there is none.
    """
    if not table.is_file():
        raise InputError(f"the label table {table} does not exist")
    names: dict[int, str] = {}
    members: dict[str, tuple[int, ...]] = {}
    at, name_at, group_at = 0, 1, None  # which fields
    for count, line in enumerate(table.read_text(encoding="utf-8-sig").splitlines(), start=1):
        fields = [field.strip() for field in (line.split("\t") if "\t" in line else line.split())]
        if not fields:
            continue
        if count == 1 and not fields[0].isdigit():
            header = [field.lower() for field in fields]
            at = next((header.index(word) for word in ("index", "value", "aal_value") if word in header), 0)
            name_at = header.index("name") if "name" in header else 1
            group_at = header.index("group") if "group" in header else None
            continue
        if len(fields) <= max(at, name_at) or not fields[at].isdigit():
            raise InputError(f"line {count} of {table} is not `number name`: {line!r}")
        number, name = int(fields[at]), fields[name_at]
        if number in names or name in names.values():
            raise InputError(f"line {count} of {table} repeats label {number} or name {name!r}; remove one")
        if number == 0:
            continue
        names[number] = name
        group = fields[group_at] if group_at is not None and group_at < len(fields) else ""
        if group not in _NONE:
            members[group] = (*members.get(group, ()), number)
    if not names:
        raise InputError(f"the label table {table} holds no line `number name`")
    _refuse_ambiguous(names, members, table)
    return LabelTable(names, Groups(members, OTHER) if members else None)


def _refuse_ambiguous(names: Mapping[int, str], members: Mapping[str, tuple[int, ...]], table: Path) -> None:
    """Raise `InputError` where a region's name would not say which labels are meant."""
    for word in (ALL, OTHER):
        if word in members or (word == ALL and word in names.values()):
            raise InputError(f"{table} calls a group or a label {word!r}, which has a meaning here; rename it")
    numbers = {name: (number,) for number, name in names.items()}
    for group, own in members.items():
        if numbers.get(group, own) != own:
            raise InputError(f"{table} has a group and another label of the name {group!r}; rename one")


def known_groups(names: Mapping[int, str]) -> Groups | None:
    """Groups of labels by their names: those of groups.json (see docs/masks.md), or the networks in Schaefer's names.

    Args:
        names: name of each label number.

    Returns:
        The groups of the one atlas that has all of these names; None if there is none.
    """
    numbers: dict[str, list[int]] = {}  # of both sides
    for number, name in names.items():
        numbers.setdefault(_without_side(name), []).append(number)
    for table in _tables().values():
        if numbers.keys() <= {name for own in (*table["groups"].values(), table["without"]) for name in own}:
            members = {
                group: tuple(sorted(number for name in own for number in numbers.get(name, ())))
                for group, own in table["groups"].items()
            }
            return Groups(members, table["rest"])
    networks = {number: re.match(r"\d+Networks_[LR]H_([A-Za-z]+)", name) for number, name in names.items()}
    found: dict[str, tuple[int, ...]] = {}
    for number, network in networks.items():
        if network is None:
            return None
        found[network[1]] = (*found.get(network[1], ()), number)
    return Groups(found, OTHER)


def _without_side(name: str) -> str:
    """A label's name without its side, spelt as nilearn spells Harvard-Oxford."""
    return re.sub(r"^(Left|Right|L|R) |_[LR]$", "", name).replace("Operculum", "Opercular")


@cache
def _tables() -> dict[str, dict]:
    return json.loads(Path(__file__).with_name("groups.json").read_text(encoding="utf-8"))
