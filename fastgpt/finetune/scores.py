"""How good predictions are: accuracy, precision, recall, F1 and the confusion matrix; RMSE, Pearson's and Spearman's correlation.

precision  of what was called a class, the share that is it;  recall  of what is it, the share that was called so
F1         2 precision recall / (precision + recall), 0 where both are 0
Pearson    covariance / (standard deviation x standard deviation), 0 where one of them is 0
Spearman   Pearson of the ranks, equal values sharing the mean of their ranks
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def confusion_matrix(truth: npt.ArrayLike, guess: npt.ArrayLike, n_classes: int) -> npt.NDArray[np.int64]:
    """(K, K) counts: row the true class, column the predicted one; truth and guess are (N) class numbers below K.

    Example:
        >>> confusion_matrix([0, 0, 1], [0, 1, 1], 2).tolist()
        [[1, 1], [0, 1]]
    """
    matrix = np.zeros((n_classes, n_classes), dtype=np.int64)
    np.add.at(matrix, (np.asarray(truth), np.asarray(guess)), 1)
    return matrix


def classification_scores(
    truth: npt.ArrayLike, guess: npt.ArrayLike, labels: Sequence[str], positive: str | None = None
) -> dict[str, Any]:
    """Scores of (N) predicted class numbers against (N) true ones.

    Args:
        truth, guess: class numbers, places in `labels`.
        labels: the classes' names.
        positive: the class that precision, recall and f1 are of; None: their means over all classes (macro).

    Returns:
        accuracy, precision, recall, f1, confusion ((K, K) lists, row the truth), and per_label: label -> its three scores and
        support.

    Raises:
        ValueError: nothing to score, or a positive label that is none.

    Example:
        >>> classification_scores([0, 0, 1], [0, 1, 1], ["ham", "spam"], "spam")["f1"]
        0.6666666666666666
    """
    if len(np.asarray(truth)) == 0 or len(np.asarray(truth)) != len(np.asarray(guess)):
        raise ValueError(
            f"guess: got {len(np.asarray(guess))} for {len(np.asarray(truth))} true; accepted: as many, at least 1"
        )
    if positive is not None and positive not in labels:
        raise ValueError(f"positive: got {positive!r}; accepted: {', '.join(labels)}")
    matrix = confusion_matrix(truth, guess, len(labels))
    hits, called, actual = np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1)
    precision = hits / np.maximum(called, 1)
    recall = hits / np.maximum(actual, 1)
    f1 = (
        2 * hits / np.maximum(called + actual, 1)
    )  # the same as the harmonic mean, and defined where nothing was called so
    per_label = {
        label: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
        for label, p, r, f, n in zip(labels, precision, recall, f1, actual, strict=True)
    }
    of = slice(None) if positive is None else labels.index(positive)
    return {
        "accuracy": float(hits.sum() / matrix.sum()),
        "precision": float(np.mean(precision[of])),
        "recall": float(np.mean(recall[of])),
        "f1": float(np.mean(f1[of])),
        "confusion": matrix.tolist(),
        "per_label": per_label,
    }


def pearson(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Pearson's correlation of two (N) arrays, in double precision; 0 where one of them is constant.

    Example:
        >>> round(pearson([1, 2, 3], [2, 4, 6]), 6)
        1.0
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


def ranks(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Ranks from 1 of an (N) array; equal values share the mean of theirs.

    Example:
        >>> ranks([10, 30, 30]).tolist()
        [1.0, 2.5, 2.5]
    """
    _, inverse, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def regression_scores(truth: npt.ArrayLike, guess: npt.ArrayLike) -> dict[str, float]:
    """rmse, pearson and spearman of two (N) arrays.

    Raises:
        ValueError: nothing to score, or lengths that differ.
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (truth, guess))
    if len(x) == 0 or x.shape != y.shape:
        raise ValueError(f"guess: got shape {y.shape} for {x.shape}; accepted: the same, at least 1")
    return {
        "rmse": float(np.sqrt(np.mean((x - y) ** 2))),
        "pearson": pearson(x, y),
        "spearman": pearson(ranks(x), ranks(y)),
    }
