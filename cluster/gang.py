"""The learner's ranks as the driver calls them: one call goes to all, tables travel by reference.

A gang does not outlive a failure: `cluster/recovery.py` starts another one and brings it to where this one was.
"""

from collections.abc import Sequence
from itertools import count
from typing import Any, Protocol

import pyarrow as pa
import ray

from actors.streams import StreamOffer
from actors.weights import Publication, WeightTransport
from cluster.config import RunConfig
from cluster.deliveries import delivered, fetched
from cluster.placement import Processes
from cluster.ranks import GangError, GangPlace, Ranks
from cluster.storage import StorageError
from learner.batch import StepPlan
from learner.learner import LearnerRank, Skipped
from learner.outlets import Streamed
from learner.state import Share, write


class _Rank(LearnerRank):
    """A rank as Ray calls it: references become tables only where they are arguments of their own."""

    def load_state(self, directory: str) -> None:
        """Call it on this host's copy."""
        super().load_state(fetched(directory))

    def export_policy(self, directory: str) -> None:
        """Call it, and bring the policy where it is wanted."""
        with delivered(directory) as local:
            super().export_policy(local)

    def step_on(self, plan: StepPlan, *tables: pa.Table) -> dict[str, float] | Skipped:
        """Call `step`."""
        return self.step(tables, plan)


class Gang(Protocol):
    """What recovery needs of a gang; every method raises GangError when a rank failed, died or was late."""

    def wait_ready(self) -> None:
        """Wait until every rank is ready."""

    def check(self) -> None:
        """Make sure that every rank lives and answers."""

    def step(self, plan: StepPlan, tables: Sequence[Any]) -> dict[str, float] | Skipped:
        """Learn from SCORED tables, or references to them."""

    def publish(
        self, version: int, incarnation: int, *, offer: StreamOffer | None, base: int | None
    ) -> Publication | Streamed:
        """Make the weights available, or send them to whom they are offered."""

    def stream_endpoint(self) -> tuple[str, int]:
        """Return where the receivers of a stream meet the ranks."""

    def begin_save(self, directory: str) -> None:
        """Copy the state, and begin to write it into a directory."""

    def finish_save(self) -> list[str]:
        """Wait until it is written, and return the names of its files; OSError when it could not be."""

    def load(self, directory: str) -> None:
        """Restore what was saved."""

    def export(self, directory: str) -> None:
        """Write the policy; OSError when it could not be."""

    def rest(self) -> None:
        """Have the ranks give back what memory they can."""

    def close(self) -> None:
        """End all ranks, without waiting for any."""


class LearnerGang:
    """Every method is one call to all ranks, with one deadline; see `LearnerRank` for what they do.

    Args:
        ranks: the processes.
        timeout_s: longest wait for a call.
        ready_timeout_s: longest wait for the processes to be placed and ready.

    Raises:
        GangError: from every method, when a rank failed, died or was late.
    """

    def __init__(self, ranks: Ranks, *, timeout_s: float, ready_timeout_s: float) -> None:
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._ready_timeout_s = ready_timeout_s

    def wait_ready(self) -> None:
        """Wait until every rank has built its model and joined the process group."""
        calls = [rank.ping.remote() for rank in self._ranks.actors]
        remedy = "raise placement.ready_timeout_s if it is just slow, and let ranks reach each other on every port"
        self._ranks.gather(calls, what="starting the learner", timeout_s=self._ready_timeout_s, remedy=remedy)

    def check(self) -> None:
        """Make sure that every rank lives and answers."""
        self._call([rank.ping.remote() for rank in self._ranks.actors], "looking after the learner")

    def step(self, plan: StepPlan, tables: Sequence[Any]) -> dict[str, float] | Skipped:
        """Learn from one batch: SCORED tables, or references to them, in any order."""
        references = [ray.put(table) if isinstance(table, pa.Table) else table for table in tables]
        calls = [rank.step_on.remote(plan, *references) for rank in self._ranks.actors]
        answer: dict[str, float] | Skipped = self._call(calls, f"learning step {plan.step}")[0]
        return answer

    def publish(
        self, version: int, incarnation: int, *, offer: StreamOffer | None, base: int | None
    ) -> Publication | Streamed:
        """Gather the weights and make them available as `version`, or send them to whom a stream is offered.

        Args:
            version: of the policy.
            incarnation: of the learner.
            offer: who gets it as a stream, which may fail while the ranks are well; None = whoever fetches it.
            base: the version that all receivers have, where changes to it would do.
        """
        calls = [rank.publish.remote(version, incarnation, offer=offer, base=base) for rank in self._ranks.actors]
        announced: Publication | Streamed = self._call(calls, f"publishing version {version}")[0]
        return announced

    def stream_endpoint(self) -> tuple[str, int]:
        """Return the address and port where the receivers of a stream meet rank 0."""
        call = self._ranks.actors[0].stream_endpoint.remote()
        endpoint: tuple[str, int] = self._call([call], "opening the stream's store")[0]
        return endpoint

    def begin_save(self, directory: str) -> None:
        """Copy the state into the ranks' memory, from where they write it into a directory meanwhile."""
        self._call([rank.begin_save.remote(directory) for rank in self._ranks.actors], "gathering the learner's state")

    def finish_save(self) -> list[str]:
        """Wait until the state is written; return the names of all ranks' files.

        Raises:
            OSError: when a rank could not write; the ranks are as good as before.
            StorageError: when a rank does not see the directory.
        """
        try:
            names = self._write(
                [rank.finish_save.remote() for rank in self._ranks.actors], "writing the learner's state"
            )
        except FileNotFoundError as error:
            raise StorageError(
                f"the checkpoint's directory must be there for every rank, and is not ({error}); "
                "choose a run.dir on a file system that all nodes share, or in an object store"
            ) from error
        return [name for of_rank in names for name in of_rank]

    def load(self, directory: str) -> None:
        """Restore what was saved."""
        self._call([rank.load_state.remote(directory) for rank in self._ranks.actors], "restoring the learner")

    def export(self, directory: str) -> None:
        """Write the policy as a directory that `from_pretrained` loads.

        Raises:
            OSError: when the disk does not take it; the ranks are as good as before.
        """
        self._write([rank.export_policy.remote(directory) for rank in self._ranks.actors], "exporting the policy")

    def rest(self) -> None:
        """Have the ranks give back what memory they can; the next call takes it again."""
        self._call([rank.rest.remote() for rank in self._ranks.actors], "resting the learner")

    def close(self) -> None:
        """End the ranks."""
        self._ranks.close()

    def _call(self, references: list[Any], what: str) -> list[Any]:
        return self._ranks.gather(references, what=what, timeout_s=self._timeout_s)

    def _write(self, references: list[Any], what: str) -> list[Any]:
        """Wait for a call in which ranks write; what the disk refuses is no reason to start them again."""
        try:
            return self._call(references, what)
        except GangError as error:
            if isinstance(error.cause, OSError):
                raise error.cause from error
            raise


