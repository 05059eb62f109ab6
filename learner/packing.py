"""Puts sized things into bins: balanced over a fixed number, or as few as a capacity allows; deterministic."""

import heapq
from collections.abc import Sequence


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into as few bins of `capacity` as first-fit-decreasing finds.

    An item above the capacity gets a bin of its own.  Sizes 5, 7, 4, 2 into 10: [1, 3] and [0, 2].

    Returns:
        The items' indices, ascending within a bin; bins in the order in which they were opened.
    """
    bins: list[list[int]] = []
    width = 1 << max(0, len(sizes) - 1).bit_length()
    # A tree of the largest room below each node; leaves are the bins in the order in which they are opened.
    room = [capacity] * (2 * width)
    for item in _longest_first(sizes):
        node = width + len(bins) if sizes[item] > capacity else _first_leaf(room, sizes[item])
        number = node - width
        if number == len(bins):
            bins.append([])
        bins[number].append(item)
        room[node] -= sizes[item]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [sorted(members) for members in bins]


def _first_leaf(room: Sequence[int], size: int) -> int:
    node = 1
    while 2 * node < len(room):
        node = 2 * node if room[2 * node] >= size else 2 * node + 1
    return node


def balance(sizes: Sequence[int], num_bins: int) -> list[list[int]]:
    """Spread items over `num_bins` bins: the longest first, each to the bin with the smallest load (ties: the first).

    The fullest bin is at most 4/3 - 1/(3 num_bins) of the optimum.  Sizes 5, 7, 4, 2 over two bins: [1, 3] and [0, 2].

    Source:
        Graham 1969, "Bounds on multiprocessing timing anomalies" (longest processing time).
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    lightest = [(0, number) for number in range(num_bins)]
    for item in _longest_first(sizes):
        load, number = lightest[0]
        bins[number].append(item)
        heapq.heapreplace(lightest, (load + sizes[item], number))
    return [sorted(members) for members in bins]


def _longest_first(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda item: (-sizes[item], item))
