"""A step over a whole batch is plain training on the whole batch, in any number of parts and processes."""

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Events
from monai.data import Dataset
from monai.engines import SupervisedTrainer
from monai.transforms import Randomizable, Transform
from torch import Tensor, nn

from bundle.anatomy import grid
from bundle.data.batches import PrepareBatch, loader
from bundle.errors import InputError
from bundle.heads.batch_norm import WholeBatchNorm
from bundle.training.distributed import join_group, lost_process, on_device
from bundle.training.handlers import DrawByPlace
from bundle.training.losses import MaskedMSELoss, RegionWeightedMSELoss, masked_squared_error
from bundle.training.metrics import MeanLoss
from bundle.training.steps import WholeBatchStep

CLIPS, BATCH, SEED, EPOCHS = 11, 4, 3, 3  # batches of 4, 4 and 3 clips


class Masked(Randomizable, Transform):
    """Noise on a clip, and a mask of a number of voxels that is drawn, too."""

    def __call__(self, item: dict) -> dict:
        image = item["image"] + torch.from_numpy(self.R.normal(size=item["image"].shape))
        mask = torch.from_numpy(self.R.rand(1, 3, 3, 3) < self.R.rand())
        mask[0, 0, 0, 0] = True
        return item | {"image": image, "mask": mask}


