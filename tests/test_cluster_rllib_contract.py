"""What the RLlib shell relies on in Ray beyond its public interface: the first Ray that changes it fails here, by name.

`RLHF.setup` replaces `Algorithm.setup` and keeps most of the other methods, so these must find all they read.
"""

import ast
import inspect
import textwrap

import pytest
from ray.air.execution.resources.placement_group import PlacementGroupAcquiredResources
from ray.rllib.algorithms.algorithm import Algorithm, TrainIterCtx
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.callbacks.utils import make_callback
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger
from ray.runtime_context import RuntimeContext
from ray.train._internal.storage import StorageContext
from ray.tune import PlacementGroupFactory, Trainable
from ray.util.placement_group import placement_group

from cluster.rllib import RLHF, RLHFConfig
from cluster.rllib_limits import CALLBACKS, METHODS

NOT_SET = {
    "config": "Algorithm.__init__ has made an RLHFConfig of it already",
    "remote_requests_in_flight": "of env runners' samples",
    "offline_eval_runner_group": "guarded by hasattr where it is read",
    "evaluation_dataset": "of Algorithm.evaluate, which RLHF replaces",
    "reward_estimators": "of Algorithm.evaluate, which RLHF replaces",
    "_aggregator_actor_to_learner": "of IMPALA's aggregators",
}
"""Attributes that `Algorithm.setup` sets and the shell does not, with the reason."""

KEPT = (
    *(Algorithm.step, Algorithm._run_one_training_iteration, Algorithm._compile_iteration_results),
    *(Algorithm.log_result, Algorithm.save_checkpoint, Algorithm.load_checkpoint, Algorithm.get_ctor_args_and_kwargs),
    *(Trainable.train, Trainable.save, Trainable.restore, Trainable.stop, Trainable.get_auto_filled_metrics),
    *(Trainable.log_result, Trainable._report_class_trainable_checkpoint, TrainIterCtx),
)
"""What `train()`, `save()`, `restore()` and `stop()` run of Ray's own."""

OLD_STACK = {"_run_one_training_iteration_old_api_stack", "_compile_iteration_results_old_api_stack"}

INHERITED = {
    *("export_model", "from_checkpoint", "get_checkpoint", "get_config", "get_ctor_args_and_kwargs", "log_result"),
    *("get_default_policy_class", "get_metadata", "is_actor", "load_checkpoint", "merge_algorithm_configs", "reset"),
    *("get_auto_filled_metrics", "get_current_ip_pid", "reset_config", "resource_help", "restore", "restore_from_path"),
    *("save", "save_checkpoint", "save_to_path", "set_state", "stop", "train", "train_buffered", "validate_env"),
    *("evaluation_workers", "workers"),  # which say themselves that they are gone
}
"""Public methods that mean for a run what they mean for RLlib."""


def _tree(thing):
    return ast.parse(textwrap.dedent(inspect.getsource(thing)))


def _of_self(thing, context, owner="self"):
    """Names of the attributes of `self` that a function or class reads (ast.Load) or sets (ast.Store)."""
    return {
        node.attr
        for node in ast.walk(_tree(thing))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, context) and ast.unparse(node.value) == owner
    }


def _own(algorithm, name):
    """A method of a class and of the classes it extends, down to Ray's Algorithm."""
    line = algorithm.__mro__[: algorithm.__mro__.index(Algorithm) + 1]
    return [vars(kind)[name] for kind in line if name in vars(kind)]


def left_out():
    """Attributes that the shell's setup sets in the place of Ray's."""
    shell = RLHF.__new__(RLHF)
    shell.config = RLHFConfig()
    before = set(vars(shell))
    shell._leave_out_rllibs_own()
    return set(vars(shell)) - before


def check_setup(algorithm):
    found = {name for setup in _own(algorithm, "setup") for name in _of_self(setup, ast.Store)}
    new, gone = found - left_out() - set(NOT_SET), (left_out() | set(NOT_SET)) - found
    assert not new, (
        f"Algorithm.setup sets {new}, and RLHF.setup, which replaces it, does not: set it, or add to NOT_SET"
    )
    assert not gone, f"Algorithm.setup no longer sets {gone}, which RLHF._leave_out_rllibs_own and NOT_SET speak of"


def check_reads(methods):
    made = _of_self(Algorithm.__init__, ast.Store) | _of_self(Trainable.__init__, ast.Store) | left_out()
    for method in methods:
        read = _of_self(method, ast.Load) if method is not TrainIterCtx else _of_self(method, ast.Load, "self.algo")
        missing = {name for name in read - made - OLD_STACK if not hasattr(RLHF, name)}
        assert not missing, f"{method.__qualname__}, which RLHF keeps, reads {missing}, which RLHF.setup does not set"


def check_methods(algorithm):
    public = {
        name
        for kind in algorithm.__mro__
        if kind.__module__.startswith(("ray.", "tests")) or kind.__module__ == __name__
        for name, value in vars(kind).items()
        if not name.startswith("_") and (callable(value) or isinstance(value, (classmethod, staticmethod)))
    }
    unknown = public - INHERITED - set(METHODS) - set(vars(RLHF))
    assert not unknown, f"Algorithm has {unknown}: override it in RLHF, refuse it in METHODS, or add to INHERITED"
    assert set(METHODS) <= public, f"Algorithm no longer has {set(METHODS) - public}, which METHODS refuses"


