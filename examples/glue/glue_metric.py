"""The official GLUE metrics as an `evaluate` module that needs only numpy, so it works without the Hub.

    evaluate.load("examples/glue/glue_metric.py", "mrpc").compute(predictions=[1, 0], references=[1, 1])
    # {'accuracy': 0.5, 'f1': 0.6666666666666666}

https://gluebenchmark.com/tasks lists the metrics of each task. The values equal those of scikit-learn and scipy, which the
`glue` module of the Hub uses.
"""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

METRICS: dict[str, tuple[str, ...]] = {
    "cola": ("matthews_correlation",),
    "mnli": ("accuracy",),
    "mnli_matched": ("accuracy",),
    "mnli_mismatched": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qnli": ("accuracy",),
    "qqp": ("accuracy", "f1"),
    "rte": ("accuracy",),
    "sst2": ("accuracy",),
    "stsb": ("pearson", "spearmanr"),
    "wnli": ("accuracy",),
}
"""Metric names of each configuration, with the names of the `glue` module of the Hub."""


class GlueMetric(evaluate.Metric):  # type: ignore[misc]
    """The metrics of one GLUE task; the configuration name is the task."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in METRICS:
            raise KeyError(
                f"'{self.config_name}' is not a GLUE task. Choose one of {', '.join(sorted(METRICS))}."
            )
        value = datasets.Value("float32" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description="The official metrics of the GLUE tasks.",
            citation="Wang et al., GLUE: a multi-task benchmark for natural language understanding, ICLR 2019.",
            inputs_description="predictions and references: class ids; scores from 0 to 5 for stsb.",
            features=datasets.Features({"predictions": value, "references": value}),
            format="numpy",
        )

    def _compute(self, predictions: Array, references: Array) -> dict[str, float]:
        predicted, expected = np.asarray(predictions), np.asarray(references)
        return {name: FIGURES[name](predicted, expected) for name in METRICS[self.config_name]}


def accuracy(predicted: Array, expected: Array) -> float:
    return float(np.mean(predicted == expected))


def f1(predicted: Array, expected: Array) -> float:
    """F1 of class 1; 0.0 if class 1 is neither present nor predicted, as in scikit-learn."""
    true_positive = int(np.sum((predicted == 1) & (expected == 1)))
    positive, present = int(np.sum(predicted == 1)), int(np.sum(expected == 1))
    return 2 * true_positive / (positive + present) if positive + present else 0.0


def matthews_correlation(predicted: Array, expected: Array) -> float:
    """Correlation of the two 0/1 vectors; 0.0 if one of them is constant, as in scikit-learn."""
    if np.ptp(predicted) == 0 or np.ptp(expected) == 0:
        return 0.0
    return pearson(predicted, expected)


def pearson(predicted: Array, expected: Array) -> float:
    """Pearson correlation; nan if one of the vectors is constant, as in scipy."""
    x, y = _centred(predicted), _centred(expected)
    scale = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / scale if scale else float("nan")


def spearmanr(predicted: Array, expected: Array) -> float:
    return pearson(_ranks(predicted), _ranks(expected))


def _centred(values: Array) -> Array:
    wide = np.asarray(values, dtype=np.float64)
    return wide - wide.mean()


def _ranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


FIGURES = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
    "spearmanr": spearmanr,
}
