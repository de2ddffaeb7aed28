"""A small sweep, and what stands for its stages: it writes what they write, and keeps what it was asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tasks import BINARY, subjects_of

from bundle.data.splits import load_splits
from bundle.data.targets import read_target
from bundle.errors import InputError
from bundle.evaluation.subjects import write_test_scores
from bundle.experiments.sweep import Sweep

LIMBIC = {"regions": ["limbic"]}


def small(store: Path, tmp_path: Path, **changes: Any) -> Sweep:
    """A sweep of three strategies and one baseline in two of three folds."""
    settings = {"splits": {"folds": 3, "test": [0, 1]}, "strategies": ["random_tube", LIMBIC, "random_weights"]}
    settings |= {"baselines": ["majority"], "steps": [], "bootstrap_resamples": 20}
    return Sweep(str(store), str(tmp_path / "results"), **(settings | changes))


class Stages:
    """Stands for `bundle.process.run_config` in trials.

    Args:
        store: whose subjects are scored.

    Attributes:
        calls: of each stage the run id, the configs and the trial.
        overrides: of each stage.
        directories: in which they were to run.
        broken: trials whose pretraining fails.
    """

    def __init__(self, store: Path) -> None:
        self.diagnosis = read_target(store).labels
        self.calls: list[tuple[str, tuple[str, ...], str]] = []
        self.overrides: list[Mapping[str, Any]] = []
        self.directories: set[str | Path | None] = set()
        self.broken: set[str] = set()

    def __call__(
        self,
        run_id: str,
        configs: Sequence[str],
        overrides: Mapping[str, Any],
        log: Path | None = None,
        lock: int | None = None,
        directory: str | Path | None = None,
    ) -> None:
        """Be a stage."""
        assert lock is not None
        self.directories.add(directory)
        output = Path(overrides["output_dir"])
        self.calls.append((run_id, tuple(configs), output.parent.name))
        self.overrides.append(overrides)
        if output.parent.name in self.broken and run_id == "pretrain":
            raise InputError("broken on purpose")
        output.mkdir(parents=True, exist_ok=True)
        for name in ("last.pt", "best.pt"):
            (output / name).touch()
        if "evaluate" in configs:
            sets = load_splits(overrides["splits_file"])["sets"]
            rng = np.random.default_rng(len(self.calls))
            tables = {}
            for name in ("validation", "test"):
                labels = np.array([self.diagnosis[p] for p in sets[name]])
                tables[name] = subjects_of(labels, rng.normal(size=len(labels)) + labels, sets[name])
            write_test_scores(BINARY, tables["validation"], tables["test"], output / "evaluation", 20)
