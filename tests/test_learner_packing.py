"""Packing and balancing: everything exactly once, capacities honoured, Graham's bound."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.packing import balance, first_fit_decreasing

SIZES = st.lists(st.integers(1, 30), max_size=12)


def check_packing(pack, sizes: list[int], capacity: int) -> None:
    bins = pack(sizes, capacity)
    assert sorted(item for members in bins for item in members) == list(range(len(sizes)))
    for members in bins:
        assert members
        assert sum(sizes[item] for item in members) <= capacity or len(members) == 1
    # Two bins that would fit into one are never left apart.
    loads = [sum(sizes[item] for item in members) for members in bins]
    assert all(a + b > capacity for a, b in itertools.combinations(loads, 2))


@settings(max_examples=150, deadline=None)
@given(SIZES, st.integers(1, 40))
def test_packing_honours_the_capacity(sizes: list[int], capacity: int) -> None:
    check_packing(first_fit_decreasing, sizes, capacity)


def test_worked_examples() -> None:
    assert first_fit_decreasing([5, 7, 4, 2], 10) == [[1, 3], [0, 2]]
    assert first_fit_decreasing([3, 12], 10) == [[1], [0]]
    assert first_fit_decreasing([2], -5) == [[0]]
    assert balance([5, 7, 4, 2], 2) == [[1, 3], [0, 2]]
    assert balance([4, 4, 4], 2) == [[0, 2], [1]]
    assert balance([4], 3) == [[0], [], []]


@pytest.mark.parametrize(
    "twin",
    [
        lambda sizes, capacity: [[item] for item in range(len(sizes))],
        lambda sizes, capacity: first_fit_decreasing(sizes, capacity + 1),
        lambda sizes, capacity: first_fit_decreasing(sizes[1:], capacity),
    ],
    ids=["one each", "one token over", "one item lost"],
)
def test_wrong_packing_is_caught(twin) -> None:
    with pytest.raises(AssertionError):
        check_packing(twin, [5, 6, 4, 2], 10)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=7), st.integers(1, 3))
def test_balance_is_within_grahams_bound_of_the_optimum(sizes: list[int], num_bins: int) -> None:
    bins = balance(sizes, num_bins)
    assert len(bins) == num_bins
    assert sorted(item for members in bins for item in members) == list(range(len(sizes)))
    fullest = max(sum(sizes[item] for item in members) for members in bins)
    optimum = min(
        max(sum(size for size, bin_ in zip(sizes, where, strict=True) if bin_ == b) for b in range(num_bins))
        for where in itertools.product(range(num_bins), repeat=len(sizes))
    )
    assert fullest <= optimum * (4 / 3 - 1 / (3 * num_bins)) + 1e-9
