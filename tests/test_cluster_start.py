"""The supervised start of a policy: trained once, also by runs that begin at the same time."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

from cluster.config import RunConfig, load
from cluster.start import prepare_policy


def test_runs_that_begin_together_train_their_start_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path))
    policy = load(RunConfig, "examples/randomwalks.yaml", []).policy
    trained = []

    def train(sft):
        trained.append(sft.output)
        time.sleep(0.2)  # the other one has asked by now
        os.makedirs(sft.output)
        with open(os.path.join(sft.output, "config.json"), "w") as file:
            file.write("{}")

    with ThreadPoolExecutor(2) as pool:
        starts = list(pool.map(lambda _: prepare_policy(policy, seed=0, train=train), range(2)))
    assert starts == [trained[0]] * 2
    assert len(trained) == 1
