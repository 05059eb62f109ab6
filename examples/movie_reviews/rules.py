"""The demo's rule functions, with TRL's signature.

`topic_named` is part of the reward.  `vader` is not: it is a lexicon that the reward model never saw, used with
weight 0 to check that reviews really became more positive.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

_ARTICLES = ("a", "an", "and", "her", "his", "its", "the", "their", "two")
_PREPOSITIONS = ("at", "by", "for", "from", "in", "of", "on", "to", "with", "without")
_STOP_WORDS = frozenset((*_ARTICLES, *_PREPOSITIONS))


def topic_named(
    prompts: Sequence[Any], completions: Sequence[Any], topic: Sequence[str], **columns: Any
) -> list[float]:
    """Return 1.0 for each completion that has a content word of its topic, in any case or number; else 0.0."""
    return [
        float(bool(content_words(name) & content_words(_text(completion))))
        for name, completion in zip(topic, completions, strict=True)
    ]


def vader(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Return VADER's compound sentiment of each completion, -1 to 1."""
    analyzer = _analyzer()
    return [float(analyzer.polarity_scores(_text(completion))["compound"]) for completion in completions]


def content_words(text: str) -> frozenset[str]:
    """Return the words of a text without articles and prepositions, in lower case and singular."""
    words = re.findall(r"[^\W\d_]+(?=['’]s\b)|[^\W\d_]{2,}", text.lower())
    return frozenset(_singular(word) for word in words if word not in _STOP_WORDS)


def _singular(word: str) -> str:
    if len(word) <= 3 or word.endswith("ss"):
        return word
    for ending, singular in (("ies", "y"), ("ves", "f"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("sses", "ss")):
        if word.endswith(ending):
            return word[: -len(ending)] + singular
    return word.removesuffix("s")


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
