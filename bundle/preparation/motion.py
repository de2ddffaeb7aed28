"""Head motion of a run, where it is known: mean framewise displacement, mm."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

logger = logging.getLogger(__name__)

MOTION_COLUMNS = ("mean_fd", "fd_mean", "mean_framewise_displacement", "meanfd")
_CONFOUND = "framewise_displacement"


def mean_fd(run: Mapping[str, Any]) -> float | None:
    """Mean framewise displacement of a run of `bundle.preparation.sources`, mm, or None where nothing tells it.

    Taken from the participant's columns, as the baseline of head motion does, else from the run's own confounds.
    """
    columns = {str(name).lower(): value for name, value in run["participant"].items()}
    for name in MOTION_COLUMNS:
        if name in columns:
            value = float(pd.to_numeric(columns[name], errors="coerce"))
            return value if math.isfinite(value) else None
    return None if run["confounds"] is None else mean_fd_in(run["confounds"])


def mean_fd_in(confounds: str | Path) -> float | None:
    """Mean of a confounds table's framewise displacement, mm, over the frames that have one (the first has none).

    None where the table has no such column, and, with a warning, where it cannot be read: motion is shown beside a
    run, and is no reason to refuse it.
    """
    try:
        with Path(confounds).open(encoding="utf-8") as file:
            separator = "\t" if "\t" in file.readline() else ","
        table = pd.read_csv(confounds, sep=separator, usecols=lambda name: name == _CONFOUND)
        value = float(table[_CONFOUND].mean()) if _CONFOUND in table else math.nan
    except (ValueError, TypeError, OSError) as error:
        logger.warning("%s tells no head motion (%s)", confounds, error)
        return None
    return value if math.isfinite(value) else None
