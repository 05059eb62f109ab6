"""The networks that are trained: the policy with a value head on its trunk, or a critic of its own.

The value head starts at zero, so every value is 0 before the first update.  Nothing here has dropout.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from actors.rows import GroupRow
from actors.scorer import Scorer, TokenFunction, model_attention, select_rows
from learner.config import LoraConfig
from learner.logprobs import KEPT_BYTES, logprobs_and_entropy, no_tokens

ADAPTER = "default"
"""peft's name for the one adapter a module has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What a forward pass is asked for."""

    temperature: float
    chunk_tokens: int
    entropy_gradient: bool = False
    kept_bytes: int = KEPT_BYTES
    """See `logprobs_and_entropy`."""
    has_tokens: bool = True
    """Without it only values are computed: no log-prob, no product with the output head."""


class PolicyAndValue(nn.Module):
    """The policy, and a value head on the hidden states that its output head receives.

    Args:
        policy: decoder with an output head; wrapped in place.
        has_value_head: False when a critic of its own gives the values.
        device: where it will run, None = where the policy is.
    """

    def __init__(
        self, policy: PreTrainedModel, *, has_value_head: bool = True, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.policy = policy
        self.value_head = _value_head(policy) if has_value_head else None
        self.scorer = Scorer(policy, device=device)

    def forward(self, row: GroupRow, scoring: Scoring) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run a row.

        Args:
            row: made by `self.scorer.row`, N responses of together S tokens.
            scoring: what is wanted.

        Returns:
            log-probs [S] and entropy [S] of the response tokens (empty when not wanted), and values [S + N], R + 1 for
            each response, of the state before each token and after the last (empty without a value head); float32.
        """
        function: TokenFunction = no_tokens
        if scoring.has_tokens:
            function = logprobs_and_entropy(
                row.targets,
                temperature=scoring.temperature,
                chunk_tokens=scoring.chunk_tokens,
                entropy_gradient=scoring.entropy_gradient,
                kept_bytes=scoring.kept_bytes,
            )
        scores = self.scorer(row, function)
        empty = scores.states.new_empty(0, dtype=torch.float32)
        logprobs, entropy = scores.tokens.unbind(-1) if scoring.has_tokens else (empty, empty)
        values = empty if self.value_head is None else self.value_head(scores.states)[:, 0].float()
        return logprobs, entropy, values


class Critic(nn.Module):
    """A value network of its own: the policy's trunk, copied, and a value head.

    Args:
        policy: decoder to copy the trunk of; not changed, and not yet in a `PolicyAndValue` that is sharded.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = cast("PreTrainedModel", copy.deepcopy(policy.base_model))
        self.value_head = _value_head(policy)

    def forward(self, row: GroupRow) -> torch.Tensor:
        """Return values [S + N] of a row that the policy's scorer made, float32."""
        hidden = self.trunk(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            **model_attention(row, self.trunk),
            use_cache=False,
        ).last_hidden_state
        states = select_rows(hidden[:, row.kept].flatten(0, 1), row.states)
        return self.value_head(states)[:, 0].float()


def add_lora(model: PreTrainedModel, config: LoraConfig) -> None:
    """Put low-rank adapters into a model, in place, and freeze everything else.

    The output head stays as it is: `all-linear` leaves it out, and it must remain a plain linear layer.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    names = config.target_modules
    targets = linear_names(model, head) if names == ("all-linear",) else list(names)
    model.requires_grad_(False)
    settings = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # declared int, used as a factor
        target_modules=targets,
        lora_dropout=0.0,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 stores weights transposed
    )
    inject_adapter_in_model(settings, model, adapter_name=ADAPTER)


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Let every forward pass within the block be that of the frozen weights alone."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def linear_names(model: nn.Module, head: nn.Module | None) -> list[str]:
    """Return the full names of all linear layers except the output head."""
    from transformers.pytorch_utils import Conv1D

    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def _value_head(policy: PreTrainedModel) -> nn.Linear:
    head = nn.Linear(hidden_size(policy), 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    reference = next(policy.parameters())
    return head.to(device=reference.device, dtype=reference.dtype)


def hidden_size(policy: PreTrainedModel) -> int:
    """Return the width of the hidden states that the output head receives."""
    return int(policy.get_output_embeddings().weight.shape[1])
