"""Log-probs of given responses: one function for the reference policy, engine checks and the learner's no-grad passes.

float32 log-softmax of the full logits divided by the temperature, for `chunk_tokens` tokens at a time.  The learner's
version with a backward pass is in `learner/logprobs.py`.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from actors.rows import GroupRow, PromptGroup, split_responses
from actors.scorer import Scorer, TokenFunction


def logprob_function(targets: torch.Tensor, *, temperature: float, chunk_tokens: int) -> TokenFunction:
    """Return a function of hidden states and head to [S, 1] log-probs of `targets`, without gradient.

    float32 log-softmax of the full logits divided by the temperature; logits exist for `chunk_tokens` tokens at a time.
    """

    def function(hidden: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        logprobs = [hidden.new_empty(0, dtype=torch.float32)]
        for part, target in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
            logits = (part if weight is None else F.linear(part, weight, bias)).float() / temperature
            logprobs.append(logits.log_softmax(-1).gather(-1, target[:, None])[:, 0])
        return torch.cat(logprobs)[:, None]

    return function


@torch.no_grad()
def token_logprobs(scorer: Scorer, row: GroupRow, *, temperature: float, chunk_tokens: int = 512) -> torch.Tensor:
    """Return the log-prob of each response token in a row, [S] float32, without gradient."""
    function = logprob_function(row.targets, temperature=temperature, chunk_tokens=chunk_tokens)
    return scorer(row, function).tokens[:, 0]


def reference_logprobs(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    responses: Sequence[Sequence[int]],
    *,
    temperature: float,
    chunk_tokens: int = 512,
    row_tokens: int = 4096,
) -> list[np.ndarray]:
    """Return the log-probs of one group's responses under `model`.

    Args:
        model: the policy that judges; the first call tries out what it supports.
        prompt_ids: [P].
        responses: token ids of each response, none empty.
        temperature: logits are divided by it.
        chunk_tokens: tokens whose logits exist at one time.
        row_tokens: a group longer than this becomes several rows; depends on the group alone, so its bits do.

    Returns:
        [R] float32 for each response.
    """
    scorer = scorer_of(model)
    logprobs: list[np.ndarray] = []
    for part in _split(responses, row_tokens - len(prompt_ids)):
        row = scorer.row([PromptGroup(prompt_ids=prompt_ids, responses=part)]).to(model.device)
        tokens = token_logprobs(scorer, row, temperature=temperature, chunk_tokens=chunk_tokens).cpu()
        logprobs += [piece.numpy() for piece in split_responses(tokens, row.lengths)]
    return logprobs


_scorers: WeakKeyDictionary[PreTrainedModel, Scorer] = WeakKeyDictionary()


def scorer_of(model: PreTrainedModel) -> Scorer:
    """Return the scorer of a model, made at the first call."""
    if model not in _scorers:
        _scorers[model] = Scorer(model)
    return _scorers[model]


def _split(responses: Sequence[Sequence[int]], budget: int) -> list[list[Sequence[int]]]:
    """Cut responses, in order, into runs of at most `budget` tokens (a longer one stays alone)."""
    parts: list[list[Sequence[int]]] = []
    used = 0
    for response in responses:
        if not parts or used + len(response) > budget:
            parts.append([])
            used = 0
        parts[-1].append(response)
        used += len(response)
    return parts