class LearnerStarter:
    """Starts a gang, and another one in its place when it is lost.

    Args:
        config: the run's.
        model_dir: where the ranks' model comes from, as they take it (`RunStorage.model_for_workers`).
        processes: how many, with what.
        transport: for the weights they publish.
        run: a name for Ray's dashboard, unique on the cluster: its ranks are `walks-3fa2c1/learner-0.0`.
        guests: rollout workers that share the ranks' GPUs.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        model_dir: Any,
        processes: Processes,
        transport: WeightTransport,
        run: str,
        guests: Processes | None = None,
    ) -> None:
        self._config = config
        self._model_dir = model_dir
        self._transport = transport
        self._run = run
        self._lives = count()
        self.place = GangPlace(processes, ready_timeout_s=config.placement.ready_timeout_s, guests=guests)
        """Where the ranks go."""

    def __call__(self) -> LearnerGang:
        """Start the processes, without waiting for them.

        Raises:
            PlacementError: when the cluster cannot hold them in time.
            GangError: when their node fails meanwhile.
        """
        timeout_s, life = self._config.pipeline.timeout_s, next(self._lives)
        ranks = Ranks(
            _Rank,
            self._arguments,
            self.place,
            group_timeout_s=timeout_s,
            name=lambda rank: f"{self._run}/learner-{rank}.{life}",
        )
        return LearnerGang(ranks, timeout_s=timeout_s, ready_timeout_s=self._config.placement.ready_timeout_s)

    def close(self) -> None:
        """Free the place."""
        self.place.close()

    def _arguments(self, rank: int) -> dict[str, Any]:
        config, processes = self._config, self.place.processes
        return {
            "model_dir": self._model_dir,
            "policy": config.policy,
            "learner": config.learner,
            "algorithm": config.algorithm,
            "temperature": config.rollouts.temperature,
            "max_new_tokens": config.rollouts.max_new_tokens,
            "credit": config.reward.credit,
            "max_staleness": config.pipeline.max_staleness,
            "bucket_bytes": config.pipeline.weights.bucket_bytes,
            "sends_delta": config.pipeline.weights.delta,
            "seed": config.run.seed,
            "rank": rank,
            "world_size": processes.count,
            "device": processes.device,
            "num_threads": processes.threads,
            "transport": self._transport,
            "write_state": write_share,
        }


def write_share(share: Share, directory: str) -> list[str]:
    """Write a rank's share of a checkpoint, as `learner.state.write`; below a URL, return when it has been brought."""
    with delivered(directory, has_hashes=True) as local:
        return write(share, local)
