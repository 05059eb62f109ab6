"""The score of a walk, as a reward function with TRL's signature: any function like it can be a judge."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from examples.randomwalks.graph import make_task

_task = lru_cache(maxsize=16)(make_task)


def optimality(
    prompts: Sequence[str], completions: Sequence[str], graph_seed: Sequence[int], **columns: Any
) -> list[float | None]:
    """Return the optimality of each walk, in [0, 1]; None for a start from which no walk can score.

    Args:
        prompts: the start, one letter each.
        completions: the letters that follow it.
        graph_seed: the data set's column of this name, one value for each prompt.
        columns: the data set's other columns, not used.
    """
    rows = zip(prompts, completions, graph_seed, strict=True)
    return [_task(seed).optimality(prompt + completion) for prompt, completion, seed in rows]
