"""Log-probs and entropy of response tokens with gradients, without a [tokens, vocab] tensor beyond one chunk.

With logits z = (h W' + b) / T, p = softmax(z), y the target:

    log-prob   l = z_y - logsumexp(z)           dl/dz_j = [j = y] - p_j
    entropy    H = -sum_j p_j log p_j           dH/dz_j = -p_j (log p_j + H)

The backward pass multiplies these with the incoming gradients and goes on to h, W and b by two matrix products.  When
all tokens fit into one chunk their log-softmax is kept from the forward pass (no extra work); otherwise each chunk's is
computed again, so memory does not grow with the number of tokens.
"""

from typing import Any

import torch
from torch.nn import functional as F

from actors.scorer import TokenFunction

Gradients = tuple[torch.Tensor | None, ...]


def logprobs_and_entropy(
    targets: torch.Tensor, *, temperature: float, chunk_tokens: int, entropy_gradient: bool = True
) -> TokenFunction:
    """Return a function of hidden states and head to [S, 2]: log-prob of each target, and entropy, both in nats.

    Args:
        targets: [S] int64.
        temperature: logits are divided by it.
        chunk_tokens: tokens whose logits exist at one time.
        entropy_gradient: without it the entropy is for looking at only, which makes the backward pass cheaper.
    """

    def function(hidden: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        if weight is None:  # a model that changes its logits after the head: they exist anyway
            logprobs, entropy = _from_logits(hidden, targets, temperature)
        else:
            logprobs, entropy = _HeadScores.apply(hidden, weight, bias, targets, temperature, chunk_tokens)
        return torch.stack([logprobs, entropy if entropy_gradient else entropy.detach()], dim=-1)

    return function


def no_tokens(hidden: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    """Return [S, 0]: for passes that only want the hidden states."""
    return hidden.new_empty(hidden.shape[0], 0)


def _from_logits(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    log_softmax = (_wide(logits) / temperature).log_softmax(-1)
    return log_softmax.gather(-1, targets[:, None])[:, 0], _entropy(log_softmax)


class _HeadScores(torch.autograd.Function):
    """(hidden [S, H], weight [V, H], bias [V] or None, ...) -> log-probs [S], entropy [S]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        keeps = hidden.shape[0] <= chunk_tokens
        log_softmax = None
        logprobs, entropies = [], []
        for part, target in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
            log_softmax = _log_softmax(part, weight, bias, temperature)
            logprobs.append(log_softmax.gather(-1, target[:, None])[:, 0])
            entropies.append(_entropy(log_softmax))
        entropy = torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, log_softmax if keeps else None)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Gradients:
        hidden, weight, bias, targets, entropy, kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        wide = _wide(hidden[:0]).dtype
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        for start in range(0, hidden.shape[0], ctx.chunk_tokens):
            chunk = slice(start, start + ctx.chunk_tokens)
            log_softmax = kept if kept is not None else _log_softmax(hidden[chunk], weight, bias, ctx.temperature)
            parts = [None if grad is None else grad[chunk] / ctx.temperature for grad in grads]
            grad_logits = _grad_logits(log_softmax, targets[chunk], entropy[chunk], parts)
            narrow = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = narrow @ weight
            if grad_weight is not None:
                grad_weight += narrow.t() @ hidden[chunk]
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        narrowed = [None if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias)]
        return grad_hidden, *narrowed, None, None, None


def _grad_logits(
    log_softmax: torch.Tensor, targets: torch.Tensor, entropy: torch.Tensor, grads: list[torch.Tensor | None]
) -> torch.Tensor:
    """Return the gradient of the scaled logits of one chunk, [s, V]; see the module's formulas.

    p (-grad_H (log p + H) - grad_l), and grad_l more at the target; written with as few passes over [s, V] as possible.
    """
    grad_logprobs, grad_entropy = grads
    probabilities = log_softmax.exp()
    if grad_entropy is None:
        result = probabilities.mul_(0.0 if grad_logprobs is None else -grad_logprobs[:, None])
    else:
        result = (log_softmax + entropy[:, None]).mul_(-grad_entropy[:, None])
        result = (result if grad_logprobs is None else result.sub_(grad_logprobs[:, None])).mul_(probabilities)
    if grad_logprobs is not None:
        result.scatter_add_(-1, targets[:, None], grad_logprobs[:, None])
    return result


def _log_softmax(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    return (_wide(F.linear(hidden, weight, bias)) / temperature).log_softmax(-1)


def _entropy(log_softmax: torch.Tensor) -> torch.Tensor:
    """Return -sum p log p of each row, without a second [s, V] product."""
    return -torch.linalg.vecdot(log_softmax.exp(), log_softmax)


def _wide(values: torch.Tensor) -> torch.Tensor:
    """Return float32, or float64 if that is what it is."""
    return values if values.dtype == torch.float64 else values.float()
