"""One process or several: the same configs, one process per GPU under torchrun."""

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
