"""TRL's own trainers over a tiny local model, as oracles: losses of given log-probs, advantages of given rewards."""

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from tests.engine_toys import build, tokenizer

NUM_GENERATIONS = 4
MAX_NEW_TOKENS = 6
TEMPERATURE = 0.7
PROMPTS = ("ab", "cde")
ONLINE_SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_generations": NUM_GENERATIONS,
    "max_completion_length": MAX_NEW_TOKENS,
    "steps_per_generation": 2,  # so that log-probs of the old policy are computed
    "temperature": TEMPERATURE,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "gradient_checkpointing": False,
}


@functools.cache
def directory() -> str:
    """Return a directory that lives as long as the process."""
    return tempfile.mkdtemp(prefix="trl-toys-")


@functools.cache
def saved_model(seed: int) -> str:
    """Return the directory of a tiny Llama: TRL reads a reference policy from where the policy came from."""
    path = f"{directory()}/model-{seed}"
    build("llama", seed).save_pretrained(path)
    return path


def loaded_model(seed: int) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(saved_model(seed))


def _rows() -> list[dict[str, str]]:
    return [{"prompt": prompt} for prompt in PROMPTS for _ in range(NUM_GENERATIONS)]


def grpo_trainer(rewards: Sequence[float] = (), **settings: Any) -> GRPOTrainer:
    """Return a GRPO trainer whose reward function gives `rewards`, whatever was generated."""
    config = GRPOConfig(output_dir=directory(), **(ONLINE_SETTINGS | settings))
    return GRPOTrainer(
        model=loaded_model(0),
        reward_funcs=lambda completions, **_: list(rewards),
        args=config,
        train_dataset=Dataset.from_list(_rows()),
        processing_class=tokenizer(),
    )


def rloo_trainer(rewards: Sequence[float] = (), **settings: Any) -> RLOOTrainer:
    """Return an RLOO trainer whose reward function gives `rewards`, whatever was generated."""
    config = RLOOConfig(output_dir=directory(), **(ONLINE_SETTINGS | settings))
    return RLOOTrainer(
        model=loaded_model(0),
        reward_funcs=lambda completions, **_: list(rewards),
        args=config,
        train_dataset=Dataset.from_list(_rows()),
        processing_class=tokenizer(),
    )


@functools.cache
def dpo_gradients(pairs: tuple[tuple[str, str, str], ...], loss_type: str, **settings: Any) -> dict[str, torch.Tensor]:
    """Return TRL's gradients of the policy of seed 1 by DPO of some pairs, with that of seed 0 as the reference."""
    config = DPOConfig(
        output_dir=directory(),
        per_device_train_batch_size=len(pairs),
        bf16=False,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        loss_type=[loss_type],
        **settings,
    )
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]
    trainer = DPOTrainer(
        model=loaded_model(1),
        ref_model=loaded_model(0),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(pairs))])
    trainer._compute_loss(trainer.model, batch, False).backward()
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def token_ids(text: str, *, ends: bool) -> list[int]:
    """Return what TRL makes of a prompt, or of a completion that ends."""
    ids = tokenizer()(text)["input_ids"]
    return [*ids, tokenizer().eos_token_id] if ends else ids


def generated(trainer: GRPOTrainer | RLOOTrainer) -> dict[str, torch.Tensor]:
    """Return what the trainer makes of one generation: token ids, masks, log-probs and advantages."""
    return trainer._generate_and_score_completions(_rows())


def generated_elsewhere(mode: str, low: float | None, high: float | None) -> dict[str, torch.Tensor]:
    """Return what the trainer makes of completions whose recorded log-probs are another policy's, with its weights."""
    trainer = grpo_trainer(
        [0.0] * len(_rows()),
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    generate = trainer._generate
    generator = torch.Generator().manual_seed(9)

    def generate_elsewhere(prompts: list[str]) -> tuple[Any, ...]:
        trainer.use_vllm = False  # no engine is asked: only the correction for one is switched on
        found = list(generate(prompts))
        trainer.use_vllm = True
        found[4] = [(-2 - 0.7 * torch.randn(len(ids), generator=generator)).tolist() for ids in found[1]]
        return tuple(found)

    trainer._generate = generate_elsewhere
    return generated(trainer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Padded:
    """Completions as TRL has them, [B, T] float64 with padding at the end."""

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    advantages: torch.Tensor
    """[B]."""
    lengths: tuple[int, ...]
    is_own: torch.Tensor
    """[B, T] bool: not a tool's token; of padding it says nothing."""

    @property
    def is_token(self) -> torch.Tensor:
        """Return [B, T] bool, False on padding."""
        return torch.arange(self.logprobs.shape[1]) < torch.tensor(self.lengths)[:, None]


def padded_batch(spread: float) -> Padded:
    """Return five completions, with log-ratios within `spread`, so that some are clipped and some are not."""
    generator = torch.Generator().manual_seed(2)
    lengths = (3, MAX_NEW_TOKENS, 1, 4, 2)

    def uniform() -> torch.Tensor:
        return torch.rand(len(lengths), MAX_NEW_TOKENS, generator=generator, dtype=torch.float64)

    old = -3 * uniform() - 0.1
    is_own = torch.ones(old.shape, dtype=torch.bool)
    is_own[1, 2] = is_own[3, 0] = False
    return Padded(
        logprobs=old + spread * (2 * uniform() - 1),
        old_logprobs=old,
        ref_logprobs=old + 0.5 * (2 * uniform() - 1),
        advantages=torch.tensor([1.2, -0.8, 0.5, -1.5, 2.0], dtype=torch.float64),
        lengths=lengths,
        is_own=is_own,
    )


def loss_and_gradient(trainer: GRPOTrainer | RLOOTrainer, batch: Padded) -> tuple[torch.Tensor, torch.Tensor]:
    """Return TRL's loss of given log-probs, and its gradient at the response tokens, sequence after sequence.

    Only the model's forward pass is replaced: everything from log-probs on is the trainer's.
    """
    leaf = batch.logprobs.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (leaf, torch.zeros_like(leaf), None)
    is_token = batch.is_token
    mask = is_token & batch.is_own
    ids = torch.ones(is_token.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": is_token.double(),
        "tool_mask": batch.is_own.double(),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old_logprobs,
        "old_logps": (batch.old_logprobs * is_token).sum(1),
        "ref_per_token_logps": batch.ref_logprobs,
        "num_items_in_batch": mask.sum(),
    }
    trainer.model.eval()  # so that the batch is taken as a whole, not as a share of an accumulation
    loss = trainer._compute_loss(trainer.model, inputs)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0][is_token]


Oracle = Callable[[Padded], tuple[torch.Tensor, torch.Tensor]]


def grpo_loss(**settings: Any) -> Oracle:
    """Return TRL's GRPO loss with some settings of `GRPOConfig`; the trainer is built at the first call."""
    trainer = functools.cache(lambda: grpo_trainer(**({"beta": 0.0} | settings)))
    return lambda batch: loss_and_gradient(trainer(), batch)


def rloo_loss(**settings: Any) -> Oracle:
    """Return TRL's RLOO loss with some settings of `RLOOConfig`; the trainer is built at the first call."""
    trainer = functools.cache(lambda: rloo_trainer(**({"beta": 0.0} | settings)))
    return lambda batch: loss_and_gradient(trainer(), batch)
