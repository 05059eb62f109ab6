"""Attention over a shared row without a T x T mask: each prompt once, each response over its prompt and itself.

A dense mask costs the square of a row; here the cost grows with what tokens really look at, so several groups in a row
cost what they cost one by one.  The hook is registered with transformers' attention interface once and does what sdpa
does unless a call brings a row (`model(..., shared_row=plan)`).  On a CPU, where a call of the kernel costs little.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from actors.slots import HARMLESS_KEYWORDS

IMPLEMENTATION = "concord_shared"

CALL_COST = 600_000
"""Multiply-adds (pairs of tokens times the heads' width) that take as long as one more call of the kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A group within a row."""

    lengths: tuple[int, ...]
    """Tokens of the prompt, then of each response."""
    mask: Tensor
    """[R, P + R] bool for the longest response: it sees the prompt and itself up to each token.  A shorter one's is the
    upper left part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRowPlan:
    """What attention must know about a row."""

    spans: tuple[Span, ...]


def install(model: PreTrainedModel) -> bool:
    """Make a model with sdpa attention on a CPU take plans; return whether it does now.

    Not with sliding windows, which the mask of a row already holds.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    is_plain = set(getattr(config, "layer_types", None) or ()) <= {"full_attention"} and window is None
    if model.device.type != "cpu" or config._attn_implementation != "sdpa" or not is_plain:
        return False
    model.set_attn_implementation(IMPLEMENTATION)
    return is_installed(model)


def is_installed(model: PreTrainedModel) -> bool:
    """Return whether a model takes plans."""
    return model.config.get_text_config()._attn_implementation == IMPLEMENTATION


def uninstall(model: PreTrainedModel) -> None:
    """Undo `install`."""
    model.set_attn_implementation("sdpa")


def plan_row(
    spans: Sequence[tuple[int, ...]], model: PreTrainedModel, *, call_cost: int = CALL_COST
) -> SharedRowPlan | None:
    """Return the plan of a row whose groups have these lengths; None where a mask is cheaper.

    A prompt of 44 tokens and four responses of 64 are 300^2 = 90,000 pairs under a mask, and 44^2 + 4 * 64 * 108 =
    29,584 in five calls: cheaper from a width of 50 on.
    """
    if not is_installed(model):
        return None
    width = model.config.get_text_config().hidden_size
    num_pairs = sum(prompt**2 + sum(length * (prompt + length) for length in rest) for prompt, *rest in spans)
    num_calls = sum(len(lengths) for lengths in spans)
    if (sum(map(sum, spans)) ** 2 - num_pairs) * width < call_cost * num_calls:
        return None
    return SharedRowPlan(spans=tuple(_span(lengths) for lengths in spans))


def _span(lengths: tuple[int, ...]) -> Span:
    prompt, longest = lengths[0], max(lengths[1:])
    mask = torch.ones(longest, prompt + longest, dtype=torch.bool).tril(prompt)
    return Span(lengths=lengths, mask=mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_row: SharedRowPlan | None = None,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attention interface's function; [1, heads, T, d] in, [1, T, heads, d] out."""
    if shared_row is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **keywords)
    for keyword, setting in keywords.items():
        if keyword not in HARMLESS_KEYWORDS and (isinstance(setting, Tensor) or setting):
            raise ValueError(
                f"attention over shared rows must be plain, got {keyword}={setting!r} ({type(module).__name__}); "
                "give the row as a mask"
            )
    repeats = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    lengths = [sum(span.lengths) for span in shared_row.spans]
    pieces = zip(shared_row.spans, *(one.split(lengths, dim=2) for one in (query, key, value)), strict=True)
    outputs = [output for piece in pieces for output in _attend(*piece, scaling=scaling)]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend(span: Span, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None) -> list[Tensor]:
    """Return the outputs of a group's prompt and responses, [1, heads, tokens, d] each."""
    queries, keys, values = (one.split(span.lengths, dim=2) for one in (query, key, value))
    prompt = span.lengths[0]
    outputs = [F.scaled_dot_product_attention(queries[0], keys[0], values[0], is_causal=True, scale=scaling)]
    for own_query, own_key, own_value in zip(queries[1:], keys[1:], values[1:], strict=True):
        length = own_query.shape[2]
        outputs.append(
            F.scaled_dot_product_attention(
                own_query,
                torch.cat([keys[0], own_key], dim=2),
                torch.cat([values[0], own_value], dim=2),
                attn_mask=span.mask[:length, : prompt + length],
                scale=scaling,
            )
        )
    return outputs


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
