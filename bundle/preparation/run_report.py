"""The table of runs that preflight and preparation leave behind: TSV for machines, one HTML file for people."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bundle.files import write_text

_ORDER = {"failed": 0, "excluded": 1}
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em }}
table {{ border-collapse: collapse }}
th {{ cursor: pointer; background: #eee; position: sticky; top: 0 }}
th, td {{ border: 1px solid #ccc; padding: .2em .5em; text-align: left; white-space: nowrap }}
td.text {{ white-space: normal; min-width: 24em }}
tr.failed {{ background: #fdd }} tr.excluded {{ background: #fed }} tr.warned {{ background: #ffd }}
figure {{ display: inline-block; margin: .5em }}
</style>
<h1>{title}</h1>
<p>{counts}. Click a heading to sort; failures and warnings come first.</p>
<table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table>
{pictures}
<script>
document.querySelectorAll("th").forEach((th, column) => th.addEventListener("click", () => {{
  const body = document.querySelector("tbody"), up = th.dataset.up = th.dataset.up === "1" ? "" : "1";
  const key = row => row.cells[column].dataset.value;
  const compare = (a, b) => a !== "" && b !== "" && !isNaN(a) && !isNaN(b) ? a - b : a.localeCompare(b);
  [...body.rows].sort((a, b) => compare(key(a), key(b)) * (up ? 1 : -1)).forEach(row => body.append(row));
}}));
</script></html>
"""


def write(
    rows: Sequence[Mapping[str, Any]],
    folder: str | Path,
    tsv: str,
    page: str,
    title: str,
    pictures: Mapping[str, bytes] | None = None,
) -> None:
    """Write a table of runs as TSV, in the runs' order, and as one self-contained page, worst first.

    Args:
        rows: one per run, with "run_id", "status", "reason" and "warnings".
        folder: where both go.
        tsv: name of the table.
        page: name of the page.
        title: the page's title.
        pictures: PNG bytes by run id, shown below the table.

    Raises:
        WriteError: the folder cannot be written.
    """
    write_text(Path(folder) / tsv, pd.DataFrame(rows).to_csv(sep="\t", index=False))
    write_text(Path(folder) / page, _html(rows, title, pictures or {}))


def _html(rows: Sequence[Mapping[str, Any]], title: str, pictures: Mapping[str, bytes]) -> str:
    worst = sorted(rows, key=lambda row: (_ORDER.get(row["status"], 2), not row["warnings"]))
    columns = list(dict.fromkeys(key for row in worst for key in row))
    counts = pd.Series([row["status"] for row in rows]).value_counts().sort_index()
    warned = sum(bool(row["warnings"]) for row in rows)
    figures = [_figure(row, pictures[row["run_id"]]) for row in worst if row["run_id"] in pictures]
    return _PAGE.format(
        title=html.escape(title),
        counts=", ".join(f"{count} {status}" for status, count in counts.items()) + f", {warned} with warnings",
        head="".join(f"<th>{html.escape(column)}</th>" for column in columns),
        body="\n".join(_row(row, columns, row["run_id"] in pictures) for row in worst),
        pictures="\n".join(figures),
    )


def _figure(row: Mapping[str, Any], png: bytes) -> str:
    name = html.escape(row["run_id"])
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    image = f'<img alt="mean BOLD with contours of the brain mask and the regions" src="{source}">'
    return f'<figure id="{name}"><figcaption>{name} {html.escape(row["warnings"])}</figcaption>{image}</figure>'


def _row(row: Mapping[str, Any], columns: Sequence[str], pictured: bool) -> str:
    kind = row["status"] if row["status"] in _ORDER else "warned" if row["warnings"] else "good"
    cells = []
    for column in columns:
        value = row.get(column)
        plain = "" if value is None else str(value)
        shown = html.escape(f"{value:.4g}" if isinstance(value, float) else plain)
        if column == "run_id" and pictured:
            shown = f'<a href="#{shown}">{shown}</a>'
        text = ' class="text"' if column in ("reason", "warnings") else ""
        cells.append(f'<td{text} data-value="{html.escape(plain)}">{shown}</td>')
    return f'<tr class="{kind}">{"".join(cells)}</tr>'
