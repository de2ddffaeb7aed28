"""The picture of what sees what: every score is where the table says, in the panel of its cohort and in its own row."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from bundle.experiments.auroc_picture import GREY, what_sees_what

NAMES = {  # as they are drawn, from the top: encoder and readout
    "connectivity": ("none", "connectivity"),
    "patches": ("none", "patches"),
    "mean – b": ("b", "mean"),
    "mean – a": ("a", "mean"),
    "covariance – b": ("b", "covariance"),
    "covariance – a": ("a", "covariance"),
}


def table() -> pd.DataFrame:
    """Each encoder's readouts one after another; "a" was not tested on the second cohort; and controls."""
    rng = np.random.default_rng(0)
    names = [("none", "connectivity"), ("b", "mean"), ("b", "covariance"), ("a", "mean"), ("a", "covariance"),
             ("none", "patches")]  # fmt: skip
    rows = []
    for cohort in ("coupling", "painted"):
        for encoder, readout in names:
            for size, shuffled, shifted in ((8, False, False), (0, False, False), (0, True, False), (0, False, True)):
                if (cohort, encoder) != ("painted", "a"):
                    low, value, high = np.sort(rng.uniform(size=3))
                    row = {"cohort": cohort, "encoder": encoder, "readout": readout, "size": size}
                    row |= {"shuffled": shuffled, "shifted": shifted}
                    rows.append(row | {"auroc": value, "low": low, "high": high})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("cohort", ["coupling", "painted"])
def test_every_score_is_in_its_own_place(cohort):
    scores = table()
    figure = what_sees_what(scores, "none")
    assert [axes.get_title() for axes in figure.axes] == ["coupling\n(SYNTHETIC)", "painted\n(real courses)"]
    first = figure.axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == list(NAMES)
    rows = first.get_yticks()
    assert (np.diff(rows) < 0).all()  # the first is on top
    axes = next(axes for axes in figure.axes if axes.get_title().startswith(cohort))
    lines, dots = axes.collections
    names, drawn = list(NAMES.values()), {}
    for (low, high), (value, place), colour in zip(
        (segment[:, 0] for segment in lines.get_segments()), dots.get_offsets(), dots.get_facecolors(), strict=True
    ):
        [row] = np.flatnonzero(rows == place)
        drawn[names[row]] = [low, value, high]
        assert (tuple(colour) == to_rgba(GREY)) == (names[row][0] == "none")
    plain = scores[(scores["cohort"] == cohort) & (scores["size"] == 0) & ~scores["shuffled"] & ~scores["shifted"]]
    expected = plain.set_index(["encoder", "readout"])[["low", "auroc", "high"]].T.to_dict("list")
    assert drawn == expected
