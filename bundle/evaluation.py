"""The final test: once, over subjects, with intervals, at a threshold fixed on the validation set."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from monai.engines import Evaluator
from scipy.special import expit
from scipy.stats import bootstrap
from sklearn.metrics import roc_curve

from bundle.metrics import SubjectScores, subject_scores
from bundle.store import write_text

logger = logging.getLogger(__name__)


def youden_threshold(labels: np.ndarray, logits: np.ndarray) -> float:
    """Logit above which a subject is called a case, with the largest sensitivity + specificity.

    The threshold lies midway between the two neighbouring scores, so that it is not tied to one subject's.
    """
    false_positives, true_positives, thresholds = roc_curve(labels, logits, drop_intermediate=False)
    best = int(np.argmax(true_positives - false_positives))
    if not np.isfinite(thresholds[best]):  # "call nobody a case" is the best that can be done
        return float(logits.max())
    below = logits[logits < thresholds[best]]
    return float((thresholds[best] + below.max()) / 2) if below.size else float(thresholds[best] - 1e-6)


def score_table(
    labels: np.ndarray, logits: np.ndarray, threshold: float, resamples: int, seed: int
) -> dict[str, dict[str, float]]:
    """Scores with 95 % percentile bootstrap intervals over subjects, resampled within cases and controls.

    Args:
        labels: 1 case, 0 control, one per subject; both classes must be present.
        logits: one averaged logit per subject.
        threshold: logit above which a subject is called a case; from the validation set.
        resamples: number of bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        For each score ``{"value", "low", "high"}``, and ``majority_accuracy``, what always answering the more
        frequent class would score.
    """
    cases, controls = logits[labels == 1], logits[labels == 0]
    table: dict[str, dict[str, float]] = {}
    for name in ("auroc", "balanced_accuracy", "accuracy"):

        def statistic(cases: np.ndarray, controls: np.ndarray, name: str = name) -> float:
            truth = np.repeat([1, 0], [len(cases), len(controls)])
            return subject_scores(truth, np.concatenate([cases, controls]), threshold)[name]

        table[name] = with_interval(cases, controls, statistic, resamples, seed)
    majority = max(len(cases), len(controls)) / len(labels)
    table["majority_accuracy"] = {"value": majority, "low": majority, "high": majority}
    return table


def with_interval(
    cases: np.ndarray, controls: np.ndarray, statistic: Callable[..., float], resamples: int, seed: int
) -> dict[str, float]:
    """A statistic with its 95 % percentile bootstrap interval, cases and controls resampled apart.

    Args:
        cases: (n,) what the statistic takes first, one per case.
        controls: (m,) what it takes second, one per control.
        statistic: of ``(cases, controls)``.
        resamples: number of bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        ``{"value", "low", "high"}``; the limits are NaN where a group has fewer than two members.
    """
    value = statistic(cases, controls)
    if min(len(cases), len(controls)) < 2:
        return {"value": value, "low": float("nan"), "high": float("nan")}
    interval = bootstrap(
        (cases, controls),
        statistic,
        n_resamples=resamples,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return {"value": value, "low": float(interval.low), "high": float(interval.high)}


def evaluate(
    validator: Evaluator,
    tester: Evaluator,
    validation_scores: SubjectScores,
    test_scores: SubjectScores,
    output_dir: str | Path,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Fix the threshold on the validation set, test once, and write ``subjects.tsv`` and ``scores.json``.

    Args:
        validator: evaluator over the validation set, with ``validation_scores`` attached.
        tester: evaluator over the test set, with ``test_scores`` attached.
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
    return write_test(
        pd.DataFrame(validation_scores.subjects), pd.DataFrame(test_scores.subjects), output_dir, resamples, seed
    )


def write_test(
    validation: pd.DataFrame,
    subjects: pd.DataFrame,
    output_dir: str | Path,
    resamples: int = 2000,
    seed: int = 0,
    threshold: float | None = None,
) -> dict[str, dict[str, float]]:
    """Score the test subjects at the validation set's threshold; write ``subjects.tsv`` and ``scores.json``.

    Args:
        validation: ``label`` and ``logit`` of each validation subject.
        subjects: ``participant_id``, ``label`` and ``logit`` of each test subject.
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
    write_text(output_dir / "scores.json", json.dumps(summary, indent=1) + "\n")
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
