"""The chain of steps from a BOLD file to z-scores: declared in configs/prepare.json, recorded, and made again."""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.transforms import MapTransform

from bundle.anatomy import grid
from bundle.anatomy.atlas import AAL3
from bundle.errors import InputError, unwrapped
from bundle.files import ROOT, config_file
from bundle.preparation.transforms import (
    CONSTANT,
    REGISTERED,
    CleanSignalsd,
    LoadBOLDd,
    RegisterToGridd,
    ResampleTRd,
    ToGridd,
    ZScored,
)


@dataclass(frozen=True)
class Preparation:
    """What shapes a prepared run, and which runs may enter a store; see `load_preparation` for the usual one.

    Attributes:
        steps: dictionary transforms from a run's path to its z-scores, as configs/prepare.json lists them.
        min_coverage: a region of which a run's brain contains less than this share, 0 to 1, has low coverage.
        on_low_coverage: "warn" in the summary and the report, or "exclude" the run (and say so there).
        atlas: whose groups are the regions; see `bundle.anatomy.atlas.load_atlas`.
    """

    steps: Sequence[MapTransform]
    min_coverage: float
    on_low_coverage: str
    atlas: str = AAL3

    def __post_init__(self) -> None:
        if not 0 <= self.min_coverage <= 1:
            raise InputError(f"min_coverage must be between 0 and 1, not {self.min_coverage}")
        if self.on_low_coverage not in ("warn", "exclude"):
            raise InputError(f"on_low_coverage must be warn or exclude, not {self.on_low_coverage!r}")

    def parameters(self) -> dict[str, Any]:
        """Everything that shapes a stored run, as JSON values; which regions it must cover does not."""
        return {
            "steps": [{"step": type(step).__name__} | _arguments(step) for step in self.steps],
            "grid_shape": list(grid.SHAPE),
            "grid_affine": grid.AFFINE.tolist(),
            "interpolation": "linear in world space and in time",
            "background": REGISTERED if self.native else f"the given brain mask, else {CONSTANT}",
            "scaling": "each voxel by its mean and population SD over the run; these, and the whole run's, are kept",
            "dtype": "float16",
        }

    @property
    def parameters_hash(self) -> str:
        """sha256 of `parameters`, hexadecimal."""
        return hashlib.sha256(json.dumps(self.parameters(), sort_keys=True).encode()).hexdigest()

    @property
    def native(self) -> bool:
        """Whether runs are taken in their own space, and no others."""
        return any(isinstance(step, RegisterToGridd) for step in self.steps)

    @property
    def reads_confounds(self) -> bool:
        """Whether a step reads the runs' tables of confounds."""
        cleaning = [step.cleaning for step in self.steps if isinstance(step, CleanSignalsd)]
        return any(bool(wanted.confounds or wanted.max_fd) for wanted in cleaning)


def _arguments(step: MapTransform) -> dict[str, Any]:
    """What a transform was made with, as JSON values, from attributes of the arguments' names."""
    names = [name for name in inspect.signature(type(step).__init__).parameters if name != "self"]
    if missing := [name for name in names if not hasattr(step, name)]:
        raise InputError(
            f"the step {type(step).__name__} does not keep its argument {missing[0]!r} as an attribute, so what it "
            f"does cannot be recorded; add `self.{missing[0]} = {missing[0]}` to it"
        )
    return json.loads(json.dumps({name: getattr(step, name) for name in names}))


def prepare_config(**changes: Any) -> ConfigParser:
    """The config configs/prepare.json, which is where the steps and their numbers stand.

    Args:
        **changes: entries to replace; None leaves an entry as it is.
    """
    parser = ConfigParser(ConfigParser.load_config_file(config_file("prepare")))
    parser.update({"bundle_root": str(ROOT)} | {name: value for name, value in changes.items() if value is not None})
    return parser


def load_preparation(**changes: Any) -> Preparation:
    """The preparation of configs/prepare.json, with some of its entries replaced, such as `new_tr=2.0`.

    Raises:
        InputError: a number outside its range.
    """
    with unwrapped():
        return prepare_config(**changes).get_parsed_content("preparation")


def rebuild_preparation(parameters: Mapping[str, Any], source: str | Path) -> Preparation:
    """The preparation that some data had, from its recorded parameters.

    Args:
        parameters: as `Preparation.parameters` gave them.
        source: the file that holds them, for the message.

    Raises:
        InputError: it has steps that are not of this bundle, or that this version of it would do otherwise.
    """
    known = {step.__name__: step for step in (LoadBOLDd, ToGridd, RegisterToGridd, CleanSignalsd, ResampleTRd, ZScored)}
    if unknown := [step["step"] for step in parameters["steps"] if step["step"] not in known]:
        raise InputError(f"{source}: its data were prepared with a step {unknown[0]} that is not of this bundle")
    recorded = [dict(step) for step in parameters["steps"]]
    steps = [known[step.pop("step")](**step) for step in recorded]
    made = replace(load_preparation(), steps=steps)
    differing = [name for name, value in made.parameters().items() if parameters.get(name) != value]
    if differing:
        raise InputError(
            f"{source}: its data were prepared with another {differing[0]} than this version of the bundle"
        )
    return made
