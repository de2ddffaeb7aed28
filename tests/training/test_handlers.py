"""Handlers: draws by place in training, each step's scalars, and the picture on TensorBoard."""

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import Dataset

from bundle.data.batches import loader
from bundle.training.handlers import DrawByPlace, SayIfFlat, StepScalars
from bundle.training.pictures import reconstruction_panel


def drawn(seed: int, epochs: int, first: int = 0) -> list[tuple[int, float]]:
    """What comes and what torch draws in each iteration of a run that starts, or is resumed, after `first`."""
    seen: list[tuple[int, float]] = []
    engine = Engine(lambda _, batch: seen.append((batch[0]["number"], float(torch.rand(())))))
    DrawByPlace(seed).attach(engine)
    engine.load_state_dict({"iteration": first, "max_epochs": epochs, "epoch_length": 5}) if first else None
    items = Dataset([{"number": number} for number in range(5)])
    engine.run(loader(items, 1, shuffle=True, seed=seed), max_epochs=epochs)
    return seen


def test_epochs_differ_seeds_differ_and_a_resumed_run_draws_the_same():
    whole = drawn(7, 4)
    assert sorted(number for number, _ in whole) == sorted(4 * list(range(5)))
    assert len(set(whole)) == 20
    assert whole[:5] != whole[5:10]
    assert drawn(8, 4) != whole
    for first in range(20):
        assert drawn(7, 4, first) == whole[first:]


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (
            {"val_temporal_r2": -0.5},
            "val_temporal_r2 is -0.500: hidden voxels are rebuilt no better over time than by a",
        ),
        (
            {"val_temporal_r2": 0.003},
            "val_temporal_r2 is 0.003: hidden voxels are rebuilt no better over time than by a",
        ),
        ({"val_temporal_r2": 0.05}, ""),
        ({}, ""),  # training was complete before
    ],
)
def test_a_pretraining_that_ends_on_the_plateau_says_so_once(
    caplog: pytest.LogCaptureFixture, metrics: dict, said: str
):
    trainer, validator = Engine(lambda *_: None), Engine(lambda *_: None)
    validator.state.metrics = metrics
    SayIfFlat(validator).attach(trainer)
    trainer.run([0, 1], max_epochs=3)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == bool(said)
    assert all(said in warning for warning in warnings)


def test_processes_draw_differently(monkeypatch: pytest.MonkeyPatch):
    alone = drawn(7, 2)
    monkeypatch.setattr("bundle.training.handlers.idist", SimpleNamespace(get_rank=lambda: 1))
    assert not {value for _, value in alone} & {value for _, value in drawn(7, 2)}


def figures(iteration: int, loss: float) -> SimpleNamespace:
    """A step's figures that are in the making, as on CUDA."""
    return SimpleNamespace(iteration=iteration, event=object(), read=lambda: [loss, 2 * loss, 0.0, 0.0])


def test_each_step_s_loss_is_written_once_however_late_it_is_known():
    """On CUDA it is read a step later; nothing waits for the device."""
    writer, steps = Mock(), []

    def step(engine: Engine, _: object) -> None:
        steps.append(figures(engine.state.iteration, float(engine.state.iteration)))
        engine.state.figures = steps[-2:]

    engine = Engine(step)
    StepScalars(writer).attach(engine)
    engine.run(range(3), max_epochs=2)
    written = [call.args for call in writer.add_scalar.call_args_list]
    assert [call for call in written if call[0] == "iteration_loss"] == [
        ("iteration_loss", float(i), i) for i in range(1, 7)
    ]


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
