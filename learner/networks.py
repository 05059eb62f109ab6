"""The networks of one rank with their optimizer engines: policy with or without a value head, or a separate critic.

The epoch loop asks for predictions, hands losses back and steps; it does not know how many engines there are.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import torch
from transformers import PreTrainedModel

from actors.rows import GroupRow
from actors.shared_attention import install, is_installed
from learner.config import LearnerConfig
from learner.model import Critic, PolicyAndValue, Scoring, add_lora, without_adapters
from learner.objective import MinibatchLoss
from learner.optimizer import NonFiniteError, OptimizerEngine, make_engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """What the networks say about a row."""

    logprobs: torch.Tensor
    """[S]; empty when not wanted."""
    entropy: torch.Tensor
    """[S]; empty when not wanted."""
    values: torch.Tensor
    """[S + N], R + 1 for each response; empty without a value function."""


class Networks:
    """Policy and value function of one rank.

    Args:
        model: the policy; wrapped and changed in place.
        config: backend, ZeRO stage, optimizer, critic, LoRA.
        scoring: temperature and chunks.
        dtype: of the forward passes.
        rank: this process among `config.num_ranks`.
        has_values: whether there is a value function.
        device: where the networks run.  With ZeRO 3 the model may be in main memory, and is cut into shards on its way
            there, so that no device holds it whole.  None = where the model is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: LearnerConfig,
        *,
        scoring: Scoring,
        dtype: torch.dtype,
        rank: int,
        has_values: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self._scoring = scoring
        self._vocab_size = int(model.config.get_text_config().vocab_size)
        self.has_values = has_values
        # ZeRO 3 pairs each forward with the backward after it: after several forwards its gradients are wrong
        self.keeps_graphs = config.backend == "local" or config.zero_stage < 3
        """Whether several forwards may come before their backwards."""
        self.device = model.device if device is None else device
        is_separate = has_values and config.critic == "separate"
        critic = Critic(model) if is_separate else None
        if config.gradient_checkpointing:
            for trunk in (model, critic.trunk) if critic else (model,):
                trunk.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                trunk.train()  # checkpointing is off in eval mode; dropout is 0 in the configuration
        if config.lora is not None:
            add_lora(model, config.lora)
            if critic is not None:
                add_lora(critic.trunk, config.lora)
        self.module = PolicyAndValue(model, has_value_head=has_values and not is_separate, device=device)
        if critic is not None and is_installed(model):
            install(critic.trunk)
        self.policy = self._engine(self.module, config, dtype=dtype, rank=rank, device=device)
        self.critic = self._engine(critic, config, dtype=dtype, rank=rank, device=device) if critic else None

    @property
    def engines(self) -> dict[str, OptimizerEngine]:
        """Engines by the name that their state has in a checkpoint."""
        return {"policy": self.policy} | ({"critic": self.critic} if self.critic else {})

    def weights(self) -> Iterator[torch.Tensor]:
        """Yield the parameters and buffers of all networks."""
        for engine in self.engines.values():
            yield from chain(engine.module.parameters(), engine.module.buffers())

    def softmax_bytes(self, row: GroupRow) -> int:
        """Return the bytes of the softmax over the vocabulary for a row's response tokens."""
        return row.targets.numel() * self._vocab_size * 4

    def forward(
        self,
        row: GroupRow,
        *,
        has_tokens: bool = True,
        values: torch.Tensor | None = None,
        occupied_bytes: int = 0,
    ) -> Forward:
        """Run a row.

        Args:
            row: made by the module's scorer.
            has_tokens: without it only values are computed.
            values: the separate critic's, where it has been run already.
            occupied_bytes: of softmax that other graphs keep meanwhile.
        """
        kept_bytes = max(0, self._scoring.kept_bytes - occupied_bytes)
        scoring = replace(self._scoring, has_tokens=has_tokens, kept_bytes=kept_bytes)
        if self.critic is None:
            logprobs, entropy, values = self.policy.forward(row, scoring)
            return Forward(logprobs=logprobs, entropy=entropy, values=values)
        empty = torch.empty(0, device=self.device)
        logprobs, entropy = self.policy.forward(row, scoring)[:2] if has_tokens else (empty, empty)
        return Forward(
            logprobs=logprobs, entropy=entropy, values=self.critic.forward(row) if values is None else values
        )

    @torch.no_grad()
    def base_logprobs(self, row: GroupRow) -> torch.Tensor:
        """Return the log-prob of each response token, [S] float32, of the policy without its adapters."""
        with without_adapters(self.module):
            logprobs: torch.Tensor = self.policy.forward(row, self._scoring)[0]
        return logprobs

    def backward(self, loss: MinibatchLoss) -> None:
        """Accumulate the gradients of one micro-batch's share of the loss."""
        if self.critic is None:
            self.policy.backward(loss.policy if loss.value is None else loss.policy + loss.value)
            return
        assert loss.value is not None, "a critic has values"
        self.policy.backward(loss.policy)
        self.critic.backward(loss.value)

    def step(self, learning_rate: float) -> float:
        """Update all networks; return the policy's gradient norm.

        The critic goes first: if its gradient is not finite, neither network changes.

        Raises:
            NonFiniteError: on all ranks; the policy is unchanged.
        """
        if self.critic is not None:
            try:
                self.critic.step(learning_rate)
            except NonFiniteError:
                self.policy.discard()
                raise
        return self.policy.step(learning_rate)

    def offload(self) -> None:
        """Move everything to main memory, until `reload`."""
        for engine in self.engines.values():
            engine.offload()

    def reload(self) -> None:
        """Move everything back to the device; nothing happens where it is there."""
        for engine in self.engines.values():
            engine.reload()

    def close(self) -> None:
        """Free the engines."""
        for engine in self.engines.values():
            engine.close()

    @staticmethod
    def _engine(
        module: torch.nn.Module, config: LearnerConfig, *, dtype: torch.dtype, rank: int, device: torch.device | None
    ) -> OptimizerEngine:
        offloads = config.offload == "optimizer"
        if offloads and (device or next(module.parameters()).device).type == "cpu":
            raise ValueError(
                "learner.offload must be none without a GPU, got optimizer: its state is in main memory already; set "
                "placement.learner_gpus to 1 or leave it out"
            )
        return make_engine(
            module,
            config.optimizer,
            backend=config.backend,
            zero_stage=config.zero_stage,
            rank=rank,
            world_size=config.num_ranks,
            dtype=dtype,
            offloads=offloads,
            device=device,
        )
