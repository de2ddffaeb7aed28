"""A number, such as age: standardised on the training subjects, and put back into its units."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.dummy import DummyRegressor
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn.functional import mse_loss

from bundle.tasks.task import Floats, Linear, Measures, Results, Task, mean_of, seeds_of

PENALTIES = [10.0**k for k in range(-2, 7)]


class Regression(Task):
    """The mean over a subject's clips, in the target's units.

    Measures, each the mean over seeds: `r2`, 1 minus squared error over the squared deviations from the tested
    subjects' mean; `pearson_r`, of deviations from each fold's means, since folds whose networks are off by a constant
    would pass for a correlation; `mae`, the mean absolute error, in units.
    """

    kind = "regression"
    metrics = ("r2", "pearson_r", "mae")
    compared = ("r2", "mae")
    within = "pearson_r"
    drawn = "Predicted against true"
    separation = "Part of the slope of the prediction over the true value"

    @property
    def chance(self) -> dict[str, float]:
        """What knows nothing scores."""
        return {"r2": 0.0, "pearson_r": 0.0}

    @property
    def columns(self) -> tuple[str, ...]:
        """The prediction."""
        return ("predicted",)

    def loss(self, prediction: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """Mean squared error of outputs (b, 1), in SD of the training subjects."""
        return mse_loss(prediction.float(), self.scaled(target["label"].float()))

    def scaled(self, labels: Any) -> Any:
        """Deviations from the training subjects' mean, in their SD."""
        return (labels - self.mean) / self.sd

    def in_units(self, outputs: Floats) -> Floats:
        """Put back what was standardised."""
        return outputs * self.sd + self.mean

    def decisions(self, outputs: Floats, threshold: float) -> dict[str, Floats]:
        """Nothing beside the prediction."""
        return {}

    def describe(self) -> dict[str, str]:
        """What the column means."""
        return {"predicted": f"{self.column} in its own units, the mean over the participant's clips"}

    @property
    def limited(self) -> tuple[str, ...]:
        """The prediction."""
        return self.columns

    def measures(self, tested: Results) -> Measures:
        """See the class."""
        truth = tested.labels
        predicted = [outputs[:, 0] for outputs in seeds_of(tested.outputs)]
        errors = [truth - own for own in predicted]
        absolute = mean_of(np.mean(np.abs(errors), axis=0))
        squared = np.mean(np.square(errors), axis=0)
        groups = (np.unique(tested.groups)[:, None] == tested.groups[None]).astype(float)  # (g, n)
        everybody = np.ones((1, len(truth)))

        def measured(counts: Floats) -> Floats:
            with np.errstate(invalid="ignore", divide="ignore"):
                r2 = 1 - (counts @ squared) / _product(counts, truth, truth, everybody)
                spread = _product(counts, truth, truth, groups)
                correlations = [
                    _product(counts, truth, own, groups) / np.sqrt(spread * _product(counts, own, own, groups))
                    for own in predicted
                ]
            return np.stack([r2, np.mean(correlations, axis=0), absolute(counts)], axis=-1)

        return measured

    def gains(self, tested: Results, metric: str) -> Floats | None:
        """Minus the squared or the absolute error."""
        errors = tested.labels[:, None] - tested.outputs[..., 0]
        return -(errors**2).mean(1) if metric == "r2" else -np.abs(errors).mean(1)

    def rankings(self, tested: Results) -> list[tuple[Floats, NDArray[np.bool_]]]:
        """None."""
        return []

    def reference(self, labels: Floats) -> dict[str, float]:
        """The error of always giving the training subjects' mean."""
        return {"training_mean_mae": float(np.abs(labels - self.mean).mean())}

    def draw(self, axes: Any, tested: Results) -> None:
        """Scatter: predicted against true, the mean over seeds; the line is where both are equal."""
        predicted = tested.outputs[..., 0].mean(1)
        ends = [min(tested.labels.min(), predicted.min()), max(tested.labels.max(), predicted.max())]
        axes.plot(ends, ends, color="black", linewidth=0.8, linestyle="--")
        axes.scatter(tested.labels, predicted, s=18, color="#225588", alpha=0.7)
        axes.set(xlabel=self.column, ylabel=f"predicted {self.column}", title=f"{len(tested.labels)} subjects")

    def linear(self, seed: int) -> Linear:
        """Ridge regression."""
        return Ridge(), {"alpha": PENALTIES}, "r2"

    def predict(self, model: BaseEstimator, rows: Any) -> Floats:
        """The prediction; a model that is made for every task calls it its decision function."""
        predict = model.decision_function if hasattr(model, "decision_function") else model.predict
        return np.asarray(predict(rows), float).reshape(-1, 1)

    def constant(self) -> BaseEstimator:
        """The training subjects' mean."""
        return DummyRegressor(strategy="mean")


def _product(counts: Floats, first: Floats, second: Floats, groups: Floats) -> Floats:
    """Sum over subjects of the product of two deviations from their group's means, by how often each counts.

    Args:
        counts: (..., n).
        first: (n,).
        second: (n,).
        groups: who is in which group, (g, n), 0 or 1.
    """
    size = counts @ groups.T  # (..., g)
    means = [
        np.divide(counts @ (groups * values).T, size, out=np.zeros_like(size), where=size > 0)
        for values in (first, second)
    ]
    return counts @ (first * second) - (size * means[0] * means[1]).sum(-1)
