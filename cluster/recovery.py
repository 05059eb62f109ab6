"""A learner that survives its ranks: a lost gang is started again and brought to where the lost one was.

Knows which step the ranks have learnt.  When a rank dies, hangs or fails, all of them are ended, a new gang loads the
newest whole checkpoint (or starts as the run did), learns the steps since then again from the redo log, and the call
that failed is made once more.  An example: checkpoint 4, ranks at the end of step 6, a death in step 7 -> load 4, learn
5 and 6 again, then 7.  Whether the lost gang had applied step 7 does not matter: what it held is gone.

The controller goes the same way: it is rebuilt from the checkpoint and observes every step that is learnt again.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from actors.streams import StreamOffer
from actors.weights import Publication
from cluster.gang import Gang
from cluster.pipeline import Batch
from cluster.ranks import GangError
from cluster.redo import RedoLog
from cluster.storage import RunStorage
from learner.controller import StepController
from learner.learner import MismatchError, Skipped
from learner.outlets import Streamed
from learner.state import StateError

MAX_SKIPPED = 3
"""So many skipped steps in a row end the run."""

_CONTROLLER = "controller.json"
_MISTAKES = (ValueError, TypeError, MismatchError, StateError)
"""Failures of a rank that would come again in the next gang."""

Answer = TypeVar("Answer")


class NonFiniteRunError(RuntimeError):
    """Too many steps in a row were skipped; the message names them and the remedy."""


class ReplayError(RuntimeError):
    """A step that is learnt again does not go as it went the first time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What became of a step."""

    metrics: dict[str, float]
    skipped: Skipped | None
    """Why nothing was learnt; None where it was."""


@dataclass(slots=True, kw_only=True)
class _Saving:
    """A checkpoint under way."""

    step: int
    files: dict[str, str]
    """Name -> text, beside what the ranks write."""
    is_gathered: bool = False


class RecoveringLearner:
    """Trains the policy on batches, hands out its weights, saves and restores its state, whatever the ranks go through.

    Args:
        start: starts a gang, without waiting for it.
        make_controller: builds the driver's side of learning as it is before the first step.
        storage: where checkpoints are.
        redo: what each step learnt from.
        incarnations: numbers for the lineages of published weights; each is taken once.
        max_restarts: failures in a row, without a completed call in between, that are survived.
        say: told of each recovery.
    """

    def __init__(
        self,
        start: Callable[[], Gang],
        make_controller: Callable[[], StepController],
        storage: RunStorage,
        redo: RedoLog,
        *,
        incarnations: Iterator[int],
        max_restarts: int,
        say: Callable[[str], None],
    ) -> None:
        self.controller = make_controller()
        self.step_done = 0
        """The last step whose end the ranks are at."""
        self.num_restarts = 0
        self.num_replayed = 0
        """Steps that were learnt again."""
        self.incarnation = next(incarnations)
        self._start = start
        self._make_controller = make_controller
        self._storage = storage
        self._redo = redo
        self._incarnations = incarnations
        self._max_restarts = max_restarts
        self._say = say
        self._skipped: set[int] = set()
        self._saving: _Saving | None = None
        self._num_failures = 0
        self._gang: Gang | None = None
        with contextlib.suppress(GangError):  # the first call starts it again, and tells why where it cannot
            self._gang = start()

    def wait_ready(self) -> None:
        """Wait until every rank is ready."""
        self._ask(lambda gang: gang.wait_ready())

    def restore(self, step: int, directory: str) -> None:
        """Continue from a checkpoint, at the end of its step."""
        self.step_done = step
        first = iter([directory])

        def load(gang: Gang) -> None:
            # A gang that was started again is there already, and this checkpoint may have turned out to be damaged.
            if (whole := next(first, None)) is not None:
                self._load(gang, whole)

        self._ask(load)

    def step(self, batch: Batch) -> StepResult:
        """Learn from one batch, which is in the redo log already.

        A step whose loss or gradient is not finite is skipped: ranks and controller are as before it.

        Raises:
            NonFiniteRunError: when it is one of too many in a row.
        """
        assert batch.step == self.step_done + 1, f"step {batch.step} cannot follow step {self.step_done}"
        started = time.perf_counter()
        first = iter([batch.tables])

        def learn(gang: Gang) -> StepResult:
            # What a node that died held is gone with it, so another attempt reads the rows from disk.
            tables = next(first, None) or self._redo.read(batch.step).tables
            result = self._learn(gang, batch.step, batch.samples, tables)
            if result.skipped is not None and result.skipped.has_changed:
                self._undo(gang)
            return result

        result = self._ask(learn)
        self.step_done = batch.step
        if result.skipped is not None:
            self._skipped.add(batch.step)
            self._stop_if_hopeless(result.skipped)
        return StepResult(metrics=result.metrics | {"learn_s": time.perf_counter() - started}, skipped=result.skipped)

    def publish(self, version: int, *, base: int | None = None) -> Publication:
        """Gather the weights and make them available as `version` of the current incarnation.

        Args:
            version: of the policy.
            base: the version that changes may be sent to; None = everything is sent.
        """
        publication = self._ask(lambda gang: gang.publish(version, self.incarnation, offer=None, base=base))
        assert isinstance(publication, Publication), "nothing was offered"
        return publication

    def stream(self, offer: StreamOffer, *, base: int | None) -> str:
        """Send the weights to whom they are offered; return why not all of them can have them, empty where all can."""
        streamed = self._ask(lambda gang: gang.publish(offer.version, offer.incarnation, offer=offer, base=base))
        assert isinstance(streamed, Streamed), "it was offered"
        return streamed.failure

    def stream_endpoint(self) -> tuple[str, int]:
        """Return the address and port where the receivers of a stream meet the ranks."""
        return self._ask(lambda gang: gang.stream_endpoint())

    def check(self) -> None:
        """Make sure that all ranks live; what is published next is of a new incarnation."""
        self._ask(lambda gang: gang.check())
        self.incarnation = next(self._incarnations)

    def export(self, directory: str) -> None:
        """Write the policy as a directory that `from_pretrained` loads; OSError when the disk does not take it."""
        self._ask(lambda gang: gang.export(directory))

    def rest(self) -> None:
        """Have the ranks give back what memory they can; the next call takes it again."""
        self._ask(lambda gang: gang.rest())

    def begin_checkpoint(self, files: Mapping[str, str]) -> None:
        """Copy the state at the end of the last step; the ranks write it while the loop goes on.

        Args:
            files: name -> text, to be saved beside it.

        Raises:
            OSError: when the disk does not take it; the checkpoint is abandoned and nothing else has changed.
        """
        assert self._saving is None, "one checkpoint is written at a time"
        state = {"controller": self.controller.state_dict(), "skipped": sorted(self._skipped)}
        self._saving = _Saving(step=self.step_done, files={**files, _CONTROLLER: json.dumps(state)})
        with self._abandoning():
            self._ask(self._gather)

    def finish_checkpoint(self) -> int | None:
        """Wait until the checkpoint under way is whole; return its step, None where there is none.

        Must be called before the next step: ranks that die while they write are brought back to the end of that step.

        Raises:
            OSError: see `begin_checkpoint`.
            StorageError: when some of the ranks' files cannot be seen from here.
        """
        if self._saving is None:
            return None
        step = self._saving.step
        with self._abandoning():
            files = self._ask(self._write)
            self._storage.commit_checkpoint(step, files=files)
        self._saving = None
        return step

    def close(self) -> None:
        """End the ranks; a checkpoint under way is abandoned."""
        if self._gang is not None:
            self._gang.close()
            self._gang = None
        if self._saving is not None:
            self._abandon()

    def _ask(self, call: Callable[[Gang], Answer]) -> Answer:
        """Call the gang, another one where it fails, until the call completes or the restarts are used up."""
        while True:
            try:
                answer = call(self._gang or self._recovered())
            except GangError as error:
                self._lose(error)
            else:
                self._num_failures = 0
                return answer

    def _lose(self, error: GangError) -> None:
        if self._gang is not None:
            self._gang.close()
            self._gang = None
        if self._saving is not None:
            self._saving.is_gathered = False
        self._num_failures += 1
        if isinstance(error.cause, _MISTAKES):
            raise error
        if self._num_failures > self._max_restarts:
            raise GangError(
                f"the learner must get through with {self._max_restarts} restarts and did not; the last failure was: "
                f"{error}; mend the cause and continue the run with the same command, or raise pipeline.max_restarts",
                error.cause,
            ) from error
        self._say(f"the learner is started again after step {self.step_done}: {error}")

    def _recovered(self) -> Gang:
        """Return a new gang that is where the lost one was."""
        self.num_restarts += 1
        gang = self._start()
        try:
            gang.wait_ready()
            self._rewind(gang, self._storage.newest_checkpoint())
        except BaseException:
            gang.close()
            raise
        self._gang = gang
        return gang

    def _rewind(self, gang: Gang, checkpoint: tuple[int, str] | None) -> None:
        """Bring ranks and controller to the end of the last step, from a checkpoint or a fresh start."""
        self.incarnation = next(self._incarnations)
        self.controller = self._make_controller()
        if checkpoint is not None:
            self._load(gang, checkpoint[1])
        for step in range(checkpoint[0] + 1 if checkpoint else 1, self.step_done + 1):
            if step not in self._skipped:
                self._learn_again(gang, step)

    def _undo(self, gang: Gang) -> None:
        """Bring the ranks to the end of the last step after half of another one."""
        checkpoint = self._storage.newest_checkpoint()
        if checkpoint is not None:
            self._rewind(gang, checkpoint)
            return
        gang.close()  # only new ranks are as they were before the first step
        self._gang = None
        self._recovered()

    def _load(self, gang: Gang, directory: str) -> None:
        gang.load(directory)
        state = json.loads(self._storage.read_text(directory, _CONTROLLER))
        self.controller.load_state_dict(state["controller"])
        self._skipped.update(state["skipped"])

    def _learn_again(self, gang: Gang, step: int) -> None:
        batch = self._redo.read(step)
        try:
            result = self._learn(gang, step, batch.samples, batch.tables)
        except GangError as error:
            if not isinstance(error.cause, _MISTAKES):
                raise
            raise ReplayError(
                f"step {step} must be learnt again as it was the first time, and was not: {error}; use the code and "
                "packages it was learnt with, or remove its rows from rollouts/ to have it generated again, and "
                "continue the run with the same command"
            ) from error
        self.num_replayed += 1
        if result.skipped is not None:
            raise ReplayError(
                f"step {step} must be learnt again as it was the first time, and was skipped: {result.skipped.reason}; "
                "continue the run with the same command, which accounts for its groups anew"
            )

    def _learn(self, gang: Gang, step: int, samples: pa.Table, tables: Sequence[Any]) -> StepResult:
        before = self.controller.state_dict()
        plan = self.controller.plan(step, samples)
        answer = gang.step(plan, tables)
        metrics = self.controller.metrics(plan, samples)
        if isinstance(answer, Skipped):
            self.controller.load_state_dict(before)
            return StepResult(metrics=metrics | {"skipped": 1.0}, skipped=answer)
        self.controller.observe(plan, samples, answer)
        return StepResult(metrics=answer | metrics | {"skipped": 0.0}, skipped=None)

    def _stop_if_hopeless(self, skipped: Skipped) -> None:
        last = range(self.step_done - MAX_SKIPPED + 1, self.step_done + 1)
        if self._skipped.issuperset(last):
            raise NonFiniteRunError(
                f"loss and gradient must be finite in at least one of {MAX_SKIPPED} steps in a row, and were not in "
                f"steps {last[0]} to {last[-1]}: {skipped.reason}; the newest checkpoint is from before; look at these "
                "steps' rows in rollouts/, and try a lower learner.optimizer.learning_rate in another run.dir"
            )

    def _gather(self, gang: Gang) -> None:
        assert self._saving is not None, "a checkpoint is under way"
        directory = self._storage.begin_checkpoint(self._saving.step)
        for name, text in self._saving.files.items():
            self._storage.write_text(text, directory, name)
        gang.begin_save(directory)
        self._saving.is_gathered = True

    def _write(self, gang: Gang) -> list[str]:
        assert self._saving is not None, "a checkpoint is under way"
        if not self._saving.is_gathered:
            self._gather(gang)
        return gang.finish_save()

    @contextlib.contextmanager
    def _abandoning(self) -> Iterator[None]:
        """Leave nothing of the checkpoint under way when the block fails."""
        try:
            yield
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        assert self._saving is not None, "a checkpoint is under way"
        step, self._saving = self._saving.step, None
        self._storage.abandon_checkpoint(step)
