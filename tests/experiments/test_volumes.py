"""Scanner sites that cannot be are refused.

Not covered: anatomy, noise and files, which the tests of the cohorts see (test_synthetic.py, test_painted.py).
"""

import math

import pytest

from bundle.errors import InputError
from bundle.experiments.volumes import Site


@pytest.mark.parametrize(
    "change",
    [{"tr": 0}, {"tr": 2000}, {"voxel_mm": 0.5}, {"axcodes": "RAR"}, {"axcodes": "xyz"}, {"axcodes": "RA"},
     {"intensity": 0}, {"intensity": math.inf}, {"dtype": "int8"}],
)  # fmt: skip
def test_bad_sites_are_refused(change):
    good = {"name": "a", "tr": 2.0, "voxel_mm": 3.0, "axcodes": "LAS", "intensity": 1.0, "dtype": "int16"}
    assert Site(**good).name == "a"
    with pytest.raises(InputError, match=f"{next(iter(change))} of site 'a'"):
        Site(**(good | change))
