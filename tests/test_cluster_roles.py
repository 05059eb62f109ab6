"""placement.by_role: on a cluster of nodes with roles, every process is on a node of its own role."""

import json
import subprocess
import sys

import pytest
import yaml

from tests.job_cluster import ROOT
from tests.run_toys import tiny_config

SCRIPT = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_actors
from cluster.config import RunConfig, load
from cluster.loop import train
from cluster.placement import PlacementError
from cluster.run import Run

head = {"num_cpus": 4, "labels": {"role": "head"}, "include_dashboard": True}
cluster = Cluster(initialize_head=True, head_node_args=head)
try:
    for role in ("learner", "reward", "rollout"):
        cluster.add_node(num_cpus=1, labels={"role": role})
    ray.init(address=cluster.address, namespace="concord")
    roles = {node["NodeID"]: node["Labels"]["role"] for node in ray.nodes()}
    with Run(load(RunConfig, sys.argv[1])) as run:
        train(run)
        actors = list_actors(detail=True, filters=[("state", "=", "ALIVE")])
        placed = {actor.class_name: roles[actor.node_id] for actor in actors}
    try:
        Run(load(RunConfig, sys.argv[1], sys.argv[2:]))
        refused = ""
    except PlacementError as error:
        refused = str(error)
    print("PLACED", json.dumps([placed, refused]))
finally:
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_process_is_on_a_node_of_its_role(tmp_path):
    """The head has most CPUs, and takes none of them; more ranks than the learner's node holds are refused by name."""
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": letter}) for letter in "abcd") + "\n")
    config = tiny_config(
        tmp_path / "run", tmp_path,
        run={"dir": str(tmp_path / "run"), "num_steps": 1},
        placement={"by_role": True},
    )  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    more = [f"run.dir={tmp_path / 'other'}", "learner.num_ranks=5", "placement.ready_timeout_s=3"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "train.yaml"), *more],
        cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    placed, refused = json.loads(done.stdout.rpartition("PLACED ")[2])
    assert placed == {"RolloutWorker": "rollout", "RewardWorker": "reward", "_Rank": "learner"}
    assert "5 x {'CPU': 1.0} for the learner (PACK) must be free within placement.ready_timeout_s = 3 s" in refused
    assert "learner.num_ranks must be at most 1 here, got 5" in refused
    assert "what is left is 1 node with 1 CPUs (role=learner)" in refused
