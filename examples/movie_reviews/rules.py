"""A reward in plain Python: does the review name the film's topic?"""

import re
from collections.abc import Sequence
from typing import Any

_SMALL_WORDS = frozenset({"a", "an", "the", "in", "of", "and"})


def topic_named(
    prompts: Sequence[Any], completions: Sequence[Any], topic: Sequence[str], **columns: Any
) -> list[float]:
    """Return the share of the topic's content words that each review names.

    Case and plural do not matter; "a jewel thief" has the words jewel and thief, so a review of jewel thieves names one
    of two by its exact form, and "thieves" counts by its beginning.
    """
    return [_share(_text(completion), words) for completion, words in zip(completions, topic, strict=True)]


def _share(text: str, topic: str) -> float:
    found = {_stem(word) for word in re.findall(r"\w+", text.lower())}
    wanted = [_stem(word) for word in topic.lower().split() if word not in _SMALL_WORDS]
    return sum(any(_alike(word, other) for other in found) for word in wanted) / len(wanted)


def _stem(word: str) -> str:
    return re.sub(r"(ies|es|s|y)$", "", word) if len(word) > 3 else word


def _alike(wanted: str, other: str) -> bool:
    # "thief"/"thiev", "dance"/"dancer": a common beginning of all but the last letter, at least four long.
    size = max(4, min(len(wanted), len(other)) - 1)
    return wanted == other or (len(wanted) >= size <= len(other) and wanted[:size] == other[:size])


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
