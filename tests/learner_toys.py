"""A tiny policy and made-up batches for the learner's tests."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from actors.config import PolicyConfig
from actors.policy import load_model
from actors.scoring import reference_logprobs
from actors.weights import InProcessTransport
from learner.algorithm_config import AlgorithmConfig
from learner.batch import StepContext, StepPlan, plan_step
from learner.config import LearnerConfig, OptimizerConfig
from learner.learner import LearnerRank
from reward.schema import SAMPLES, SCORED

VOCAB = 61
TEMPERATURE = 0.7
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def toy_model(model_type: str = "llama", **settings: object) -> PreTrainedModel:
    """Return a model with seeded random weights, large enough for context to matter."""
    config = AutoConfig.for_model(model_type, **((GPT2 if model_type == "gpt2" else SMALL) | settings))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def toy_directory(path: Path, model_type: str = "llama", **settings: object) -> str:
    """Save a toy model and return its directory."""
    toy_model(model_type, **settings).save_pretrained(path)
    return str(path)


def tokens(generator: np.random.Generator, count: int) -> list[int]:
    return generator.integers(3, VOCAB, count).tolist()


@dataclass(frozen=True, kw_only=True)
class ToyBatch:
    """What the learner gets for one step."""

    tables: list[pa.Table]
    plan: StepPlan


@functools.cache
def toy_tables(
    directory: str, *, step: int, num_groups: int = 5, num_samples: int = 3
) -> tuple[list[pa.Table], pa.Table]:
    """Return SCORED tables (one a group) with log-probs of the model in `directory`, and their SAMPLES table."""
    model = load_model(directory, dtype=torch.float32, device=torch.device("cpu"))
    generator = np.random.default_rng(100 + step)
    scored, samples = [], []
    for group in range(num_groups):
        prompt = tokens(generator, int(generator.integers(2, 9)))
        responses = [tokens(generator, int(generator.integers(1, 11))) for _ in range(num_samples)]
        logprobs = reference_logprobs(model, prompt, responses, temperature=TEMPERATURE)
        rows = []
        for index, (response, logprob) in enumerate(zip(responses, logprobs, strict=True)):
            mask = [position != 1 for position in range(len(response))]  # one token not the policy's own
            rows.append(
                {
                    "prompt_id": f"p{group}",
                    "prompt": "",
                    "prompt_ids": prompt,
                    "extras": "{}",
                    "run_id": "toy",
                    "incarnation": 0,
                    "group_id": f"{step}/p{group}",
                    "sample_index": index,
                    "lease_id": group,
                    "response_ids": response,
                    "response_text": "",
                    "logprobs": logprob.tolist(),
                    "policy_versions": [0] * len(response),
                    "loss_mask": mask,
                    "finish_reason": "length" if index == 1 else "eos",
                    "components": [("toy", 0.0)],
                    "token_scores": None,
                    "score_std": None,
                    "reward_version": 0,
                    "ref_logprobs": (logprob + generator.normal(0, 0.1, len(response))).astype(np.float32).tolist(),
                    "reference_version": 0,
                }
            )
            samples.append(
                {
                    "group_id": f"{step}/p{group}",
                    "sample_index": index,
                    "num_prompt_tokens": len(prompt),
                    "num_response_tokens": len(response),
                    "num_loss_tokens": sum(mask),
                    "finish_reason": rows[-1]["finish_reason"],
                    "components": [("toy", 0.0)],
                    "kl": 0.0,
                    "oldest_version": 0,
                    "newest_version": 0,
                }
            )
        scored.append(pa.Table.from_pylist(rows, schema=SCORED))
    return scored, pa.Table.from_pylist(samples, schema=SAMPLES)


def toy_batch(directory: str, learner: LearnerConfig, *, step: int) -> ToyBatch:
    """Return one step's tables and plan; scores depend on the step alone."""
    tables, samples = toy_tables(directory, step=step)
    scores = np.random.default_rng(200 + step).normal(size=samples.num_rows)
    context = StepContext(step=step, num_steps=10, seed=7, kl_coef=0.1)
    return ToyBatch(tables=tables, plan=plan_step(samples, scores, learner=learner, context=context))


def learner_config(**settings: object) -> LearnerConfig:
    """Return a configuration with small micro-batches, two epochs and two minibatches, learning rate 1e-3."""
    defaults = {
        "backend": "local",
        "optimizer": OptimizerConfig(learning_rate=1e-3),
        "epochs": 2,
        "num_minibatches": 2,
        "microbatch_tokens": 48,
        "chunk_tokens": 16,
    }
    return LearnerConfig(**(defaults | settings))


def learner_rank(
    directory: str,
    learner: LearnerConfig,
    *,
    rank: int = 0,
    algorithm: AlgorithmConfig | None = None,
    dtype: str = "float32",
    max_staleness: int = 0,
) -> LearnerRank:
    return LearnerRank(
        model_dir=directory,
        policy=PolicyConfig(model=directory, dtype=dtype),
        learner=learner,
        algorithm=algorithm or AlgorithmConfig(entropy_coef=0.01),
        temperature=TEMPERATURE,
        seed=3,
        rank=rank,
        world_size=learner.num_ranks,
        device="cpu",
        num_threads=1,
        transport=InProcessTransport(),
        max_new_tokens=16,
        max_staleness=max_staleness,
    )


def learnt(metrics: object) -> dict[str, float]:
    """Return a step's metrics without those of the process, which no two runs share."""
    assert isinstance(metrics, dict), f"a step that was made has metrics, got {metrics}"
    return {name: value for name, value in metrics.items() if not name.startswith("resident_mb")}


def parameters(learner: LearnerRank) -> dict[str, torch.Tensor]:
    """Return every trained parameter in full, by engine and name; collective."""
    return {
        f"{engine_name}/{name}": state["param"].clone()
        for engine_name, engine in learner._networks.engines.items()
        for name, state in engine.full_state()
    }
