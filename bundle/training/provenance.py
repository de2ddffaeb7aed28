"""What made a checkpoint: the whole resolved config and the data; saved inside it, and compared when it is loaded.

Nobody lists what shapes the weights. Every entry of the config counts, also those of overlays and of the command
line, except the few that are named in `CANNOT_SHAPE`.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.reference_resolver import ReferenceResolver

from bundle.anatomy.atlas import is_atlas, load_atlas
from bundle.data.splits import load_splits
from bundle.errors import InputError
from bundle.files import file_sha256
from bundle.preparation.store import read_index
from bundle.preparation.transforms import mask_kind

CANNOT_SHAPE = {
    "_meta_": "says what the bundle is",
    "imports": "names for expressions",
    "bundle_root": "a path",
    "run": "what is done with the entries",
    "pretrain": "the same",
    "finalize": "how a process ends",
    "provenance": "holds this",
    "dataset_dir": "a path; what lies there is compared",
    "splits_file": "a path; the sets are compared",
    "output_dir": "a path",
    "device": "where it is computed; precision is an entry",
    "num_workers": "who reads",
    "checkpointing": "computes again what it does not keep",
    "accumulate": "the same batch, in parts",
    "checkpoint_minutes": "how often it is written",
    "lost_process_seconds": "when to give up",
    "max_epochs": "how long",
    "early_stop_patience": "how long",
    "writer": "logs",
    "train#reports": "log",
    "validate#reports": "log",
    "tracking_uri": "where MLflow logs",
    "experiment_name": "MLflow's",
    "run_name": "MLflow's",
    "save_execute_config": "MLflow's",
    "is_not_rank0": "MLflow's",
}
"""Entries of the configs that cannot shape weights, and why. The last ones are what `--tracking mlflow` adds."""

TRACKERS = ("MLFlowHandler",)
"""Handlers that `--tracking` adds to lists of them."""

TRAINING_ONLY = ("config#encoder_checkpoint", "config#initialize")
"""Facts that shape weights while they are trained, and say nothing of how a trained network is to be used."""


class Provenance:
    """Facts that are saved in a checkpoint and must be the same when it is used.

    Args:
        facts: nested JSON values by name.
    """

    def __init__(self, **facts: Any) -> None:
        self.facts: dict[str, Any] = json.loads(json.dumps(facts))

    def state_dict(self) -> dict[str, str]:
        """Return the facts as one JSON string, which `torch.load(weights_only=True)` accepts."""
        return {"facts": json.dumps(self.facts)}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Compare with the facts of a checkpoint.

        Raises:
            InputError: a fact differs; the message names it and both values.
        """
        self.require(json.loads(state["facts"]), "the checkpoint")

    def require(
        self,
        theirs: Mapping[str, Any],
        source: str | Path,
        names: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
        more_is_fine: bool = False,
        advice: str = "use the same settings, or give another --output_dir",
    ) -> None:
        """Refuse facts of `source` that differ from ours.

        Args:
            theirs: the facts of a checkpoint or a released model.
            source: its file, for the message.
            names: facts to compare; None compares all, and also refuses a fact that only one side has.
            ignore: entries that are not compared, such as "config#encoder_checkpoint".
            more_is_fine: our config may have entries that theirs lacks, as an overlay that evaluates adds some.
            advice: what the user can do.

        Raises:
            InputError: a fact differs; the message names the entry and both values.
        """
        sides = [{name: facts.get(name) for name in names or facts} for facts in (theirs, self.facts)]
        old, new = (dict(entries(side)) for side in sides)
        compared = old if more_is_fine else old | new
        differing = [name for name in compared if old.get(name, _ABSENT) != new.get(name, _ABSENT)]
        differing = sorted((name for name in differing if not _below(name, ignore)), key=lambda name: name.count("#"))
        if differing:
            name = differing[0]
            more = f" ({len(differing) - 1} more differ)" if len(differing) > 1 else ""
            was, now = (repr(side[name]) if name in side else "nothing" for side in (old, new))
            entry = name.removeprefix("config#")
            raise InputError(f"{source}: was made with {entry} {was}, but here it is {now}{more}; {advice}")


_ABSENT = object()


