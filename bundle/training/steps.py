"""A step of training: one move of the weights by the loss over a whole batch, however many share the computing."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.engines import SupervisedTrainer, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bundle.errors import InputError


class WholeBatchStep:
    """Trainer's `iteration_update`: a step that is the same for one process and several, in one part and several.

    The mean of means is not the mean: masks hide different numbers of voxels, and shares differ in size. So the loss of
    each part is multiplied by what it is a mean over, the gradients of these sums are added up over parts and
    processes, and then divided by the total, once. MONAI's `accumulation_steps` and data-parallel training by itself
    take the mean of means.

    A loss that is a mean over something else than the items says over how much: a method `denominator(target)`, as
    `bundle.training.losses.MaskedMSELoss` has it.

    After the step `engine.state.figures` holds the `Figures` of the last two steps, and `engine.state.stop` whether the
    processes have agreed to stop (see `bundle.training.checkpoints.KeepCheckpoints`).

    Args:
        parts: in how many parts a process computes its share of a batch, one after another: less memory, the same
            result but for rounding.

    Raises:
        InputError: (when called) a loss or gradient is not finite; or several parts of a batch norm, which needs the
            whole batch at once.
    """

    def __init__(self, parts: int = 1) -> None:
        if parts < 1:
            raise InputError(f"accumulate must be at least 1, not {parts}")
        self.parts = parts

    def __call__(self, engine: SupervisedTrainer, items: list[dict]) -> list[dict[str, Tensor]]:
        """Compute, step, and return the `loss` over the whole batch, a scalar on the device.

        It lies in a list of one dictionary, as where MONAI takes batches apart: so its trackers find it.
        """
        network: Any = engine.network
        device, world = engine.state.device, idist.get_world_size()
        if self.parts > 1 and any(isinstance(module, _BatchNorm) for module in network.modules()):
            raise InputError(
                "accumulate must be 1 here, as the head's batch norm needs a whole batch at once (a frozen encoder "
                "works clip by clip anyway); for less memory start more processes"
            )
        network.train()
        engine.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # of losses times denominators, of denominators
        parts = [part.tolist() for part in np.array_split(np.arange(len(items)), min(self.parts, len(items)))]
        for part in parts:
            inputs, target, args, kwargs = engine.prepare_batch([items[i] for i in part], device, engine.non_blocking)
            with nullcontext() if part is parts[-1] or world == 1 else network.no_sync():
                loss = engine.loss_function(engine.inferer(inputs, network, *args, **kwargs), target)
                weight = _denominator(engine.loss_function, target, len(part), sums)
                (loss * weight).backward()
            sums += torch.stack([loss.detach() * weight, weight])
        own, asked = sums[0].clone(), float(getattr(engine.state, "stop_signal", 0) != 0)
        sums = torch.cat([sums, sums.new_full((1,), asked)])  # filled on the device, which is not waited for
        if world > 1:
            torch.distributed.all_reduce(sums)
        loss, gradients = sums[0] / sums[1], [p.grad for p in network.parameters() if p.grad is not None]
        # data-parallel training has divided the sum of gradients by the number of processes
        torch._foreach_mul_(gradients, (world / sums[1]).to(gradients[0].dtype))
        norm = nn.utils.get_total_norm(gradients)
        engine.optimizer.step()
        known = getattr(engine.state, "figures", [])[-1:]
        engine.state.figures = [*known, Figures(engine, items, torch.stack([loss, norm.to(loss), sums[2], own]))]
        for figures in readable(engine):
            figures.require_finite()
            engine.state.stop = figures.read()[2] > 0
        return [{"loss": loss.float()}]


def _denominator(loss: Any, target: dict, items: int, like: Tensor) -> Tensor:
    return loss.denominator(target).to(like) if hasattr(loss, "denominator") else like.new_full((), items)


class Figures:
    """What is known of a step: numbers on their way from the device, which is not waited for, and the step's clips.

    Args:
        engine: the trainer, in the step.
        items: the clips, of this process.
        values: on the device, (4,): loss, norm of the gradient, whether any process was asked to stop, and the sum of
            this process's own losses.
    """

    def __init__(self, engine: Trainer, items: Sequence[dict], values: Tensor) -> None:
        self.epoch, self.iteration = engine.state.epoch, engine.state.iteration
        self.clips = [(item["run_id"], item.get("start")) for item in items]
        self.values = values.to("cpu", non_blocking=True)
        self.event = torch.cuda.Event() if values.is_cuda else None
        if self.event is not None:
            self.event.record()

    def read(self) -> list[float]:
        """Return the four values, when they have come."""
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()

    def require_finite(self) -> None:
        """Refuse a loss or a gradient that is NaN or infinite.

        Raises:
            InputError: it is; names the clips.
        """
        loss, norm, _, own = self.read()
        if np.isfinite(loss) and np.isfinite(norm):
            return
        what = f"the gradient's norm is {norm}" if np.isfinite(loss) else f"the loss is {loss}"
        clips = ", ".join(run if start is None else f"{run} from frame {start}" for run, start in self.clips)
        if np.isfinite(own) and not np.isfinite(loss):
            clips = "of another process, which names them"
        raise InputError(
            f"{what} in epoch {self.epoch}, iteration {self.iteration}; the last good checkpoint is kept; look at the "
            f"clips of this step ({clips}), or lower learning_rate and give another --output_dir"
        )


def readable(engine: Trainer) -> list[Figures]:
    """Figures that can be read without waiting: on CUDA those of the step before the last, else the last step's."""
    figures: list[Figures] = engine.state.figures
    return figures[:-1] if figures[-1].event is not None else figures[-1:]
