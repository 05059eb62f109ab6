"""Choosing an engine: what is refused before anything starts, and what its processes are given."""

import importlib.util

import pytest

from cluster.config import ConfigError
from cluster.placement import plan_placement
from cluster.session import Session
from tests.run_toys import minimal_config


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
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
