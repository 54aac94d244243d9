"""Rank statistics of predicted scores."""

import math

import numpy as np


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; equal values share the mean of their ranks."""
    return pearson(ranks(a), ranks(b))


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Linear correlation; 0 where one side does not vary."""
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 1e-12 else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Rank of every value, ties averaged."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return ((last - counts + last - 1) / 2)[inverse]


def bootstrap(predicted: np.ndarray, labels: np.ndarray, prompts: np.ndarray,
              draws: int = 500) -> list[float]:
    """95% interval of Spearman: (n,) predictions, labels and numbers of the prompts.

    Prompts are drawn with replacement, not rows: answers to one prompt are alike, and
    taking them for independent would make the interval too narrow.
    """
    generator = np.random.default_rng(0)
    rows = [np.flatnonzero(prompts == p) for p in np.unique(prompts)]
    correlations = []
    for _ in range(draws):
        drawn = generator.integers(len(rows), size=len(rows))
        here = np.concatenate([rows[i] for i in drawn])
        correlations.append(spearman(predicted[here], labels[here]))
    return np.quantile(correlations, [0.025, 0.975]).tolist()
