"""Attention over slots: the key-value memory of the torch engine, and the hook that makes any decoder read it.

A slot is one row of static memory, `[slots, kv heads, max_len, head_dim]` per layer.  The hook is registered with
transformers' attention interface once; what one call needs travels with the call (`model(..., slot_ctx=ctx)`), so any
number of engines live in one process and no model code is copied.

Left to the engine: which sample has which slot, and when a slot is free.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

IMPLEMENTATION = "concord_slots"
WINDOW_MULTIPLE = 16
"""Key-value windows and padded prompts are rounded up to this, so that their bits do not depend on company."""

CHUNK = 32
"""Tokens of a prompt that attend together: what prompts share is shared in whole chunks."""

HARMLESS_KEYWORDS = frozenset({"position_ids", "use_cache", "output_router_logits", "is_causal"})
"""Keywords that models hand to attention and that do not change its result here."""


def round_up(count: int, multiple: int) -> int:
    """Return the next multiple that is not below `count`, e.g. 17 and 16 -> 32."""
    return -(-count // multiple) * multiple


class SlotContext(Protocol):
    """What one forward pass does with keys and values."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: "AttentionRule") -> Tensor:
        """Store key and value of `layer`, and return the attention output [B, heads, T, head_dim]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRule:
    """How a layer attends."""

    scaling: float | None  # None = 1 / sqrt(head_dim)
    sliding_window: int | None  # a query sees this many keys, itself included
    softcap: float | None  # scores become softcap * tanh(scores / softcap)


class SlotCache:
    """Static keys and values of `num_slots` samples, shaped like the model's first ones; grows for longer samples."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.max_len = 0
        self.generation = 0
        """Changes when the memory does."""
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def reserve(self, length: int) -> None:
        """Make room for samples of `length` tokens, keeping what is stored."""
        if length <= self.max_len:
            return
        self.max_len = round_up(length, WINDOW_MULTIPLE)
        self.generation += 1
        self.keys = [_lengthened(tensor, self.max_len) for tensor in self.keys]
        self.values = [_lengthened(tensor, self.max_len) for tensor in self.values]

    def release(self) -> None:
        """Give all memory back; the next `write` takes it again."""
        self.keys, self.values = [], []
        self.generation += 1

    def write(self, first: int, count: int, prefix: "Prefix") -> None:
        """Copy a prefix into the slots `first .. first + count`."""
        if not self.keys:
            self.keys = [self._allocate(key) for key in prefix.keys]
            self.values = [self._allocate(value) for value in prefix.values]
        length = prefix.length
        for stored, new in ((self.keys, prefix.keys), (self.values, prefix.values)):
            for target, source in zip(stored, new, strict=True):
                target[first : first + count, :, :length] = source[:, :, :length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` over those of slot `target`."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def _allocate(self, like: Tensor) -> Tensor:
        # Zeros, not empty: a masked position still meets a weight of zero, and zero times NaN is NaN.
        _, heads, _, head_dim = like.shape
        return like.new_zeros(self.num_slots, heads, self.max_len, head_dim)


@dataclass(slots=True, kw_only=True)
class Prefix:
    """Context of a forward over whole sequences, right-padded; collects their keys and values, [B, kv heads, T, d]."""

    length: int  # of the longest one, without padding
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """Attend causally; padding stands behind every real position, so no real query sees it."""
        _check_order(layer, self.keys)
        self.keys.append(key)
        self.values.append(value)
        allowed = None
        if rule.softcap is not None or rule.sliding_window is not None:
            allowed = _causal(0, key.shape[2], rule.sliding_window, key.device)
        return _attend(query, key, value, allowed, rule)


class Continuation:
    """Context of a forward over one sequence alone, right-padded, from token `known` on; `before` has those up to it.

    Chunks of `CHUNK` queries attend one after another, the same ones wherever the forward starts, so that a token has
    the same bits whether what stands before its chunk is computed with it or was there already.

    Args:
        known: tokens that are not computed, a multiple of `CHUNK`.
        before: their keys and values, perhaps with more behind them.
    """

    def __init__(self, *, known: int = 0, before: Prefix | None = None) -> None:
        self._known = known
        self._before = before
        self._allowed: dict[tuple[int, int | None], Tensor] = {}
        self.keys: list[Tensor] = []
        """Of all tokens, [1, kv heads, T, d] for each layer."""
        self.values: list[Tensor] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """Attend causally; padding stands behind every real position, so no real query sees it."""
        _check_order(layer, self.keys)
        if self._before is not None:
            key = torch.cat([self._before.keys[layer][:, :, : self._known], key], dim=2)
            value = torch.cat([self._before.values[layer][:, :, : self._known], value], dim=2)
        # In one order in memory whether there is something before or not; and apart from what they were computed with.
        key, value = key.contiguous(), value.contiguous()
        self.keys.append(key)
        self.values.append(value)
        outputs: list[Tensor] = []
        for index, chunk in enumerate(query.split(CHUNK, dim=2)):
            start = self._known + index * CHUNK
            end = start + chunk.shape[2]
            allowed = self._mask(start, end, rule.sliding_window, key.device)
            outputs.append(_attend(chunk, key[:, :, :end], value[:, :, :end], allowed, rule))
        return torch.cat(outputs, dim=2)

    def _mask(self, start: int, end: int, sliding_window: int | None, device: torch.device) -> Tensor:
        """Return what the queries of a chunk see, [end - start, end]; made once, not per layer."""
        if (start, sliding_window) not in self._allowed:
            self._allowed[start, sliding_window] = _causal(start, end, sliding_window, device)
        return self._allowed[start, sliding_window]


class Decode:
    """Context of a forward over one new token per row: row b's token stands at `positions[b]` of slot b."""

    def __init__(self, cache: SlotCache, positions: Tensor, window: int) -> None:
        self._cache = cache
        self._positions = positions
        self._window = window
        self._allowed: dict[int | None, Tensor] = {}
        self._lines: dict[int, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """Store the new token's key and value, attend over the slots' windows."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        rows, heads, _, head_dim = query.shape
        is_alike = keys.shape == values.shape
        scaling = head_dim**-0.5 if rule.scaling is None else rule.scaling
        if is_alike and query.device.type == "cpu" and query.dtype == torch.float32:
            return _cpu_kernel()(
                query[:, :, 0], key[:, :, 0], value[:, :, 0], keys, values, self._positions,
                scaling=scaling, sliding_window=rule.sliding_window, softcap=rule.softcap,
            )[:, :, None]  # fmt: skip
        # Whole lines of head_dim numbers by index_copy_: several times cheaper than assignment by two index tensors.
        lines = self._lines_of(keys)
        keys.view(-1, keys.shape[3]).index_copy_(0, lines, key.reshape(-1, key.shape[3]))
        values.view(-1, values.shape[3]).index_copy_(0, lines, value.reshape(-1, value.shape[3]))
        kernel = _gpu_kernel() if is_alike and query.is_cuda else None
        if kernel is not None:
            return kernel(
                query[:, :, 0], keys, values, self._positions, window=self._window, scaling=scaling,
                sliding_window=rule.sliding_window, softcap=rule.softcap,
            )[:, :, None]  # fmt: skip
        keys, values = keys[:rows, :, : self._window], values[:rows, :, : self._window]
        # The query heads that share a key head become its query positions: grouped attention without repeating keys.
        grouped = query.reshape(rows, keys.shape[1], heads // keys.shape[1], head_dim)
        output = _attend(grouped, keys, values, self._mask(rule.sliding_window), rule)
        return output.reshape(rows, heads, 1, output.shape[-1])

    def _lines_of(self, stored: Tensor) -> Tensor:
        """Return where the new token's lines stand in a layer's memory, [B * kv heads]: all heads of row 0 first."""
        heads, max_len = stored.shape[1:3]
        if heads not in self._lines:  # the same for every layer with as many heads
            line = torch.arange(len(self._positions) * heads, device=stored.device) * max_len
            self._lines[heads] = line + self._positions.repeat_interleave(heads)
        return self._lines[heads]

    def _mask(self, sliding_window: int | None) -> Tensor:
        """Return which of its window each row sees, [B, 1, 1, window] bool; made once per step, not per layer."""
        if sliding_window not in self._allowed:
            distance = self._positions[:, None] - torch.arange(self._window, device=self._positions.device)
            self._allowed[sliding_window] = _window(distance, sliding_window)[:, None, None]
        return self._allowed[sliding_window]


def install(model: PreTrainedModel) -> None:
    """Make `model` attend over slots; from now on it needs `slot_ctx` in every call.

    Raises:
        ValueError: if the architecture does not go through the attention interface.
    """
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config.get_text_config()._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"the architecture must use transformers' attention interface, got {type(model).__name__}; "
            "use a decoder that supports set_attn_implementation, or another engine"
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attention interface's function; [B, heads, T, d] in, [B, T, heads, d] out."""
    context: SlotContext = keywords.pop("slot_ctx")
    rule = AttentionRule(
        scaling=keywords.pop("scaling", None),
        sliding_window=keywords.pop("sliding_window", None),
        softcap=keywords.pop("softcap", None),
    )
    if keywords.pop("dropout", 0.0):
        raise ValueError("attention dropout must be 0 while sampling; call model.eval() before the engine takes it")
    for keyword, setting in keywords.items():
        if setting is not None and keyword not in HARMLESS_KEYWORDS:
            raise ValueError(
                f"attention keywords must be ones the torch engine implements, got {keyword!r} "
                f"({type(module).__name__}); this architecture needs another engine"
            )
    layer = cast(int, module.layer_idx)
    return context.attend(layer, query, key, value, rule).transpose(1, 2), None


@functools.cache
def _cpu_kernel() -> Callable[..., Tensor]:
    """Return the kernel for decoding, which brings a compiler that other engines' processes do without."""
    from actors.decode_attention_cpu import decode_attention

    return decode_attention


@functools.cache
def _gpu_kernel() -> Callable[..., Tensor] | None:
    """Return the kernel for decoding; None where Triton, which comes with torch for GPUs, is not installed."""
    try:
        from actors.decode_attention import decode_attention
    except ImportError:
        return None
    return decode_attention


def _window(distance: Tensor, sliding_window: int | None) -> Tensor:
    """Return whether a query sees a key that lies `distance` positions before it."""
    allowed = distance >= 0
    return allowed if sliding_window is None else allowed & (distance < sliding_window)


def _causal(start: int, end: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Return which of the keys 0 .. end the queries start .. end see, [end - start, end]."""
    position = torch.arange(end, device=device)
    return _window(position[start:, None] - position, sliding_window)


def _check_order(layer: int, collected: list[Tensor]) -> None:
    if layer != len(collected):
        raise ValueError(f"attention layers must run in order 0, 1, ..., got {layer} after {len(collected)}")


def _attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, rule: AttentionRule) -> Tensor:
    """Return the attention output [B, heads, T, d]; without `allowed`, causally."""
    if rule.softcap is not None:
        assert allowed is not None, "softcap attention is called with a mask"
        return _softcapped(query, key, value, allowed, rule)
    is_grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, is_causal=allowed is None, scale=rule.scaling, enable_gqa=is_grouped
    )


def _softcapped(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, rule: AttentionRule) -> Tensor:
    """Attention with tanh-capped scores, which torch's fused kernel does not know."""
    assert rule.softcap is not None, "softcap attention is called with a cap"
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scaling = query.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling
    scores = torch.tanh((query @ key.transpose(2, 3)) * scaling / rule.softcap) * rule.softcap
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value


def _lengthened(tensor: Tensor, length: int) -> Tensor:
    longer = tensor.new_zeros(*tensor.shape[:2], length, tensor.shape[3])
    longer[:, :, : tensor.shape[2]] = tensor
    return longer


# Without a mask function of that name the model makes no mask, which would be built for nothing and asks the host.
AttentionInterface.register(IMPLEMENTATION, _attention)
