"""Optional cleaning of a run's signals: confound regression, scrubbing and band-pass, by nilearn; off by default.

Order as in `nilearn.signal.clean` (Lindquist et al. 2019, Human Brain Mapping 40:2358): censored frames are
interpolated before filtering, left out of the regression, and confounds are filtered like the signals. Clips need
every frame in its place, so censored frames come out as lines between the kept frames around them, and their number
is recorded. Every voxel keeps its mean, so that units and anatomy stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from nilearn.interfaces.fmriprep import load_confounds
from nilearn.signal import clean
from numpy.typing import NDArray

from bundle.errors import InputError

STRATEGIES = ("motion", "wm_csf", "global_signal", "compcor", "high_pass", "ica_aroma")
TABLE = "table"
HEAD_RADIUS_MM = 50  # Power et al. 2012, NeuroImage 59:2142
MAX_CENSORED = 0.5
_ROTATIONS = ["rot_x", "rot_y", "rot_z"]
_TRANSLATIONS = ["trans_x", "trans_y", "trans_z"]
_VOXELS_AT_ONCE = 16384


@dataclass(frozen=True)
class Cleaning:
    """What is taken out of the signals; nothing by default.

    Attributes:
        confounds: strategies of nilearn's `load_confounds` (fMRIPrep's confounds beside the run), or ("table",)
            for every column of the run's own table.
        max_fd: frames with more framewise displacement than this are censored, mm.
        high_pass: lowest frequency kept, Hz.
        low_pass: highest frequency kept, Hz.
    """

    confounds: Sequence[str] = ()
    max_fd: float | None = None
    high_pass: float | None = None
    low_pass: float | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.confounds if name not in (*STRATEGIES, TABLE)]
        if unknown or (TABLE in self.confounds and len(self.confounds) > 1):
            raise InputError(
                f"confounds must be some of {', '.join(STRATEGIES)}, or {TABLE} alone, not {', '.join(self.confounds)}"
            )
        if self.max_fd is not None and self.max_fd <= 0:
            raise InputError(f"max_fd must be above 0 mm, not {self.max_fd}")
        for name in ("high_pass", "low_pass"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise InputError(f"{name} must be above 0 Hz, not {value}")
        if self.high_pass and self.low_pass and self.high_pass >= self.low_pass:
            raise InputError(f"high_pass ({self.high_pass} Hz) must be below low_pass ({self.low_pass} Hz)")

    def __bool__(self) -> bool:
        """Whether anything is to be done."""
        return bool(self.confounds or self.max_fd or self.high_pass or self.low_pass)


def clean_frames(
    frames: NDArray[np.float32], tr: float, cleaning: Cleaning, bold: Path, table: str | Path | pd.DataFrame | None
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Clean a run's in-brain signals.

    Args:
        frames: (T, V), changed in place.
        tr: their spacing, seconds.
        cleaning: what to do.
        bold: the run's file, beside which fMRIPrep's confounds lie.
        table: the run's own table of confounds, one row per frame; or a .tsv or .csv file of it.

    Returns:
        The cleaned (T, V) and what was done: {"censored": n, "regressors": [names]}.

    Raises:
        InputError: confounds are missing or do not fit the run, or more than half of its frames are censored.
    """
    regressors, kept = _regressors(cleaning, bold, table, len(frames))
    if cleaning.max_fd is not None:
        moved = framewise_displacement(_read(table, bold, len(frames)), bold) > cleaning.max_fd
        kept &= ~moved
    censored = int((~kept).sum())
    if censored > MAX_CENSORED * len(frames):
        raise InputError(
            f"{bold} has {censored} of {len(frames)} frames to censor (at most {MAX_CENSORED:.0%} may be); exclude "
            "the run, or raise --max_fd"
        )
    nyquist = 0.5 / tr
    if any(value is not None and value >= nyquist for value in (cleaning.high_pass, cleaning.low_pass)):
        raise InputError(f"{bold} has frames every {tr:g} s, so frequencies must be below {nyquist:g} Hz")
    at = np.flatnonzero(kept)
    places = np.interp(np.arange(len(frames)), at, np.arange(len(at)))  # a censored frame lies between kept ones
    below = np.floor(places).astype(int)
    above = np.minimum(below + 1, len(at) - 1)
    share = (places - below).astype(np.float32)[:, None]
    for start in range(0, frames.shape[1], _VOXELS_AT_ONCE):
        part = frames[:, start : start + _VOXELS_AT_ONCE]
        mean = part[kept].mean(axis=0, dtype=np.float64)
        try:
            cleaned = clean(
                part - mean, detrend=False, standardize=False, confounds=regressors, t_r=tr, ensure_finite=False,
                filter="butterworth" if cleaning.high_pass or cleaning.low_pass else False,
                high_pass=cleaning.high_pass, low_pass=cleaning.low_pass,
                sample_mask=at if censored else None, extrapolate=False,
            )  # fmt: skip
        except ValueError as error:  # a run too short for the filter
            raise InputError(f"{bold} cannot be cleaned ({' '.join(str(error).split())}); exclude the run") from error
        cleaned = (cleaned - cleaned.mean(axis=0) + mean).astype(np.float32)
        part[:] = cleaned[below] * (1 - share) + cleaned[above] * share
    names = [] if regressors is None else [str(name) for name in regressors.columns]
    return frames, {"censored": censored, "regressors": names}


