"""Samples that are being generated: what each has drawn so far, when it ends, and what it has become then."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from actors.engine import Completion, EngineError, FinishReason, Request
from actors.slots import Prefix

_STOP_MARGIN = 8
"""Tokens decoded before the longest possible stop string: a decoder may treat the first token of a text differently."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the model says about some states."""

    logits: Tensor
    """[..., V]."""
    hidden: Tensor
    """[..., H], what the output head received for them."""

    def __getitem__(self, index: Any) -> "Outputs":
        return Outputs(self.logits[index], self.hidden[index])


@dataclass(slots=True, kw_only=True, eq=False)
class LiveGroup:
    """A request being served; `prefilled` holds its prompt's keys, values and last state until all samples started."""

    request: Request
    num_started: int = 0
    num_finished: int = 0
    prefilled: tuple[Prefix, Outputs] | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class LiveRow:
    """A live sample; its index in the engine's list of rows is its slot."""

    group: LiveGroup
    sample_index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @property
    def num_stored(self) -> int:
        """Positions whose keys and values are in the slot; also the position of the last drawn token, not yet fed."""
        return len(self.group.request.prompt_ids) + len(self.tokens) - 1

    def append(self, token: int, logprob: float, version: int) -> None:
        """Take the next token.

        Raises:
            EngineError: if its log-prob is not finite.
        """
        if not math.isfinite(logprob):
            raise EngineError(
                f"log-probs must be finite, got {logprob} (request {self.group.request.request_id!r}, "
                f"token {len(self.tokens)}, version {version}); the policy has probably diverged"
            )
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)


class Endings:
    """Knows when a sample ends, and makes a completion of it.

    Args:
        tokenizer: decodes responses.
        eos_ids: tokens that end a response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids

    def reason(self, row: LiveRow) -> FinishReason | None:
        """Return why a row ends with its last token; None = it goes on."""
        request, length = row.group.request, len(row.tokens)
        if request.forced_lengths:
            return "length" if length == request.forced_lengths[row.sample_index] else None
        if row.tokens[-1] in self._eos_ids:
            return "eos"
        if request.sampling.stop and self._stops(row.tokens, request.sampling.stop):
            return "stop"
        return "length" if length == request.sampling.max_new_tokens else None

    def completion(self, row: LiveRow, reason: FinishReason) -> Completion:
        """Return what a row that has ended is handed on as."""
        return Completion(
            request_id=row.group.request.request_id,
            sample_index=row.sample_index,
            response_ids=np.array(row.tokens, dtype=np.int32),
            response_text=self._text(row.tokens),
            logprobs=np.array(row.logprobs, dtype=np.float32),
            policy_versions=np.array(row.versions, dtype=np.int32),
            finish_reason=reason,
        )

    def _stops(self, tokens: Sequence[int], stop: tuple[str, ...]) -> bool:
        """Return whether the last token completed a stop string; a token of text has at least one byte of it."""
        tail = max(len(string.encode()) for string in stop) + _STOP_MARGIN
        text = self._text(tokens[-tail:])
        return any(string in text for string in stop)

    def _text(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str), "one sequence decodes to one text"
        return text
