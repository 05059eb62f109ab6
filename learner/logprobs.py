"""Log-probs and entropy of response tokens with gradients, without a [tokens, vocab] tensor beyond one chunk.

With logits z = (h W' + b) / T, p = softmax(z), y the target:

    log-prob   l = z_y - logsumexp(z)           dl/dz_j = [j = y] - p_j
    entropy    H = -sum_j p_j log p_j           dH/dz_j = -p_j (log p_j + H)

The backward pass multiplies these with the incoming gradients and goes on to h, W and b by two matrix products.  The
log-softmax of as many chunks as a number of bytes allows is kept from the forward pass; the others' is computed again,
so memory does not grow with the number of tokens.  A chunk's tensor is written over in place, on a CPU some rows at a
time, which stay in its cache from one operation to the next.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from actors.scorer import TokenFunction

Gradients = tuple[torch.Tensor | None, ...]


KEPT_BYTES = 2**28
"""Of log-softmax from forward to backward, 256 MiB: 1365 tokens of a vocabulary of 49152 in float32."""
_BLOCK_BYTES = 2**21
"""Of rows that an operation on a CPU gets at a time; it fits a core's cache."""


def logprobs_and_entropy(
    targets: torch.Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    entropy_gradient: bool = True,
    kept_bytes: int = KEPT_BYTES,
) -> TokenFunction:
    """Return a function of hidden states and head to [S, 2]: log-prob of each target, and entropy, both in nats.

    Args:
        targets: [S] int64.
        temperature: logits are divided by it.
        chunk_tokens: tokens whose logits exist at one time, beside those that are kept.
        entropy_gradient: without it the entropy is for looking at only, which makes the backward pass cheaper.
        kept_bytes: of log-softmax that is kept for the backward pass; what is above is computed again.
    """

    def function(hidden: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        if weight is None:  # a model that changes its logits after the head: they exist anyway
            logprobs, entropy = _from_logits(hidden, targets, temperature)
        else:
            settings = _Settings(temperature=temperature, chunk_tokens=chunk_tokens, kept_bytes=kept_bytes)
            logprobs, entropy = _HeadScores.apply(hidden, weight, bias, targets, settings)
        return torch.stack([logprobs, entropy if entropy_gradient else entropy.detach()], dim=-1)

    return function


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """See `logprobs_and_entropy`."""

    temperature: float
    chunk_tokens: int
    kept_bytes: int


def no_tokens(hidden: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    """Return [S, 0]: for passes that only want the hidden states."""
    return hidden.new_empty(hidden.shape[0], 0)


def _from_logits(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    log_softmax = (_wide(logits) / temperature).log_softmax(-1)
    return log_softmax.gather(-1, targets[:, None])[:, 0], _entropy(log_softmax)


class _HeadScores(torch.autograd.Function):
    """(hidden [S, H], weight [V, H], bias [V] or None, targets [S], settings) -> log-probs [S], entropy [S]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        settings: _Settings,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        chunks, budget = settings.chunk_tokens, settings.kept_bytes if any(ctx.needs_input_grad) else 0
        kept: list[torch.Tensor | None] = []
        logprobs, entropies = [], []
        for part, target in zip(hidden.split(chunks), targets.split(chunks), strict=True):
            log_softmax = _log_softmax(part, weight, bias, settings.temperature)
            logprobs.append(log_softmax.gather(-1, target[:, None])[:, 0])
            entropies.append(_entropy(log_softmax))
            budget -= log_softmax.nbytes
            kept.append(log_softmax if budget >= 0 else None)
            del log_softmax  # before the next one is made
        entropy = torch.cat(entropies)
        ctx.kept = kept
        ctx.save_for_backward(hidden, weight, bias, targets, entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Gradients:
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        settings: _Settings = ctx.settings
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight: torch.Tensor | None = None
        wide = _wide(hidden[:0]).dtype
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        for number, start in enumerate(range(0, hidden.shape[0], settings.chunk_tokens)):
            chunk = slice(start, start + settings.chunk_tokens)
            log_softmax, ctx.kept[number] = ctx.kept[number], None  # written over below: a second pass needs another
            if log_softmax is None:
                log_softmax = _log_softmax(hidden[chunk], weight, bias, settings.temperature)
            parts = [None if grad is None else grad[chunk] / settings.temperature for grad in grads]
            grad_logits = _grad_logits(log_softmax, targets[chunk], entropy[chunk], parts)
            narrow = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(narrow, weight, out=grad_hidden[chunk])
            if ctx.needs_input_grad[1]:
                grad_weight = _added(grad_weight, narrow.t(), hidden[chunk], wide)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            del log_softmax, grad_logits, narrow
        narrowed = [None if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias)]
        return grad_hidden, *narrowed, None, None


def _added(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return total + left @ right in a wide dtype; the total is written over."""
    if total is None:
        return torch.mm(left, right).to(dtype)
    return total.addmm_(left, right) if left.dtype == dtype else total.add_(torch.mm(left, right))


def _grad_logits(
    log_softmax: torch.Tensor, targets: torch.Tensor, entropy: torch.Tensor, grads: list[torch.Tensor | None]
) -> torch.Tensor:
    """Return the gradient of the scaled logits of one chunk, [s, V], written over `log_softmax`.

    p (-grad_H (log p + H) - grad_l), and grad_l more at the target; see the module's formulas.
    """
    grad_logprobs, grad_entropy = grads
    for rows in _blocks(log_softmax):
        block = log_softmax[rows]
        if grad_entropy is None:
            block.exp_().mul_(0.0 if grad_logprobs is None else -grad_logprobs[rows, None])
            continue
        probabilities = block.exp()
        block.add_(entropy[rows, None]).mul_(-grad_entropy[rows, None])
        if grad_logprobs is not None:
            block.sub_(grad_logprobs[rows, None])
        block.mul_(probabilities)
    if grad_logprobs is not None:
        log_softmax.scatter_add_(-1, targets[:, None], grad_logprobs[:, None])
    return log_softmax


def _log_softmax(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    logits = _wide(F.linear(hidden, weight, bias))
    for rows in _blocks(logits):
        block = logits[rows] if temperature == 1.0 else logits[rows].div_(temperature)
        torch.log_softmax(block, -1, out=block)
    return logits


def _entropy(log_softmax: torch.Tensor) -> torch.Tensor:
    """Return -sum p log p of each row, without a second [s, V] product."""
    blocks = [log_softmax[rows] for rows in _blocks(log_softmax)]
    return -torch.cat([torch.linalg.vecdot(block.exp(), block) for block in blocks])


def _blocks(values: torch.Tensor) -> list[slice]:
    """Cut [s, V] into runs of rows; one for all where an operation costs more than passing over memory again."""
    count = values.shape[0]
    size = max(1, count if values.device.type != "cpu" else _BLOCK_BYTES // max(1, values[:1].nbytes))
    return [slice(start, start + size) for start in range(0, count, size)]


def _wide(values: torch.Tensor) -> torch.Tensor:
    """Return float32, or float64 if that is what it is."""
    return values if values.dtype == torch.float64 else values.float()
