"""The processes of a run at its newest checkpoint: what training and evaluation alone have in common."""

import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import count
from typing import Any, Literal

import pyarrow as pa
import ray

from actors.cache import cache_directory
from actors.config import PromptsConfig
from actors.policy import PromptEncoder, load_tokenizer, max_positions
from actors.prompts import DrawnPrompt, PromptSource, fitting
from actors.rollout_worker import RolloutWorker
from actors.streams import StreamOffer
from actors.weights import WeightTransport
from cluster.config import ConfigError, RunConfig
from cluster.distribution import wire_of
from cluster.fleet import NotReadyError
from cluster.gang import LearnerStarter
from cluster.growth import Growth, live_views
from cluster.ledger import Ledger, LedgerJournal, Unrecorded
from cluster.messages import Role, Weights
from cluster.pipeline import Batch, Pipeline
from cluster.pipeline_core import PipelineCore
from cluster.placement import Placement, PlacementError, Processes, join_cluster, plan_placement
from cluster.places import Places, check_trial
from cluster.pool import RayWorkers, fetch, unique_name
from cluster.processes import ProcessStatus
from cluster.progress import Display
from cluster.recovery import RecoveringLearner
from cluster.redo import RedoLog
from cluster.remote_storage import open_storage
from cluster.start import prepare_policy, train_start
from cluster.storage import StorageError
from cluster.transport import make_transport
from learner.config import SFTConfig
from learner.controller import StepController
from reward.reward_worker import RewardWorker

STATE_FILE = "run.json"


