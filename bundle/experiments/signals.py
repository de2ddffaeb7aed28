"""Band-limited signals with a known covariance: the latents of the regions, and the AAL3 labels around them.

The model is described in `bundle.experiments.synthetic`, which writes images from these signals.
"""

import math

import numpy as np
import pandas as pd

from bundle.anatomy.atlas import REGIONS
from bundle.errors import InputError

BAND_HZ = (0.01, 0.1)
COUPLED = ("limbic", "cerebellum")
GROUP_CORRELATION = 0.2  # between the latents of any two groups
LABEL_SHARE = 0.7  # share of a label's variance that is its group's


def band_frequencies(frames: int, tr: float) -> np.ndarray:
    """Return the Fourier coefficients of a run in the band: k of `k / (frames * tr)` Hz, below Nyquist.

    Raises:
        InputError: fewer than three do.
    """
    k = np.arange(1, (frames + 1) // 2)
    hz = k / (frames * tr)
    k = k[(hz >= BAND_HZ[0]) & (hz <= BAND_HZ[1] + 1e-9)]
    if len(k) < 3:
        raise InputError(
            f"{frames} frames of TR {tr} s hold {len(k)} frequencies in {BAND_HZ[0]}–{BAND_HZ[1]} Hz, and "
            "3 are needed; give a longer duration_s or a shorter tr."
        )
    return k


def band_limited(rng: np.random.Generator, count: int, frames: int, tr: float) -> np.ndarray:
    """Draw independent Gaussian processes that have power in 0.01–0.1 Hz only, flat within it.

    Args:
        rng: the source of randomness.
        count: how many processes.
        frames: their length.
        tr: time between frames in seconds.

    Returns:
        (frames, count) float64, each column of mean 0 and SD 1 over the run.
    """
    k = band_frequencies(frames, tr)
    spectrum = np.zeros((frames // 2 + 1, count), dtype=complex)
    spectrum[k] = rng.standard_normal((len(k), count)) + 1j * rng.standard_normal((len(k), count))
    series = np.fft.irfft(spectrum, n=frames, axis=0)
    return series / series.std(axis=0)


def group_latents(coupling_z: float, frames: int, tr: float, rng: np.random.Generator) -> pd.DataFrame:
    """Draw the latent signal of each group; see the model in `bundle.experiments.synthetic`.

    Args:
        coupling_z: Fisher z of the correlation of the limbic and the cerebellar latent over this run.
        frames: length of the run.
        tr: seconds.
        rng: the source of randomness.

    Returns:
        (frames, groups), a column per region and one "other", each of mean 0 and SD 1.
    """
    groups = [*REGIONS, "other"]
    processes = band_limited(rng, len(groups) + 1, frames, tr)
    shared, own = processes[:, -1:], processes[:, :-1]
    values = math.sqrt(GROUP_CORRELATION) * shared + math.sqrt(1 - GROUP_CORRELATION) * own
    latents = pd.DataFrame(values / values.std(axis=0), columns=groups)
    first, second = latents[COUPLED[0]], latents[COUPLED[1]]
    rest = second - first * (first @ second) / frames  # orthogonal to the first: one step of Gram–Schmidt
    r = math.tanh(coupling_z)
    latents[COUPLED[1]] = r * first + math.sqrt(1 - r**2) * rest / rest.std(ddof=0)
    return latents


def latents_of(latents: pd.DataFrame, numbers: np.ndarray) -> np.ndarray:
    """Give each AAL3 label the latent of its group.

    Args:
        latents: (frames, groups), from `group_latents`.
        numbers: (n,) AAL3 label numbers; those of no region are of the group "other".

    Returns:
        (frames, n) float64.
    """
    group_of = {number: group for group, members in REGIONS.items() for number in members}
    return latents[[group_of.get(int(number), "other") for number in numbers]].to_numpy()


def label_signals(latents: pd.DataFrame, numbers: np.ndarray, tr: float, rng: np.random.Generator) -> np.ndarray:
    """Draw the signal of each AAL3 label around the latent of its group.

    Args:
        latents: (frames, groups), from `group_latents`.
        numbers: (n,) AAL3 label numbers.
        tr: seconds.
        rng: the source of randomness.

    Returns:
        (frames, n) float64, of unit variance in expectation.
    """
    own = band_limited(rng, len(numbers), len(latents), tr)
    return math.sqrt(LABEL_SHARE) * latents_of(latents, numbers) + math.sqrt(1 - LABEL_SHARE) * own
