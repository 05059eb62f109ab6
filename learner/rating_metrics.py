"""How well scores agree with human judgement, with bootstrap intervals over the texts that were judged.

Resampling texts, not pairs of texts: pairs that share a text are not independent, and an interval over pairs would be
far too narrow.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_NUM_RESAMPLES = 1000
_MAX_TEXTS = 2000
"""Texts of which all pairs are compared; more are drawn from, as memory grows with the square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure and its 95% bootstrap interval."""

    value: float
    low: float
    high: float


def pearson(scores: np.ndarray, ratings: np.ndarray, *, seed: int) -> Estimate:
    """Return the correlation of scores [N] with ratings [N]."""
    columns = np.stack([np.ones_like(scores), scores, ratings, scores**2, ratings**2, scores * ratings])

    def correlation(weights: np.ndarray) -> np.ndarray:
        count, s, r, ss, rr, sr = columns @ weights.T
        covariance = sr / count - s * r / count**2
        return covariance / np.sqrt((ss / count - (s / count) ** 2) * (rr / count - (r / count) ** 2))

    return _bootstrap(correlation, len(scores), seed=seed)


def pairwise_accuracy(scores: np.ndarray, ratings: np.ndarray, *, margin: float, seed: int) -> Estimate:
    """Return the share of pairs of texts, rated more than `margin` apart, that the scores put in the same order.

    Args:
        scores: [N].
        ratings: [N].
        margin: in units of the rating; a tied score counts one half.
        seed: of the bootstrap.
    """
    if len(scores) > _MAX_TEXTS:
        chosen = np.random.default_rng([seed % 2**63, 3]).choice(len(scores), size=_MAX_TEXTS, replace=False)
        scores, ratings = scores[chosen], ratings[chosen]
    is_above = (ratings[:, None] - ratings[None, :] > margin).astype(np.float64)
    agreement = is_above * (np.sign(scores[:, None] - scores[None, :]) + 1.0) / 2.0

    def accuracy(weights: np.ndarray) -> np.ndarray:
        pairs = ((weights @ is_above) * weights).sum(axis=1)
        return ((weights @ agreement) * weights).sum(axis=1) / np.where(pairs > 0, pairs, np.nan)

    return _bootstrap(accuracy, len(scores), seed=seed)


def preference_accuracy(chosen: np.ndarray, rejected: np.ndarray, clusters: np.ndarray, *, seed: int) -> Estimate:
    """Return the share of pairs in which the chosen response scores higher; a tie counts one half.

    Args:
        chosen: [N] scores.
        rejected: [N] scores.
        clusters: [N] integers, equal for pairs with one prompt; prompts are resampled, not pairs.
        seed: of the bootstrap.
    """
    return _clustered_share((np.sign(chosen - rejected) + 1.0) / 2.0, clusters, seed=seed)


def sign_accuracy(costs: np.ndarray, is_safe: np.ndarray, clusters: np.ndarray, *, seed: int) -> Estimate:
    """Return the share of responses whose cost is negative if they are safe and positive if not; 0 counts one half.

    Args:
        costs: [N].
        is_safe: [N] bool.
        clusters: [N] integers, equal for responses to one prompt; prompts are resampled.
        seed: of the bootstrap.
    """
    signs = np.where(is_safe, -1.0, 1.0)
    return _clustered_share((np.sign(costs * signs) + 1.0) / 2.0, clusters, seed=seed)


def _clustered_share(wins: np.ndarray, clusters: np.ndarray, *, seed: int) -> Estimate:
    """Return the mean of wins [N], its interval over resamples of clusters."""
    _, cluster = np.unique(clusters, return_inverse=True)
    won, count = np.bincount(cluster, wins), np.bincount(cluster).astype(np.float64)

    def accuracy(weights: np.ndarray) -> np.ndarray:
        return (weights @ won) / (weights @ count)

    return _bootstrap(accuracy, len(won), seed=seed)


def _bootstrap(statistic: Callable[[np.ndarray], np.ndarray], num_units: int, *, seed: int) -> Estimate:
    """Return a statistic at weights 1 and its percentile interval over resamples.

    Args:
        statistic: function of weights [M, N], how often each unit occurs in each of M resamples, to [M] values.
        num_units: N.
        seed: of the resamples.
    """
    random = np.random.default_rng([seed % 2**63, 2])
    weights = random.multinomial(num_units, np.full(num_units, 1.0 / num_units), size=_NUM_RESAMPLES)
    value = float(statistic(np.ones((1, num_units)))[0])
    low, high = np.nanquantile(statistic(weights.astype(np.float64)), [0.025, 0.975])
    return Estimate(value=value, low=float(low), high=float(high))
