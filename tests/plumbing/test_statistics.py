"""Claims about plumbing/statistics.py.

* Ranks and correlations are what their definitions say, ties included; what does not
  vary correlates with nothing.
* The interval is the textbook's, and counts prompts, not rows.
"""

import numpy as np
import pytest

from plumbing import statistics


def definition_of_ranks(values) -> list[float]:
    """How many are smaller, and half of the others that are equal."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2
            for x in values]


def test_ranks_share_the_mean_where_values_tie():
    values = np.array([0.3, 0.1, 0.3, 0.9, 0.1, 0.3, -2.0])
    assert statistics.ranks(values).tolist() == definition_of_ranks(values)
    # Known from scipy.stats.rankdata, less 1.
    assert statistics.ranks(np.array([0, 2, 3, 2])).tolist() == [0, 1.5, 3, 1.5]


def test_pearson_and_spearman_equal_numpy_on_values_and_on_ranks():
    random = np.random.default_rng(0)
    a = random.normal(size=50).round(1)  # rounded, so that there are ties
    b = (a ** 3 + random.normal(size=50)).round(1)
    assert len(set(a)) < 45
    assert statistics.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    on_ranks = np.corrcoef(definition_of_ranks(a), definition_of_ranks(b))[0, 1]
    assert statistics.spearman(a, b) == pytest.approx(on_ranks)
    assert statistics.spearman(a, a ** 3) == pytest.approx(1)
    assert statistics.spearman(a, -a) == pytest.approx(-1)


def test_the_interval_is_the_textbooks_and_counts_prompts_not_rows():
    random = np.random.default_rng(3)
    labels = random.normal(size=150)
    predicted = labels + random.normal(size=150)
    alone = np.arange(150)
    low, high = statistics.bootstrap(predicted, labels, alone)
    middle = np.arctanh(statistics.spearman(predicted, labels))
    # Fisher's z; 1.06 is the usual correction for ranks.
    margin = 1.96 * np.sqrt(1.06 / (150 - 3))
    assert low == pytest.approx(np.tanh(middle - margin), abs=0.03)
    assert high == pytest.approx(np.tanh(middle + margin), abs=0.03)
    four = [np.repeat(x, 4) for x in (predicted, labels, alone)]  # nothing was learnt
    assert statistics.bootstrap(*four) == pytest.approx([low, high], abs=0.01)


def test_a_constant_prediction_correlates_with_nothing():
    labels = np.array([0.1, 0.5, 0.9, 0.2, 0.3, 0.8])
    rounding = np.full(6, 0.1)
    assert (rounding != rounding.mean()).all()  # noise that must not pass for a signal
    for constant in (np.full(6, 0.5), rounding):
        for figure in (statistics.pearson, statistics.spearman):
            assert figure(constant, labels) == 0.0
            assert figure(labels, constant) == 0.0
