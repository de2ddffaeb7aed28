"""Three classes or more: one logit per class."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.base import BaseEstimator
from sklearn.metrics import confusion_matrix
from torch import Tensor
from torch.nn.functional import cross_entropy

from bundle.tasks.classes import OfClasses
from bundle.tasks.task import Floats, Measures, Results, auroc, independent_pairs, mean_of, seeds_of


class Multiclass(OfClasses):
    """The class with the largest logit.

    Measures: `macro_auroc`, the mean over classes of each against the rest, by its probability; `balanced_accuracy`,
        the mean of the classes' recalls; `macro_f1`; `accuracy`. A class that no test subject has is left out of the
        means.
    """

    kind = "multiclass"
    metrics = ("macro_auroc", "balanced_accuracy", "macro_f1", "accuracy")
    compared = ("macro_auroc", "accuracy")
    within = "macro_auroc"
    scoring = "roc_auc_ovr"
    drawn = "Confusion"
    separation = "Part of the difference between the last class's and the others' mean logit for it"

    @property
    def chance(self) -> dict[str, float]:
        """What knows nothing scores."""
        return {"macro_auroc": 0.5, "balanced_accuracy": 1 / len(self.classes)}

    @property
    def columns(self) -> tuple[str, ...]:
        """A logit for each class."""
        return tuple(f"logit_{name}" for name in self.classes)

    def loss(self, prediction: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy of logits (b, k)."""
        return cross_entropy(prediction.float(), target["label"].flatten().long())

    def decisions(self, outputs: Floats, threshold: float) -> dict[str, Floats]:
        """`probability_<class>` of each class, and `predicted`, the number of the class."""
        shares = softmax(outputs, axis=-1)
        found = {f"probability_{name}": shares[:, number] for number, name in enumerate(self.classes)}
        return found | {"predicted": outputs.argmax(-1)}

    def describe(self) -> dict[str, str]:
        """What the columns mean."""
        said = {
            f"probability_{name}": f"of {self.column} {name}, softmax of the logits divided by the temperature"
            for name in self.classes
        }
        said |= dict.fromkeys(self.columns, "the mean over the participant's clips")
        numbers = ", ".join(f"{number} {name}" for number, name in enumerate(self.classes))
        return said | {"predicted": f"the class with the largest logit: {numbers}"}

    def measures(self, tested: Results) -> Measures:
        """See the class."""
        right = self.right(tested)
        present = [number for number in range(len(self.classes)) if (tested.labels == number).any()]
        ranks = [auroc(tested, scores, positive) for scores, positive in self.rankings(tested)]
        recalls = [mean_of(right, tested.labels == number) for number in present]
        overall = mean_of(right)
        chosen = [outputs.argmax(-1) for outputs in seeds_of(tested.outputs)]

        def f1(counts: Floats) -> Floats:
            """Of each class present, 2 TP / (subjects of it + subjects called it), the mean over classes and seeds."""
            found = []
            for predicted in chosen:
                for number in present:
                    own, called = tested.labels == number, predicted == number
                    found.append(2 * counts @ (own & called) / (counts @ own + counts @ called))
            return np.mean(found, axis=0)

        def measured(counts: Floats) -> Floats:
            means = [np.mean([measure(counts) for measure in part], axis=0) for part in (ranks, recalls)]
            return np.stack([*means, f1(counts), overall(counts)], axis=-1)

        return measured

    def right(self, tested: Results) -> Floats:
        """Share of seeds that are right about each subject, (n,)."""
        return (tested.outputs.argmax(-1) == tested.labels[:, None]).mean(1)

    def rankings(self, tested: Results) -> list[tuple[Floats, NDArray[np.bool_]]]:
        """Each class against the rest, by its probability, where some have it and some have not."""
        shares = softmax(tested.outputs, axis=-1)
        pairs = [(shares[..., number], tested.labels == number) for number in range(len(self.classes))]
        return [(scores, positive) for scores, positive in pairs if 0 < positive.sum() < len(positive)]

    def trials(self, tested: Results) -> dict[str, int]:
        """The fewest disjoint pairs of a class and the rest, and the smallest class."""
        pairs = [independent_pairs(tested, positive) for _, positive in self.rankings(tested)]
        fewest = min(len(members) for members in self.strata(tested.labels))
        counts = dict.fromkeys(("balanced_accuracy", "macro_f1", "accuracy"), fewest)
        return counts | {"macro_auroc": min(pairs, default=0)}

    def reference(self, labels: Floats) -> dict[str, float]:
        """The accuracy of always giving the most frequent answer."""
        return {"majority_accuracy": float(np.bincount(labels.astype(int)).max() / len(labels))}

    def draw(self, axes: Any, tested: Results) -> None:
        """Confusion matrix: of each true class (row) the share that is given each class, over all seeds."""
        numbers = range(len(self.classes))
        truth = np.repeat(tested.labels, tested.outputs.shape[1]).astype(int)
        shares = confusion_matrix(truth, tested.outputs.argmax(-1).ravel(), labels=numbers, normalize="true")
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row in numbers:
            for column in numbers:
                ink = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{shares[row, column]:.2f}", ha="center", va="center", color=ink)
        axes.set_xticks(numbers, self.classes, rotation=30, ha="right")
        axes.set_yticks(numbers, self.classes)
        axes.set(xlabel="predicted", ylabel=self.column, title=f"Share of each class, {len(tested.labels)} subjects")

    def predict(self, model: BaseEstimator, rows: Any) -> Floats:
        """The decision functions, or the logarithms of the probabilities."""
        if hasattr(model, "decision_function"):
            return np.asarray(model.decision_function(rows), float)
        return np.log(np.clip(model.predict_proba(rows), 1e-12, None))
