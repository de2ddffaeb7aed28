"""Two classes, as most tests have them."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bundle.evaluation.subjects import Scores, score_table
from bundle.tasks.binary import Binary
from bundle.tasks.scores import once_tested

BINARY = Binary("diagnosis", ("control", "adhd"))


def subjects_of(labels: Sequence, logits: Sequence, names: Sequence[str] = (), site: str = "A") -> pd.DataFrame:
    """A row per subject, as the evaluation has it."""
    ids = list(names) or [f"s{i}" for i in range(len(labels))]
    return pd.DataFrame({"participant_id": ids, "site": site, "label": labels, "logit": logits, "clips": 1})


def binary_table(labels: Sequence, logits: Sequence, threshold: float, resamples: int, seed: int) -> Scores:
    """`score_table` of one network and site."""
    tested = once_tested(subjects_of(labels, logits), BINARY, threshold)
    return score_table(BINARY, tested, np.full(len(labels), "A"), resamples, seed)
