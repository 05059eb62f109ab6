"""Asks a Hugging Face decoder for numbers per token instead of logits, so that no [tokens, vocab] tensor need exist.

No model code is copied: the whole model is called, and only its output head is told, for one call, to return numbers
per token.  The head keeps its parameters, names and hooks, so that ZeRO-3, tied embeddings and checkpoints see nothing
new.  Whether a model allows this (nothing scales or caps what its head returns) and whether it takes a group as one row
(a 4-D attention mask) is tried once on a small example and compared with the plain way, the fallback.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from actors.rows import GroupRow, Layout, PromptGroup, attention_mask, group_row
from actors.shared_attention import CALL_COST, install, plan_row, uninstall

logger = logging.getLogger(__name__)

TokenFunction = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]
"""(hidden [S, H], head weight [V, H], head bias [V] or None) -> [S, C] numbers per token, float32; without a weight the
hidden states already are logits [S, V]."""


def select_rows(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return `values[indices]`, [K, H], with a backward pass of fixed order.

    A group's responses share the state of their prompt's last token, so that row's gradient is a sum.  What indexing
    does for it on a CPU, atomic additions by all threads, has other bits each time.
    """
    return F.embedding(indices, values)


class ScoringLinear(nn.Linear):
    """An output head that, while it has a request, returns [1, S, C] numbers per token instead of logits.

    They are the forward's return value, not a side effect: ZeRO-3's hooks look there to gather the weight again for the
    backward pass.
    """

    row: GroupRow | None = None
    function: TokenFunction | None = None
    states: torch.Tensor | None = None
    """[K, H], what the head received for the K states of the last request."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return logits, or what the request asks for."""
        if self.row is None or self.function is None:
            return super().forward(input)
        self.states = select_rows(input.flatten(0, 1), self.row.states)
        return self.function(self.states[self.row.token_states], self.weight, self.bias)[None]


@dataclass(frozen=True, slots=True)
class Scores:
    """What one forward pass says about a row."""

    tokens: torch.Tensor
    """[S, C] float32, what the request's function returned."""
    states: torch.Tensor
    """[K, H], the hidden states that the head received."""


class Scorer:
    """Knows how to ask one model for numbers per token; make it before the model is sharded.

    Args:
        model: a decoder with an output head, in eval mode or without dropout.
        device: where it will run, None = where it is.
    """

    layout: Layout = "padded"
    call_cost = CALL_COST
    """See `actors.shared_attention`."""

    def __init__(self, model: PreTrainedModel, *, device: torch.device | None = None) -> None:
        self._model = model
        self._head = _swap_head(model)
        self.is_chunked = self._head is not None
        self.is_chunked = self.is_chunked and _head_is_last(self, model)
        stays = device is None or device.type == model.device.type  # plans are for the CPU
        takes = (stays and _attends_without_mask(self, model)) or _takes_shared_rows(self, model)
        self.layout = "shared" if takes else "padded"

    def row(self, groups: Sequence[PromptGroup]) -> GroupRow:
        """Lay groups out as this model needs them."""
        return group_row(groups, layout=self.layout)

    def __call__(self, row: GroupRow, function: TokenFunction) -> Scores:
        """Run the model on a row; `function` sees the hidden states of the S tokens and the head."""
        return self.request(row, function) if self.is_chunked else self.plain(row, function)

    def request(self, row: GroupRow, function: TokenFunction) -> Scores:
        """Run the model with a request on its head."""
        head = self._head
        assert head is not None, "only a plain linear head takes requests"
        head.row, head.function = row, function
        try:
            tokens = self._forward(row).logits[0]
            states = head.states
        finally:
            head.row = head.function = head.states = None
        assert states is not None, "the model's forward must call its output head"
        return Scores(tokens, states)

    def plain(self, row: GroupRow, function: TokenFunction) -> Scores:
        """Run the model as it is and score its own logits."""
        received: list[torch.Tensor] = []
        head = self._model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
        try:
            logits = self._forward(row).logits
        finally:
            handle.remove()
        token_logits = select_rows(logits.flatten(0, 1), row.states)[row.token_states]
        return Scores(function(token_logits, None, None), select_rows(received[0].flatten(0, 1), row.states))

    def _forward(self, row: GroupRow) -> Any:
        return self._model(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            **model_attention(row, self._model, call_cost=self.call_cost),
            use_cache=False,
            logits_to_keep=row.kept,
        )


