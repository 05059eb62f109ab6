"""ray_cluster.yaml: Ray accepts it, in its variants too, and it keeps its promises about roles and safety."""

import copy
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "ray_cluster.yaml").read_text(encoding="utf-8")


@pytest.fixture
def cluster():
    return yaml.safe_load(TEXT)


def variant(name):
    """Return the sections that a commented block at the file's end puts in place of others."""
    block = TEXT.partition(f"# ==== On {name} ====\n")[2].partition("# ====")[0]
    lines = [line.removeprefix("# ").removeprefix("#") for line in block.splitlines() if not line.startswith("##")]
    return yaml.safe_load("\n".join(lines))


def _validate(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(cluster)))  # validation alone misses what preparation fills in


def _starts(cluster):
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


def test_ray_accepts_it(cluster):
    _validate(cluster)


def test_ray_accepts_it_with_gcps_sections(cluster):
    changed = cluster | variant("GCP")
    assert changed["provider"]["type"] == "gcp"
    _validate(changed)
    assert _roles(changed) == _roles(cluster)


def test_ray_accepts_it_for_machines_of_ones_own(cluster):
    left_out = ("available_node_types", "head_node_type", "max_workers")
    changed = {name: section for name, section in cluster.items() if name not in left_out} | variant(
        "machines of your own"
    )
    assert changed["provider"]["worker_ips"]
    _validate(changed)


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


def _roles(cluster):
    return {
        node["labels"]["role"]: node["resources"].get("GPU", 0) for node in cluster["available_node_types"].values()
    }


def test_the_head_has_no_gpu_and_every_role_has_some(cluster):
    nodes = cluster["available_node_types"]
    assert "GPU" not in nodes[cluster["head_node_type"]]["resources"]
    assert _roles(cluster) == {"head": 0, "rollout": 1, "reward": 1, "learner": 4}


def test_gpu_nodes_come_and_go_with_the_work(cluster):
    workers = [node for node in cluster["available_node_types"].values() if node["labels"]["role"] != "head"]
    assert all(node["min_workers"] == 0 for node in workers)
    assert sum(node["max_workers"] for node in workers) == cluster["max_workers"]


def test_the_labels_are_those_that_concord_looks_for(cluster):
    from cluster.placement import plan_placement
    from tests.run_toys import minimal_config

    placement = plan_placement(minimal_config(placement={"by_role": True}), cores=4)
    wanted = {role.labels["role"] for role in placement.all}
    assert wanted == set(_roles(cluster)) - {"head"}
    assert not any("label_selector" in role.options() for role in plan_placement(minimal_config(), cores=4).all)


def test_every_process_asks_for_the_token_and_the_dashboard_stays_on_the_head(cluster):
    starts = _starts(cluster)
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in starts[0]


def test_every_node_has_the_ray_that_concord_is_tested_with(cluster):
    version = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)
    images = [cluster["docker"]["image"], cluster["docker"]["worker_image"]]
    assert all(image.startswith(f"rayproject/ray:{version}-py311-") for image in images)
    assert f"ARG RAY_VERSION={version}\n" in (ROOT / "cluster" / "Dockerfile").read_text()


def test_what_has_to_be_edited_is_said(cluster):
    """Two values of AWS's, and nothing else that a person must find out by failing."""
    assert re.findall(r"\S*EDIT\S*", yaml.safe_dump(cluster)) == ["ami-EDIT"] * 4 + [
        "fs-EDIT.efs.us-west-2.amazonaws.com:/"
    ]
    assert TEXT.count("# EDIT: ") == 2
