"""Scores against values worked out by hand, and against scipy and scikit-learn where they are installed."""

import numpy as np
import pytest

from fastgpt.finetune.scores import classification_scores, confusion_matrix, pearson, ranks, regression_scores

TRUTH, GUESS = [0, 0, 0, 1, 1, 1, 1, 0], [0, 1, 0, 1, 1, 0, 1, 0]


def test_by_hand():
    found = classification_scores(TRUTH, GUESS, ["ham", "spam"], "spam")
    assert found["confusion"] == [[3, 1], [1, 3]]
    assert (found["accuracy"], found["precision"], found["recall"], found["f1"]) == (0.75, 0.75, 0.75, 0.75)


def test_rows_are_the_truth():
    assert confusion_matrix([0, 0, 2], [1, 0, 2], 3).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_a_class_that_is_never_predicted_scores_zero():
    found = classification_scores([0, 0, 1], [0, 0, 0], ["a", "b"], "b")
    assert (found["precision"], found["recall"], found["f1"]) == (0, 0, 0)


def test_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(3)
    truth, guess = generator.integers(0, 4, 200), generator.integers(0, 4, 200)
    found = classification_scores(truth, guess, list("abcd"))
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(truth, guess, average="macro")
    assert [found["precision"], found["recall"], found["f1"]] == pytest.approx([precision, recall, f1])
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, guess))
    assert found["confusion"] == metrics.confusion_matrix(truth, guess).tolist()


def test_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(4)
    a = generator.normal(size=100).round(1)  # rounded, so that some are equal
    b = (a + generator.normal(size=100)).round(1)
    found = regression_scores(a, b)
    assert found["pearson"] == pytest.approx(stats.pearsonr(a, b).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(a, b).statistic)
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((a - b) ** 2)))


def test_ranks_and_constants():
    assert ranks([3, 1, 3, 2]).tolist() == [3.5, 1, 3.5, 2]
    assert pearson([1, 1, 1], [1, 2, 3]) == 0.0


def test_what_is_refused():
    with pytest.raises(ValueError, match="guess: got 0 for 0"):
        classification_scores([], [], ["a"])
    with pytest.raises(ValueError, match="positive: got 'c'"):
        classification_scores([0], [0], ["a", "b"], "c")
    with pytest.raises(ValueError, match="guess: got shape"):
        regression_scores([1.0], [1.0, 2.0])
