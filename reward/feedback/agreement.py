"""How far annotators agree, and how good the compared are by their comparisons.

1 - observed / expected disagreement    Krippendorff's alpha: 1 is perfect, 0 is chance; 0.8 counts as reliable and
                                        0.667 as the least to draw tentative conclusions from
P(i beats j) = p_i / (p_i + p_j)        Bradley-Terry: strengths from wins, by maximum likelihood
"""

from typing import Literal

import numpy as np

Level = Literal["nominal", "ordinal", "interval", "ratio"]
"""What the numbers mean: names, ranks, differences, or amounts with a true zero."""

_MAX_SWEEPS = 100_000


def krippendorff_alpha(ratings: np.ndarray, level: Level) -> float:
    """Return Krippendorff's alpha, NaN if all ratings are the same, so that there is nothing to disagree about.

    Two annotators who rate three items (1, 1), (2, 2), (1, 2): of six ordered pairs two disagree; by chance, among the
    ratings 1, 1, 1, 2, 2, 2, it is 18 of 30; alpha = 1 - (2 / 6) / (18 / 30) = 4 / 9.

    Args:
        ratings: [annotators, items], NaN where an annotator did not rate an item.
        level: How far apart two ratings are.

    Raises:
        ValueError: if no item has two ratings, or a ratio has a negative rating.

    Source:
        Krippendorff 2011, "Computing Krippendorff's alpha-reliability".
    """
    values = np.unique(ratings[~np.isnan(ratings)])
    counts = np.array([(ratings == value).sum(axis=0) for value in values], dtype=np.float64)  # [values, items]
    counts = counts[:, counts.sum(axis=0) >= 2] if values.size else np.zeros((0, 0))
    if counts.shape[1] == 0:
        raise ValueError("at least one item must have two ratings, got none; give items to more than one annotator")
    if level == "ratio" and values[0] < 0:
        raise ValueError(f"ratings must not be negative at level ratio, got {values[0]}; use level interval")
    pairs = _coincidences(counts)
    totals = pairs.sum(axis=0)
    distances = _distances(values, totals, level)
    expected = (np.outer(totals, totals) * distances).sum() / (totals.sum() - 1.0)
    return float(1.0 - (pairs * distances).sum() / expected) if expected > 0 else float("nan")


def bradley_terry(wins: np.ndarray, *, tolerance: float = 1e-12) -> np.ndarray:
    """Return the maximum-likelihood strengths, with geometric mean 1.

    p_i <- (wins of i) / sum_j (comparisons of i and j) / (p_i + p_j), until no log p changes by more than `tolerance`.

    Args:
        wins: [K, K], how often i was preferred to j; half a win each for a tie.
        tolerance: Of the logarithms.

    Returns:
        [K] float64.

    Raises:
        ValueError: if a part of the compared never won, or never lost, against the rest: no strength is the likeliest.

    Source:
        Zermelo 1929; Hunter 2004, "MM algorithms for generalized Bradley-Terry models", Eq. 3.
    """
    wins = np.array(wins, dtype=np.float64)
    np.fill_diagonal(wins, 0.0)
    _check_connected(wins)
    games, won = wins + wins.T, wins.sum(axis=1)
    logs = np.zeros(len(wins))
    for _ in range(_MAX_SWEEPS):
        strengths = np.exp(logs)
        updated = np.log(won / (games / (strengths[:, None] + strengths[None, :])).sum(axis=1))
        updated -= updated.mean()
        change, logs = np.abs(updated - logs).max(), updated
        if change <= tolerance:
            return np.exp(logs)
    raise ValueError(f"strengths must settle in {_MAX_SWEEPS} sweeps and still changed by {change}; raise tolerance")


def _coincidences(counts: np.ndarray) -> np.ndarray:
    """Return [values, values]: ordered pairs of ratings of one item, each weighted by 1 / (ratings of the item - 1)."""
    weights = 1.0 / (counts.sum(axis=0) - 1.0)
    return (counts * weights) @ counts.T - np.diag((counts * weights).sum(axis=1))


def _distances(values: np.ndarray, totals: np.ndarray, level: Level) -> np.ndarray:
    """Return [values, values]: squared distances between ratings."""
    if level == "nominal":
        return 1.0 - np.eye(len(values))
    if level == "ordinal":  # ratings between the two, those of the two themselves counted half
        ranks = np.cumsum(totals) - totals / 2.0
        return np.square(ranks[:, None] - ranks[None, :])
    difference = values[:, None] - values[None, :]
    if level == "interval":
        return np.square(difference)
    total = values[:, None] + values[None, :]
    return np.square(np.divide(difference, total, out=np.zeros_like(total), where=total > 0))


def _check_connected(wins: np.ndarray) -> None:
    """Refuse comparisons in which a set of the compared has no win, or no loss, against the others (Ford 1957)."""
    reaches = (wins > 0) | np.eye(len(wins), dtype=bool)
    for through in range(len(wins)):
        reaches |= np.outer(reaches[:, through], reaches[through])
    missing = np.argwhere(~reaches)
    if missing.size:
        better, worse = (int(index) for index in missing[0][::-1])
        raise ValueError(
            f"each of the compared must be linked to each other by a chain of wins, got none from {worse} to {better}; "
            "collect more comparisons, or leave out those that always win or lose"
        )
