"""Sampling that is guided by learned values: a logits hook for the torch engine.

    pi(a|s) ~ pi_policy(a|s) exp(beta (min Q(s, a) - V(s)))

V(s) is the same for all tokens, so it moves no probability; it keeps the logits of the size they had.

Source: Snell et al. 2022 (ILQL, arXiv 2206.11871), policy extraction.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from actors.value_heads import ValueHeads

_ROW_MULTIPLE = 4
"""As the engine's: a row keeps its bits in any company if the heads see rows in fours too."""


class ValueGuidance:
    """`TorchEngine(logits_hook=...)`: adds beta times the advantages of the saved heads to the policy's logits.

    The engine divides the sum by the temperature, so temperature 0 takes the likeliest token of the guided policy.

    Args:
        heads: value heads on the engine's device, trained beside the engine's model.
        beta: weight of the values; 0 changes nothing.
    """

    def __init__(self, heads: ValueHeads, *, beta: float) -> None:
        if beta < 0:
            raise ValueError(f"beta must be at least 0, got {beta}; negative weights seek low values")
        self._heads = heads.eval()
        self._dtype = next(heads.parameters()).dtype
        self.beta = beta

    @classmethod
    def load(cls, directory: str, *, beta: float | None = None, device: torch.device) -> "ValueGuidance":
        """Return the guidance of a trained directory; `beta` None takes what it was saved with.

        Raises:
            ValueError: if the directory holds no value heads.
        """
        heads, saved = ValueHeads.load(directory)
        return cls(heads.to(device), beta=saved if beta is None else beta)

    @torch.no_grad()
    def __call__(self, logits: Tensor, hidden: Tensor, request_ids: Sequence[str]) -> Tensor:
        """Return the guided logits [B, V] of logits [B, V] and hidden states [B, H]."""
        count = len(hidden)
        rows = F.pad(hidden.to(self._dtype), (0, 0, 0, -count % _ROW_MULTIPLE))
        return logits.float() + self.beta * self._heads.advantages(rows)[:count]
