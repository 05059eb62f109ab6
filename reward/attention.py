"""What a model's last layer looks at: its attention, recorded while the model reads as always.

transformers hands out attention only from its slow implementation, and then every layer's [B, heads, T, T] at once.
Here queries and keys of each layer pass by, those of the last one are kept, and only the wanted rows are worked out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "concord_recorded"

_UNKNOWN_KEYWORDS = ("position_bias", "s_aux")
"""Keywords that would change the weights and that are not worked out here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One layer's attention before the softmax."""

    query: Tensor
    """[B, heads, T, d]."""
    key: Tensor
    """[B, key heads, T, d]; each serves heads / key heads query heads."""
    mask: Tensor | None
    """[B, 1, T, T] bool, or added to the scores; None: nothing is masked but what `is_causal` does."""
    is_causal: bool
    scaling: float | None
    """None = 1 / sqrt(d)."""
    softcap: float | None
    """Scores become softcap * tanh(scores / softcap)."""

    def weights(self, row: int, positions: Tensor) -> Tensor:
        """Return [heads, P, T] float32: how much each of `positions` ([P]) of a row looks at each token; sums to 1."""
        query, key = self.query[row, :, positions].float(), self.key[row].float()
        key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
        scores = query @ key.transpose(1, 2) * (query.shape[-1] ** -0.5 if self.scaling is None else self.scaling)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if self.mask is None:
            hidden = torch.arange(key.shape[1], device=key.device) > positions[:, None]
            return scores.masked_fill(hidden & self.is_causal, -torch.inf).softmax(dim=-1)
        mask = self.mask[row if self.mask.shape[0] > 1 else 0, :, positions, : key.shape[1]]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(dim=-1)


@contextmanager
def recorded_attention(trunk: PreTrainedModel) -> Iterator[list[Attention]]:
    """Record what `trunk` reads within the block; afterwards it computes as before.

    Yields:
        A list that holds the latest layer's attention once the model has read something.

    Raises:
        ValueError: if the architecture's attention cannot be recorded.
    """
    before = trunk.config.get_text_config()._attn_implementation
    trunk.set_attn_implementation(IMPLEMENTATION)
    found: list[Attention] = []
    token = _latest.set(found)
    try:
        is_set = trunk.config.get_text_config()._attn_implementation == IMPLEMENTATION
        if not is_set or trunk.config.is_encoder_decoder:
            raise ValueError(
                "a reward model's attention can be recorded where it uses transformers' attention interface and is "
                f"no encoder-decoder, got {type(trunk).__name__}; use another model or credit of kind potential"
            )
        yield found
    finally:
        _latest.reset(token)
        trunk.set_attn_implementation(before)


_latest: ContextVar[list[Attention]] = ContextVar("latest attention")


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, None]:
    """Attention interface's function; [B, heads, T, d] in, [B, T, heads, d] out."""
    for keyword in _UNKNOWN_KEYWORDS:
        if keywords.get(keyword) is not None:
            raise ValueError(
                f"attention to record must be plain or soft-capped, got {keyword!r} ({type(module).__name__}); use "
                "another reward model or credit of kind potential"
            )
    is_causal = keywords.get("is_causal")
    attention = Attention(
        query=query,
        key=key,
        mask=attention_mask,
        is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,  # transformers' own rule
        scaling=keywords.get("scaling"),
        softcap=keywords.get("softcap"),
    )
    _latest.get()[:] = [attention]
    if attention.softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)
    return _soft_capped(attention, value), None  # which torch's fused kernel does not know


def _soft_capped(attention: Attention, value: Tensor) -> Tensor:
    """Return the attention's output, [B, T, heads, d]."""
    heads, length = attention.query.shape[1:3]
    everything = torch.arange(length, device=value.device)
    outputs = []
    for row in range(len(value)):
        values = value[row].repeat_interleave(heads // value.shape[1], dim=0)
        outputs.append(attention.weights(row, everything).to(value.dtype) @ values)
    return torch.stack(outputs).transpose(1, 2).contiguous()


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
