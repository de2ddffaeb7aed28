"""A released model of a tiny network, made without a training."""

from pathlib import Path
from typing import Any

import torch
from references import reference
from tasks import BINARY
from torch import nn

from bundle.data.normalisation import Normalisation
from bundle.deploy.release import release
from bundle.preparation.store import read_manifest
from bundle.training.checkpoints import load_checkpoint, save_checkpoint, write_checkpoint
from bundle.training.provenance import Provenance

SIZE: dict[str, Any] = {"frames": 2, "embed_dim": 4, "depths": [1, 2, 1, 1]}
UNITS = Normalisation("voxel", sd_floor=0.1, clip=5.0)


def checkpoint(
    folder: Path,
    store: Path,
    network: nn.Module,
    arguments: dict[str, Any] | None = None,
    preparation: dict[str, Any] | None = None,
    **config: object,
) -> Path:
    """A classifier's checkpoint, as of a training on a store that has ended.

    Args:
        folder: where it goes.
        store: whose preparation it has.
        network: of the sizes above.
        arguments: further ones of the network.
        preparation: changes of the store's.
        config: further entries of the config.
    """
    network_def = {"_target_": f"{type(network).__module__}.{type(network).__qualname__}", **SIZE, **(arguments or {})}
    own = {"precision": "float32", "seed": 3, "network_def": network_def, "frames": 2, "clip_stride": 2}
    facts = {
        "config": own | {"whole_runs": False} | config,
        "preparation": read_manifest(store)["parameters"] | (preparation or {}),
        "brain_masks": ["given"],
        "network": network.encoder.size,
        "task": BINARY.facts(),
        "splits": "s",
        "data": "d",
        "normalisation": UNITS.facts(),
    }
    save_checkpoint({"network": network, "provenance": Provenance(**facts)}, folder / "best.pt")
    write_checkpoint(
        load_checkpoint(folder / "best.pt") | {"reference": reference(BINARY, columns=network.encoder.channels)},
        folder / "best.pt",
    )
    return folder / "best.pt"


def released(folder: Path, store: Path, network: nn.Module, arguments: dict[str, Any] | None = None) -> Path:
    """The same, released: `model.pt`."""
    return release(checkpoint(folder, store, network, arguments), folder / "models")


def shaken(network: nn.Module) -> nn.Module:
    """The network with statistics of a batch norm, and a head, as if it were trained; for inference."""
    with torch.no_grad():
        network.norm.running_mean.normal_(0, 0.1)
        network.norm.running_var.uniform_(0.5, 2)
    return network.eval()
