"""Choosing an engine: what is refused before anything starts, and what its processes are given."""

import importlib.util
import json

import pyarrow.parquet as pq
import pytest

from cluster.config import ConfigError
from cluster.loop import train
from cluster.placement import plan_placement
from cluster.run import Run
from cluster.session import Session
from tests.run_toys import minimal_config, tiny_config

HAS_VLLM = importlib.util.find_spec("vllm") is not None
LLAMA = {
    "architecture": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 6,
        "max_position_embeddings": 64,
    },
    "tokenizer": {"characters": "abcd"},
}  # fmt: skip


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_an_engine_that_is_not_installed_is_refused_before_anything_starts():
    with pytest.raises(ConfigError, match=r"rollouts.engine must be one that is installed, got vllm.*extra `vllm`"):
        Session(minimal_config(rollouts={"engine": "vllm"}))


def test_vllm_takes_no_changes_to_weights():
    with pytest.raises(ConfigError, match=r"delta must be false with rollouts\.engine vllm"):
        minimal_config(rollouts={"engine": "vllm"}, pipeline={"weights": {"delta": True}})


def test_only_rollout_workers_of_vllm_have_its_settings():
    placement = plan_placement(minimal_config(rollouts={"engine": "vllm"}), cores=2)
    assert placement.rollout.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    others = [placement.reward, placement.learner, plan_placement(minimal_config(), cores=2).rollout]
    assert not any(name.startswith("VLLM") for processes in others for name in processes.environment)


@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
def test_ppo_learns_from_what_vllm_generates(ray_cluster, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in "abcdabcd"))
    config = tiny_config(
        tmp_path / "run",
        tmp_path,
        run={"num_steps": 3},
        policy={"model": LLAMA},
        rollouts={"engine": "vllm"},
        learner={"optimizer": {"learning_rate": 1e-2}},
    )
    with Run(config) as run:
        train(run)
    rows = pq.read_table(tmp_path / "run" / "metrics.parquet").to_pylist()
    assert [row["policy_version"] for row in rows] == [1, 2, 3]
    assert max(row["learner_logprob_gap"] for row in rows) < 1e-4, "each version reached vLLM"
    assert rows[-1]["approx_kl"] > 0