def model_attention(row: GroupRow, model: PreTrainedModel, *, call_cost: int = CALL_COST) -> dict[str, Any]:
    """Return the arguments that tell a model which token sees which: a mask, or a plan where that is cheaper."""
    plan = plan_row(row.spans, model, call_cost=call_cost) if row.layout == "shared" else None
    if plan is None:
        return {"attention_mask": model_mask(row, model)}
    # transformers passes a 4-D mask on as it is, and makes one of its own where there is none
    return {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool), "shared_row": plan}


def model_mask(row: GroupRow, model: PreTrainedModel) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return a row's attention mask in the form that the model takes.

    Shared: boolean for sdpa, additive for eager; a sliding window is part of the mask, as a model that is given a 4-D
    mask does not apply its own; models that mix layer types take one for each type.  Padded: [rows, T], 1 on tokens.
    """
    if row.layout == "padded":
        return (row.groups >= 0).long()
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if "sliding_attention" in layer_types:
        windows = {"full_attention": None, "sliding_attention": window}
        return {name: _in_form(attention_mask(row, window=width), model) for name, width in windows.items()}
    return _in_form(attention_mask(row, window=None if layer_types else window), model)


def _in_form(allowed: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    if model.config._attn_implementation != "eager":
        return allowed
    additive = torch.zeros_like(allowed, dtype=model.dtype)
    return additive.masked_fill(~allowed, torch.finfo(model.dtype).min)


def _swap_head(model: PreTrainedModel) -> ScoringLinear | None:
    """Make the model's output head one that takes requests; None if it is not a plain linear layer."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = ScoringLinear
    return head if isinstance(head, ScoringLinear) else None


PROBE_SEED = 20240229
REFUSALS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What a model may raise when it is given a mask of a form it does not know."""


def _probe_groups(model: PreTrainedModel) -> list[PromptGroup]:
    """Return two small groups of random tokens, long enough that positions and masks matter."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    vocab_size = model.config.get_text_config().vocab_size

    def tokens(count: int) -> list[int]:
        return torch.randint(vocab_size, (count,), generator=generator).tolist()

    return [
        PromptGroup(prompt_ids=tokens(7), responses=[tokens(4), tokens(6), tokens(3)]),
        PromptGroup(prompt_ids=tokens(5), responses=[tokens(5), tokens(2)]),
    ]


def _log_softmax(hidden: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    logits = hidden if weight is None else F.linear(hidden, weight, bias)
    return logits.float().log_softmax(-1)


def is_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Compare relative to the largest value: a wrong mask is far outside, rounding far inside."""
    found, expected = found.float(), expected.float()
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 0.05
    return found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@torch.no_grad()
def _head_is_last(scorer: Scorer, model: PreTrainedModel) -> bool:
    """Return whether the model returns what its head returns, to the bit, and log-probs agree with the plain way."""
    row = group_row(_probe_groups(model), layout="padded").to(model.device)
    count = row.targets.numel()
    marks = torch.linspace(-60.0, 60.0, 2 * count, device=model.device).reshape(count, 2)
    echo = scorer.request(row, lambda *_: marks).tokens
    agrees = torch.equal(echo, marks)
    if agrees:
        plain = scorer.plain(row, _log_softmax)
        agrees = is_close(scorer.request(row, _log_softmax).tokens, plain.tokens, model.dtype)
    if not agrees:
        logger.warning(
            "%s changes the logits after its output head: log-probs come from whole logits, which takes more memory",
            type(model).__name__,
        )
    return agrees


def _attends_without_mask(scorer: Scorer, model: PreTrainedModel) -> bool:
    """Let the model attend over shared rows by plan, if that gives what it should."""
    if not install(model):
        return False
    scorer.call_cost = 0  # small rows too
    agrees = _takes_shared_rows(scorer, model)
    scorer.call_cost = CALL_COST
    if not agrees:
        uninstall(model)
    return agrees


@torch.no_grad()
def _takes_shared_rows(scorer: Scorer, model: PreTrainedModel) -> bool:
    """Return whether a group as one row gives what its samples give one by one."""
    groups = _probe_groups(model)
    rows = {layout: group_row(groups, layout=layout).to(model.device) for layout in ("padded", "shared")}
    padded = scorer(rows["padded"], _log_softmax)
    try:
        shared = scorer(rows["shared"], _log_softmax)
    except REFUSALS as error:
        logger.info("%s takes no 4-D mask (%s); a row holds one sample", type(model).__name__, error)
        return False
    agrees = is_close(shared.states, padded.states, model.dtype) and is_close(shared.tokens, padded.tokens, model.dtype)
    if not agrees:
        logger.info("%s does not follow a 4-D mask; a row holds one sample", type(model).__name__)
    return agrees
