"""RLlib's conventions for a Concord run: configure fluently, `build_algo()`, `train()`, save, restore, Tune.

    from cluster.rllib import RLHFConfig

    config = RLHFConfig().from_yaml("examples/randomwalks.yaml").rollouts(samples_per_prompt=16).run(num_steps=30)
    algorithm = config.build_algo()
    print(algorithm.train()["score_mean"])
    algorithm.stop()

A thin shell: the run, its processes and its directory are those of `concord train`, one `train()` is one step of the
loop, and RLlib's own workers, learners and modules are not used.  The run directory is the checkpoint: one that RLlib
writes holds the configuration and names that directory, and restoring continues from the run's own last checkpoint
there, which is written whenever RLlib saves and as `run.checkpoint_every` says.  RLlib writes its checkpoints as
pickles; load only your own.

A Tune trial is a run whose directory is the trial's own (`Result.path`), whatever `run.dir` says.  Its processes live
in the trial's placement group, which `default_resource_request` describes, and `placement.cores` says how many cores a
trial has: on two cores, two trials with one each work at a time.

    tune.Tuner(RLHF, param_space=config.learners(optimizer={"learning_rate": tune.grid_search([1e-4, 4e-4])})).fit()
"""

import os
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.callbacks.utils import make_callback
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger
from ray.tune import PlacementGroupFactory

from cluster.checks import check_run
from cluster.config import ConfigError, RunConfig, load, validate
from cluster.loop import train_step
from cluster.placement import Placement, cluster_cpus, plan_placement
from cluster.remote_storage import open_storage
from cluster.rllib_limits import METHODS, problems, refusing
from cluster.run import Run, Stopped


class RLHFConfig(AlgorithmConfig):
    """A run's configuration in RLlib's manner: each method changes settings of one section and returns the config.

    A section's settings are those of the YAML file; nested ones are merged.  Nothing is checked before `build_algo()`,
    except what `from_yaml` reads.
    """

    def __init__(self, algo_class: type | None = None) -> None:
        self.sections: dict[str, Any] = {}
        super().__init__(algo_class=algo_class or RLHF)
        del self.__dict__["model"]  # settings of RLlib's own networks, which would hide the method of that name

    def from_yaml(self, path: str, overrides: tuple[str, ...] = ()) -> "RLHFConfig":
        """Take all settings of a YAML file, with `section.field=value` overrides.

        Raises:
            ConfigError: naming each wrong key or value.
        """
        self.sections = load(RunConfig, path, overrides).model_dump(mode="json")
        return self

    def section(self, name: str, **settings: Any) -> "RLHFConfig":
        """Change settings of any section, e.g. `section("evaluation", every=5)`."""
        self.sections = _merged(self.sections, {name: settings})
        return self

    def model(self, model: str | dict[str, Any], **settings: Any) -> "RLHFConfig":  # type: ignore[override]
        """Choose the policy: a path, or an architecture with random weights; other settings of section `policy`."""
        return self.section("policy", model=model, **settings)

    def prompts(self, **settings: Any) -> "RLHFConfig":
        """Change settings of section `prompts`."""
        return self.section("prompts", **settings)

    def rollouts(self, **settings: Any) -> "RLHFConfig":
        """Change settings of section `rollouts`."""
        return self.section("rollouts", **settings)

    def reward(self, **settings: Any) -> "RLHFConfig":
        """Change settings of section `reward`."""
        return self.section("reward", **settings)

    def learners(self, **settings: Any) -> "RLHFConfig":
        """Change settings of section `learner`."""
        return self.section("learner", **settings)

    def algorithm(self, **settings: Any) -> "RLHFConfig":
        """Change settings of section `algorithm`."""
        return self.section("algorithm", **settings)

    def run(self, **settings: Any) -> "RLHFConfig":
        """Change settings of section `run`; without `dir` the run directory is inside RLlib's log directory."""
        return self.section("run", **settings)

    def run_config(self, default_dir: str) -> RunConfig:
        """Return the run's checked configuration.

        Raises:
            ConfigError: naming each wrong key or value.
        """
        sections = _merged({"run": {"dir": default_dir}}, self.sections)
        return validate(RunConfig, sections, where="RLHFConfig")

    def validate(self) -> None:
        """Check the run's settings, and that RLlib's own, which concern environments, are left alone.

        Raises:
            ConfigError: naming each wrong key or value.
        """
        if found := list(problems(self.to_dict(), RLHFConfig().to_dict())):
            raise ConfigError("\n".join(found))
        self.run_config(default_dir="unknown until built")

    def get_default_rl_module_spec(self) -> Any:
        """Return None: the policy is no RLModule."""

    def get_default_learner_class(self) -> Any:
        """Return None: the learner is Concord's."""


