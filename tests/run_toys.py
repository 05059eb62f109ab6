"""Configurations of small runs, and what is equal about two runs that have ended."""

from typing import Any

import pyarrow.parquet as pq

from cluster.config import RunConfig, validate

MINIMAL: dict[str, dict[str, Any]] = {
    "run": {"dir": "runs/x", "num_steps": 2},
    "policy": {"model": "owner/model"},
    "prompts": {"path": "prompts.jsonl"},
    "reward": {"components": {"share": {"function": "tests.rules:share_of_a"}}},
}
"""What has no default; nothing of it need exist."""

TINY_POLICY = {
    "model": {
        "architecture": {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 6},
        "tokenizer": {"characters": "abcd"},
    }
}


def minimal_config(**sections: dict[str, Any]) -> RunConfig:
    """Return the smallest configuration, with sections merged in."""
    return validate(RunConfig, merged(MINIMAL, sections), where="test")


def tiny_config(directory: Any, data: Any, **sections: dict[str, Any]) -> RunConfig:
    """Return a run of four steps with a tiny policy, on `prompts.jsonl` of a data directory."""
    base = {
        **MINIMAL,
        "run": {"dir": str(directory), "num_steps": 4, "checkpoint_every": 2},
        "policy": TINY_POLICY,
        "prompts": {"path": str(data / "prompts.jsonl")},
        "rollouts": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 8, "max_rows": 8},
        "learner": {"optimizer": {"learning_rate": 3e-3}, "num_minibatches": 2, "epochs": 2},
        "algorithm": {"kl": {"coef": 0.01}},
    }
    return validate(RunConfig, merged(base, sections), where="test")


def merged(base: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """Return the sections, those of `base` changed setting by setting."""
    return base | {name: base.get(name, {}) | section for name, section in sections.items()}


def metrics_of(directory: Any) -> list[dict[str, Any]]:
    """Return a run's rows without times and fault counters, which two equal runs do not share."""
    rows = pq.read_table(directory / "metrics.parquet").to_pylist()
    return [
        {name: value for name, value in row.items() if not (name.endswith("_s") or name.startswith("faults_"))}
        for row in rows
    ]


def weights_of(directory: Any) -> dict[str, Any]:
    """Return the tensors of the policy that a run exported."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory / "policy").state_dict()


def are_equal(directory: Any, expected: Any) -> bool:
    """Whether a run ended with the same metrics and the same weights as another, to the bit."""
    import torch

    weights, others = weights_of(directory), weights_of(expected)
    same = [torch.equal(tensor, others[name]) for name, tensor in weights.items()]
    return metrics_of(directory) == metrics_of(expected) and len(same) == len(others) and all(same)
