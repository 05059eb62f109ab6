"""Held-out prompts answered and judged in this process: what an offline result is worth.

The trained policy answers, guided by its values where it has some; judges and the starting policy's log-probs come from
the same worker class that a training run has.  No process is started.
"""

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.config import PolicyConfig
from actors.engine import Completion, Request, SamplingParams
from actors.guidance import ValueGuidance
from actors.policy import PromptEncoder, eos_ids, load_model, load_tokenizer, max_positions, resolve_dtype
from actors.prompts import DrawnPrompt, PromptSource, fitting
from actors.rollout_worker import rollouts_table
from actors.sampling import group_seed
from actors.schema import group_id
from actors.torch_engine import TorchEngine
from learner.algorithm_config import AlgorithmConfig
from learner.config import LearnerConfig
from learner.controller import StepController
from learner.training import training_device
from reward.reward_worker import RewardWorker

if TYPE_CHECKING:
    from learner.offline_config import OfflineEvaluationConfig

EVALUATION_FILE = "evaluation.parquet"


class Evaluation:
    """Held-out prompts and how they are judged; made before training, so that wrong prompts are reported at once.

    Judges and reference policy are loaded after training: they would take its memory.

    Args:
        config: prompts, judges, sampling.
        policy: dtype and trust.
        source: local directory of the starting policy, whose log-probs are `ref_logprobs`.
        cache_dir: where data sets are kept.
    """

    def __init__(self, config: "OfflineEvaluationConfig", policy: PolicyConfig, *, source: str, cache_dir: str) -> None:
        self._config = config
        self._policy = policy
        self._device = training_device()
        encoder = PromptEncoder(load_tokenizer(source, trust_remote_code=policy.trust_remote_code))
        section = fitting(
            config.prompts,
            "evaluation.prompts",
            positions=max_positions(source, trust_remote_code=policy.trust_remote_code),
            max_new_tokens=(config.max_new_tokens, "evaluation.max_new_tokens"),
        )
        prompts = PromptSource(section, encoder, seed=config.seed, cache_dir=cache_dir)
        self.prompts: list[DrawnPrompt] = prompts.first(config.num_prompts)
        self.quarantined = tuple(prompts.quarantined)
        self._source = source

    def run(self, directory: str, *, is_guided: bool) -> dict[str, float]:
        """Answer and judge, write SCORED rows beside the model, and return the figures.

        Args:
            directory: the trained model, where `evaluation.parquet` is written.
            is_guided: whether values beside the model guide its sampling.

        Returns:
            `score_mean`, `kl`, `<component>_mean` and so on, as a training run's evaluation names them without `eval_`.

        Raises:
            RewardError: if a judge fails.
        """
        judge = self._judge()
        scored, samples = [], []
        for rollouts in self._answer(directory, is_guided=is_guided):
            rows, numbers = judge.score(rollouts)
            scored.append(rows)
            samples.append(numbers)
        pq.write_table(pa.concat_tables(scored), os.path.join(directory, EVALUATION_FILE))
        config = self._config
        controller = StepController(
            config.reward,
            LearnerConfig(),
            AlgorithmConfig(),
            num_steps=1,
            seed=config.seed,
            max_new_tokens=config.max_new_tokens,
        )
        return controller.evaluation_metrics(pa.concat_tables(samples))

    def _judge(self) -> RewardWorker:
        return RewardWorker(
            reward=self._config.reward,
            policy=self._policy,
            policy_dir=self._source,
            temperature=self._config.temperature or 1.0,
            device=str(self._device),
            num_threads=0,
        )

    def _answer(self, directory: str, *, is_guided: bool) -> list[pa.Table]:
        """Return ROLLOUTS for each prompt, in their order."""
        engine = self._engine(directory, is_guided=is_guided)
        engine.submit([self._request(prompt) for prompt in self.prompts])
        found: dict[str, list[Completion]] = {}
        while engine.has_work:
            for completion in engine.step():
                found.setdefault(completion.request_id, []).append(completion)
        run_id = os.path.basename(directory)
        return [_rollouts(prompt, found[_group(prompt)], run_id=run_id) for prompt in self.prompts]

    def _engine(self, directory: str, *, is_guided: bool) -> TorchEngine:
        trust = self._policy.trust_remote_code
        dtype = resolve_dtype(self._policy.dtype, self._device)
        model = load_model(directory, dtype=dtype, device=self._device, trust_remote_code=trust)
        tokenizer = load_tokenizer(directory, trust_remote_code=trust)
        return TorchEngine(
            model,
            tokenizer,
            max_rows=self._config.max_rows,
            eos_ids=eos_ids(model, tokenizer),
            logits_hook=ValueGuidance.load(directory, device=self._device) if is_guided else None,
        )

    def _request(self, prompt: DrawnPrompt) -> Request:
        config = self._config
        return Request(
            request_id=_group(prompt),
            prompt_ids=prompt.table["prompt_ids"][0].as_py(),
            num_samples=config.samples_per_prompt,
            seed=group_seed(config.seed, _group(prompt)),
            sampling=SamplingParams(max_new_tokens=config.max_new_tokens, temperature=config.temperature),
        )


def _group(prompt: DrawnPrompt) -> str:
    return group_id(prompt.epoch, prompt.prompt_id)


def _rollouts(prompt: DrawnPrompt, completions: list[Completion], *, run_id: str) -> pa.Table:
    """Return one prompt's samples as ROLLOUTS; there is one policy, version 0."""
    rows = [
        replace(completion, policy_versions=np.zeros(len(completion.response_ids), dtype=np.int32))
        for completion in sorted(completions, key=lambda completion: completion.sample_index)
    ]
    return rollouts_table(prompt.table, rows, run_id=run_id, group_id=_group(prompt))
