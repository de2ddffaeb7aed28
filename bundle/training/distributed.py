"""One process or several: the same configs, one process per GPU under torchrun."""

import atexit
import gc
import os
import re
from datetime import timedelta

import ignite.distributed as idist
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from bundle.errors import InputError

FLUSH_S = 10
"""TensorBoard's files lack at most so much of a process that is killed."""


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """The network on a device, wrapped for data-parallel training where several processes share it."""
    network = network.to(device)
    return idist.auto_model(network) if idist.get_world_size() > 1 else network


def summary_writer(folder: str) -> SummaryWriter | None:
    """TensorBoard writer of the first process; the others write nothing."""
    return SummaryWriter(folder, flush_secs=FLUSH_S) if idist.get_rank() == 0 else None


def join_group(patience_s: float) -> None:
    """Join the group of training processes, as `torchrun` names them: with NCCL on CUDA, else gloo.

    Args:
        patience_s: a process that does not answer for so long is lost, and all others end; they end at once where the
            system says that it is gone. It must be longer than any process ever waits for another: for one that reads
            from a slow disk, or writes a checkpoint.

    Raises:
        InputError: torchrun is to start processes again, and would have them meet in a store that still holds the
            addresses of those that are gone (PyTorch's issue 135712), so that most restarts fail.
    """
    elastic = {name: os.environ.get(f"TORCHELASTIC_{name}") for name in ("MAX_RESTARTS", "USE_AGENT_STORE")}
    if elastic["MAX_RESTARTS"] not in (None, "0") and elastic["USE_AGENT_STORE"] == "True":
        raise InputError(
            "torchrun's --max_restarts needs a store of its own for each start, or restarts look for processes that "
            "are gone; export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, and give it --standalone or "
            "--rdzv_backend c10d"
        )
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    idist.initialize(backend, timeout=timedelta(seconds=patience_s))


def lost_process(error: BaseException) -> BaseException:
    """What an error says where it comes from another process that is gone or does not answer; else the error itself."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not ("gloo" in text or isinstance(error, torch.distributed.DistError)):
        return error
    reason = re.sub(r"^\[.*?\] *", "", text.splitlines()[0]).split(". ")[0]  # without the place in gloo's own code
    lost = InputError(
        f"another training process was lost ({reason}); see what it said last; the same command goes on from last.pt"
    )
    lost.__cause__ = error
    return lost


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
