"""One process or several: the same configs, one process per GPU under torchrun."""

import atexit
import gc

import ignite.distributed as idist
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """The network on a device, wrapped for data-parallel training where several processes share it."""
    network = network.to(device)
    return idist.auto_model(network) if idist.get_world_size() > 1 else network


def summary_writer(folder: str) -> SummaryWriter:
    """TensorBoard writer of this process; those beside the first have folders of their own, `<folder>1` ..."""
    return SummaryWriter(f"{folder}{idist.get_rank() or ''}")


def leave_group() -> None:
    """Leave the group of training processes, and see that its threads end before Python does.

    A thread of gloo needs the interpreter to let go of a tensor. If the interpreter is just ending, the process aborts
    ("terminate called without an active exception"). A group waits for its threads when the last reference to it goes,
    and `ignite.distributed.finalize` drops only PyTorch's: the network that `auto_model` wrapped refers to it too, for
    as long as the workflow lives. So the end of the process looks for what is left of the workflow, and drops a
    reference from Python last, since the network's would hold the interpreter while it waits, for ever.
    """
    group = [torch.distributed.group.WORLD]
    idist.finalize()

    @atexit.register
    def wait_for_threads() -> None:
        gc.collect()
        group.clear()