def framewise_displacement(motion: pd.DataFrame, source: object) -> NDArray[np.float64]:
    """Power's framewise displacement: fMRIPrep's column, else from its six motion parameters (mm, radians).

    Args:
        motion: a run's confounds, a row per frame.
        source: named in the error.

    Returns:
        (T,) mm, 0 at the first frame.

    Raises:
        InputError: the columns are not there.
    """
    if "framewise_displacement" in motion:
        moved = pd.to_numeric(motion["framewise_displacement"], errors="coerce")
        if moved[1:].isna().any():
            raise InputError(f"{source} has a framewise_displacement that is not a number; repair it")
        return moved.fillna(0).to_numpy(np.float64)
    missing = [name for name in (*_TRANSLATIONS, *_ROTATIONS) if name not in motion]
    if missing:
        raise InputError(f"{source} has no framewise_displacement and no {', '.join(missing)}; scrubbing needs them")
    moved, turned = (motion[names].diff().abs().sum(axis=1) for names in (_TRANSLATIONS, _ROTATIONS))
    return (moved + HEAD_RADIUS_MM * turned).to_numpy(np.float64)


def _regressors(
    cleaning: Cleaning, bold: Path, table: str | Path | pd.DataFrame | None, frames: int
) -> tuple[pd.DataFrame | None, NDArray[np.bool_]]:
    """The confounds (T, C) or None, and which frames the strategy keeps (T,): not those before a steady state."""
    kept = np.ones(frames, bool)
    if not cleaning.confounds:
        return None, kept
    if tuple(cleaning.confounds) == (TABLE,):
        return _usable(_read(table, bold, frames), bold), kept
    try:
        values, sample_mask = load_confounds(str(bold), strategy=tuple(cleaning.confounds), demean=True)
    except (ValueError, OSError) as error:
        raise InputError(f"{bold} has no usable fMRIPrep confounds ({' '.join(str(error).split())})") from error
    if sample_mask is not None:
        kept[:] = False
        kept[sample_mask] = True
    return _usable(_fitting(values, frames, bold), bold), kept


def _usable(values: pd.DataFrame, bold: Path) -> pd.DataFrame:
    """Confounds as numbers, their first row, where fMRIPrep's derivatives are n/a, filled with the second."""
    numbers = values.apply(pd.to_numeric, errors="coerce")
    numbers.iloc[0] = numbers.iloc[0].fillna(numbers.iloc[min(1, len(numbers) - 1)])
    odd = [str(name) for name in numbers if not np.isfinite(numbers[name]).all()]
    if odd:
        raise InputError(
            f"the confounds of {bold} have values that are not numbers, in {', '.join(odd[:5])}; repair these columns "
            "or leave them out"
        )
    if numbers.shape[1] >= len(numbers):
        raise InputError(
            f"{bold} has {len(numbers)} frames and {numbers.shape[1]} confounds, which leave nothing of its signal; "
            "give fewer confounds"
        )
    return numbers


def _read(table: str | Path | pd.DataFrame | None, bold: Path, frames: int) -> pd.DataFrame:
    if isinstance(table, pd.DataFrame):
        return _fitting(table, frames, bold)
    if table is None:
        raise InputError(f"{bold} has no table of confounds; add a confounds column to the table of runs")
    try:
        values = pd.read_csv(table, sep=r"[\t,]", engine="python", na_values=["n/a"])  # nilearn's .csv hold tabs
    except (ValueError, OSError) as error:
        raise InputError(f"{table} cannot be read as a table ({error}); check the path") from error
    return _fitting(values, frames, bold)


def _fitting(values: pd.DataFrame, frames: int, bold: Path) -> pd.DataFrame:
    if len(values) != frames:
        raise InputError(
            f"{bold} has {frames} frames but {len(values)} rows of confounds; give the run's own confounds"
        )
    return values
