"""Training values on logged text: the objective of ILQL and token Q-learning for the supervised loop."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from actors.rows import PromptGroup
from learner.optimizer import OptimizerEngine
from learner.training import ROW_TOKENS
from learner.value_config import ILQLConfig, ValueLearningConfig
from learner.value_learning import ValueInputs, ValueLoss, ilql_loss, q_learning_loss
from learner.value_model import PolicyWithValues

if TYPE_CHECKING:
    from learner.offline_data import Trajectory

_PARTS = ("q_loss", "v_loss", "cql_loss", "bc_loss")


class ValueObjective:
    """Objective for `learner.training.fit`, which must be given `after_update=objective.after_update`.

    Args:
        module: policy with value heads; after training, save its `policy` and then call its `save_heads`.
        trajectories: prompt, response, which tokens are learnt, score, whether the text ended.
        settings: of the algorithm, the same that the module was made with.
        device: where the module is.

    Raises:
        ValueError: if a trajectory has no learnt token.
    """

    microbatch_tokens = ROW_TOKENS

    def __init__(
        self,
        module: PolicyWithValues,
        trajectories: "Sequence[Trajectory]",
        settings: ValueLearningConfig,
        device: torch.device,
    ) -> None:
        self._module = module
        self._trajectories = trajectories
        self._settings = settings
        self._device = device
        self.lengths = [len(one.prompt_ids) + len(one.response_ids) for one in trajectories]
        self.units = [sum(one.is_learnt) for one in trajectories]
        if 0 in self.units:
            raise ValueError(
                f"a trajectory must have a learnt token, got none (number {self.units.index(0)}); leave it out"
            )
        self._sums = dict.fromkeys(_PARTS, 0.0)
        self._num_actions = 0

    def loss_sum(self, engine: OptimizerEngine, examples: Sequence[int]) -> torch.Tensor:
        """Return the loss summed over the learnt tokens of some trajectories."""
        chosen = [self._trajectories[index] for index in examples]
        groups = [PromptGroup(prompt_ids=one.prompt_ids, responses=[one.response_ids]) for one in chosen]
        row = self._module.scorer.row(groups).to(self._device)
        logprobs, numbers = engine.forward(row)
        loss = self._loss(value_inputs(logprobs, numbers, chosen))
        for name in _PARTS:
            self._sums[name] += float(getattr(loss, name).detach().sum())
        self._num_actions += len(loss.loss)
        return loss.loss.sum()

    def after_update(self) -> Mapping[str, float]:
        """Move the target heads; return the parts of the loss, means over the update's learnt tokens."""
        self._module.update_targets()
        means = {name: total / self._num_actions for name, total in self._sums.items()}
        self._sums, self._num_actions = dict.fromkeys(_PARTS, 0.0), 0
        return means

    def _loss(self, inputs: ValueInputs) -> ValueLoss:
        settings = self._settings
        shared = {"gamma": settings.gamma, "cql_coef": settings.cql_coef, "bc_coef": settings.bc_coef}
        if isinstance(settings, ILQLConfig):
            return ilql_loss(inputs, tau=settings.tau, awac_beta=settings.awac_beta, **shared)
        return q_learning_loss(inputs, **shared)


def value_inputs(logprobs: torch.Tensor, numbers: torch.Tensor, trajectories: "Sequence[Trajectory]") -> ValueInputs:
    """Keep the learnt tokens of what the networks say: whatever stands between two of them is part of the step.

    A response with tokens 5 6 7, of which 6 was not sampled but said by an environment: actions 5 and 7, states before
    5, before 7 and at the end.

    Args:
        logprobs: [S], of the response tokens of all trajectories.
        numbers: [6, S + N], see `PolicyWithValues.forward`.
        trajectories: N of them, each with at least one learnt token.
    """
    device = logprobs.device
    is_learnt = torch.tensor([flag for one in trajectories for flag in one.is_learnt], device=device)
    acts = torch.tensor([flag for one in trajectories for flag in (*one.is_learnt, False)], device=device)
    is_state = torch.tensor([flag for one in trajectories for flag in (*one.is_learnt, True)], device=device)
    at_actions = numbers[:, acts]
    return ValueInputs(
        q=at_actions[:2],
        q_nll=at_actions[2:4],
        target_q=at_actions[4].detach(),
        values=numbers[5, is_state],
        logprobs=logprobs[is_learnt],
        scores=torch.tensor([one.score for one in trajectories], device=device, dtype=torch.float32),
        is_terminal=torch.tensor([one.is_terminal for one in trajectories], device=device),
        lengths=tuple(sum(one.is_learnt) for one in trajectories),
    )
