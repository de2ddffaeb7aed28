"""Released models: the weights, and beside them what they were made with and whom they know."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from bundle.anatomy.atlas import AAL3, load_atlas
from bundle.data.normalisation import Normalisation
from bundle.errors import InputError
from bundle.files import file_sha256, write_json
from bundle.preparation.chain import rebuild_preparation
from bundle.tasks.kinds import task_from
from bundle.tasks.task import Task
from bundle.training.checkpoints import load_checkpoint, saved_facts, write_checkpoint
from bundle.training.provenance import Provenance
from bundle.training.provenance import entries as leaves

logger = logging.getLogger(__name__)


SAME_IN_ALL = ("preparation", "normalisation", "network", "task#kind", "task#column", "task#classes")
"""Facts that the networks of an ensemble share; and `config#precision`."""


def release(checkpoint: str | Path | Sequence[str | Path], folder: str | Path) -> Path:
    """Write the network of a checkpoint as `model.pt`, a flat state dict, with its facts in `model.json`.

    This is the form that the model zoo and `monai.bundle.load` expect. Beside them lies `reference.pt`: what the
    training subjects are like, see `bundle.evaluation.reference`. The facts carry the hashes of all files, so that
    they cannot be mixed up.

    Args:
        checkpoint: of a classifier whose training has ended; or several, of other seeds or folds, which become an
            ensemble: `model.pt`, `model_2.pt`, ...
        folder: where to write.

    Returns:
        The path of `model.pt`.

    Raises:
        InputError: a checkpoint cannot be used, or those of an ensemble do not go together.
    """
    sources = [checkpoint] if isinstance(checkpoint, str | Path) else list(checkpoint)
    saved = [load_checkpoint(source) for source in sources]
    facts = [_facts_to_release(one, source) for one, source in zip(saved, sources, strict=True)]
    for own, source in zip(facts[1:], sources[1:], strict=True):
        _require_alike(facts[0], own, source)
    path = Path(folder) / "model.pt"
    members = []
    for number, (one, own) in enumerate(zip(saved, facts, strict=True), start=1):
        file = path if number == 1 else path.with_name(f"model_{number}.pt")
        write_checkpoint(one["network"], file)
        about = {name: own[name] for name in ("task", "brain_masks", "splits", "data")}
        about |= {"seed": own["config"].get("seed"), "training_subjects": one["reference"]["participants"]}
        about |= {"calibration": one["reference"]["calibration"]}
        members.append({"file": file.name, "sha256": file_sha256(file)} | about)
    reference = path.with_name("reference.pt")
    write_checkpoint({"members": [one["reference"] for one in saved]}, reference)
    hashes = {"sha256": members[0]["sha256"], "reference_sha256": file_sha256(reference)}
    write_json(path.with_suffix(".json"), facts[0] | hashes | {"members": members})
    return path


def open_model(path: str | Path) -> "ReleasedModel":
    """A released model, or a classifier's checkpoint as `release` would write it."""
    if Path(path).with_suffix(".json").is_file():
        return ReleasedModel(path)
    with TemporaryDirectory() as folder:
        return ReleasedModel(release(path, folder))


def _facts_to_release(saved: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    facts = saved_facts(saved, source)
    if facts["task"] is None:
        raise InputError(f"{source}: a pretrained network, which predicts nothing; train one, and release that")
    if "reference" not in saved:
        raise InputError(f"{source}: does not know its training subjects; give its training's command again")
    return facts


def _require_alike(first: Mapping[str, Any], facts: Mapping[str, Any], source: str | Path) -> None:
    """Refuse a network that cannot be averaged with the first."""
    shared = [
        {name: _at(one, name) for name in (*SAME_IN_ALL, "config#precision", "config#network_def#_target_")}
        for one in (first, facts)
    ]
    Provenance(**shared[0]).require(shared[1], source, advice="release networks that differ in seed or fold only")


def _at(content: Mapping[str, Any], name: str) -> Any:
    for key in name.split("#"):
        content = content[key]
    return content


@dataclass(frozen=True)
class Member:
    """One network of a released model.

    Attributes:
        state: its weights.
        task: what it predicts; of a regression it has mean and SD of its own training subjects.
        reference: what these are like, see `bundle.evaluation.reference.reference_of`.
    """

    state: dict[str, Tensor]
    task: Task
    reference: dict[str, Any]


EXPECTED = {"config", "preparation", "network", "normalisation", "brain_masks", "task", "members", "reference_sha256"}
"""Of a record."""


class ReleasedModel:
    """A model that `release` wrote, and what is known of how it was made: it is served as it was trained.

    Args:
        path: `model.pt`; `model.json` and `reference.pt` lie beside it, and of an ensemble `model_2.pt`, ...

    Attributes:
        record: what it was made with.
        precision: "float32" or "bf16", see `bundle.networks.precision`.
        normalisation: units of what it sees, see `bundle.data.normalisation`.
        task: what it predicts, see `bundle.tasks`.
        members: its networks: one, or several of an ensemble.
        preparation: how its data were prepared, see `bundle.preparation.chain`.

    Raises:
        InputError: a file is absent, they do not belong together, or the record was written by another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        load_checkpoint(self.path)
        source = self.path.with_suffix(".json")
        if not source.is_file():
            raise InputError(
                f"{source}: absent, so nobody knows what {self.path.name} is; run `python -m scripts release`"
            )
        self.record: dict[str, Any] = json.loads(source.read_text())
        if missing := EXPECTED - set(self.record):
            raise InputError(f"{source}: does not say its {min(missing)}; train and release with this version")
        files = {self.path.with_name(one["file"]): one["sha256"] for one in self.record["members"]}
        reference = self.path.with_name("reference.pt")
        for file, sha256 in (files | {reference: self.record["reference_sha256"]}).items():
            if file_sha256(file) != sha256:
                raise InputError(f"{source}: does not belong to {file.name} (its sha256 differs); release it again")
        self.precision: str = self.record["config"]["precision"]
        self.normalisation = Normalisation(**self.record["normalisation"])
        self.task = task_from(self.record["task"])
        known = load_checkpoint(reference)["members"]
        self.members = [
            Member(load_checkpoint(file), task_from(one["task"]), its)
            for file, one, its in zip(files, self.record["members"], known, strict=True)
        ]
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

    def load_into(self, network: Any, member: int = 0) -> None:
        """Load the weights of one of the members, refusing a network of other sizes; every key must fit.

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
            network.load_state_dict(self.members[member].state, strict=True)
        except RuntimeError as error:  # how torch reports keys that do not fit
            raise InputError(f"{self.path}: its weights do not fit a {type(network).__name__}; {advice}") from error
        of = f" ({member + 1} of {len(self.members)})" if len(self.members) > 1 else ""
        logger.info("Loaded the model %s%s", self.path, of)