def check_overrides(algorithm):
    for name, own in vars(RLHF).items():
        theirs = next((vars(kind)[name] for kind in algorithm.__mro__ if name in vars(kind)), None)
        if name.startswith("_") or name in METHODS or not inspect.isfunction(own) or theirs is None:
            continue
        wanted = inspect.signature(theirs).parameters.values()
        has = inspect.signature(own).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in has.values())
        new = {p.name for p in wanted if p.name not in has and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        assert takes_all or not new, f"Algorithm.{name} takes {new}, and RLHF's own does not"


def check_arguments(function, names, use):
    missing = names - set(inspect.signature(function).parameters)
    assert not missing, f"{function.__qualname__} no longer takes {missing}, which the shell uses for {use}"


def check_source(thing, texts, use):
    source = " ".join(inspect.getsource(thing).split())
    missing = [text for text in texts if text not in source]
    assert not missing, f"{thing.__qualname__} no longer has {missing}, which the shell relies on for {use}"


def test_ray_is_as_the_shell_expects():
    check_setup(Algorithm)
    check_reads(KEPT)
    check_methods(Algorithm)
    check_overrides(Algorithm)


ARGUMENTS = [
    (make_callback, {"callback_name", "callbacks_objects", "callbacks_functions", "kwargs"}, "on_algorithm_init"),
    (MetricsLogger.log_value, {"key", "value", "reduce", "window"}, "results that are no moving averages"),
    (Checkpointable.restore_from_path, {"path"}, "restoring without env runners"),
    (placement_group, {"bundles", "strategy", "bundle_label_selector"}, "the bundles of a trial"),
    (PlacementGroupFactory.__init__, {"bundles", "strategy", "kwargs"}, "the bundles of a trial"),
    (Algorithm.default_resource_request, {"config"}, "the bundles of a trial"),
    (AlgorithmConfig.update_from_dict, {"config_dict"}, "what Tune hands over"),
]

SOURCES = [
    (PlacementGroupAcquiredResources, ["placement_group_capture_child_tasks=True"], "finding that it is in a trial"),
    (Trainable._setup_logdir, ['setdefault("TUNE_ORIG_WORKING_DIR", os.getcwd())'], "relative paths in a trial"),
    (Trainable.__init__, ["self._storage = storage", "self._setup_logdir()"], "a trial's run directory"),
    (StorageContext.__init__, ["self.storage_filesystem", "self.storage_fs_path"], "a trial's run directory"),
    (Trainable.train, ["self._iteration += 1"], "continuing to count where the run's checkpoint is"),
    (Trainable.restore, ["self._iteration = checkpoint_metrics.get("], "set_state, which sets it again"),
]


def test_arguments_that_the_shell_passes():
    for function, names, use in ARGUMENTS:
        check_arguments(function, names, use)


def test_lines_of_ray_that_the_shell_stands_on():
    for thing, texts, use in SOURCES:
        check_source(thing, texts, use)


def test_names_that_the_shell_uses():
    assert isinstance(StorageContext.trial_fs_path, property), "used for a trial's run directory"
    assert hasattr(RuntimeContext, "should_capture_child_tasks_in_placement_group"), (
        "used to find that it is in a trial"
    )
    assert "model" in vars(AlgorithmConfig()), "RLHFConfig deletes this attribute: it would hide the method model()"
    hooks = {name for name in dir(RLlibCallback) if name.startswith("on_")}
    assert set(CALLBACKS) <= hooks, "called by RLHF or by the methods that it keeps"
    request = PlacementGroupFactory([{}, {"CPU": 0.5}], bundle_label_selector=[{"role": "learner"}])
    assert request.head_bundle_is_empty, "a trial's own process has no bundle"
    assert request.bundles == [{"CPU": 0.5}], "so the ranks' bundles are the first ones"


class _NewAttribute(Algorithm):
    def setup(self, config):
        super().setup(config)
        self.rollout_buffer = []


class _NewMethod(Algorithm):
    def collect(self):
        """A method that RLHF does not know."""


class _NewArgument(Algorithm):
    def evaluate(self, parallel_train_future=None, num_episodes=1):
        """RLHF's own takes no num_episodes."""


def _new_read(self):
    return self.rollout_buffer


def _without_window(self, key, value, *, reduce="mean"):
    """A log_value that could only average over all time."""


PLANTED = {
    "setup sets more": (check_setup, (_NewAttribute,), "sets {'rollout_buffer'}"),
    "a kept method reads more": (check_reads, ((*KEPT, _new_read),), "reads {'rollout_buffer'}"),
    "a new method": (check_methods, (_NewMethod,), "has {'collect'}"),
    "a new argument": (check_overrides, (_NewArgument,), "takes {'num_episodes'}"),
    "an argument is gone": (check_arguments, (_without_window, {"window"}, "results"), "no longer takes {'window'}"),
    "a line is gone": (check_source, (Trainable.train, ["self._iteration -= 1"], "counting"), "no longer has"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_next_incompatible_ray_is_caught(name):
    check, arguments, message = PLANTED[name]
    with pytest.raises(AssertionError) as caught:
        check(*arguments)
    assert message in str(caught.value)
