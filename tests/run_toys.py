"""Configurations of small runs, and what is equal about two runs that have ended."""

import shutil
from typing import Any

import pyarrow.parquet as pq

from cluster.config import RunConfig, validate
from cluster.metrics import is_of_the_machine

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
    return [{name: value for name, value in row.items() if not is_of_the_machine(name)} for row in rows]


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


def assert_each_group_is_trained_once(directory: Any, config: RunConfig) -> None:
    """Check what a run with staleness has learnt from: whole groups, each in one step, sampled late enough for it."""
    seen: list[str] = []
    for step in range(1, config.run.num_steps + 1):
        rows = pq.read_table(directory / "rollouts" / f"step-{step}.parquet")
        groups = rows["group_id"].to_pylist()
        oldest = min(min(versions) for versions in rows["policy_versions"].to_pylist())
        assert step - 1 - config.pipeline.max_staleness <= oldest, f"step {step} learns from version {oldest}"
        assert all(groups.count(group) == config.rollouts.samples_per_prompt for group in groups)
        seen += sorted(set(groups))
        assert len(seen) == step * config.rollouts.prompts_per_step
    assert len(set(seen)) == len(seen), "no group is learnt from twice"
    last = pq.read_table(directory / "metrics.parquet").to_pylist()[-1]
    assert (last["groups_trained"], last["groups_in_flight"], last["groups_dropped"]) == (len(seen), 0, 0)


def replayed(directory: Any, config: RunConfig, into: Any) -> Any:
    """Learn all steps of a run once more from what it wrote down; return the new run's directory."""
    from cluster.loop import train
    from cluster.run import Run

    shutil.copytree(directory / "rollouts", into / "rollouts")
    replay = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(into)})})
    with Run(replay) as run:
        train(run)
    return into