class Network(nn.Module):
    """Rebuilds (B, 1, 3, 3, 3, 4) from what a mask leaves; float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double()

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.layers(image * ~mask.unsqueeze(-1))


class DoubleLoss(nn.Module):
    """The masked mean squared error, in float64."""

    def forward(self, prediction: Tensor, target: dict) -> Tensor:
        return (prediction - target["image"])[target["mask"]].square().mean()

    def denominator(self, target: dict) -> Tensor:
        return target["mask"].sum() * 4


def trained(parts: int, loss: nn.Module) -> tuple[list[Tensor], list[float], list[list[dict]]]:
    """Weights, the loss of each step, and the prepared clips of each batch of this process."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    items = [
        {
            "run_id": f"run-{i}",
            "start": 0,
            "participant_id": f"sub-{i}",
            "image": torch.randn(1, 3, 3, 3, 4, generator=generator, dtype=torch.float64),
        }
        for i in range(CLIPS)
    ]
    network = on_device(Network(), torch.device("cpu"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    losses: list[float] = []
    prepare = PrepareBatch([Masked()])
    clips: list[list[dict]] = []

    def kept(items: list[dict], *given: object) -> tuple:
        batch = prepare(items, *given)
        masks, images = batch[1]["mask"], batch[1]["image"]
        clips.append([{"image": i, "mask": m} for i, m in zip(images, masks, strict=True)])
        return batch

    mean = MeanLoss()
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=EPOCHS,
        train_data_loader=loader(Dataset(items), BATCH, shuffle=True, seed=SEED),
        network=network,
        optimizer=optimizer,
        loss_function=loss,
        iteration_update=WholeBatchStep(parts),
        prepare_batch=kept,
        key_train_metric={"loss": mean},
        train_handlers=[DrawByPlace(SEED)],
        decollate=False,
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: losses.append(trainer.state.figures[-1].read()[0]))
    trainer.run()
    assert trainer.state.metrics["loss"] == pytest.approx(sum(losses[-3:]) / 3, rel=1e-6)
    return [parameter.detach() for parameter in network.parameters()], losses, clips


def plain(clips: list[list[dict]]) -> tuple[list[Tensor], list[float]]:
    """Whole batches, one after another: what training is without any of this."""
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    losses = []
    for batch in clips:
        image, mask = (torch.stack([clip[name] for clip in batch]) for name in ("image", "mask"))
        squared = (network(image, mask) - image).square() * mask.unsqueeze(-1)
        loss = squared.sum() / (mask.sum() * 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [parameter.detach() for parameter in network.parameters()], losses


def test_a_step_is_a_plain_one_on_the_whole_batch():
    weights, losses, clips = trained(1, DoubleLoss())
    assert [len(batch) for batch in clips] == EPOCHS * [4, 4, 3]
    assert len({clip["mask"].sum().item() for batch in clips for clip in batch}) > 10
    expected, true_losses = plain(clips)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)
    assert losses == pytest.approx(true_losses, rel=1e-12)


@pytest.mark.parametrize("parts", [2, 3, 24])
def test_accumulated_parts_are_the_whole_batch(parts: int):
    whole, losses, _ = trained(1, DoubleLoss())
    weights, found, clips = trained(parts, DoubleLoss())
    torch.testing.assert_close(weights, whole, rtol=0, atol=1e-12)
    assert found == pytest.approx(losses, rel=1e-12)
    assert len(clips[0]) == math.ceil(4 / parts)  # it was computed in parts


def test_in_float32_parts_agree_to_1e_6():
    whole, losses, _ = trained(1, MaskedMSELoss())
    weights, found, _ = trained(3, MaskedMSELoss())
    torch.testing.assert_close(weights, whole, rtol=0, atol=1e-6)
    assert found == pytest.approx(losses, rel=1e-6)


def work_as_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        weights, losses, clips = trained(1, DoubleLoss())
        parts, *_ = trained(2, DoubleLoss())
        torch.save({"weights": weights, "losses": losses, "clips": clips, "parts": parts}, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path):
    """The same global batches, the same draws, the same losses and weights; each computes its own share."""
    whole, losses, clips = trained(1, DoubleLoss())
    torch.multiprocessing.spawn(work_as_rank, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for rank in found:
        torch.testing.assert_close(rank["weights"], whole, rtol=0, atol=1e-12)
        torch.testing.assert_close(rank["parts"], whole, rtol=0, atol=1e-12)
        assert rank["losses"] == pytest.approx(losses, rel=1e-12)
    for batch, *shares in zip(clips, *(rank["clips"] for rank in found), strict=True):
        masks = [{clip["mask"].numpy().tobytes() for clip in share} for share in shares]
        assert masks[0].isdisjoint(masks[1])
        assert masks[0] | masks[1] == {clip["mask"].numpy().tobytes() for clip in batch}


@pytest.mark.parametrize("loss", [MaskedMSELoss(), RegionWeightedMSELoss({"limbic": 3.0})])
@pytest.mark.parametrize("per_frame", [False, True])
def test_a_batch_s_loss_is_the_mean_of_its_parts_by_their_denominators(loss: nn.Module, per_frame: bool):
    generator = torch.Generator().manual_seed(0)
    image, prediction = torch.randn(2, 3, 1, *grid.SHAPE, 2, generator=generator)
    mask = torch.rand(image.shape if per_frame else image.shape[:-1], generator=generator)
    mask = mask < torch.tensor([0.1, 0.5, 0.9]).view(3, *[1] * (mask.ndim - 1))
    whole = loss(prediction, {"image": image, "mask": mask})
    parts = [{"image": image[i : i + 1], "mask": mask[i : i + 1]} for i in range(3)]
    weights = torch.stack([loss.denominator(part) for part in parts]).double()
    losses = torch.stack([loss(prediction[i : i + 1], part) for i, part in enumerate(parts)]).double()
    assert float((losses * weights).sum() / weights.sum()) == pytest.approx(float(whole), rel=1e-5)
    if isinstance(loss, MaskedMSELoss):
        assert int(weights.sum()) == masked_squared_error(prediction, image, mask)[1]


class Poisoned(nn.Module):
    """A loss that is not finite for one clip."""

    def __init__(self, value: float, gradient_only: bool = False) -> None:
        super().__init__()
        self.value, self.gradient_only = value, gradient_only

    def forward(self, prediction: Tensor, target: dict) -> Tensor:
        loss = (prediction - target["image"]).square().mean()
        if "sub-7" not in target["participant_id"]:
            return loss
        # the square root of 0 has an infinite slope
        return loss + (prediction - prediction.detach()).sum().abs().sqrt() if self.gradient_only else loss * self.value


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (Poisoned(math.nan), "the loss is nan"),
        (Poisoned(math.inf), "the loss is inf"),
        (Poisoned(1, gradient_only=True), "the gradient's norm is nan"),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_and_names_the_clips(loss: nn.Module, words: str):
    with pytest.raises(InputError, match=f"{words} in epoch 1, iteration .*run-7 from frame 0"):
        trained(1, loss)


def test_parts_of_a_batch_norm_are_refused():
    engine = SimpleNamespace(
        network=nn.Sequential(WholeBatchNorm(3)), state=SimpleNamespace(device=torch.device("cpu"))
    )
    with pytest.raises(InputError, match="accumulate must be 1 here"):
        WholeBatchStep(2)(engine, [{}])
    with pytest.raises(InputError, match="accumulate must be at least 1, not 0"):
        WholeBatchStep(0)


def test_only_errors_of_other_processes_are_taken_for_lost_ones():
    ours = RuntimeError("shapes do not fit")
    assert lost_process(ours) is ours
    gloo = RuntimeError("[/a/gloo/pair.cc:537] Connection closed by peer [127.0.0.1]:4711. This means a lot.")
    assert str(lost_process(gloo)).startswith(
        "another training process was lost (Connection closed by peer [127.0.0.1]:"
    )
    assert "This means" not in str(lost_process(gloo))


@pytest.mark.parametrize(
    ("restarts", "shared", "refused"), [("1", "True", True), ("0", "True", False), ("1", "False", False)]
)
def test_restarts_by_torchrun_need_a_store_of_their_own(monkeypatch, restarts: str, shared: str, refused: bool):
    """Set as torchrun sets them for its processes."""
    joined = []
    monkeypatch.setattr("ignite.distributed.initialize", lambda *_, **__: joined.append(True))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    with pytest.raises(InputError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before") if refused else nullcontext():
        join_group(50.0)
    assert bool(joined) != refused
