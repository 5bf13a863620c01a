"""n-gram models with modified Kneser-Ney smoothing: the baselines of language_model.py and melody.py.

A text is an array of symbols 0, 1, ..., V - 1. Each level n of a model gives
p_n(w | context) = weight(context, w) + share(context) * p_{n-1}(w | shorter context), and p_0 = 1 / V.
This is the interpolated form of Chen and Goodman (1999).
"""

from typing import NamedTuple

import numpy as np


class Level(NamedTuple):
    """The n-grams of one length. A gram is one integer whose digits to the base V are its symbols."""

    grams: np.ndarray  # sorted
    weights: np.ndarray  # the discounted probability of each gram
    contexts: np.ndarray  # sorted: the grams without their last symbol
    shares: np.ndarray  # what each context leaves to the level below


class Model(NamedTuple):
    vocabulary: int
    levels: list[Level]


def grams_of(text: np.ndarray, n: int, vocabulary: int) -> np.ndarray:
    """The n-gram that ends at each symbol of the text, from symbol n - 1 on."""
    if vocabulary**n >= 2**63:
        raise ValueError(f"{n}-grams of {vocabulary} symbols do not fit into 64 bits")
    grams = np.zeros(len(text) - n + 1, dtype=np.int64)
    for k in range(n):
        grams = grams * vocabulary + text[k : len(text) - n + 1 + k]
    return grams


def discounts_of(counts: np.ndarray) -> np.ndarray:
    """The discount of each count: D1, D2 or D3+ of Chen and Goodman (1999), eq. 26."""
    n = [np.count_nonzero(counts == k) for k in range(5)]
    discounts = np.array([0, 0.5, 1, 1.5])  # for a level with too few counts to estimate them
    if min(n[1:]) > 0:
        y = n[1] / (n[1] + 2 * n[2])
        estimates = np.array([k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)])
        if estimates.min() > 0:
            discounts[1:] = estimates
    return discounts[np.minimum(counts, 3)]


def fit(text: np.ndarray, order: int, vocabulary: int) -> Model:
    """Count the n-grams of `text` up to `order`."""
    levels = []
    for n in range(1, order + 1):
        if n < order:
            # The count of a lower order is the number of symbols seen before the gram.
            longer = np.unique(grams_of(text, n + 1, vocabulary))
            grams, counts = np.unique(longer % vocabulary**n, return_counts=True)
        else:
            grams, counts = np.unique(grams_of(text, n, vocabulary), return_counts=True)
        contexts, which = np.unique(grams // vocabulary, return_inverse=True)
        totals, discounts = np.bincount(which, counts), discounts_of(counts)
        weights, shares = (counts - discounts) / totals[which], np.bincount(which, discounts) / totals
        levels.append(Level(grams, weights, contexts, shares))
    return Model(vocabulary, levels)


def look_up(keys: np.ndarray, table: np.ndarray, values: np.ndarray, missing: float) -> np.ndarray:
    places = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return np.where(table[places] == keys, values[places], missing)


def probabilities(model: Model, text: np.ndarray) -> np.ndarray:
    """The probability of each symbol of the text after the symbols before it."""
    p = np.full(len(text), 1 / model.vocabulary)
    for n, level in enumerate(model.levels, 1):
        grams = grams_of(text, n, model.vocabulary)
        # The first n - 1 symbols have too short a context for this level.
        lower = p[n - 1 :]
        share = look_up(grams // model.vocabulary, level.contexts, level.shares, missing=1)
        p[n - 1 :] = look_up(grams, level.grams, level.weights, missing=0) + share * lower
    return p
