"""A participant's page as PDF, drawn by matplotlib: what the HTML page shows, as far as it may be reported."""

import textwrap
from collections.abc import Iterator
from io import BytesIO

import numpy as np
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from PIL import Image

from bundle.deploy.results import Result

A4 = (8.27, 11.69)  # inches
MARGIN = 0.08  # share of the width and of the height
LINE = 0.019  # height of a line of 10 points, as a share of the page
WIDTH = 88  # characters of 10 points in a line
PICTURE = 0.24  # height of a picture
GOOD, WARNED, SOFT = "#1b6e3c", "#9a4a00", "#555555"


def pdf(result: Result) -> bytes:
    """The page; without a time in it, so that the same result gives the same bytes."""
    file = BytesIO()
    with PdfPages(file, metadata={"CreationDate": None, "Title": f"Prediction of {result.column}"}) as pages:
        figure, top = Figure(figsize=A4), 1 - MARGIN
        for item in _items(result):
            height = PICTURE if isinstance(item, bytes) else LINE * item[1] / 10
            if top - height < MARGIN:
                pages.savefig(figure)
                figure, top = Figure(figsize=A4), 1 - MARGIN
            if isinstance(item, bytes):
                axes = figure.add_axes((MARGIN, top - height, 1 - 2 * MARGIN, height * 0.95))
                axes.imshow(np.asarray(Image.open(BytesIO(item)).convert("RGB")))
                axes.set_axis_off()
            else:
                text, size, colour = item
                figure.text(MARGIN, top, text, size=size, color=colour, va="top", parse_math=False)
            top -= height
        pages.savefig(figure)
    return file.getvalue()


def _items(result: Result) -> Iterator[tuple[str, float, str] | bytes]:
    """Lines (text, points, colour) and pictures (a file's bytes) from top to bottom."""
    yield from _lines(result.participant, 18)
    yield from _lines(f"Prediction of {result.column} from resting-state BOLD. Preliminary, not verified.", 10, SOFT)
    yield from _lines(result.intended_use, 10, WARNED)
    yield "", 10, SOFT
    for remark in result.remarks:
        yield from _lines(remark, 11, WARNED)
    for column, value in result.values.items():
        yield from _lines(f"{value:.3f}", 20, WARNED if result.remarks else GOOD)
        yield from _lines(result.labels[column], 10)
    yield "", 10, SOFT
    for run_id in result.runs:
        yield from _lines(run_id, 9, SOFT)
        if run_id in result.pictures:
            yield result.pictures[run_id]
    if result.pictures:
        yield from _lines(
            "Mean BOLD over time in MNI space at x = -24, y = -30, z = -10 mm, the subject's left on the left. White: "
            "the run's brain mask. Colours: where the atlas's regions should be.", 9, SOFT,
        )  # fmt: skip
    yield "", 10, SOFT
    yield from _lines(" ".join(result.software), 9, SOFT)
    for number, sha256 in enumerate(result.sha256, start=1):
        yield from _lines(f"sha256 of model {number}: {sha256}", 9, SOFT)


def _lines(text: str, size: float, colour: str = "black") -> Iterator[tuple[str, float, str]]:
    for line in textwrap.wrap(text, int(WIDTH * 10 / size)):
        yield line, size, colour
