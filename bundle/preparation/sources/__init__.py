"""Where runs come from: one adapter per layout on disk, all to the same list of runs.

A run is a dictionary:

    run_id          unique, fit to be a folder's name
    participant_id  as in the participants' table
    bold, mask      paths; mask may be None
    confounds       path of the run's own table of confounds, or None
    tr, space       the user's word, or None to take the file's
    site, diagnosis as in the participants' table; either may be None
    participant     the participant's other columns
    problem         only where the run must not be prepared: why

To add a layout: a module with a `from_...` function beside the others, and a line in `bundle.preparation.sources.find`.
"""

from bundle.preparation.sources.adhd200 import from_adhd200, from_nilearn_adhd
from bundle.preparation.sources.bids import from_bids
from bundle.preparation.sources.files import from_files
from bundle.preparation.sources.find import LAYOUTS, find_runs
from bundle.preparation.sources.participants import Labels, Run
from bundle.preparation.sources.table import from_table

__all__ = [
    "LAYOUTS",
    "Labels",
    "Run",
    "find_runs",
    "from_adhd200",
    "from_bids",
    "from_files",
    "from_nilearn_adhd",
    "from_table",
]
