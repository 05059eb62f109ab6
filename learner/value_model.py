"""A policy with value heads on the hidden states that its output head receives, for learning values from text.

No [states, vocab] tensor exists beyond one chunk: each chunk of states becomes a few numbers, and is computed again in
the backward pass where there is more than one.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from actors.rows import GroupRow
from actors.scorer import Scorer
from actors.value_heads import HeadShape, ValueHeads
from learner.logprobs import logprobs_and_entropy
from learner.value_config import ValueLearningConfig
from learner.value_learning import polyak_update, token_nll


class PolicyWithValues(nn.Module):
    """The policy and its value heads.

    Args:
        policy: decoder with an output head, on its device; wrapped in place.
        settings: of the algorithm; ILQL has a V head, Q-learning takes V from Q.
        seed: of the heads' weights.
        chunk_tokens: states whose values of all tokens exist at one time.
    """

    def __init__(
        self, policy: PreTrainedModel, settings: ValueLearningConfig, *, seed: int = 0, chunk_tokens: int = 512
    ) -> None:
        super().__init__()
        self.policy = policy
        output = policy.get_output_embeddings().weight
        vocab_size, hidden_size = output.shape
        shape = HeadShape(hidden_size=hidden_size, vocab_size=vocab_size, has_v=settings.name == "ilql")
        self.heads = ValueHeads(shape, seed=seed).to(output.device)
        self.scorer = Scorer(policy)
        self._settings = settings
        self._chunk_tokens = chunk_tokens
        self._averages: list[torch.Tensor] = []  # of the target heads, in float32, once training has begun

    def forward(self, row: GroupRow) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a row of N responses with together S tokens.

        Args:
            row: made by `self.scorer.row`.

        Returns:
            log-probs [S] of the response tokens, and numbers [5 + 1, S + N] of all their states: both Q(s, a), both
            -log softmax(Q)[a], the smaller target Q(s, a), and V(s); float32.  After a response's last token there is
            no a, and only V(s) means something.
        """
        chunk = self._chunk_tokens
        function = logprobs_and_entropy(row.targets, temperature=1.0, chunk_tokens=chunk, entropy_gradient=False)
        scores = self.scorer(row, function)
        actions = row.targets.new_zeros(len(row.states))
        actions[row.token_states] = row.targets
        parts = zip(scores.states.split(chunk), actions.split(chunk), strict=True)
        if len(actions) <= chunk:
            numbers = self._numbers(scores.states, actions)
        else:
            numbers = torch.cat([checkpoint(self._numbers, *part, use_reentrant=False) for part in parts], dim=1)
        return scores.tokens[:, 0], numbers

    def update_targets(self) -> None:
        """Move the target heads toward the trained ones by the settings' share.

        The averages are float32 whatever the heads are: in half precision most steps of a slow average would be lost.

        Raises:
            ValueError: if the parameters are sharded.
        """
        targets, sources = list(self.heads.target_q.parameters()), list(self.heads.q.parameters())
        if not all(tensor.numel() for tensor in sources):
            raise ValueError(
                "target heads must be whole, got sharded ones; set training.engine.zero_stage to 2 or less"
            )
        if not self._averages:
            self._averages = [target if target.dtype == torch.float32 else target.float() for target in targets]
        polyak_update(self._averages, sources, self._settings.polyak)
        with torch.no_grad():
            for target, average in zip(targets, self._averages, strict=True):
                if target is not average:
                    target.copy_(average)

    def save_heads(self, directory: str) -> None:
        """Write the value heads and decoding's beta beside the saved policy."""
        self.heads.save(directory, beta=self._settings.guidance)

    def _numbers(self, hidden: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        heads = self.heads
        q = [head(hidden).float() for head in heads.q]
        with torch.no_grad():
            target = heads.target(hidden)
        values = target.amax(-1) if heads.v is None else heads.v(hidden)[:, 0].float()
        nll = [token_nll(one, actions) for one in q]
        return torch.stack([*(_at(one, actions) for one in q), *nll, _at(target, actions), values])


def _at(q: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    return q.gather(-1, actions[:, None])[:, 0]
