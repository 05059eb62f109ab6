"""Puts sized things into bins: balanced over a fixed number, or as few as a capacity allows; deterministic."""

from collections.abc import Sequence


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into as few bins of `capacity` as first-fit-decreasing finds.

    An item above the capacity gets a bin of its own.  Sizes 5, 7, 4, 2 into 10: [1, 3] and [0, 2].

    Returns:
        The items' indices, ascending within a bin; bins in the order in which they were opened.
    """
    bins: list[list[int]] = []
    loads: list[int] = []
    for item in _longest_first(sizes):
        fits = next((i for i, load in enumerate(loads) if load + sizes[item] <= capacity), None)
        if fits is None:
            bins.append([item])
            loads.append(sizes[item])
        else:
            bins[fits].append(item)
            loads[fits] += sizes[item]
    return [sorted(members) for members in bins]


def balance(sizes: Sequence[int], num_bins: int) -> list[list[int]]:
    """Spread items over `num_bins` bins: the longest first, each to the bin with the smallest load (ties: the first).

    The fullest bin is at most 4/3 - 1/(3 num_bins) of the optimum.  Sizes 5, 7, 4, 2 over two bins: [1, 3] and [0, 2].

    Source:
        Graham 1969, "Bounds on multiprocessing timing anomalies" (longest processing time).
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for item in _longest_first(sizes):
        lightest = min(range(num_bins), key=lambda i: loads[i])
        bins[lightest].append(item)
        loads[lightest] += sizes[item]
    return [sorted(members) for members in bins]


def _longest_first(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda item: (-sizes[item], item))
