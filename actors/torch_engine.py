"""The embedded engine: continuous batching over key-value slots, for any Hugging Face decoder, on CPU and GPU.

A worked example with four slots and requests p (3 samples) and q (2 samples): p is prefilled once, alone, and its keys
and values are copied into slots 0-2; q is prefilled and its first sample takes slot 3.  Each step decodes one token for
the slots 0-3.  When p's sample in slot 1 ends, the sample of slot 3 moves into the hole, so live rows stay dense, and
slot 3 goes to q's second sample before the next token is decoded.

A prompt that begins as the one before it did takes the keys and values of that beginning from there.

On a CPU in float32 a sample's tokens and log-probs have the same bits alone and in any company.  This rests on: prompts
prefilled alone, in chunks that stand at the same places always (`actors.slots.Continuation`), rows padded to a multiple
of four, attention that computes each row by itself (`actors.decode_attention_cpu`), random numbers without state
(`actors.sampling`), and `MKL_CBWR=AVX2,STRICT` in the environment before torch is loaded.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.buckets import Load
from actors.bursts import BurstDecoder
from actors.engine import (
    Capability,
    Completion,
    EngineError,
    EngineStats,
    FinishReason,
    Request,
    UpdateMode,
    check_requests,
)
from actors.live_rows import Endings, LiveGroup, LiveRow, Outputs
from actors.packed_linear import pack, release, repack
from actors.prefill import ROW_MULTIPLE, Prefilled, Prefiller
from actors.sampling import sample, uniforms
from actors.slots import WINDOW_MULTIPLE, Decode, SlotCache, SlotContext, install, round_up
from actors.weights import InPlaceWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How much an engine asks of its device at a time."""

    steps: int
    """Tokens decoded for every row before the host looks at them, see `actors.bursts`."""
    prefill_tokens: int
    """Tokens of waiting prompts in one pass, padding included; 0 = each prompt alone, with the same bits always."""


CPU_PACE = Pace(steps=1, prefill_tokens=0)
GPU_PACE = Pace(steps=8, prefill_tokens=8192)

LogitsHook = Callable[[Tensor, Tensor, Sequence[str]], Tensor]
"""`hook(logits [B, V], hidden [B, H], request_ids) -> logits`, before every draw; `hidden` is what the output head made
the logits of.  Recorded log-probs are those of the hook's result, divided by the temperature.  A row's result must have
the same bits in any company if its sample shall."""


