"""The pipeline as the loop sees it: one thread that owns prompts, ledger, leases and workers, and requests to it."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from actors.prompts import DrawnPrompt
from actors.streams import StreamOffer
from actors.weights import Publication
from cluster.groups import Batch
from cluster.messages import Weights
from cluster.pipeline_core import PipelineCore

__all__ = ["Batch", "Pipeline"]

_CLOSING_S = 30.0


class Pipeline:
    """Asks, and waits for answers; the work is done by `core` in a thread of its own.

    Waiting can be interrupted by a signal; the pipeline goes on working meanwhile.
    """

    def __init__(self, core: PipelineCore) -> None:
        self._core = core
        self._is_closing = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="pipeline", daemon=True)
        self._thread.start()

    def wait_ready(self) -> None:
        """Wait until every worker is up.

        Raises:
            FleetError: when one cannot start, or not in time.
        """
        self._ask(self._core.ready).result()

    def take_batch(self, step: int) -> Batch:
        """Return the step's judged groups, drawn at the first call.

        Raises:
            WeightsLostError, WeightsWantedError: publish the weights again, then ask again.
            FleetError: no worker is left.
            RetriesError: the machinery failed a group too often.
            DataError: too many groups failed through their own fault.
        """
        batch: Batch = self._ask(self._core.batch, step).result()
        return batch

    def evaluate(self, version: int, prompts: Sequence[DrawnPrompt]) -> Batch:
        """Answer and judge held-out prompts with fixed random numbers; the training ledger does not know of them.

        Raises:
            WeightsLostError, FleetError, RetriesError, DataError: see `take_batch`.
        """
        batch: Batch = self._ask(self._core.evaluation, version, prompts).result()
        return batch

    def replay_batch(self, batch: Batch) -> None:
        """Account for a batch that was read from the redo log."""
        self._ask(self._core.replay, batch)

    def publish(self, publication: Publication) -> None:
        """Make a version the one that everything is generated with from now on; workers fetch it when they can."""
        weights = Weights(incarnation=publication.incarnation, version=publication.version)
        base = None if publication.base is None else replace(weights, version=publication.base)
        self._ask(self._core.publish, weights, publication, base)

    def offer(
        self, weights: Weights, make: Callable[[tuple[str, ...]], StreamOffer], *, base: Weights | None
    ) -> StreamOffer | None:
        """Make a version that is about to be broadcast the one that everything is generated with from now on.

        Args:
            weights: the version.
            make: members -> the offer, which each of them is given.
            base: what they must have; None = anything.

        Returns:
            The offer; None where no worker can take part.
        """
        offer: StreamOffer | None = self._ask(self._core.offer, weights, make, base)
        return offer

    def grow(self, count: int) -> None:
        """Start up to so many more rollout workers: the cluster has room for them."""
        self._ask(self._core.grow, count)

    def rest(self) -> None:
        """Have every rollout worker give its memory back until there is something to generate again."""
        self._ask(self._core.rest).result()

    def settle(self, batch: Batch, *, dropped: str | None = None) -> dict[str, int]:
        """End a batch's groups, TRAINED or DROPPED for a reason; return the ledger's counts, which add up."""
        counts: dict[str, int] = self._ask(self._core.settle, batch, dropped)
        return counts

    def counts(self) -> dict[str, int]:
        """Return the ledger's counts."""
        counts: dict[str, int] = self._ask(self._core.counts)
        return counts

    def fault_counts(self) -> dict[str, int]:
        """Return how often things went wrong in this process's life, by name."""
        counts: dict[str, int] = self._ask(self._core.fault_counts)
        return counts

    def usage(self) -> dict[str, float]:
        """Return metrics of the time since the last call: idle shares with reasons, queues, memory of the workers."""
        usage: dict[str, float] = self._ask(self._core.usage)
        return usage

    def process_figures(self) -> dict[str, float]:
        """Return figures of single workers, busy shares those of the last `usage`."""
        figures: dict[str, float] = self._ask(self._core.process_figures)
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for the checkpoint: how things stand without what was drawn ahead."""
        state: dict[str, Any] = self._ask(self._core.state_dict)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a checkpoint stopped."""
        self._ask(self._core.load_state_dict, state)

    def close(self) -> None:
        """End the workers and the thread; a second call does nothing."""
        self._is_closing.set()
        self._core.ask(lambda: None)  # wakes the thread
        self._thread.join(_CLOSING_S)

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        future = self._core.ask(function, *arguments)
        if self._failure is not None:  # looked at after the asking, so that nothing slips in behind the thread's end
            self._core.fail(self._failure)
        return future.result()

    def _run(self) -> None:
        ended = RuntimeError("the pipeline has ended")
        try:
            while not self._is_closing.is_set():
                self._core.advance()
            self._failure = ended
        except BaseException as error:  # whoever waits for the pipeline gets it
            self._failure = error
        finally:
            try:
                self._core.close()
            finally:
                self._core.fail(self._failure or ended)
