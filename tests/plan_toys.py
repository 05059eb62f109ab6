"""Published models as configurations without weights, and runs of them for planning."""

import json
import subprocess
import sys
from typing import Any

from cluster.config import RunConfig
from cluster.memory_plan import Sizes
from cluster.model_config import shape_of
from tests.run_toys import merged, minimal_config

LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
NUM_7B, NUM_70B = 6_738_415_616, 68_976_648_192

GPUS = {"learner_gpus": 1, "rollout_gpus": 1.0, "reward_gpus": 1.0}


def sizes_of(config: dict[str, Any], *, judges: tuple[tuple[str, int], ...] = ()) -> Sizes:
    """Return the sizes of a run with this policy."""
    shape = shape_of(config, where="test")
    return Sizes(policy=shape, policy_parameters=shape.num_parameters, judges=judges)


def model_directory(path: Any, config: dict[str, Any]) -> str:
    """Write a directory that has a configuration and no weights."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def run_of_7b(policy: str = "owner/model", judge: str | None = None, **sections: dict[str, Any]) -> RunConfig:
    """Return PPO with a critic of its own on 8 GPUs: 4 ranks, 2 rollout and 2 reward workers."""
    components = {"liking": {"model": judge}} if judge else {"share": {"function": "tests.rules:share_of_a"}}
    base: dict[str, dict[str, Any]] = {
        "policy": {"model": policy},
        "prompts": {"path": "tests/rules.py", "max_prompt_tokens": 512},
        "rollouts": {"num_workers": 2, "prompts_per_step": 64, "max_new_tokens": 512},
        "reward": {"components": components, "num_workers": 2},
        "learner": {"num_ranks": 4, "zero_stage": 3, "critic": "separate", "gradient_checkpointing": True},
        "placement": GPUS,
    }
    return minimal_config(**merged(base, sections))


def run_of_70b(policy: str = "owner/model", **sections: dict[str, Any]) -> RunConfig:
    """Return GRPO on 64 GPUs: 32 ranks, 7 replicas of 4 GPUs; the reference in main memory."""
    base: dict[str, dict[str, Any]] = {
        "run": {"dir": "/shared/run", "num_steps": 2},
        "policy": {"model": policy, "dtype": "bfloat16"},
        "prompts": {"path": "tests/rules.py", "max_prompt_tokens": 1024},
        "rollouts": {
            "engine": "vllm", "tensor_parallel": 4, "num_workers": 7, "prompts_per_step": 64, "max_new_tokens": 1024,
        },
        "learner": {"num_ranks": 32, "zero_stage": 3, "gradient_checkpointing": True},
        "algorithm": {"name": "grpo"},
        "placement": {**GPUS, "reward_gpus": 0.0},
    }  # fmt: skip
    return minimal_config(**merged(base, sections))


COMMAND = """
import sys, time
sys.argv = ["concord", *{arguments}]
import cluster.cli as cli
try:
    cli.main()
except SystemExit as end:
    status = end.code or 0
heavy = [name for name in ("torch", "transformers", "deepspeed", "ray", "vllm") if name in sys.modules]
print("ENDED", status, heavy, time.process_time())
"""


def run_command(*arguments):
    """Run a command in a process of its own; return what it printed, its status, heavy modules, CPU seconds."""
    code = COMMAND.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    printed, _, end = done.stdout.rpartition("ENDED ")
    status, _, rest = end.partition(" ")
    heavy, _, seconds = rest.rpartition(" ")
    return printed, int(status), heavy, float(seconds)
