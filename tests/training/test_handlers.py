"""Handlers: reseeding per epoch and rank, and the picture on TensorBoard."""

import numpy as np
import pytest
import torch
from ignite.engine import Engine

from bundle.training.handlers import ReseedEachEpoch
from bundle.training.pictures import reconstruction_panel


class Draws:
    """A transform with MONAI's generator."""

    def __init__(self) -> None:
        self.R = np.random.RandomState()

    def set_random_state(self, seed: int | None = None, state: object = None) -> "Draws":
        self.R.seed(seed)
        return self


def epochs(seed: int, count: int, first: int = 0) -> list[tuple[float, float]]:
    """What is drawn in each epoch of a run that starts, or is resumed, at epoch `first`."""
    transform, seen = Draws(), []
    engine = Engine(lambda *_: seen.append((float(transform.R.rand()), float(torch.rand(())))))
    ReseedEachEpoch([transform], seed).attach(engine)
    engine.load_state_dict({"epoch": first, "max_epochs": count, "epoch_length": 1}) if first else None
    engine.run([0], max_epochs=count)
    return seen


def test_epochs_differ_seeds_differ_and_a_resumed_run_draws_the_same():
    whole = epochs(7, 4)
    assert len(set(whole)) == 4
    assert epochs(7, 4) == whole
    assert epochs(8, 4) != whole
    assert epochs(7, 4, first=2) == whole[2:]


@pytest.mark.parametrize("rank", [1, 3])
def test_ranks_draw_different_masks(monkeypatch: pytest.MonkeyPatch, rank: int):
    alone = epochs(7, 2)
    monkeypatch.setattr("bundle.training.handlers.idist.get_rank", lambda: rank)
    assert not set(alone) & set(epochs(7, 2))


def test_panel_shows_the_hidden_frame_nearest_to_the_middle():
    image = torch.zeros(10, 6, 6, 10)
    for frame in range(10):
        image[frame, :, :, frame] = 1  # a bright sagittal plane tells the frame
    mask = torch.zeros(10, 6, 6, 10, dtype=torch.bool)
    for hidden, shown in (([0, 3, 8], 3), ([9], 9), ([], 5)):
        mask[2:4, 2:4, 2:4] = False
        mask[2:4, 2:4, 2:4, hidden] = True
        axial = reconstruction_panel(image, image, mask)[12:, :10]  # the first of the last row's three planes
        assert (axial.argmax(1) == shown).all()


@pytest.mark.parametrize("per_frame", [False, True])
def test_panel_shows_original_masked_and_rebuilt_planes_the_right_way_up(per_frame: bool):
    """A bright right-anterior-superior octant must be drawn right and up, and black where it is hidden."""
    image = torch.zeros(8, 10, 12, 4)
    image[4:, 5:, 6:] = 1.0
    mask = image[..., 0] > 0
    if per_frame:
        mask = mask.unsqueeze(-1).expand(8, 10, 12, 4)
    panel = reconstruction_panel(image, torch.full_like(image, 0.5), mask)
    assert panel.shape == (12 + 12 + 10, 3 * 10)  # sagittal and coronal planes are 12 high, the axial one 10
    sagittal, coronal, axial = panel[:12], panel[12:24, : 3 * 8], panel[24:, : 3 * 8]
    for rows, (height, width) in ((sagittal, (12, 10)), (coronal, (12, 8)), (axial, (10, 8))):
        original, masked, rebuilt = (rows[:, i * width : (i + 1) * width] for i in range(3))
        bright = np.zeros((height, width))
        bright[: height // 2, width // 2 :] = 1
        np.testing.assert_array_equal(original, bright)
        np.testing.assert_array_equal(masked, 0 * bright)
        np.testing.assert_allclose(rebuilt, 0.5 * bright)
