"""Reference policies that live with the learner; each rank scores its share of the batch in the first pass.

One follows the trained policy, taken anew every so many steps or a moving average of its weights: its state belongs
into the checkpoint and its log-probs must be those of the step, so each rank holds a whole copy.  The other one is the
trained policy without its adapters, which costs no memory.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from transformers import PreTrainedModel

from actors.rows import GroupRow
from actors.scorer import Scorer
from actors.scoring import token_logprobs
from learner.algorithm_config import ReferenceConfig
from learner.networks import Networks
from learner.publisher import Publisher


class Reference(Protocol):
    """What the first pass asks."""

    def logprobs(self, row: GroupRow) -> torch.Tensor:
        """Return the log-prob of each response token in a row, [S] float32."""


class BaseReference:
    """The policy that training starts from, as the trained one without its adapters."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks

    def logprobs(self, row: GroupRow) -> torch.Tensor:
        """Return the log-prob of each response token in a row, [S] float32; collective with ZeRO-3."""
        return self._networks.base_logprobs(row)


class MovingReference:
    """See the module.

    Args:
        model: a copy of the policy that training starts from; belongs to it from now on.
        publisher: gathers the trained policy's weights.
        config: mode swap or ema.
        temperature: the run's.
        chunk_tokens: response tokens whose logits exist at one time.
        rank: this process.
        world_size: learner processes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        publisher: Publisher,
        config: ReferenceConfig,
        *,
        temperature: float,
        chunk_tokens: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.num_updates = 0
        self._model = model.requires_grad_(False)
        self._scorer = Scorer(model)
        self._publisher = publisher
        self._config = config
        self._temperature, self._chunk_tokens = temperature, chunk_tokens

    def logprobs(self, row: GroupRow) -> torch.Tensor:
        """Return the log-prob of each response token in a row, [S] float32."""
        return token_logprobs(self._scorer, row, temperature=self._temperature, chunk_tokens=self._chunk_tokens)

    def follow(self, step: int) -> None:
        """Look at the policy at the end of a step; collective.

        swap: reference <- policy after steps `every`, 2 `every`, ...; ema: reference <- decay reference + (1 - decay)
        policy after each.
        """
        if self._config.every is not None and step % self._config.every:
            return
        share = 1.0 - (self._config.decay or 0.0)
        parameters = dict(self._model.named_parameters())
        for bucket in self._publisher.gathered():
            for name, tensor in bucket():
                target = parameters[name].data
                target.copy_(tensor) if share == 1.0 else target.lerp_(tensor.to(target.dtype), share)
        self.num_updates += 1

    def full_state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yield name -> float32 `param`; copies, which no later step changes."""
        for name, parameter in self._model.named_parameters():
            yield name, {"param": parameter.detach().to(torch.float32, copy=True)}

    def load_full_state(self, state: Mapping[str, Mapping[str, torch.Tensor]], num_updates: int) -> None:
        """Take weights of the shape of `full_state`."""
        for name, parameter in self._model.named_parameters():
            parameter.data.copy_(state[name]["param"])
        self.num_updates = num_updates
