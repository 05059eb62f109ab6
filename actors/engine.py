"""The engine protocol: what a rollout worker asks of whatever generates text.

An engine is driven by one thread.  It owns model weights, KV memory and the order in which requests are served; it does
not know prompts' sources, rewards, Ray or the loop.
"""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from actors.buckets import Load

FinishReason = Literal["eos", "stop", "length"]
UpdateMode = Literal["drain", "keep", "reprefill"]
Capability = Literal["seeded_per_sample", "batch_invariant", "logits_hook", "in_flight_update"]


class EngineError(RuntimeError):
    """Generation failed, or the engine was asked for something its state does not allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn.  Training uses temperature alone: the learner could not reproduce the rest."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    stop: tuple[str, ...] = ()  # strings; a response ends with the token that completes one


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and its `num_samples` samples.

    `seed` is a pure function of (run seed, group), see `actors.sampling.group_seed`; with the sample index and the
    token's position it fixes every draw, so a retried request gives the same bits on any worker.
    """

    request_id: str
    prompt_ids: Sequence[int]
    num_samples: int
    seed: int
    sampling: SamplingParams
    forced_lengths: tuple[int, ...] = ()  # one per sample: exact lengths, EOS ignored; for benchmarks


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished sample.  All arrays have length R, the number of response tokens, the final EOS included."""

    request_id: str
    sample_index: int
    response_ids: np.ndarray
    """[R] int32."""
    response_text: str
    """Decoded without special tokens."""
    logprobs: np.ndarray
    """[R] float32, log-softmax of the full logits divided by the temperature (by 1 when greedy)."""
    policy_versions: np.ndarray
    """[R] int32, the policy version that sampled each token."""
    finish_reason: FinishReason


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """Counters since the engine was built; seconds are wall time inside the engine."""

    num_prefill_tokens: int = 0  # computed; those that a prompt shares with another one are not
    num_decode_tokens: int = 0
    num_decode_steps: int = 0
    num_decode_rows: int = 0  # rows computed, padding included: the waste is num_decode_rows - num_decode_tokens
    num_completions: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    sample_s: float = 0.0
    load_s: float = 0.0
    num_live_rows: int = 0
    num_waiting_requests: int = 0
    kv_bytes: int = 0
    extra: dict[str, float] = field(default_factory=dict)


def check_requests(requests: Sequence[Request], *, in_flight: Container[str], max_len: int) -> set[str]:
    """Check what every engine demands of requests that are submitted together; return their ids.

    Args:
        requests: to be submitted.
        in_flight: ids of the requests that are queued or live.
        max_len: longest prompt with response, tokens.

    Raises:
        ValueError: if one of them could never be served.
    """
    ids: set[str] = set()
    for request in requests:
        _check_request(request, is_known=request.request_id in in_flight or request.request_id in ids, max_len=max_len)
        ids.add(request.request_id)
    return ids


def _check_request(request: Request, *, is_known: bool, max_len: int) -> None:
    where, sampling, num_prompt = f"request {request.request_id!r}", request.sampling, len(request.prompt_ids)
    longest = sampling.max_new_tokens
    if is_known:
        raise ValueError(f"request ids must be unique while in flight, got a second {where}; name it differently")
    if not num_prompt:
        raise ValueError(f"prompts must have at least one token, got none ({where}); add a BOS token or some text")
    if request.num_samples < 1 or longest < 1:
        raise ValueError(
            f"num_samples and max_new_tokens must be at least 1, got {request.num_samples} and {longest} ({where}); "
            "raise them"
        )
    if sampling.temperature < 0 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise ValueError(
            f"temperature and top_k must be at least 0 and top_p in (0, 1], got {sampling.temperature}, "
            f"{sampling.top_k} and {sampling.top_p} ({where}); correct the sampling settings"
        )
    if "" in sampling.stop:
        raise ValueError(f"stop strings must not be empty, got {sampling.stop} ({where}); remove the empty one")
    if num_prompt + longest > max_len:
        raise ValueError(
            f"prompt and response must fit into {max_len} tokens, got {num_prompt} + {longest} ({where}); "
            "shorten the prompt or lower max_new_tokens"
        )
    forced = request.forced_lengths
    if forced and not (len(forced) == request.num_samples and 0 < min(forced) <= max(forced) <= longest):
        raise ValueError(
            f"forced_lengths must be one length in 1..{longest} per sample, got {forced} ({where}); correct them"
        )


class Engine(Protocol):
    """Generates samples for requests, and takes new weights between two tokens."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What this engine promises; the contract tests run for what it claims."""

    @property
    def version(self) -> int:
        """The policy version that the next token is sampled with; -1 before the first update."""

    @property
    def is_updating(self) -> bool:
        """Whether an update has begun and not ended: its weights are half old, half new, and it cannot step."""

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests.

        Raises:
            ValueError: if a request could never be served (too long, a duplicate id, a bad sampling setting).
        """

    def step(self) -> list[Completion]:
        """Prefill what fits, decode one token for every live row, return the samples that finished."""

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests and free their rows; unknown ids are ignored."""

    def begin_update(self, version: int, mode: UpdateMode) -> None:
        """Start replacing the weights by `version`.

        `drain` requires that no request is live; `keep` goes on with the KV computed by the old weights; `reprefill`
        recomputes the KV of live rows with the new ones.
        """

    def load(self, tensors: "Iterable[tuple[str, Load]]") -> None:
        """Copy one bucket of named tensors (canonical Hugging Face names) into the weights, in place."""

    def end_update(self) -> None:
        """Check that every weight came, drop cached prefixes, take the new version."""

    def weight_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return what `load` expects: canonical name -> (shape, dtype name), tied tensors once."""

    def sleep(self) -> None:
        """Give the memory of weights and KV back; no request may be live.  The next complete update wakes it."""

    def stats(self) -> EngineStats:
        """Return a snapshot of the counters."""
