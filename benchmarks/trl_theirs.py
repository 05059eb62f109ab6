"""TRL's side of `benchmarks.trl`: its own trainer, in its own process, one iteration for each line on standard input.

    python -m benchmarks.trl_theirs JOB.json

PPO is `trl.experimental.ppo.PPOTrainer` (TRL 1.12), GRPO is `trl.GRPOTrainer` (TRL 1.16).  What is added to them:
a logits processor that forces response lengths, a callback that waits between iterations, and clocks around generation
and forward passes.  Nothing that they compute is changed.  Answers are JSON, one line each, on standard output;
everything that TRL prints goes to standard error.
"""

import json
import os
import sys
import time
from collections import defaultdict
from typing import Any, TextIO

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from benchmarks.trl_workload import THREADS, scripted_reward


class ForcedLengths(LogitsProcessor):
    """Draws EOS at each row's length and neither EOS nor padding before; rows that never end draw neither."""

    def __init__(self, lengths: list[int], *, never: list[int], eos: int, ends: bool) -> None:
        self._lengths, self._never, self._eos, self._ends = torch.tensor(lengths), never, eos, ends
        self._first = 0  # row of all rows that the next batch begins with

    def begin(self, prompts: torch.Tensor) -> None:
        """Take the lengths of the rows of a batch, [B, P], which follow those of the batch before."""
        self._prompt_tokens = prompts.shape[1]
        rows = range(self._first, self._first + prompts.shape[0])
        self._of_batch = self._lengths[rows.start : rows.stop]
        self._first = rows.stop % len(self._lengths)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Change the logits of the next token, [B, V], in place."""
        scores[:, self._never] = -torch.inf
        if self._ends:
            is_last = self._of_batch - 1 == input_ids.shape[1] - self._prompt_tokens
            scores[is_last] = -torch.inf
            scores[is_last, self._eos] = 0.0
        return scores


class Turns(TrainerCallback):
    """Waits for a line before each iteration, and answers with what it took after it."""

    def __init__(self, answers: TextIO, *, iterations: int, begins_with_step: bool) -> None:
        self._answers, self._left, self._begins_with_step = answers, iterations, begins_with_step
        self._phase, self._since, self._started = "other", 0.0, 0.0
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._positions: defaultdict[str, int] = defaultdict(int)
        self.facts: dict[str, Any] = {}
        """What the iteration saw: `prompt_ids`, `lengths`, rows in order."""

    def switch(self, phase: str) -> None:
        """End the phase that runs, begin another one."""
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def watch(self, model: torch.nn.Module) -> None:
        """Count the positions, padding included, that go through a network, by phase."""

        def count(_: Any, inputs: Any) -> None:
            self._positions[self._phase] += inputs[0].numel()

        model.get_input_embeddings().register_forward_pre_hook(count)  # type: ignore[operator]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Wait, where the trainer has no sign for the beginning of a step."""
        if not self._begins_with_step:
            self._wait()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Wait."""
        self._wait()

    def on_log(self, *_: Any, **__: Any) -> None:
        """End the update."""
        self.switch("other")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Answer, and wait where the next step begins unseen."""
        self.switch("other")
        seconds = time.perf_counter() - self._started
        positions = dict(self._positions)
        self.answer({"seconds": seconds, "phases": dict(self._seconds), "positions": positions, **self.facts})
        self._left -= 1
        if self._left and not self._begins_with_step:
            self._wait()

    def answer(self, message: dict[str, Any]) -> None:
        """Write one line."""
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit("the benchmark has ended")
        self._seconds.clear()
        self._positions.clear()
        self._started = self._since = time.perf_counter()
        self._phase = "other"


