"""Agreement and strengths: published vectors, and what has no answer."""

import numpy as np
import pytest

from reward.feedback import agreement
from reward.feedback.agreement import bradley_terry, krippendorff_alpha
from tests.checks import Case, Check, with_twins

X = np.nan
OBSERVERS = np.array([
    [1, 2, 3, 3, 2, 1, 4, 1, 2, X, X, X],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, X, 3],
    [X, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, X],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, X],
])  # fmt: skip
"""Krippendorff 2011, section D: four observers, twelve units, missing data."""
ALPHAS = {"nominal": 0.743, "ordinal": 0.815, "interval": 0.849, "ratio": 0.797}

GAMES = np.array([[0, 2, 0, 1], [3, 0, 5, 0], [0, 3, 0, 1], [4, 0, 3, 0]])
"""A beats B 2 times, D 1; B beats A 3, C 5; C beats B 3, D 1; D beats A 4, C 3."""
STRENGTHS = (0.640, 1.043, 0.660, 2.270)


def has_published_alphas(alpha) -> None:
    for level, published in ALPHAS.items():
        assert alpha(OBSERVERS, level) == pytest.approx(published, abs=5e-4), level


def leaves_items_unweighted(ratings, level):
    """Planted: items with more ratings weigh more."""

    def coincidences(counts):
        return counts @ counts.T - np.diag(counts.sum(axis=1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "_coincidences", coincidences)
        return krippendorff_alpha(ratings, level)


def keeps_lonely_ratings(ratings, level):
    """Planted: an item with one rating counts as agreed upon."""
    filled = np.where(np.isnan(ratings).sum(axis=0) == len(ratings) - 1, np.nanmean(ratings, axis=0), ratings)
    return krippendorff_alpha(filled, level)


def draws_with_replacement(ratings, level):
    """Planted: chance pairs a rating with itself, so alpha lacks the correction for small samples."""
    n = sum((~np.isnan(ratings)).sum(axis=0)[(~np.isnan(ratings)).sum(axis=0) >= 2])
    return 1.0 - (1.0 - krippendorff_alpha(ratings, level)) * n / (n - 1.0)


def has_published_strengths(fit) -> None:
    np.testing.assert_allclose(fit(GAMES), STRENGTHS, atol=5e-4)


CHECKS = (
    Check(
        id="11a-krippendorff",
        run=has_published_alphas,
        part=krippendorff_alpha,
        twins={
            "unweighted-items": leaves_items_unweighted,
            "lonely-ratings": keeps_lonely_ratings,
            "no-small-sample-correction": draws_with_replacement,
            "one-level-for-all": lambda ratings, level: krippendorff_alpha(ratings, "interval"),
        },
    ),
    Check(
        id="11a-bradley-terry",
        run=has_published_strengths,
        part=bradley_terry,
        twins={
            "losses-for-wins": lambda wins: bradley_terry(wins.T),
            "win-rate": lambda wins: wins.sum(axis=1) / wins.sum(axis=0),
            "arithmetic-mean-1": lambda wins: bradley_terry(wins) / bradley_terry(wins).mean(),
            "stops-early": lambda wins: bradley_terry(wins, tolerance=0.1),
        },
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


def test_alpha_by_hand_of_two_annotators() -> None:
    # Six ordered pairs, two of them apart; by chance 18 of 30: see the docstring.
    assert krippendorff_alpha(np.array([[1.0, 2, 1], [1, 2, 2]]), "nominal") == pytest.approx(4 / 9)


def test_alpha_is_1_when_all_agree_and_nan_when_nothing_varies() -> None:
    assert krippendorff_alpha(np.array([[1.0, 2, 3], [1, 2, 3]]), "ordinal") == 1.0
    assert np.isnan(krippendorff_alpha(np.ones((2, 3)), "nominal"))


@pytest.mark.parametrize("level", list(ALPHAS))
def test_alpha_does_not_depend_on_the_order_of_annotators_and_items(level) -> None:
    shuffled = OBSERVERS[[2, 0, 3, 1]][:, ::-1]
    assert krippendorff_alpha(shuffled, level) == pytest.approx(krippendorff_alpha(OBSERVERS, level))


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one item must have two ratings, got none"):
        krippendorff_alpha(np.array([[1.0, X], [X, 2.0]]), "nominal")
    with pytest.raises(ValueError, match="at least one item must have two ratings, got none"):
        krippendorff_alpha(np.full((2, 2), X), "nominal")
    with pytest.raises(ValueError, match=r"must not be negative at level ratio, got -1\.0"):
        krippendorff_alpha(np.array([[-1.0, 1], [1, 1]]), "ratio")


def test_strengths_satisfy_the_likelihood_equation() -> None:
    wins = np.random.default_rng(0).integers(1, 9, size=(6, 6)).astype(float)
    np.fill_diagonal(wins, 0)
    p = bradley_terry(wins)
    expected = (wins + wins.T) * p[:, None] / (p[:, None] + p[None, :])
    np.testing.assert_allclose(expected.sum(axis=1), wins.sum(axis=1), rtol=1e-9)
    assert np.log(p).mean() == pytest.approx(0.0, abs=1e-12)


def test_comparisons_without_a_likeliest_strength_are_refused() -> None:
    with pytest.raises(ValueError, match="by a chain of wins, got none from 1 to 0"):
        bradley_terry(np.array([[0, 3], [0, 0]]))