class Session:
    """Workers, learner and prompts, continued from the run directory's newest checkpoint; writes nothing there.

    Use as a context manager: leaving it ends every process.
    """

    pipeline: Pipeline
    learner: RecoveringLearner
    held_out: list[DrawnPrompt]
    _model_dir: str
    _sent_model: Any
    """The same for processes on any host."""
    _published: Weights | None = None
    _turn: str = ""
    _stream_members: tuple[str | int, ...] = ()
    _stream_epoch: int = 0
    _sources: list[PromptSource]
    _on_processes: Callable[[list[ProcessStatus]], None] | None = None

    def __init__(self, config: RunConfig, *, display: Display | None = None) -> None:
        self.config = config
        self.display = display or Display()
        self.storage = open_storage(config.run.dir)
        self.step = 0
        """The last step that is done."""
        self.redo = RedoLog(self.storage)
        self.publish_s = 0.0
        self.num_broken_streams = 0
        """Broadcasts of weights that not all workers could take part in to the end."""
        self._exit = ExitStack()
        self._exit.callback(self.display.stop)
        try:
            self._open()
        except BaseException:
            self._exit.close()
            raise

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process."""
        self._exit.close()

    def publish(self, version: int) -> None:
        """Give the learner's weights to every rollout worker as `version`."""
        started = time.perf_counter()
        base = self._published.version if self._published and self.config.pipeline.weights.delta else None
        if self.config.pipeline.weights.transport != "process_group" or not self._stream(version, base):
            self._announce(version, base)
        self.publish_s = time.perf_counter() - started

    def give_turn(self, to: Literal["rollouts", "learner"]) -> None:
        """Where both share their memory, have the others give theirs back; elsewhere do nothing."""
        if self.config.placement.colocated and self._turn != to:
            (self.pipeline.rest if to == "learner" else self.learner.rest)()
            self._turn = to

    def _announce(self, version: int, base: int | None = None) -> None:
        publication = self.learner.publish(version, base=base)
        self.pipeline.publish(publication)
        self._published = Weights(incarnation=publication.incarnation, version=version)

    def _stream(self, version: int, base: int | None) -> bool:
        """Broadcast the weights to the workers that are there; return whether all of them could have them."""
        endpoint = self.learner.stream_endpoint()
        weights = Weights(incarnation=self.learner.incarnation, version=version)
        is_next = base is not None and self._published == replace(weights, version=base)

        def make(members: tuple[str, ...]) -> StreamOffer:
            if self._stream_members != (*endpoint, *members):
                self._stream_epoch += 1
            self._stream_members = (*endpoint, *members)
            return StreamOffer(
                epoch=self._stream_epoch,
                address=endpoint[0],
                port=endpoint[1],
                members=members,
                version=version,
                incarnation=weights.incarnation,
                timeout_s=self.config.pipeline.weights.timeout_s,
                wire=wire_of(self.config),
            )

        offer = self.pipeline.offer(weights, make, base=self._published if is_next else None)
        if offer is None:
            return False
        failure = self.learner.stream(offer, base=base if is_next else None)
        if failure:
            self._stream_members = ()  # the next stream has a group of its own
            self.num_broken_streams += 1
            self.display.say(f"version {version} goes through the object store: {failure}")
            return False
        self._published = weights
        return True

    def answer_held_out(self, version: int) -> tuple[Batch, dict[str, float]]:
        """Answer and judge the held-out prompts with the current policy; return them with metrics named `eval_...`."""
        with self.display.phase(f"evaluating version {version} on {len(self.held_out)} held-out prompts"):
            batch = self.pipeline.evaluate(version, self.held_out)
        for group, reason in batch.quarantined.items():
            self.display.say(f"left out of the evaluation: {group}, {reason}")
        metrics = self.learner.controller.evaluation_metrics(batch.samples)
        return batch, {f"eval_{name}": value for name, value in metrics.items()}

    def tables(self, batch: Batch) -> pa.Table:
        """Return a batch's SCORED rows, for the run directory."""
        references = list(batch.tables)
        return pa.concat_tables(fetch(references, what="reading a batch", timeout_s=self.config.pipeline.timeout_s))

    def _open(self) -> None:
        """Start everything; `Run` claims its directory before and opens its records after."""
        config = self.config
        self._check_engine()
        if not ray.is_initialized():
            self._exit.callback(ray.shutdown)
        with self.display.phase("joining Ray"):
            cores, node_cores = join_cluster(config)
            placement = plan_placement(config, cores=cores, node_cores=node_cores)
            check_trial(placement)
        has_checkpoints = bool(self.storage.checkpoints())
        checkpoint = self.storage.newest_checkpoint()
        if has_checkpoints and checkpoint is None:
            self._begin_without_checkpoint()
        self.step = checkpoint[0] if checkpoint else 0
        with self.display.phase("preparing the policy"):
            self._model_dir = self._starting_model(placement, checkpoint)
            self._sent_model = self.storage.model_for_workers(self._model_dir)
        prompts = self._read_prompts()
        with self.display.phase("starting workers"):
            self._start_processes(placement, prompts)
        if checkpoint is not None:
            self._restore(*checkpoint)
        self.publish(self.step)

    def _check_engine(self) -> None:
        if self.config.rollouts.engine == "vllm":
            if importlib.util.find_spec("vllm") is None:
                raise ConfigError(
                    "rollouts.engine must be one that is installed, got vllm, which is not; install Concord's extra "
                    "`vllm`, or use torch"
                )
            self.display.say("vLLM draws its own random numbers: what is generated again has other bits")

    def _say_of_learner(self, text: str) -> None:
        """Be told that the learner is started again."""
        self.display.say(text)

    def _begin_without_checkpoint(self) -> None:
        """Decide what to do where every checkpoint is damaged."""
        raise StorageError(
            f"{self.storage.shown()} must hold a whole checkpoint, and all it has are damaged; continue its training "
            "with `concord train`, which learns the steps in rollouts/ again"
        )

    def _journal(self) -> LedgerJournal:
        """Return where the ledger's transitions are kept for people to read."""
        return Unrecorded()

    def _incarnations(self) -> Iterator[int]:
        """Return numbers for the lineages of published weights."""
        return count()

    def _starting_model(self, placement: Placement, checkpoint: tuple[int, str] | None) -> str:
        kept = self.storage.starting_model()
        if kept is not None:
            return kept
        if checkpoint is not None:
            directory: str = self._read_state(checkpoint[1])["model_dir"]
            if os.path.isdir(directory):
                return directory
        return prepare_policy(
            self.config.policy,
            seed=self.config.run.seed,
            train=lambda sft: self._train_start(sft, placement),
        )

    def _train_start(self, sft: SFTConfig, placement: Placement) -> None:
        with self.storage.model_under_way(sft.output) as output:
            train_start(
                sft.model_copy(update={"output": output}),
                learner=placement.learner,
                ready_timeout_s=self.config.placement.ready_timeout_s,
            )

    def _fitting(self, prompts: PromptsConfig, where: str) -> PromptsConfig:
        """Return the section with a limit under which every prompt and its response fit the policy's positions."""
        config = self.config
        positions = max_positions(self._model_dir, trust_remote_code=config.policy.trust_remote_code)
        limit = (config.rollouts.max_new_tokens, "rollouts.max_new_tokens")
        try:
            return fitting(prompts, where, positions=positions, max_new_tokens=limit)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _read_prompts(self) -> PromptSource:
        config, cache = self.config, cache_directory()
        encoder = PromptEncoder(load_tokenizer(self._model_dir, trust_remote_code=config.policy.trust_remote_code))
        prompts = PromptSource(self._fitting(config.prompts, "prompts"), encoder, seed=config.run.seed, cache_dir=cache)
        self._sources, self.held_out = [prompts], []
        if config.evaluation.prompts is not None:
            section = self._fitting(config.evaluation.prompts, "evaluation.prompts")
            held_out = PromptSource(section, encoder, seed=config.run.seed, cache_dir=cache)
            self._sources.append(held_out)
            self.held_out = held_out.first(config.evaluation.num_prompts)
            if len(self.held_out) < config.evaluation.num_prompts:
                self.display.say(
                    f"evaluation.prompts has {len(self.held_out)} good rows; evaluation.num_prompts asks for "
                    f"{config.evaluation.num_prompts}"
                )
        return prompts

    def _start_processes(self, placement: Placement, prompts: PromptSource) -> None:
        config, transport = self.config, make_transport(self.config)
        name = self.storage.name
        rollout_arguments = {
            "model_dir": self._sent_model,
            "policy": config.policy,
            "rollouts": config.rollouts,
            "transport": transport,
            "run_id": name,
            "seed": config.run.seed,
            "device": placement.rollout.device,
            "num_threads": placement.rollout.threads,
            # Sooner than the worker's own deadline: lost weights are not its fault.
            "fetch_timeout_s": config.pipeline.timeout_s / 2,
            "stall_s": config.pipeline.heartbeat_s,
            "update_mode": config.pipeline.update_mode,
        }
        reward_arguments = {
            "reward": config.reward.with_absolute_paths(),
            "policy": config.policy,
            "policy_dir": self._sent_model,
            "has_reference": config.algorithm.reference.mode != "base",  # the learner has it already
            "temperature": config.rollouts.temperature,
            "device": placement.reward.device,
            "num_threads": placement.reward.threads,
        }
        specs = {
            Role.ROLLOUT: (RolloutWorker, rollout_arguments, placement.rollout),
            Role.REWARD: (RewardWorker, reward_arguments, placement.reward),
        }
        names = unique_name(name)
        starter = self._reserve_learner(placement, transport, names)
        places = Places(placement, starter.place.current, timeout_s=config.placement.ready_timeout_s)
        self._exit.callback(places.close)
        places.reserve()
        workers = RayWorkers(specs, run=names, place=places.options)
        core = PipelineCore(config, prompts=prompts, workers=workers, ledger=Ledger(), journal=self._journal())
        core.on_progress = self.display.groups
        core.say = self.display.say
        core.on_processes = self._on_processes
        self.pipeline = Pipeline(core)
        self._exit.callback(self.pipeline.close)
        self._start_learner(starter)
        self._wait_ready()
        if config.rollouts.max_workers is not None:
            self._watch_for_room(placement.rollout, places)

    def _watch_for_room(self, rollouts: Processes, places: Places) -> None:
        """Start more rollout workers where the cluster has room for them, as long as the session lasts."""
        if not places.can_grow:
            self.display.say("rollouts.max_workers has no effect here: a Tune trial has room for num_workers")
            return

        def grow(nodes: list[str], count: int) -> None:
            places.grow(nodes)
            with suppress(Exception):  # the pipeline has ended, and whoever waits for it is told why
                self.pipeline.grow(count)

        self._exit.callback(Growth(rollouts, live_views, grow).close)

    def _reserve_learner(self, placement: Placement, transport: WeightTransport, names: str) -> LearnerStarter:
        """Keep a place for the ranks before workers take one, as theirs is the hardest to find."""
        starter = LearnerStarter(
            self.config,
            model_dir=self._sent_model,
            processes=placement.learner,
            guests=placement.rollout if placement.shares_gpus else None,
            transport=transport,
            run=names,
        )
        self._exit.callback(starter.close)
        starter.place.reserve()
        return starter

    def _start_learner(self, starter: LearnerStarter) -> None:
        config = self.config

        def make_controller() -> StepController:
            return StepController(
                config.reward,
                config.learner,
                config.algorithm,
                num_steps=config.run.num_steps,
                seed=config.run.seed,
                max_new_tokens=config.rollouts.max_new_tokens,
            )

        self.learner = RecoveringLearner(
            starter,
            make_controller,
            self.storage,
            self.redo,
            incarnations=self._incarnations(),
            max_restarts=config.pipeline.max_restarts,
            say=self._say_of_learner,
        )
        self._exit.callback(self.learner.close)

    def _wait_ready(self) -> None:
        try:
            self.pipeline.wait_ready()
        except NotReadyError as error:
            raise PlacementError(
                f"{error}; the cluster has {ray.available_resources()} free of {ray.cluster_resources()}; "
                "add nodes, lower the number of workers, or raise placement.ready_timeout_s"
            ) from error
        self.learner.wait_ready()

    def _restore(self, step: int, directory: str) -> None:
        # A rank may have died while it was started, and recovery have looked at the checkpoints.
        if not self.storage.exists(directory, STATE_FILE):
            raise StorageError(
                f"{self.storage.shown(directory)} must stay whole while the run starts, and was set aside as damaged; "
                "continue the run with the same command, which uses an older checkpoint"
            )
        state = self._read_state(directory)  # first: while ranks are restored, it may be set aside as damaged
        self.learner.restore(step, directory)
        self.pipeline.load_state_dict(state["pipeline"])
        self.display.say(f"continuing after step {self.step}")

    def _read_state(self, checkpoint: str) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.storage.read_text(checkpoint, STATE_FILE))
        return state
