"""Units of what the network sees: against NumPy on the run's values in the file's units, from one store.

Not covered: that networks learn from one or the other (docs/experiments.md).
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bundle.data.normalisation import MODES, Normalisation
from bundle.errors import InputError
from bundle.preparation.scaling import run_moments, zscore


def stored(seed: int = 0, frames: int = 40, voxels: int = 61) -> tuple:
    """A run in the file's units (T, V), one voxel constant and one quiet, and what a store makes of it."""
    rng = np.random.default_rng(seed)
    values = rng.normal(1000, 200, voxels) + rng.normal(0, rng.uniform(5, 20, voxels), (frames, voxels))
    values[:, 3] = 900.0
    values[:, 4] = 1100 + 0.05 * rng.standard_normal(frames)
    values[7, 5] += 5000  # a spike
    values = values.astype(np.float32)
    z, moments, mean, sd = zscore(values)
    record = {"mean": mean, "sd": sd, "fill": float((values.min() - mean) / sd)}
    parts = (torch.from_numpy(z).float(), torch.from_numpy(run_moments(moments, record)), record["fill"])
    return values.astype(float), parts


def by_run(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std()


def by_voxel(values: np.ndarray, floor: float, clip: float) -> np.ndarray:
    sd = values.std(0)
    return np.clip((values - values.mean(0)) / np.maximum(sd, floor * np.median(sd)), -clip, clip)


def by_frame(values: np.ndarray) -> np.ndarray:
    return (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)


@given(seed=st.integers(0, 50), floor=st.sampled_from([0.05, 0.1, 0.5]), clip=st.sampled_from([2.0, 5.0]))
def test_each_mode_is_what_numpy_makes_of_the_original_values(seed, floor, clip):
    values, parts = stored(seed)
    expected = {"run": [by_run(values)], "voxel": [by_voxel(values, floor, clip)]}
    expected["both"] = expected["run"] + expected["voxel"]
    for mode in MODES:
        for per_frame in (False, True):
            made = Normalisation(mode, floor, clip, per_frame).apply(*parts)
            assert len(made) == Normalisation(mode, floor, clip).channels
            for (got, fill), plain in zip(made, expected[mode], strict=True):
                np.testing.assert_allclose(got, by_frame(plain) if per_frame else plain, atol=0.01)
                if per_frame or plain is not expected["run"][0]:
                    assert fill == 0
                else:
                    assert fill == pytest.approx(plain.min(), abs=1e-3)


def test_floor_and_clip_hold_quiet_voxels_and_spikes():
    _, parts = stored()
    [(z, _)] = Normalisation("voxel", sd_floor=0.1, clip=3.0).apply(*parts)
    assert not z[:, 3].any()  # does not vary
    assert z[:, 4].std() < 0.1  # varies by less than a tenth of the median
    assert z[7, 5] == 3.0
    assert abs(z).max() <= 3.0


@given(seed=st.integers(0, 50), mode=st.sampled_from(MODES), per_frame=st.booleans())
def test_what_was_done_can_be_undone(seed, mode, per_frame):
    values, parts = stored(seed)
    normalisation = Normalisation(mode, sd_floor=0.1, clip=100.0, per_frame=per_frame)
    seen, _ = normalisation.apply(*parts)[-1]
    undone = normalisation.undo(seen, *parts[:2])
    np.testing.assert_allclose(undone, by_run(values), atol=0.01)


@pytest.mark.parametrize("changes", [{"mode": "global"}, {"sd_floor": 0.0}, {"clip": -1.0}])
def test_what_makes_no_sense_is_refused(changes):
    with pytest.raises(InputError, match="normalisation#"):
        Normalisation(**({"mode": "run", "sd_floor": 0.1, "clip": 5.0} | changes))