def entries(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested JSON with their names, such as `mask#ratio`; a list without dictionaries is one leaf."""
    if isinstance(content, dict):
        pairs: Any = content.items()
    elif isinstance(content, list) and any(isinstance(part, dict) for part in content):
        pairs = enumerate(content)
    else:
        yield name, content
        return
    for key, value in pairs:
        yield from entries(value, f"{name}#{key}" if name else str(key))


def training_provenance(
    store: str | Path,
    splits_file: str | Path,
    network: Mapping[str, Any],
    normalisation: Mapping[str, Any],
    task: Mapping[str, Any] | None = None,
    labels: Mapping[str, float] | None = None,
) -> Provenance:
    """Facts of a training: the config that asks for this, and the data that it names.

    Args:
        store: the prepared store: its preparation, its brain masks, and the content of its runs.
        splits_file: the split file.
        network: sizes of the encoder, `SwinMambaEncoder.size`.
        normalisation: units of what the network sees, `Normalisation.facts`.
        task: what it predicts, `bundle.tasks.task.Task.facts`; None: it is pretrained.
        labels: of each participant, kept as a hash; None likewise.

    Returns:
        `config` (see `resolved_config`), `preparation`, `brain_masks`, `data`, `splits`, `network`, `normalisation`,
        `task` and `labels`. The number of processes that share a step is no fact: the step is the same.
    """
    manifest = read_index(store)
    return Provenance(
        config=resolved_config(parser_at_work()),
        preparation=manifest["parameters"],
        brain_masks=sorted({mask_kind(run) for run in manifest["runs"]}),
        data=_content_of(manifest["runs"]),
        splits=load_splits(splits_file)["sha256"],
        network=dict(network),
        normalisation=dict(normalisation),
        task=task and dict(task),
        labels=labels and _hash(dict(labels)),
    )


def _content_of(runs: Sequence[Mapping[str, Any]]) -> str:
    """One hash of what a store's runs were made from, and of their sites."""
    keys = ("run_id", "source_sha256", "mask_sha256", "confounds_sha256", "site")
    return _hash([[run.get(key) for key in keys] for run in runs])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def parser_at_work() -> ConfigParser:
    """The parser that is making the entry whose function calls this.

    MONAI gives no entry a way to the config that it is part of (a macro of all of it would make every entry a
    second time), so the parser is taken from the calls that led here. A test holds this to MONAI's way of calling.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(parser := frame.f_locals.get("self"), ConfigParser):
            return parser
        frame = frame.f_back
    raise RuntimeError("provenance is an entry of a config; it cannot be made outside one")


def resolved_config(parser: ConfigParser) -> dict[str, Any]:
    """A config with references and expressions replaced by their values, less `CANNOT_SHAPE`.

    An expression that needs more than plain values, such as one of a network, stays as its text: a change of it is
    seen, and so is a change of whatever it refers to. References to what `CANNOT_SHAPE` names stay too. A path of a
    file that was there before counts by the file's content, and an entry `atlas`, wherever it is, by what the atlas is:
    its labels, their names and groups.

    Returns:
        Nested JSON values.
    """
    config: dict[str, Any] = parser.config  # type: ignore[assignment]
    shaping = {key: value for key, value in config.items() if key not in CANNOT_SHAPE}
    # what is done at the beginning has effects, so it is not done again to see its value
    return {key: value if key == "initialize" else _resolved(parser, key, value) for key, value in shaping.items()}


def _resolved(parser: ConfigParser, name: str, value: Any) -> Any:
    if isinstance(value, dict):
        inside = {key: f"{name}#{key}" for key in value}
        return {key: _resolved(parser, inside[key], value[key]) for key in value if inside[key] not in CANNOT_SHAPE}
    if isinstance(value, list):
        parts = {i: v for i, v in enumerate(value) if not (isinstance(v, dict) and v.get("_target_") in TRACKERS)}
        return [_resolved(parser, f"{name}#{index}", part) for index, part in parts.items()]
    if not isinstance(value, str):
        return value if _is_json(value) else f"an object of {type(value).__name__}"  # put there by Python code
    if not _is_plain(parser, name) or "output_dir" in _all_references(parser, value):
        return value
    result = parser.get_parsed_content(name)
    if isinstance(result, str) and name.split("#")[-1] == "atlas" and is_atlas(result):
        return f"sha256 {load_atlas(result).sha256}"
    if isinstance(result, str) and Path(result).is_file():
        return f"sha256 {file_sha256(result)}"
    return value if any(_below(other, CANNOT_SHAPE) for other in _references(value)) else result


def _is_plain(parser: ConfigParser, name: str) -> bool:
    """Whether an entry is a JSON value, or becomes one by nothing but such values."""
    value = parser[name]
    if isinstance(value, dict | list):
        return "_target_" not in value and all(
            _is_plain(parser, f"{name}#{key}") for key in (value if isinstance(value, dict) else range(len(value)))
        )
    if not isinstance(value, str) or not (_references(value) or value.startswith("$")):
        return True
    plain = all(_is_plain(parser, other) for other in _references(value))
    return plain and _is_json(parser.get_parsed_content(name))


def _is_json(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False


def _references(value: Any) -> list[str]:
    names = ReferenceResolver.match_refs_pattern(value) if isinstance(value, str) else ()
    return [name.replace("::", "#") for name in names]


def _all_references(parser: ConfigParser, value: Any) -> set[str]:
    """What an entry refers to, and what that refers to, and so on."""
    found = set(_references(value))
    return found.union(*(_all_references(parser, parser[name]) for name in found))


def _below(name: str, others: Sequence[str] | Mapping[str, Any]) -> bool:
    """Whether a name is one of others, or part of one."""
    return any(name == other or name.startswith(f"{other}#") for other in others)
