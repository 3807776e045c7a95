"""What a classifier must beat: unlabelled texts under named classes, from frozen embeddings alone.

`texts` are (U, H) and `prompts` (C, H) float arrays of unit rows: embeddings of the texts, and of
a prompt for each class. A score is a cosine; the highest is the class. None of it reads a label,
but for `supervised`.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def unit(rows: Floats) -> Floats:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def softmax(scores: Floats) -> Floats:
    """Over the last axis."""
    # Less the highest, or exp overflows; the result is the same.
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def cosine(texts: Floats, prompts: Floats) -> Floats:
    """(U, C) cosines of texts and prompts."""
    return texts @ prompts.T


def without_prior(scores: Floats) -> Floats:
    """The scores less their mean over the texts: a class that is near all texts loses that.

    It flatters itself where classes are equally frequent.
    """
    return scores - scores.mean(0)


def self_training(
    texts: Floats, prompts: Floats, *, share: float = 0.01, rounds: int = 2, steps: int = 300
) -> Floats:
    """Gera et al. (EMNLP 2022, arXiv 2210.17541) on frozen embeddings: (U, C) scores.

    Each round takes the most confident texts of each class as its rows, and fits a linear head.

    Args:
        share: texts of a class that are taken, in proportion to U.
        rounds: heads, one after the other.
        steps: full-batch gradient steps of a head.
    """
    scores = without_prior(cosine(texts, prompts))
    most = max(1, round(share * len(texts)))
    for _ in range(rounds):
        rows, labels = confident(scores, most)
        scores = linear(texts[rows], labels, scores.shape[1], steps)(texts)
    return scores


def confident(scores: Floats, most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and classes of the `most` texts of each class whose lead is the largest.

    The lead is the highest score less the second; a text stands under its highest class alone.
    """
    first = scores.argmax(1)
    # Each row ascending: the last two are its highest scores.
    ordered = np.sort(scores, 1)
    lead = ordered[:, -1] - ordered[:, -2]
    rows = [
        mine[np.argsort(-lead[mine], kind="stable")[:most]]
        for mine in (np.flatnonzero(first == c) for c in range(scores.shape[1]))
    ]
    return np.concatenate(rows), np.repeat(np.arange(len(rows)), [len(one) for one in rows])


def prototypes(
    texts: Floats, prompts: Floats, *, rounds: int = 8, sharpness: float = 20.0
) -> Floats:
    """Soft prototypes: (U, C) scores. A class becomes the mean of its texts, each by its share.

    Args:
        rounds: of computing the means anew.
        sharpness: factor on cosines before the softmax.
    """
    scores = without_prior(cosine(texts, prompts))
    for _ in range(rounds):
        means = unit(softmax(sharpness * scores).T @ texts)
        scores = without_prior(cosine(texts, means))
    return scores


def supervised(texts: Floats, labels: NDArray[np.int64], classes: int) -> Floats:
    """The ceiling of a frozen embedding: a linear head that is fitted on one half of the labelled
    texts and scores the other, both ways.
    """
    scores = np.zeros((len(texts), classes))
    for side in range(2):
        here = np.arange(len(texts)) % 2 == side
        scores[~here] = linear(texts[here], labels[here], classes, 600)(texts[~here])
    return scores


def linear(texts: Floats, labels: NDArray[np.int64], classes: int, steps: int):
    """A softmax regression on 10 times the embeddings, by full-batch descent with momentum from 0.

    Returns a function from texts (n, H) to scores (n, C).
    """
    x = 10.0 * texts
    weight, bias = np.zeros((classes, x.shape[1])), np.zeros(classes)
    speed = [np.zeros_like(weight), np.zeros_like(bias)]
    wanted = np.eye(classes)[labels]
    for _ in range(steps):
        off = (softmax(x @ weight.T + bias) - wanted) / len(x)
        for part, gradient in enumerate((off.T @ x + 1e-4 * weight, off.sum(0))):
            speed[part] = 0.9 * speed[part] - 0.05 * gradient
        weight, bias = weight + speed[0], bias + speed[1]
    return lambda rows: 10.0 * rows @ weight.T + bias
