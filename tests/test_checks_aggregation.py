"""C11: loss and gradient do not depend on how a minibatch is split, ordered or padded."""

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from learner.losses import LossInputs, aggregation_weights
from tests.checks import Case, Check, with_twins
from tests.loss_toys import (
    LENGTHS,
    LOSSES,
    MODES,
    NORM_TOKENS,
    PolicyLossFunction,
    Weights,
    minibatch,
)

SPLITS = ([(0, 1, 2, 3)], [(0, 1), (2, 3)], [(3, 0), (), (2,), (1,)], [(3,), (2,), (1,), (0,), ()])
"""Ranks and micro-batches of whole sequences, in different orders, with empty ones."""
PRECISIONS = ((torch.float64, 1e-12), (torch.float32, 1e-6))


def cut(inputs: LossInputs, sequences: Sequence[int], *, padding: int) -> LossInputs:
    """Return some sequences, each with masked tokens of hopeless numbers behind it."""
    starts = [0, *itertools.accumulate(LENGTHS)]
    places = [t for b in sequences for t in (*range(starts[b], starts[b + 1]), *(-1,) * padding)]
    index = torch.tensor(places, dtype=torch.long)
    is_padding = index < 0

    def take(tokens: torch.Tensor, filler: float) -> torch.Tensor:
        return torch.where(is_padding, torch.full((), filler).to(tokens), tokens[index])

    return LossInputs(
        logprobs=take(inputs.logprobs, -20.0),
        old_logprobs=take(inputs.old_logprobs, -1.0),
        advantages=take(inputs.advantages, 1e3),
        lengths=tuple(LENGTHS[b] + padding for b in sequences),
        loss_mask=inputs.loss_mask[index] & ~is_padding,
    )


def split_loss(
    loss: PolicyLossFunction,
    mode: str,
    weigh: Weights,
    split: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype,
    padding: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the minibatch's loss and gradient, added up over the parts of a split."""
    inputs = minibatch(0.5, dtype)
    leaf = inputs.logprobs.clone().requires_grad_()
    whole = dataclasses.replace(inputs, logprobs=leaf)
    value = torch.zeros((), dtype=torch.float64)
    for sequences in split:
        part = cut(whole, sequences, padding=padding)
        weights = weigh(
            part.lengths,
            part.loss_mask,
            mode,
            total_tokens=int(inputs.loss_mask.sum()),
            total_sequences=len(LENGTHS),
            norm_tokens=NORM_TOKENS,
        )
        share = (loss(part).loss * weights).sum()
        share.backward()
        value += share.detach().double()
    return value, leaf.grad


def is_the_same_however_it_is_cut(weigh: Weights, losses: Sequence[PolicyLossFunction] = ()) -> None:
    losses = losses or [loss for loss, _ in LOSSES.values()]
    for (dtype, tolerance), mode, loss in itertools.product(PRECISIONS, MODES, losses):
        whole = split_loss(loss, mode, weigh, SPLITS[0], dtype=dtype)
        for split, padding in itertools.product(SPLITS, (0, 2)):
            value, grad = split_loss(loss, mode, weigh, split, dtype=dtype, padding=padding)
            torch.testing.assert_close(value, whole[0], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(grad, whole[1], rtol=tolerance, atol=tolerance)


def weights_of_the_microbatch(lengths, loss_mask, mode, **totals):
    local = {"total_tokens": max(1, int(loss_mask.sum())), "total_sequences": max(1, len(lengths))}
    return aggregation_weights(lengths, loss_mask, mode, **(totals | local))


def weights_of_padding_too(lengths, loss_mask, mode, **totals):
    return loss_mask * aggregation_weights(lengths, torch.ones_like(loss_mask), mode, **totals)


def weights_by_the_first_token(lengths, loss_mask, mode, **totals):
    """Masked tokens are left out at the wrong place: the mask is one token late."""
    return aggregation_weights(lengths, loss_mask.roll(1), mode, **totals)


def with_every_token(loss: PolicyLossFunction) -> PolicyLossFunction:
    return lambda inputs: loss(dataclasses.replace(inputs, loss_mask=torch.ones_like(inputs.loss_mask)))


CHECKS = (
    Check(
        id="C11-aggregation",
        run=is_the_same_however_it_is_cut,
        part=aggregation_weights,
        twins={
            "denominators-of-the-microbatch": weights_of_the_microbatch,
            "padding-counts": weights_of_padding_too,
            "shifted-mask": weights_by_the_first_token,
        },
    ),
    Check(
        id="C11-gspo",
        run=lambda loss: is_the_same_however_it_is_cut(aggregation_weights, [loss]),
        part=LOSSES["gspo"][0],
        twins={"ratio-over-padding": with_every_token(LOSSES["gspo"][0])},
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()
