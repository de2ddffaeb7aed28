"""Which task a target is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bundle.data.splits import load_splits
from bundle.data.targets import Target
from bundle.errors import InputError
from bundle.tasks.binary import Binary
from bundle.tasks.multiclass import Multiclass
from bundle.tasks.regression import Regression
from bundle.tasks.task import Task

KINDS: dict[str, type[Task]] = {kind.kind: kind for kind in (Binary, Multiclass, Regression)}


def task_of(target: Target, splits_file: str | Path, outputs: int | None = None) -> Task:
    """The task of a target; a number's mean and SD are those of the split file's training subjects.

    Args:
        target: what is predicted.
        splits_file: the split file.
        outputs: of the network; None: there is none.

    Raises:
        InputError: the network has another number of outputs, or the training subjects' values do not differ.
    """
    if target.kind != "regression":
        task = KINDS[target.kind](target.column, target.classes)
        if outputs not in (None, task.outputs):
            raise InputError(
                f"{target.column!r} has the classes {', '.join(target.classes)}, but the network has {outputs} "
                f"outputs; say the classes and their order: --classes {str(list(target.classes))!r}"
            )
        return task
    train = load_splits(splits_file)["sets"]["train"]
    values = [target.labels[name] for name in train if name in target.labels]
    sd = float(np.std(values)) if values else 0.0
    if sd == 0:
        raise InputError(f"{splits_file}: the training set's values of {target.column!r} do not differ; split anew")
    return Regression(target.column, mean=float(np.mean(values)), sd=sd)


def task_from(facts: Mapping[str, Any]) -> Task:
    """The task whose `Task.facts` these are."""
    return KINDS[facts["kind"]](**{name: value for name, value in facts.items() if name != "kind"})
