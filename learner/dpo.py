"""Direct preference optimization: the policy itself as reward model of preferences.

    loss = -(1 - s) log sigmoid(m) - s log sigmoid(-m)
    m = beta [(log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))]

with log-probs summed over the response's tokens, the end-of-sequence token included.  The policy that minimises its
expectation under Bradley-Terry preferences is that of reinforcement learning with a KL penalty of weight beta.

Differs from the paper:
- Label smoothing s (conservative DPO, Mitchell 2023); s = 0 is the paper.
- A term -sft_coef log p(chosen) / |chosen| (Pang et al. 2024, Eq. 1); 0 is the paper.
- The reference policy's log-probs are computed once, before training, so it takes no memory while training.
"""

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from actors.rows import GroupRow, PromptGroup, split_responses
from actors.scoring import token_logprobs
from learner.model import PolicyAndValue, Scoring
from learner.offline_config import DPOConfig
from learner.offline_data import Pair
from learner.optimizer import OptimizerEngine
from learner.training import CHUNK_TOKENS, ROW_TOKENS, microbatches


def dpo_margin(
    chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor, *, beta: float
) -> torch.Tensor:
    """Return how much higher the chosen response's implicit reward beta log(p / p_ref) is, [N].

    Source: Rafailov et al. 2023, Eq. 5 (the prompt's own term cancels).
    """
    return beta * ((chosen - ref_chosen) - (rejected - ref_rejected))


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the loss of each pair.

    Args:
        chosen: [N] log-probs of whole responses under the policy, nats.
        rejected: [N], likewise.
        ref_chosen: [N], under the reference policy, without gradient.
        ref_rejected: [N], likewise.
        beta: weight of the KL penalty that the optimum obeys.
        label_smoothing: s, the share of preferences that are taken to be the wrong way round.

    Returns:
        [N], log 2 where policy and reference agree.

    Source:
        Rafailov et al. 2023 (arXiv 2305.18290), Eq. 7; Mitchell 2023, "A note on DPO with noisy preferences", Eq. 3.
    """
    margin = dpo_margin(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


class DirectPreference:
    """Objective: DPO's loss of pairs.  Make it before the module is sharded: it asks the module for the reference.

    Args:
        module: the policy as it starts, which is the reference.
        pairs: what is learnt.
        settings: of the loss.
        device: where the module is.
    """

    microbatch_tokens = ROW_TOKENS

    def __init__(
        self, module: PolicyAndValue, pairs: Sequence[Pair], settings: DPOConfig, device: torch.device
    ) -> None:
        self._scorer = module.scorer
        self._pairs = pairs
        self._settings = settings
        self._device = device
        self.lengths = [len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs]
        self.units = [1] * len(pairs)
        self._seen: list[torch.Tensor] = []
        self._reference = self._reference_logprobs()

    def loss_sum(self, engine: OptimizerEngine, examples: Sequence[int]) -> torch.Tensor:
        """Return the summed losses of some pairs."""
        row = self._row(examples)
        logprobs, _, _ = engine.forward(row, Scoring(temperature=1.0, chunk_tokens=CHUNK_TOKENS))
        chosen, rejected = self._sums(logprobs, row, examples).unbind(1)
        ref_chosen, ref_rejected = self._reference[list(examples)].unbind(1)
        settings = self._settings
        margin = dpo_margin(chosen, rejected, ref_chosen, ref_rejected, beta=settings.beta)
        self._seen.append(margin.detach())
        losses = dpo_loss(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
        )
        if settings.sft_coef:
            num_tokens = [sum(self._pairs[index].chosen_is_learnt) for index in examples]
            losses = losses - settings.sft_coef * chosen / torch.tensor(num_tokens, device=self._device)
        return losses.sum()

    def after_update(self) -> Mapping[str, float]:
        """Return how well the implicit reward told the update's pairs apart, before the update."""
        margins = torch.cat(self._seen)
        self._seen.clear()
        return {"implicit_accuracy": float((margins > 0).float().mean()), "implicit_margin": float(margins.mean())}

    def _row(self, examples: Sequence[int]) -> GroupRow:
        pairs = [self._pairs[index] for index in examples]
        groups = [PromptGroup(prompt_ids=p.prompt_ids, responses=[p.chosen_ids, p.rejected_ids]) for p in pairs]
        return self._scorer.row(groups).to(self._device)

    def _sums(self, logprobs: torch.Tensor, row: GroupRow, examples: Sequence[int]) -> torch.Tensor:
        """Return [N, 2] log-probs of the chosen and the rejected responses, of the tokens that are learnt."""
        flags = [flag for index in examples for flag in _flags(self._pairs[index])]
        learnt = logprobs.where(torch.tensor(flags, device=self._device), torch.zeros_like(logprobs))
        return torch.stack([part.sum() for part in split_responses(learnt, row.lengths)]).reshape(-1, 2)

    def _reference_logprobs(self) -> torch.Tensor:
        """Return [pairs, 2], computed pairs of similar length together."""
        found = torch.empty(len(self._pairs), 2, device=self._device)
        order = sorted(range(len(self._pairs)), key=self.lengths.__getitem__)
        for part in microbatches(order, self.lengths, max_tokens=self.microbatch_tokens):
            row = self._row(part)
            logprobs = token_logprobs(self._scorer, row, temperature=1.0, chunk_tokens=CHUNK_TOKENS)
            found[part] = self._sums(logprobs, row, part)
        return found


def _flags(pair: Pair) -> list[bool]:
    return [*pair.chosen_is_learnt, *pair.rejected_is_learnt]
