"""What all HTML pages share: one look (`templates/base.html.j2`), one way to fill a template in, pictures inside.

A page is one file: styles, script and pictures are in it, and its content policy forbids to load anything else. Text
from data is escaped.
"""

import base64
from collections.abc import Mapping
from functools import cache
from io import BytesIO
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure


def render(template: str, **context: Any) -> str:
    """Fill in a template of `bundle/templates`; what the context holds is escaped where the template makes HTML.

    Args:
        template: its file's name.
        context: what it speaks of; a name that it uses and that is not given is an error.
    """
    return _environment().get_template(template).render(context)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("bundle"),
        autoescape=select_autoescape(enabled_extensions=("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "measure_name": measure_name,
        "number": number,
        "percent": percent,
        "p_value": p_value,
        "ci": with_intervals,
    }
    return environment


def embedded(picture: bytes, kind: str = "png") -> str:
    """A picture's bytes as an address that holds the picture itself."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def png(figure: Figure, dpi: int = 130) -> bytes:
    """A figure as PNG."""
    file = BytesIO()
    figure.savefig(file, dpi=dpi)
    return file.getvalue()


def drawn(figure: Figure, dpi: int = 130) -> str:
    """A figure as `embedded` PNG."""
    return embedded(png(figure, dpi))


def number(value: Any, digits: int = 3) -> str:
    """A number with some decimals, a dash for none."""
    return "–" if value is None or pd.isna(value) else f"{value:.{digits}f}"


def percent(value: Any) -> str:
    """A share, 0 to 1, as a percentage, a dash for none."""
    return "–" if value is None or pd.isna(value) else f"{value:.0%}"


def p_value(value: float) -> str:
    """A p-value in three digits, of which 0.000 is not one."""
    return "<0.001" if value < 0.001 else number(value)


def with_intervals(row: Mapping[str, Any], name: str) -> str:
    """Value with its interval, as it goes into a paper."""
    return f"{number(row[name])} ({number(row[f'{name}_low'])}–{number(row[f'{name}_high'])})"


def measure_name(name: str) -> str:
    """A measure as people write it: "AUROC within site" of auroc_within_site."""
    special = {
        "auroc": "AUROC",
        "auprc": "AUPRC",
        "r2": "R²",
        "pearson": "Pearson",
        "f1": "F1",
        "mae": "MAE",
        "brier": "Brier",
    }
    return " ".join(special.get(word, word) for word in name.split("_")) + (" score" if name == "brier" else "")
