"""The final test: once, over subjects, with intervals, at a threshold fixed on the validation set."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from monai.engines import Evaluator
from scipy.sparse import csr_array
from scipy.sparse.csgraph import structural_rank
from scipy.special import expit

from bundle.evaluation.intervals import bootstrap_interval, clopper_pearson_lower
from bundle.files import write_json, write_text
from bundle.tasks.case_control import SubjectScores, subject_scores, youden_threshold

logger = logging.getLogger(__name__)


def score_table(
    labels: np.ndarray, logits: np.ndarray, threshold: float, resamples: int, seed: int
) -> dict[str, dict[str, float]]:
    """Scores of one test set with 95 % intervals over subjects, see `with_intervals`.

    Args:
        labels: 1 case, 0 control, one per subject. Where one class is absent, as at a small site left out, only the
            accuracy has a value and nothing has limits.
        logits: one averaged logit per subject.
        threshold: logit above which a subject is called a case; from the validation set.
        resamples: number of bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        For each score `{"value", "low", "high"}`, and `majority_accuracy`, what always answering the more
        frequent class would score.
    """
    cases, controls = logits[labels == 1], logits[labels == 0]
    above = pairs_above(cases, controls)
    correct = ((logits > threshold) == (labels == 1)).astype(float)
    scores = subject_scores(labels, logits, threshold)
    table = with_intervals(scores, labels, correct, above, np.ones_like(above), resamples, seed)
    majority = max(len(cases), len(controls)) / len(labels)
    table["majority_accuracy"] = {"value": majority, "low": majority, "high": majority}
    return table


def pairs_above(cases: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """Whether each case (n,) scores above each control (m,), (n, m): 1 or 0, and one half for a tie."""
    return (1 + np.sign(np.subtract.outer(cases, controls))) / 2


def auroc_of_drawn(cases: np.ndarray, controls: np.ndarray, above: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC of subjects that are drawn so often: cases (..., n), controls (..., m), and `pairs_above` with weights."""
    with np.errstate(invalid="ignore"):  # where no pair is compared
        return (cases @ (above * weights) * controls).sum(-1) / (cases @ weights * controls).sum(-1)


def with_intervals(
    scores: Mapping[str, float],
    labels: np.ndarray,
    correct: np.ndarray,
    above: np.ndarray,
    weights: np.ndarray,
    resamples: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Scores with their 95 % expanded percentile bootstrap intervals, cases and controls resampled apart.

    The smaller of the two groups' sizes stands for the number of subjects (see `bundle.evaluation.intervals`), which
    is on the safe side. A score of 1 in every resample would have the limits 1 and 1. Its lower limit is the exact one
    of Clopper and Pearson for as many independent trials as there are disjoint pairs of a case and a control: all of
    these are right with a probability of at most score^pairs. A score of 0 is treated alike. Another score that no
    resample changes, as of a constant answer, keeps limits equal to its value.

    Args:
        scores: value of "auroc", "balanced_accuracy" and "accuracy".
        labels: 1 case, 0 control, (n,).
        correct: how often each subject is called right, 0 to 1, (n,).
        above: how often a case scores above a control, 0 to 1, (cases, controls).
        weights: of these pairs in the AUROC, the same shape; 0 for pairs that are not compared.
        resamples: number of bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        `{"value", "low", "high"}` of each; the limits are NaN where a class has fewer than two subjects.
    """
    n, m = above.shape
    cases, controls = correct[labels == 1], correct[labels == 0]

    def statistic(first: np.ndarray, second: np.ndarray, axis: int) -> np.ndarray:
        """The scores (3, ...) of cases (..., n) and controls (..., m) drawn by position, from how often each was."""
        a = np.apply_along_axis(np.bincount, axis, first, minlength=n)  # (..., n)
        b = np.apply_along_axis(np.bincount, axis, second, minlength=m)  # (..., m)
        auroc = auroc_of_drawn(a, b, above, weights)
        return np.stack([auroc, (a @ cases / n + b @ controls / m) / 2, (a @ cases + b @ controls) / (n + m)])

    ends = bootstrap_interval((np.arange(n), np.arange(m)), statistic, resamples, seed)
    low, high = (np.broadcast_to(end, 3).tolist() for end in ends)
    trials = (structural_rank(csr_array(weights)), min(n, m), min(n, m))
    table = {}
    for position, name in enumerate(("auroc", "balanced_accuracy", "accuracy")):
        if low[position] == 1:
            low[position] = clopper_pearson_lower(trials[position])
        if high[position] == 0:
            high[position] = 1 - clopper_pearson_lower(trials[position])
        table[name] = {"value": scores[name], "low": low[position], "high": high[position]}
    return table


def evaluate(
    validator: Evaluator,
    tester: Evaluator,
    validation_scores: SubjectScores,
    test_scores: SubjectScores,
    output_dir: str | Path,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Fix the threshold on the validation set, test once, and write `subjects.tsv` and `scores.json`.

    Args:
        validator: evaluator over the validation set, with `validation_scores` attached.
        tester: evaluator over the test set, with `test_scores` attached.
        validation_scores: subject scores of the validation set.
        test_scores: subject scores of the test set.
        output_dir: folder of the two files.
        resamples: bootstrap resamples.
        seed: seed of the bootstrap.

    Returns:
        The table of `score_table` for the test set.
    """
    validator.run()
    tester.run()
    return write_test_scores(
        pd.DataFrame(validation_scores.subjects), pd.DataFrame(test_scores.subjects), output_dir, resamples, seed
    )


def write_test_scores(
    validation: pd.DataFrame,
    subjects: pd.DataFrame,
    output_dir: str | Path,
    resamples: int = 2000,
    seed: int = 0,
    threshold: float | None = None,
) -> dict[str, dict[str, float]]:
    """Score the test subjects at the validation set's threshold; write `subjects.tsv` and `scores.json`.

    Args:
        validation: `label` and `logit` of each validation subject.
        subjects: `participant_id`, `label` and `logit` of each test subject.
        output_dir: folder of the two files.
        resamples: bootstrap resamples.
        seed: seed of the bootstrap.
        threshold: a logit to use instead of the one that is best on the validation set.

    Returns:
        The table of `score_table` for the test set.
    """
    if threshold is None:
        threshold = youden_threshold(validation["label"].to_numpy(), validation["logit"].to_numpy())
    labels, logits = subjects["label"].to_numpy(), subjects["logit"].to_numpy()
    table = score_table(labels, logits, threshold, resamples, seed)
    subjects = subjects.assign(probability=expit(logits), predicted=(logits > threshold).astype(int))
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "subjects.tsv", subjects.to_csv(sep="\t", index=False))
    summary = {
        "subjects": len(subjects),
        "threshold_logit": threshold,
        "bootstrap_seed": seed,
        "scores": table,
    }
    write_json(output_dir / "scores.json", summary)
    for name, score in table.items():
        logger.info(
            "Test, %d subjects: %s %.3f (95%% interval %.3f to %.3f)",
            len(subjects),
            name,
            score["value"],
            score["low"],
            score["high"],
        )
    return table