@refusing(METHODS)
class RLHF(Algorithm):
    """A Concord run as an RLlib algorithm; `train()` is one step."""

    config: RLHFConfig
    metrics: MetricsLogger
    _run: Run | None = None
    _steps: Iterator[int]

    @classmethod
    def get_default_config(cls) -> RLHFConfig:
        """Return a config without settings."""
        return RLHFConfig()

    @classmethod
    def default_resource_request(cls, config: Any) -> PlacementGroupFactory:
        """Name every process of a trial, so that one which has begun has all it needs."""
        try:
            settings = config if isinstance(config, RLHFConfig) else cls.get_default_config().update_from_dict(config)
            run_config = settings.run_config(default_dir="unknown until built")
        except ConfigError:
            # Raised here it would end all trials; this one will fail with it alone, when it is built.
            return PlacementGroupFactory([{"CPU": 0.01}])
        return _trial_request(plan_placement(run_config, cores=cluster_cpus()[0] if ray.is_initialized() else None))

    def setup(self, config: Any) -> None:
        """Open the run and evaluate its start; what RLlib would build itself is absent."""
        self._leave_out_rllibs_own()
        self._set_up_metrics()
        sections = self.config.sections
        # Chosen now, and in the config from now on, so that a checkpoint names the directory.
        sections["run"] = sections.get("run", {}) | self._directory(sections.get("run", {}))
        run_config = self.config.run_config(default_dir=sections["run"]["dir"])
        check_run(run_config)
        if self._storage is not None:
            _wait_for_former(run_config)
        self._run = Run(run_config)
        try:
            self._run.evaluate_start()
        except BaseException:
            self._run.close()
            raise
        self._steps = self._run.steps()
        self._iteration = self._run.step
        make_callback(
            "on_algorithm_init",
            self.callbacks,
            self.config.callbacks_on_algorithm_init,
            kwargs={"algorithm": self, "metrics_logger": self.metrics},
        )

    def training_step(self) -> None:
        """Run one step of the loop; after the last one the policy is exported.

        Raises:
            RuntimeError: when all steps are done.
            Stopped: when a stop is requested; the last finished step is saved.
        """
        run = self._open_run
        try:
            self._train_step(run)
        except Stopped:
            run.save_stopped()
            raise

    def evaluate(self, parallel_train_future: Any = None) -> dict[str, float]:
        """Evaluate the current policy on the held-out prompts; return metrics named `eval_...`.

        Raises:
            ConfigError: when there are none.
        """
        run = self._open_run
        if not run.held_out:
            raise ConfigError('evaluation.prompts must be set for evaluate(), got none; use section("evaluation", ...)')
        return run.evaluate(run.step)

    def step(self) -> dict[str, Any]:
        """Return the step's results; `done` tells Tune that the run is over."""
        run = self._open_run
        if self._storage is not None and self._is_done:  # Tune was ended before it heard so, and asks again
            run.finish()
            self._iteration = run.step - 1
            return {**run.recorder.rows[-1], "done": True}
        return {**super().step(), "done": self._is_done}

    def cleanup(self) -> None:
        """End every process of the run, the checkpoint under way completed."""
        run, self._run = self._run, None
        if run is not None:
            run.__exit__(None, None, None)

    def restore_env_runners(self, env_runner_group: Any) -> list[int]:
        """Return none: the run recovers its own workers."""
        return []

    def get_checkpointable_components(self) -> list[Any]:
        """Return none: the run directory holds the state."""
        return []

    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Save the run at the end of its last step, and return where its state is."""
        run = self._open_run
        run.save()
        return {"run_dir": run.storage.shown(), "step": run.step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Check that this is the run that was saved: it has already continued from its own newest checkpoint.

        Raises:
            ValueError: when it is another run.
        """
        run = self._open_run
        if state["run_dir"] != run.storage.shown():
            raise ValueError(
                f"the run to restore must be in {state['run_dir']}, got run.dir {run.storage.shown()}; "
                "use RLHF.from_checkpoint, and no scheduler of Tune that copies trials (PBT)"
            )
        self._iteration = run.step  # which Tune has just set to that of its own checkpoint

    def restore_from_path(self, path: Any, *args: Any, **kwargs: Any) -> None:
        """Read the saved state; RLlib's own version would go on to synchronise workers it does not have here."""
        Checkpointable.restore_from_path(self, path, *args, **kwargs)

    def __repr__(self) -> str:
        if self._run is None:
            return "RLHF"
        return f"RLHF({self._run.storage.name})"  # before each line that Ray prints of a trial

    def _directory(self, settings: dict[str, Any]) -> dict[str, str]:
        """Return `run.dir`: in a Tune trial the trial's own, elsewhere the configured one, by default RLlib's.

        Raises:
            ConfigError: when Tune keeps trials in an object store.
        """
        if self._storage is None:
            return {"dir": settings.get("dir", os.path.join(self.logdir, "run"))}
        if self._storage.storage_filesystem.type_name != "local":
            raise ConfigError(
                "Tune's storage_path must be a directory that all nodes mount, got "
                f"{self._storage.storage_fs_path}; an object store is for runs that Tune does not start"
            )
        os.chdir(os.environ["TUNE_ORIG_WORKING_DIR"])  # which Tune has left, and where relative paths start
        return {"dir": self._storage.trial_fs_path}

    @property
    def _open_run(self) -> Run:
        if self._run is None:
            raise RuntimeError("an algorithm must not be used after stop(); continue the run with RLHF.from_checkpoint")
        return self._run

    def _train_step(self, run: Run) -> None:
        step = next(self._steps, None)
        if step is None:
            raise RuntimeError(f"train() must be called at most run.num_steps times, got one more ({run.step})")
        for name, value in train_step(run, step).items():
            self.metrics.log_value(name, value, reduce="mean", window=1)  # the default would be a moving average
        if self._is_done:
            run.finish()

    @property
    def _is_done(self) -> bool:
        return self._open_run.step >= self._open_run.config.run.num_steps

    def _leave_out_rllibs_own(self) -> None:
        self.callbacks = [make() for make in _as_list(self.config.callbacks_class)]
        self.evaluation_config = self.config.get_evaluation_config_object()
        absent = "env_runner_group eval_env_runner_group learner_group offline_data local_replay_buffer spaces"
        connectors = "_aggregator_actor_manager env_to_module_connector module_to_env_connector"
        for name in f"{absent} {connectors}".split():
            setattr(self, name, None)


def _trial_request(placement: Placement) -> PlacementGroupFactory:
    bundles = placement.trial_bundles()
    labels = [dict(group.labels) for group, _ in bundles]
    # The first, empty one is the trial's own process, which only waits for the others.
    selectors: dict[str, Any] = {"bundle_label_selector": labels} if any(labels) else {}
    return PlacementGroupFactory([{}, *(group.resources for group, _ in bundles)], **selectors)


def _wait_for_former(config: RunConfig) -> None:
    """Give a trial's former process, which Tune paused or takes for failed, time to close the run directory."""
    storage, deadline = open_storage(config.run.dir), time.monotonic() + config.placement.ready_timeout_s
    while storage.holder() is not None and time.monotonic() < deadline:
        time.sleep(0.5)


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    both = {name: _merged(old[name], new[name]) for name in new if _is_dict(old.get(name)) and _is_dict(new[name])}
    return {**old, **new, **both}


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
