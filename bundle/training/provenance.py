"""What a checkpoint was made with: saved inside it, and compared when it is loaded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bundle.data.splits import load_splits
from bundle.errors import InputError
from bundle.preparation.store import read_manifest
from bundle.preparation.transforms import mask_kind


class Provenance:
    """What a checkpoint was made with: saved inside it, and compared when it is loaded.

    Args:
        facts: name and JSON value of everything that must not change between the runs that share a checkpoint.
    """

    def __init__(self, **facts: Any) -> None:
        self.facts: dict[str, Any] = json.loads(json.dumps(facts))

    def state_dict(self) -> dict[str, str]:
        """Return the facts as one JSON string, which ``torch.load(weights_only=True)`` accepts."""
        return {"facts": json.dumps(self.facts)}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Compare with the facts of a checkpoint.

        Raises:
            InputError: a fact differs; the message names it and both values.
        """
        self.require(json.loads(state["facts"]), list(self.facts), "the checkpoint")

    def require(
        self,
        facts: Mapping[str, Any],
        names: list[str],
        source: str | Path,
        advice: str = "use the same settings, or give another --output_dir",
    ) -> None:
        """Refuse ``facts`` of ``source`` that differ from ours in one of ``names``; ``advice`` says what to do."""
        for name in names:
            theirs, ours = facts.get(name), self.facts.get(name)
            if theirs == ours:
                continue
            if isinstance(theirs, dict) and isinstance(ours, dict):  # of a network's many sizes, those that differ
                differing = [key for key in theirs | ours if theirs.get(key) != ours.get(key)]
                theirs, ours = ({key: side.get(key) for key in differing} for side in (theirs, ours))
            raise InputError(f"{source}: was made with {name} {theirs!r}, but this run has {ours!r}; {advice}")


def training_provenance(
    store: str | Path, splits_file: str | Path, network: Mapping[str, Any], **settings: Any
) -> Provenance:
    """Facts of a training run: the store's preparation and brain masks, the split, network sizes, settings."""
    manifest = read_manifest(store)
    return Provenance(
        preparation=manifest["parameters_hash"],
        brain_masks=sorted({mask_kind(run) for run in manifest["runs"]}),
        splits=load_splits(splits_file)["sha256"],
        network=dict(network),
        **settings,
    )
