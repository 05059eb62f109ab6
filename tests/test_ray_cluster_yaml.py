"""ray_cluster.yaml: Ray's own validator accepts it, and what it promises about roles and safety holds."""

import copy
import os

import pytest
import yaml

PATH = os.path.join(os.path.dirname(os.path.dirname(__file__)), "ray_cluster.yaml")


@pytest.fixture
def cluster():
    with open(PATH, encoding="utf-8") as file:
        return yaml.safe_load(file)


def _validate(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(cluster)))  # validation alone misses what preparation fills in


def _starts(cluster):
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


def test_ray_accepts_it(cluster):
    _validate(cluster)


def test_the_validator_catches_mistakes(cluster):
    """Planted bugs: a misspelled key of a node type, and more workers than the cluster allows."""
    misspelled = copy.deepcopy(cluster)
    misspelled["available_node_types"]["rollout"]["lables"] = {"role": "rollout"}
    with pytest.raises(Exception, match="lables"):
        _validate(misspelled)
    crowded = copy.deepcopy(cluster)
    crowded["available_node_types"]["rollout"]["min_workers"] = 100
    with pytest.raises(Exception, match="max_workers"):
        _validate(crowded)


def test_the_head_has_no_gpu_and_every_role_has_some(cluster):
    nodes = cluster["available_node_types"]
    assert "GPU" not in nodes[cluster["head_node_type"]]["resources"]
    roles = {node["labels"]["role"]: node["resources"].get("GPU", 0) for node in nodes.values()}
    assert roles == {"head": 0, "rollout": 1, "reward": 1, "learner": 4}


def test_every_process_asks_for_the_token_and_the_dashboard_stays_on_the_head(cluster):
    starts = _starts(cluster)
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in starts[0]
