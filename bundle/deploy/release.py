"""Released models: the weights, and beside them what they were made with."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bundle.errors import InputError
from bundle.files import file_sha256, write_json
from bundle.training.checkpoints import load_checkpoint, saved_facts, write_checkpoint
from bundle.training.provenance import Provenance

logger = logging.getLogger(__name__)


def release(checkpoint: str | Path, folder: str | Path) -> Path:
    """Write the network of a checkpoint as ``model.pt``, a flat state dict, with its facts in ``model.json``.

    This is the form that the model zoo and ``monai.bundle.load`` expect. The facts carry the hash of the weights,
    so that the two files cannot be mixed up.

    Returns:
        The path of ``model.pt``.
    """
    saved = load_checkpoint(checkpoint)
    facts = saved_facts(saved, checkpoint)
    path = Path(folder) / "model.pt"
    write_checkpoint(saved["network"], path)
    write_json(path.with_suffix(".json"), facts | {"sha256": file_sha256(path)})
    return path


def load_released(network: nn.Module, path: str | Path, facts: Mapping[str, Any]) -> None:
    """Load what `release` wrote, refusing weights whose recorded facts differ from ``facts``.

    Raises:
        InputError: a file is absent, the two do not belong together, or a fact differs.
    """
    path = Path(path)
    state = load_checkpoint(path)
    record = path.with_suffix(".json")
    if not record.is_file():
        raise InputError(f"{record}: absent, so nobody knows what {path.name} is; run `python -m scripts release`")
    recorded = json.loads(record.read_text())
    if recorded.get("sha256") != file_sha256(path):
        raise InputError(f"{record}: does not belong to {path.name} (its sha256 differs); release the model again")
    advice = "give the overlays and options that it was trained with (see the README on `preparation`)"
    Provenance(**facts).require(recorded, list(facts), record, advice)
    network.load_state_dict(state, strict=True)
    logger.info("Loaded the model %s", path)
