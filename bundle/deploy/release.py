"""Released models: the weights, and beside them what they were made with."""

import json
import logging
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bundle.anatomy.atlas import AAL3, load_atlas
from bundle.data.normalisation import Normalisation
from bundle.errors import InputError
from bundle.files import file_sha256, write_json
from bundle.preparation.chain import rebuild_preparation
from bundle.tasks.kinds import task_from
from bundle.training.checkpoints import load_checkpoint, saved_facts, write_checkpoint
from bundle.training.provenance import Provenance
from bundle.training.provenance import entries as leaves

logger = logging.getLogger(__name__)


def release(checkpoint: str | Path, folder: str | Path) -> Path:
    """Write the network of a checkpoint as `model.pt`, a flat state dict, with its facts in `model.json`.

    This is the form that the model zoo and `monai.bundle.load` expect. The facts carry the hash of the weights,
    so that the two files cannot be mixed up.

    Returns:
        The path of `model.pt`.
    """
    saved = load_checkpoint(checkpoint)
    facts = saved_facts(saved, checkpoint)
    path = Path(folder) / "model.pt"
    write_checkpoint(saved["network"], path)
    write_json(path.with_suffix(".json"), facts | {"sha256": file_sha256(path)})
    return path


def open_model(path: str | Path) -> "ReleasedModel":
    """A released model, or a classifier's checkpoint as `release` would write it."""
    if Path(path).with_suffix(".json").is_file():
        return ReleasedModel(path)
    with TemporaryDirectory() as folder:
        return ReleasedModel(release(path, folder))


class ReleasedModel:
    """A model that `release` wrote, and what is known of how it was made: it is served as it was trained.

    Args:
        path: `model.pt`; `model.json` lies beside it.

    Attributes:
        record: what it was made with.
        precision: "float32" or "bf16", see `bundle.networks.precision`.
        normalisation: units of what it sees, see `bundle.data.normalisation`.
        task: what it predicts, see `bundle.tasks`.
        preparation: how its data were prepared, see `bundle.preparation.chain`.

    Raises:
        InputError: a file is absent, the two do not belong together, or the record was written by another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.state = load_checkpoint(self.path)
        source = self.path.with_suffix(".json")
        if not source.is_file():
            raise InputError(
                f"{source}: absent, so nobody knows what {self.path.name} is; run `python -m scripts release`"
            )
        self.record: dict[str, Any] = json.loads(source.read_text())
        if self.record.get("sha256") != file_sha256(self.path):
            raise InputError(
                f"{source}: does not belong to {self.path.name} (its sha256 differs); release the model again"
            )
        if missing := {"config", "preparation", "network", "normalisation", "brain_masks", "task"} - set(self.record):
            raise InputError(f"{source}: does not say its {min(missing)}; train and release with this version")
        self.precision: str = self.record["config"]["precision"]
        self.normalisation = Normalisation(**self.record["normalisation"])
        if self.record["task"] is None:
            raise InputError(f"{self.path}: a pretrained network, which predicts nothing; train one, and release that")
        self.task = task_from(self.record["task"])
        self.preparation = rebuild_preparation(self.record["preparation"], source)

    def entries(self, atlas: str = AAL3) -> dict[str, Any]:
        """The entries of `configs/inference.json` that the network needs, from what it was made with.

        Args:
            atlas: of the training, which the record knows by its hash only; see `bundle.anatomy.atlas.load_atlas`.

        Raises:
            InputError: it was trained with another atlas, or the record asks for what is no head of this bundle.
        """
        config, source = self.record["config"], self.path.with_suffix(".json")
        network = dict(config["network_def"])
        network |= {name: value for name, value in self.record["network"].items() if name in network}
        own = f"sha256 {load_atlas(atlas).sha256}"
        if network.get("atlas", own) != own:
            raise InputError(f"{source}: was trained with another atlas than {atlas}; give its --atlas")
        network |= {"atlas": atlas} if "atlas" in network else {}
        made = {"network_def": network} | {name: config[name] for name in ("frames", "clip_stride", "whole_runs")}
        strange = [value for _, value in leaves(made) if isinstance(value, str) and value.startswith(("$", "@", "%"))]
        if strange or not re.fullmatch(r"bundle\.heads\.\w+\.\w+", str(network.get("_target_"))):
            raise InputError(f"{source}: its network is no head of this bundle, so it is not made; release it again")
        return made | {"atlas": atlas}

    def load_into(self, network: Any) -> None:
        """Load the weights, refusing a network of other sizes; every key must fit.

        Raises:
            InputError: the network has other sizes than the one that was trained, or another readout.
        """
        advice = "give the overlays and options that it was trained with"
        if network.outputs != self.task.outputs:
            raise InputError(
                f"{self.path}: predicts {self.task.column} by {self.task.outputs} outputs, not {network.outputs}; give "
                f"--outputs {self.task.outputs}"
            )
        Provenance(network=network.encoder.size).require(
            self.record, self.path.with_suffix(".json"), ["network"], advice=advice
        )
        try:
            network.load_state_dict(self.state, strict=True)
        except RuntimeError as error:  # how torch reports keys that do not fit
            raise InputError(f"{self.path}: its weights do not fit a {type(network).__name__}; {advice}") from error
        logger.info("Loaded the model %s", self.path)
