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

Tune moves each trial into a directory of its own; RAY_CHDIR_TO_TRIAL_DIR=0 lets relative paths keep their meaning.
"""

import os
from collections.abc import Iterator
from typing import Any

from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger
from ray.tune import PlacementGroupFactory

from cluster.checks import check_run
from cluster.config import RunConfig, load, validate
from cluster.loop import train_step
from cluster.placement import plan_placement
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
        """Check the run's settings; RLlib's own concern environments, which a run does not have."""
        self.run_config(default_dir="unknown until built")

    def get_default_rl_module_spec(self) -> Any:
        """Return None: the policy is no RLModule."""

    def get_default_learner_class(self) -> Any:
        """Return None: the learner is Concord's."""


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
        """Name every process that Tune must make room for inside a trial; the learner places its ranks itself."""
        settings = config if isinstance(config, RLHFConfig) else cls.get_default_config().update_from_dict(config)
        placement = plan_placement(settings.run_config(default_dir="unknown until built"))
        workers = [
            {"CPU": processes.cpus} | ({"GPU": processes.gpus} if processes.gpus else {})
            for processes in placement.pools
            for _ in range(processes.count)
        ]
        return PlacementGroupFactory([{}, *workers])

    def setup(self, config: Any) -> None:
        """Open the run and evaluate its start; what RLlib would build itself is absent."""
        self._leave_out_rllibs_own()
        self._set_up_metrics()
        sections = self.config.sections
        # Chosen now, and in the config from now on, so that a checkpoint names the directory.
        sections["run"] = {"dir": os.path.join(self.logdir, "run"), **sections.get("run", {})}
        run_config = self.config.run_config(default_dir=sections["run"]["dir"])
        check_run(run_config)
        self._run = Run(run_config)
        self._run.evaluate_start()
        self._steps = self._run.steps()
        self._iteration = self._run.step

    def training_step(self) -> None:
        """Run one step of the loop; after the last one the policy is exported.

        Raises:
            RuntimeError: when all steps are done.
            Stopped: when a stop is requested; the last finished step is saved.
        """
        assert self._run is not None, "RLlib calls training_step after setup"
        try:
            self._train_step(self._run)
        except Stopped:
            self._run.save_stopped()
            raise

    def step(self) -> dict[str, Any]:
        """Return the step's results; `done` tells Tune that the run is over."""
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
        assert self._run is not None, "RLlib saves after setup"
        self._run.save()
        return {"run_dir": self._run.storage.directory, "step": self._run.step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Check that this is the run that was saved: it has already continued from its own checkpoint.

        Raises:
            ValueError: when it is another run.
        """
        assert self._run is not None, "RLlib restores after setup"
        if state["run_dir"] != self._run.storage.directory:
            raise ValueError(
                f"the run to restore must be in {state['run_dir']}, got run.dir {self._run.storage.directory}; "
                "use RLHF.from_checkpoint"
            )

    def restore_from_path(self, path: Any, *args: Any, **kwargs: Any) -> None:
        """Read the saved state; RLlib's own version would go on to synchronise workers it does not have here."""
        Checkpointable.restore_from_path(self, path, *args, **kwargs)

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
        assert self._run is not None
        return self._run.step >= self._run.config.run.num_steps

    def _leave_out_rllibs_own(self) -> None:
        self.callbacks = [make() for make in _as_list(self.config.callbacks_class)]
        self.evaluation_config = self.config.get_evaluation_config_object()
        absent = "env_runner_group eval_env_runner_group learner_group offline_data local_replay_buffer spaces"
        connectors = "_aggregator_actor_manager env_to_module_connector module_to_env_connector"
        for name in f"{absent} {connectors}".split():
            setattr(self, name, None)


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    both = {name: _merged(old[name], new[name]) for name in new if _is_dict(old.get(name)) and _is_dict(new[name])}
    return {**old, **new, **both}


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