class TorchEngine:
    """Implements `actors.engine.Engine`.  The model given to it belongs to it: its attention is replaced.

    Args:
        model: decoder in eval mode, on the device it runs on.
        tokenizer: decodes responses.
        max_rows: samples decoded together, a multiple of 4.
        eos_ids: tokens that end a response.
        max_len: longest prompt with response, tokens; None = what the model's positions allow.  Memory grows with need.
        logits_hook: see `LogitsHook`.
        pack_weights: see `actors/packed_linear.py`; an update ends with packing again.
        pace: None = what suits the device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_rows: int,
        eos_ids: frozenset[int],
        max_len: int | None = None,
        logits_hook: LogitsHook | None = None,
        pack_weights: bool = True,
        pace: Pace | None = None,
    ) -> None:
        if max_rows < 1 or max_rows % ROW_MULTIPLE:
            raise ValueError(f"max_rows must be a multiple of {ROW_MULTIPLE}, got {max_rows}; round it up")
        install(model)
        self._model = model.eval()
        self._received = _recorder(model)
        self._endings = Endings(tokenizer, eos_ids)
        self._hook = logits_hook
        self._device = next(model.parameters()).device
        self._pace = pace or (CPU_PACE if self._device.type == "cpu" else GPU_PACE)
        max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31 - 1
        self._max_len = min(max_positions, max_len or max_positions)
        self._cache = SlotCache(max_rows)
        self._prefiller = Prefiller(self._forward, self._device, max_positions=max_positions)
        self._bursts = BurstDecoder(
            self._next_logits, self._cache, self._device, steps=self._pace.steps, max_positions=max_positions
        )
        self._weights = InPlaceWeights(model)
        if pack_weights:
            pack(model)
        self._version = -1
        self._next: tuple[int, UpdateMode] | None = None
        self._asleep = False
        self._queue: deque[LiveGroup] = deque()  # groups with samples not started, in order of arrival
        self._rows: list[LiveRow] = []
        self._ids: set[str] = set()
        self._stats = EngineStats()

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What this engine promises."""
        exact = self._device.type == "cpu" and next(self._model.parameters()).dtype == torch.float32
        promised: set[Capability] = {"seeded_per_sample", "logits_hook", "in_flight_update"}
        return frozenset(promised | {"batch_invariant"}) if exact else frozenset(promised)

    @property
    def version(self) -> int:
        """The policy version that the next token is sampled with; -1 before the first update."""
        return self._version

    @property
    def is_updating(self) -> bool:
        """Whether an update has begun and not ended."""
        return self._next is not None

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something."""
        return bool(self._rows or self._queue)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; all of them or, when one is refused, none."""
        self._ids |= check_requests(requests, in_flight=self._ids, max_len=self._max_len)
        self._queue.extend(LiveGroup(request=request) for request in requests)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Give free slots to waiting samples, decode one token for every live row, return the samples that finished."""
        if self._next is not None or self._asleep:
            raise EngineError("the engine must be awake and between updates to step; bring it a complete version first")
        finished = []
        while self._queue and len(self._rows) < self._cache.num_slots:
            finished += self._start(self._queue[0])
        if self._rows:
            finished += self._decode_burst() if self._may_burst() else self._decode()
        return finished

    @torch.inference_mode()
    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests and free their rows; unknown ids are ignored."""
        unwanted = set(request_ids)
        self._ids -= unwanted
        self._queue = deque(group for group in self._queue if group.request.request_id not in unwanted)
        for slot in reversed(range(len(self._rows))):
            if self._rows[slot].group.request.request_id in unwanted:
                self._free(slot)

    def begin_update(self, version: int, mode: UpdateMode) -> None:
        """Start replacing the weights; a second call starts over.

        Raises:
            EngineError: if `mode` is drain and a request is live.
        """
        if mode == "drain" and (self._rows or any(group.num_started for group in self._queue)):
            raise EngineError(f"no request must be live in a drain update, got {len(self._rows)} rows; step until idle")
        self._next = (version, mode)
        self._weights.begin()

    def load(self, tensors: Iterable[tuple[str, Load]]) -> None:
        """Copy named tensors, or parts or changes of them, into the weights, in place."""
        start = time.perf_counter()
        self._weights.load(tensors)
        self._stats.load_s += time.perf_counter() - start

    @torch.inference_mode()
    def end_update(self) -> None:
        """Check that every weight came, drop cached prefixes, take the new version."""
        if self._next is None:
            raise EngineError("an update must have begun before it ends; call begin_update() first")
        self._weights.end()
        start = time.perf_counter()
        repack(self._model)
        self._stats.load_s += time.perf_counter() - start
        (self._version, mode), self._next = self._next, None
        self._asleep = False
        self._forget_prompts()
        if mode == "reprefill":
            for slot, row in enumerate(self._rows):
                self._cache.write(slot, 1, self._prefill([*row.group.request.prompt_ids, *row.tokens[:-1]])[0])

    def weight_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return what `load` expects: canonical name -> (shape, dtype name), tied tensors once."""
        return self._weights.shapes()

    def sleep(self) -> None:
        """Give the memory of weights and KV back; no request may be live.  The next complete update wakes it."""
        if self._rows:
            raise EngineError(f"no request must be live when the engine sleeps, got {len(self._rows)} rows; abort them")
        self._forget_prompts()
        self._cache.release()
        self._weights.release()
        release(self._model)
        self._bursts.forget()
        self._asleep = True

    def stats(self) -> EngineStats:
        """Return a snapshot of the counters."""
        return replace(
            self._stats,
            num_prefill_tokens=self._prefiller.num_tokens,
            num_live_rows=len(self._rows),
            num_waiting_requests=len(self._queue),
            kv_bytes=self._cache.num_bytes,
            extra=dict(self._stats.extra),
        )

    def _start(self, group: LiveGroup) -> list[Completion]:
        """Start as many of a group's samples as there are free slots; their first tokens come from the prefill."""
        request = group.request
        if group.prefilled is None and self._pace.prefill_tokens:
            self._prefill_waiting()
        prefix, last = group.prefilled = group.prefilled or self._prefill(request.prompt_ids)
        first = len(self._rows)
        count = min(request.num_samples - group.num_started, self._cache.num_slots - first)
        self._cache.reserve(len(request.prompt_ids) + request.sampling.max_new_tokens)
        self._cache.write(first, count, prefix)
        indices = range(group.num_started, group.num_started + count)
        self._rows += [LiveRow(group=group, sample_index=index) for index in indices]
        group.num_started += count
        if group.num_started == request.num_samples:
            self._queue.remove(group)
            group.prefilled = None
        return self._draw(first, Outputs(last.logits.expand(count, -1), last.hidden.expand(count, -1)))

    def _prefill(self, tokens: Sequence[int]) -> Prefilled:
        """Run one sequence alone."""
        start = time.perf_counter()
        prefilled = self._prefiller.alone(tokens)
        self._stats.prefill_s += time.perf_counter() - start
        return prefilled

    def _forget_prompts(self) -> None:
        """Drop what the weights, which change or go, have made of prompts."""
        self._prefiller.forget()
        for group in self._queue:
            group.prefilled = None

    def _prefill_waiting(self) -> None:
        """Run, as one batch, the prompts of the next groups that free slots are there for."""
        start = time.perf_counter()
        free, width = self._cache.num_slots - len(self._rows), 0
        groups: list[LiveGroup] = []
        for group in self._queue:
            width = max(width, round_up(len(group.request.prompt_ids), WINDOW_MULTIPLE))
            if free <= 0 or (groups and width * (len(groups) + 1) > self._pace.prefill_tokens):
                break
            free -= group.request.num_samples - group.num_started
            if group.prefilled is None:
                groups.append(group)
        if groups:
            prefilled = self._prefiller.together([group.request.prompt_ids for group in groups])
            for group, one in zip(groups, prefilled, strict=True):
                group.prefilled = one
        self._stats.prefill_s += time.perf_counter() - start

    def _may_burst(self) -> bool:
        """Return whether no row asks for what a burst cannot do: a hook, or truncated distributions."""
        if self._pace.steps == 1 or self._hook is not None:
            return False
        settings = (row.group.request.sampling for row in self._rows)
        return not any(sampling.top_k or sampling.top_p < 1 for sampling in settings)

    def _decode_burst(self) -> list[Completion]:
        """Draw several tokens for every row, keep those up to its end."""
        start = time.perf_counter()
        burst = self._bursts.run(self._rows)
        self._stats.num_decode_steps += self._pace.steps
        self._stats.num_decode_rows += self._pace.steps * burst.num_rows
        finished = []
        for slot in reversed(range(len(self._rows))):  # the row that fills a hole has been looked at already
            row = self._rows[slot]
            for token, logprob in zip(burst.tokens[:, slot].tolist(), burst.logprobs[:, slot].tolist(), strict=True):
                row.append(token, logprob, self._version)
                self._stats.num_decode_tokens += 1
                reason = self._endings.reason(row)
                if reason is not None:
                    finished.append(self._complete(slot, reason))
                    break
        self._stats.decode_s += time.perf_counter() - start
        return finished

    def _decode(self) -> list[Completion]:
        """Feed every row's last token and draw its next one."""
        start = time.perf_counter()
        live = len(self._rows)
        feed = np.zeros((2, round_up(live, ROW_MULTIPLE)), dtype=np.int64)  # token and position of each row
        feed[0, :live] = [row.tokens[-1] for row in self._rows]
        feed[1, :live] = [row.num_stored for row in self._rows]
        window = round_up(int(feed[1].max()) + 1, WINDOW_MULTIPLE)
        tokens, positions = torch.from_numpy(feed).to(self._device)
        context = Decode(self._cache, positions, window)
        outputs = self._forward(tokens[:, None], positions[:, None], 1, context)
        self._stats.num_decode_steps += 1
        self._stats.num_decode_rows += feed.shape[1]
        self._stats.num_decode_tokens += live
        self._stats.decode_s += time.perf_counter() - start
        return self._draw(0, outputs[:live, 0])

    def _next_logits(self, ids: Tensor, positions: Tensor, context: SlotContext) -> Tensor:
        return self._forward(ids, positions, 1, context).logits[:, 0]

    def _forward(self, ids: Tensor, positions: Tensor, keep: int | Tensor, context: SlotContext) -> Outputs:
        logits: Tensor = self._model(
            input_ids=ids.to(self._device),
            position_ids=positions.to(self._device),
            use_cache=False,
            logits_to_keep=keep,
            slot_ctx=context,
        ).logits
        hidden = self._received.pop()
        assert hidden.shape[:-1] == logits.shape[:-1], "the output head is called on the kept states alone"
        return Outputs(logits, hidden)

    def _draw(self, first: int, outputs: Outputs) -> list[Completion]:
        """Append one token to each row from `first` on, and retire the rows that end with it."""
        start = time.perf_counter()
        rows = self._rows[first:]
        requests = [row.group.request for row in rows]
        logits = outputs.logits
        if self._hook is not None:
            logits = self._hook(logits, outputs.hidden, [request.request_id for request in requests])
        seeds = np.array([request.seed for request in requests], dtype=np.uint64)
        indices = np.array([row.sample_index for row in rows])
        uniform = uniforms(seeds, indices, np.array([len(row.tokens) for row in rows]))
        tokens, logprobs = sample(logits, [request.sampling for request in requests], uniform)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.append(token, logprob, self._version)
        finished = []
        # From the last row down, so that the row which fills a hole has been looked at already.
        for slot in reversed(range(first, len(self._rows))):
            reason = self._endings.reason(self._rows[slot])
            if reason is not None:
                finished.append(self._complete(slot, reason))
        self._stats.sample_s += time.perf_counter() - start
        return finished

    def _complete(self, slot: int, reason: FinishReason) -> Completion:
        row = self._rows[slot]
        self._free(slot)
        row.group.num_finished += 1
        if row.group.num_finished == row.group.request.num_samples:
            self._ids.discard(row.group.request.request_id)
        self._stats.num_completions += 1
        return self._endings.completion(row, reason)

    def _free(self, slot: int) -> None:
        """Give a slot back and move the last live row into it."""
        last = len(self._rows) - 1
        if slot != last:
            self._cache.move(last, slot, self._rows[last].num_stored)
            self._rows[slot] = self._rows[last]
        self._rows.pop()


def _recorder(model: PreTrainedModel) -> deque[Tensor]:
    """Return a queue of one that every forward pass of the model puts its output head's input into."""
    received: deque[Tensor] = deque(maxlen=1)
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    return received
