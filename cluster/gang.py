"""The learner as the loop sees it: a gang of ranks plus the driver-side controller that plans each step.

The controller composes scores and fixes the plan once for all ranks; tables travel by reference.
"""

import json
import os
import time
from typing import Any

import pyarrow as pa

from actors.weights import Publication, WeightTransport
from cluster.config import RunConfig
from cluster.pipeline import Batch
from cluster.placement import Processes
from cluster.pool import Gang
from learner.batch import StepPlan
from learner.controller import StepController
from learner.learner import LearnerRank

_CONTROLLER = "controller.json"


class _Rank(LearnerRank):
    """A rank as Ray calls it: references become tables only where they are arguments of their own."""

    def step_on(self, plan: StepPlan, *tables: pa.Table) -> dict[str, float]:
        """Call `step`."""
        return self.step(tables, plan)


class LearnerGang:
    """Trains the policy on batches, hands out its weights, saves and restores its state."""

    def __init__(self, config: RunConfig, *, model_dir: str, processes: Processes, transport: WeightTransport) -> None:
        self.controller = StepController(
            config.reward, config.learner, config.algorithm, num_steps=config.run.num_steps, seed=config.run.seed
        )
        self._timeout_s = config.pipeline.timeout_s

        def arguments(rank: int) -> dict[str, Any]:
            return {
                "model_dir": model_dir,
                "policy": config.policy,
                "learner": config.learner,
                "algorithm": config.algorithm,
                "temperature": config.rollouts.temperature,
                "seed": config.run.seed,
                "rank": rank,
                "world_size": processes.count,
                "device": processes.device,
                "num_threads": processes.threads,
                "transport": transport,
            }

        self._gang = Gang(_Rank, arguments, processes, ready_timeout_s=config.placement.ready_timeout_s)
        self._ready_timeout_s = config.placement.ready_timeout_s

    def wait_ready(self) -> None:
        """Wait until every rank has built its model and joined the process group."""
        ready = [rank.ping.remote() for rank in self._gang.ranks]
        self._gang.call(ready, what="starting the learner", timeout_s=self._ready_timeout_s)

    def step(self, batch: Batch) -> dict[str, float]:
        """Train on one batch; return the step's metrics."""
        started = time.perf_counter()
        plan = self.controller.plan(batch.step, batch.samples)
        calls = [rank.step_on.remote(plan, *batch.tables) for rank in self._gang.ranks]
        metrics: dict[str, float] = self._gang.call(calls, what=f"step {batch.step}", timeout_s=self._timeout_s)[0]
        metrics |= self.controller.metrics(plan, batch.samples)
        self.controller.observe(plan, batch.samples)
        return metrics | {"learn_s": time.perf_counter() - started}

    def publish(self, version: int, *, incarnation: int = 0) -> Publication:
        """Gather the weights and make them available as `version`."""
        calls = [rank.publish.remote(version, incarnation) for rank in self._gang.ranks]
        publication: Publication = self._gang.call(
            calls, what=f"publishing version {version}", timeout_s=self._timeout_s
        )[0]
        return publication

    def save(self, directory: str) -> None:
        """Write the ranks' and the controller's state into a directory."""
        calls = [rank.save_state.remote(directory) for rank in self._gang.ranks]
        self._gang.call(calls, what="saving the learner", timeout_s=self._timeout_s)
        with open(os.path.join(directory, _CONTROLLER), "w", encoding="utf-8") as file:
            json.dump(self.controller.state_dict(), file)

    def load(self, directory: str) -> None:
        """Restore what `save` wrote."""
        calls = [rank.load_state.remote(directory) for rank in self._gang.ranks]
        self._gang.call(calls, what="restoring the learner", timeout_s=self._timeout_s)
        with open(os.path.join(directory, _CONTROLLER), encoding="utf-8") as file:
            self.controller.load_state_dict(json.load(file))

    def export(self, directory: str) -> None:
        """Write the policy as a directory that `from_pretrained` loads."""
        calls = [rank.export_policy.remote(directory) for rank in self._gang.ranks]
        self._gang.call(calls, what="exporting the policy", timeout_s=self._timeout_s)

    def close(self) -> None:
        """End the ranks."""
        self._gang.close()
