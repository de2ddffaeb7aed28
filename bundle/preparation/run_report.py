"""The runs that preflight and preparation leave behind: a TSV for machines, a page with a card per run for people."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bundle.files import write_text
from bundle.pages import embedded, render
from bundle.preparation.pictures import region_colours

KINDS = ("failed", "excluded", "warned", "good")  # worst first
COVERAGE = "coverage_"
"""How the columns begin that hold the share of a region, one of the atlas's groups, that a run covers."""
MOST_REGIONS = 12
"""How many regions the page shows, those that are covered least; the table has all."""
MOST_CARDS = 1000
"""How many runs have a card on the page, the worst; browsers become slow with more, and the table has all."""
_DETAILS = ("voxels", "mean", "sd", "source", "source_sha256")


def write(
    rows: Sequence[Mapping[str, Any]],
    folder: str | Path,
    tsv: str,
    page: str,
    title: str,
    pictures: Mapping[str, bytes] | None = None,
    low: Mapping[str, float] | None = None,
) -> None:
    """Write a table of runs as TSV, in the runs' order, and as one self-contained page, worst first.

    Args:
        rows: one per run, with "run_id", "status", "reason" and "warnings".
        folder: where both go.
        tsv: name of the table.
        page: name of the page.
        title: the page's title.
        pictures: WebP bytes by run id, each shown on its run's card; None: the page says how to get some.
        low: values, by the beginning of a column's name, below which the page marks it as low.

    Raises:
        WriteError: the folder cannot be written.
    """
    write_text(Path(folder) / tsv, pd.DataFrame(rows).to_csv(sep="\t", index=False))
    kinds = Counter(map(kind_of, rows))
    context = {
        "title": title,
        "tsv": tsv,
        "runs": len(rows),
        "kinds": {kind: kinds[kind] for kind in KINDS},
        "rugs": rugs(rows, low or {}),
    }
    write_text(Path(folder) / page, render("runs.html.j2", **context, **cards(shown(rows), pictures, low or {})))


def shown(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that have a card on the page, the worst first; of runs alike, those that were not current come first."""
    order = sorted(rows, key=lambda row: (KINDS.index(kind_of(row)), row["status"] == "current"))
    return order[:MOST_CARDS]


def cards(
    rows: Sequence[Mapping[str, Any]], pictures: Mapping[str, bytes] | None, low: Mapping[str, float]
) -> dict[str, Any]:
    """What a page has to know to show a card per run, worst first: "cards", "pictures" and "colours"; see `write`."""
    regions = _regions(rows)
    worst = sorted(rows, key=lambda row: KINDS.index(kind_of(row)))
    return {
        "cards": [_card(row, regions, (pictures or {}).get(row["run_id"]), low) for row in worst],
        "pictures": pictures is not None,
        "colours": region_colours(regions),
    }


def kind_of(row: Mapping[str, Any]) -> str:
    """One of `KINDS`: how a run is shown."""
    return row["status"] if row["status"] in KINDS else "warned" if row["warnings"] else "good"


def _regions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The regions of which the rows say how much is covered, in order."""
    columns = dict.fromkeys(column for row in rows for column in row if column.startswith(COVERAGE))
    return [column.removeprefix(COVERAGE) for column in columns]


def _least_covered(shares: Mapping[str, float | None]) -> list[str]:
    """The regions that the page shows, in the order of `shares`; those without a share come last."""
    order = sorted(shares, key=lambda name: (shares[name] is None, shares[name]))[:MOST_REGIONS]
    return [name for name in shares if name in order]


def _card(
    row: Mapping[str, Any], regions: Sequence[str], picture: bytes | None, low: Mapping[str, float]
) -> dict[str, Any]:
    bars = {name: _bar(name, row, f"{COVERAGE}{name}", low) for name in regions}
    shown = [bars[name] for name in _least_covered({name: bar["share"] for name, bar in bars.items()})]
    return {
        "row": {"participant_id": "–", "site": None, "diagnosis": None, **row},
        "kind": kind_of(row),
        "measured": known(row.get("frames")),
        "bars": shown,
        "overlap": _bar("whole brain", row, "mni_overlap", low),
        "least": min((bar["share"] for bar in bars.values() if bar["share"] is not None), default=None),
        "details": {name: row[name] for name in _DETAILS if known(row.get(name))},
        "picture": picture and embedded(picture, "webp"),
    }


def _bar(name: str, row: Mapping[str, Any], column: str, low: Mapping[str, float]) -> dict[str, Any]:
    share = row.get(column)
    share = share if known(share) else None
    return {"name": name, "share": share, "low": share is not None and share < limit_of(column, low)}


def limit_of(column: str, low: Mapping[str, float]) -> float:
    """The value below which a column is marked as low; 0 for none."""
    return next((value for start, value in low.items() if column.startswith(start)), 0.0)


def known(value: Any) -> bool:
    """Whether there is a value: neither None nor NaN."""
    return value is not None and not pd.isna(value)


def _measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Columns of numbers that the page shows of all runs: their names, and "%" for shares, or a unit."""
    found = ((name, _numbers(rows, f"{COVERAGE}{name}")) for name in _regions(rows))
    shares = {name: None if np.isnan(numbers).all() else float(np.nanmin(numbers)) for name, numbers in found}
    return {
        "mni_overlap": ("MNI brain covered", "%"),
        **{f"{COVERAGE}{name}": (f"{name} covered", "%") for name in _least_covered(shares)},
        "frames_in": ("frames acquired", ""),
        "frames": ("frames prepared", ""),
        "tr_in": ("TR", "s"),
        "mean_fd": ("mean framewise displacement", "mm"),
    }


def rugs(
    rows: Sequence[Mapping[str, Any]],
    low: Mapping[str, float],
    measures: Mapping[str, tuple[str, str]] | None = None,
) -> list[dict[str, Any]]:
    """One line per measure that any run has: its range, and a stroke for each run.

    Args:
        rows: one per run.
        low: see `write`.
        measures: name, and "%" for shares or a unit, by column of numbers; None takes those of runs.

    Returns:
        "name", "unit", "least", "median" and "most", "limit" (None, or where low values end) and "strokes" (positions
        by kind of run); positions are 0 to 1000 along the axis, which is 0 to 100 % for shares, else least to most.
    """
    kinds = np.array([kind_of(row) for row in rows])
    lines = []
    for column, (name, unit) in (_measures(rows) if measures is None else measures).items():
        numbers = _numbers(rows, column)
        has = ~np.isnan(numbers)
        if not has.any():
            continue
        least, most = float(numbers[has].min()), float(numbers[has].max())
        start, end = (0.0, 1.0) if unit == "%" else (least, most)
        places = ((numbers - start) * (1000 / (end - start))).round(1) if end > start else np.full(len(rows), 500.0)
        strokes = {kind: np.unique(places[has & (kinds == kind)]).tolist() for kind in KINDS[::-1]}
        limit = limit_of(column, low)
        lines.append(
            {
                "name": name,
                "unit": unit,
                "least": least,
                "median": float(np.median(numbers[has])),
                "most": most,
                "limit": 1000 * limit if unit == "%" and limit else None,
                "strokes": {kind: found for kind, found in strokes.items() if found},
            }
        )
    return lines


def _numbers(rows: Sequence[Mapping[str, Any]], column: str) -> NDArray[np.float64]:
    """A column of numbers, NaN where a row has none."""
    return np.array([row.get(column) for row in rows], dtype=np.float64)