def main() -> None:
    """Build the trainer of a job and train."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # TRL prints; standard output is for answers
        with open(sys.argv[1], encoding="utf-8") as file:
            job = json.load(file)
        torch.set_num_threads(THREADS)
        torch.manual_seed(0)
        is_ppo = job["algorithm"] == "ppo"
        turns = Turns(answers, iterations=job["iterations"], begins_with_step=not is_ppo)
        tokenizer = _tokenizer(job["model"])
        trainer = _ppo(job, tokenizer, turns) if is_ppo else _grpo(job, tokenizer, turns)
        turns.answer({"ready": _versions(), "settings": _settings(trainer)})
        trainer.train()
        sys.stdin.readline()  # the benchmark looks at this process, and then ends it


def _ppo(job: dict[str, Any], tokenizer: PreTrainedTokenizerBase, turns: Turns) -> Any:
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    work, settings = job["workload"], job["settings"]
    rows = [list(ids) for ids, lengths in zip(work["prompt_ids"], work["lengths"], strict=True) for _ in lengths]
    policy, reference = (_policy(job["model"], tokenizer) for _ in range(2))
    judge, critic = (_scalar(job["judge"], tokenizer) for _ in range(2))
    _force_lengths(policy, job, tokenizer)
    config = PPOConfig(
        **_training(job, num_rows=len(rows)),
        total_episodes=len(rows) * job["iterations"],
        num_ppo_epochs=1,
        num_mini_batches=1,
        local_rollout_forward_batch_size=job["rollout_rows"],
        num_sample_generations=0,
        response_length=work["max_new_tokens"],
        stop_token=None if work["is_uniform"] else "eos",
        temperature=settings["temperature"],
        kl_coef=settings["kl_coef"],
        cliprange=settings["clip_range"],
        cliprange_value=settings["value_clip_range"],
        vf_coef=settings["value_coef"],
        gamma=settings["gamma"],
        lam=settings["gae_lambda"],
    )
    for model in (policy, reference, judge, critic):
        turns.watch(model)
    _clock_ppo(ppo_trainer, turns, tokenizer)
    dataset = Dataset.from_dict({"input_ids": rows})
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=judge,
        value_model=critic,
        train_dataset=dataset,
        eval_dataset=dataset,  # it wants one, and with `num_sample_generations` 0 never looks at it
        callbacks=[turns],
    )


def _clock_ppo(module: Any, turns: Turns, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put clocks around the functions of TRL's PPO module."""
    generate, forward = module.batch_generation, module.forward

    def timed_generation(model: Any, queries: torch.Tensor, *arguments: Any) -> Any:
        turns.switch("generate")
        found = generate(model, queries, *arguments)
        turns.switch("score")
        lengths = (found[0][:, queries.shape[1] :] != tokenizer.pad_token_id).sum(1)
        turns.facts = {"prompt_ids": queries.tolist(), "lengths": lengths.tolist()}
        return found

    def timed_forward(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            turns.switch("train")
        return forward(*arguments)

    module.batch_generation, module.forward = timed_generation, timed_forward


def _grpo(job: dict[str, Any], tokenizer: PreTrainedTokenizerBase, turns: Turns) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    work, settings = job["workload"], job["settings"]
    num_samples = len(work["lengths"][0])
    policy = _policy(job["model"], tokenizer)
    _force_lengths(policy, job, tokenizer)
    config = GRPOConfig(
        **_training(job, num_rows=num_samples * len(work["prompts"])),
        max_steps=job["iterations"],
        num_generations=num_samples,
        max_completion_length=work["max_new_tokens"],
        shuffle_dataset=False,
        temperature=settings["temperature"],
        beta=settings["kl_coef"],
        use_bias_correction_kl=False,
        epsilon=settings["clip_range"],
        loss_type="grpo",
    )
    trainer: Any = GRPOTrainer(
        model=policy,
        reward_funcs=scripted_reward,  # type: ignore[arg-type]
        args=config,
        train_dataset=Dataset.from_dict({"prompt": list(work["prompts"])}),
        processing_class=tokenizer,
        callbacks=[turns],
    )
    for model in (policy, trainer.ref_model):
        assert model.dtype == torch.float32, "both networks compute in float32"
        turns.watch(model)
    _clock_grpo(trainer, turns)
    return trainer


def _clock_grpo(trainer: Any, turns: Turns) -> None:
    """Put clocks around the methods of TRL's GRPO trainer."""
    generate, score, loss = (
        trainer._generate_single_turn,
        trainer._get_per_token_logps_and_entropies,
        trainer.compute_loss,
    )

    def timed_generation(prompt_ids: Any, *arguments: Any, **keywords: Any) -> Any:
        turns.switch("generate")
        found = generate(prompt_ids, *arguments, **keywords)
        turns.switch("other")
        turns.facts = {"prompt_ids": prompt_ids, "lengths": [len(ids) for ids in found[0]]}
        return found

    def timed_score(*arguments: Any, **keywords: Any) -> Any:
        if torch.is_grad_enabled():
            return score(*arguments, **keywords)
        turns.switch("score")
        found = score(*arguments, **keywords)
        turns.switch("other")
        return found

    def timed_loss(*arguments: Any, **keywords: Any) -> Any:
        turns.switch("train")
        return loss(*arguments, **keywords)

    trainer._generate_single_turn = timed_generation
    trainer._get_per_token_logps_and_entropies = timed_score
    trainer.compute_loss = timed_loss


def _training(job: dict[str, Any], *, num_rows: int) -> dict[str, Any]:
    """Return what both of TRL's configurations get; none writes, logs or checkpoints anything."""
    settings, micro = job["settings"], job["microbatch"]
    assert num_rows % micro == 0, f"{num_rows} rows are whole micro-batches of {micro}"
    return {
        "output_dir": job["directory"],
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": num_rows // micro,
        "learning_rate": settings["learning_rate"],
        "adam_beta1": settings["betas"][0],
        "adam_beta2": settings["betas"][1],
        "adam_epsilon": settings["eps"],
        "weight_decay": settings["weight_decay"],
        "max_grad_norm": settings["max_grad_norm"],
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "seed": 0,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def _force_lengths(policy: Any, job: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Let every `generate` of the policy have the logits processor."""
    work, generate = job["workload"], policy.generate
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    lengths = [length for row in work["lengths"] for length in row]
    processor = ForcedLengths(lengths, never=[eos, pad], eos=eos, ends=not work["is_uniform"])

    def forced(*arguments: Any, **keywords: Any) -> Any:
        processor.begin(keywords["input_ids"])
        return generate(*arguments, logits_processor=LogitsProcessorList([processor]), **keywords)

    policy.generate = forced


def _tokenizer(directory: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer, with a padding token that is not EOS: TRL tells padding by comparing ids."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = next(token for token in tokenizer.all_special_tokens if token != tokenizer.eos_token)
    return tokenizer


def _policy(directory: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def _scalar(directory: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _settings(trainer: Any) -> dict[str, Any]:
    """Return what the trainer will do, as its own objects have it."""
    arguments = trainer.args
    steps = getattr(arguments, "gradient_accumulation_steps", 1)
    return {
        "learning_rate": arguments.learning_rate,
        "betas": [arguments.adam_beta1, arguments.adam_beta2],
        "eps": arguments.adam_epsilon,
        "weight_decay": arguments.weight_decay,
        "max_grad_norm": arguments.max_grad_norm,
        "optimizer": str(arguments.optim),
        "epochs": getattr(arguments, "num_ppo_epochs", None) or arguments.num_iterations,
        "minibatches": 1,
        "microbatch": arguments.per_device_train_batch_size,
        "accumulation": steps,
        "threads": torch.get_num_threads(),
        "attention": trainer.model.config._attn_implementation,
    }


def _versions() -> dict[str, str]:
    import transformers
    import trl

    return {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    main()
