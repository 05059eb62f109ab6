"""Rule-based and verifiable rewards: functions of the user, with TRL's signature.

    def f(prompts, completions, **columns) -> list[float | None]

For a plain prompt `prompts` and `completions` are strings; for a chat prompt they are messages, a completion being
`[{"role": "assistant", "content": ...}]`.  Columns are the data set's other columns, one list each, and
`completion_ids`; a function without `**columns` gets those it names.  None means that the rule does not apply to the
sample.

What a function raises is taken for the group's fault: it is judged once more, then left out of training.  Not so an
outage: ConnectionError, TimeoutError, MemoryError and torch.OutOfMemoryError, themselves or under a client library's
own kind that was raised while one of them was handled.  The group is then generated and judged again, with growing
pauses, at most `pipeline.max_retries` times.  A function that asks a service should raise ConnectionError for an answer
that means "try again later" (HTTP 429, 503).
"""

import inspect
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch

from actors.encoding import Prompt
from actors.plugins import import_function
from reward.errors import RewardError

RESERVED = ("prompts", "completions", "completion_ids")
"""Argument names that a data set's columns cannot take."""

_OUTAGES: tuple[type[Exception], ...] = (ConnectionError, TimeoutError, MemoryError, torch.OutOfMemoryError)


class RewardFunction:
    """One component that is a function.

    Args:
        name: of the component.
        path: import path, `package.module:name`.
        arguments: more keyword arguments, which win over columns of the same name.
    """

    def __init__(self, name: str, path: str, arguments: dict[str, Any]) -> None:
        self._name = name
        self._arguments = arguments
        self._function = import_function(path)
        self._signature = inspect.signature(self._function)
        kinds = [parameter.kind for parameter in self._signature.parameters.values()]
        self._takes_all = inspect.Parameter.VAR_KEYWORD in kinds

    def score(
        self,
        prompt_id: str,
        prompt: Prompt,
        responses: Sequence[str],
        *,
        response_ids: Sequence[Sequence[int]],
        extras: dict[str, Any],
    ) -> list[float | None]:
        """Return the function's score of each response to one prompt.

        Raises:
            RewardError: if it cannot be called with the columns there are, raises anything else, or returns anything
                but one finite number or None for each response.
            ConnectionError, TimeoutError, MemoryError, torch.OutOfMemoryError: if the function met one of them.
        """
        columns = {key: [value] * len(responses) for key, value in extras.items() if key not in RESERVED}
        columns["completion_ids"] = [list(ids) for ids in response_ids]
        given = {**columns, **self._arguments}
        if not self._takes_all:
            given = {key: value for key, value in given.items() if key in self._signature.parameters}
        call = {"prompts": [prompt] * len(responses), "completions": _completions(prompt, responses), **given}
        try:
            self._signature.bind(**call)
        except TypeError as error:
            problem = (
                f"its function must be callable with {sorted(call)}: {error}; the columns come from the prompt file"
            )
            raise RewardError(self._name, prompt_id, problem) from error
        try:
            scores = self._function(**call)
        except Exception as error:
            raise self._blamed(prompt_id, error) from error
        return self._checked(prompt_id, scores, len(responses))

    def _blamed(self, prompt_id: str, error: Exception) -> Exception:
        """Return what a failure of the function is to the run; an outage in the plain kind, which any process knows."""
        found = f"{type(error).__name__}: {error}"
        outage = _outage(error)
        if outage is None:
            problem = f"its function must not raise, got {found}; mend the function or the data"
            return RewardError(self._name, prompt_id, problem)
        problem = f"its function must have what it needs, got {found}; mend the service or the machine it runs on"
        return outage(str(RewardError(self._name, prompt_id, problem)))

    def _checked(self, prompt_id: str, scores: Any, wanted: int) -> list[float | None]:
        if not isinstance(scores, Sequence) and not hasattr(scores, "__len__"):
            raise RewardError(self._name, prompt_id, f"scores must be a list, got {type(scores).__name__}")
        if len(scores) != wanted:
            raise RewardError(self._name, prompt_id, f"scores must be {wanted}, one per response, got {len(scores)}")
        return [None if score is None else self._number(prompt_id, score) for score in scores]

    def _number(self, prompt_id: str, score: Any) -> float:
        if not isinstance(score, Real):
            problem = f"a score must be a number or None, got {score!r:.80} ({type(score).__name__})"
            raise RewardError(self._name, prompt_id, problem)
        return finite(self._name, prompt_id, float(score))


def finite(component: str, prompt_id: str, score: float) -> float:
    """Return `score`.

    Raises:
        RewardError: if it is not finite.
    """
    if not math.isfinite(score):
        raise RewardError(component, prompt_id, f"a score must be finite, got {score}")
    return score


def _outage(error: BaseException | None) -> type[Exception] | None:
    """Return the kind of outage that an error is or was raised over, None where there is none."""
    while error is not None:
        kind = next((kind for kind in _OUTAGES if isinstance(error, kind)), None)
        if kind is not None:
            return kind
        error = error.__cause__ or error.__context__  # httpx hides it from tracebacks, so hidden ones count
    return None


def _completions(prompt: Prompt, responses: Sequence[str]) -> list[Any]:
    if isinstance(prompt, str):
        return list(responses)
    return [[{"role": "assistant", "content": response}] for response in responses]
