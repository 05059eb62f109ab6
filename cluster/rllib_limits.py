"""What of RLlib a run has no use for, and what to use instead: refused in one line, not ignored."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from ray.rllib.callbacks.callbacks import RLlibCallback

Class = TypeVar("Class", bound=type)

CALLBACKS = ("on_algorithm_init", "on_train_result", "on_checkpoint_loaded")
"""What of an `RLlibCallback` is called."""

_POLICY = "the policy is in <run directory>/policy after the last step, or where `concord export` writes it"
_ONE_POLICY = "a run has one policy, which the learner trains; start from other weights with RLHFConfig.model(...)"

METHODS = {
    "add_module": _ONE_POLICY,
    "add_policy": _ONE_POLICY,
    "compute_actions": _POLICY,
    "compute_single_action": _POLICY,
    "evaluate_offline": "use evaluate()",
    "export_model": _POLICY,
    "export_policy_checkpoint": _POLICY,
    "export_policy_model": _POLICY,
    "from_state": "use RLHF.from_checkpoint(path)",
    "get_module": _POLICY,
    "get_policy": _POLICY,
    "get_weights": _POLICY,
    "remove_module": _ONE_POLICY,
    "remove_policy": _ONE_POLICY,
    "restore_offline_eval_runners": "a run restores its own workers",
    "restore_workers": "a run restores its own workers",
    "set_weights": _ONE_POLICY,
}
"""Methods of RLlib's algorithms -> what to use instead."""

_SETTINGS = {
    "env": "prompts(...) and reward(...)",
    "evaluation_duration": 'section("evaluation", num_prompts=...)',
    "evaluation_interval": 'section("evaluation", every=...)',
    "gamma": "algorithm(gamma=...)",
    "grad_clip": 'learners(optimizer={"max_grad_norm": ...})',
    "lr": 'learners(optimizer={"learning_rate": ...})',
    "minibatch_size": "learners(num_minibatches=...)",
    "num_cpus_for_main_process": 'section("placement", cores=...)',
    "num_env_runners": "rollouts(num_workers=...)",
    "num_epochs": "learners(epochs=...)",
    "num_gpus_per_env_runner": 'section("placement", rollout_gpus=1)',
    "num_gpus_per_learner": 'section("placement", learner_gpus=1)',
    "num_learners": "learners(num_ranks=...)",
    "seed": "run(seed=...)",
    "train_batch_size": "rollouts(prompts_per_step=..., samples_per_prompt=...)",
    "_train_batch_size_per_learner": "rollouts(prompts_per_step=..., samples_per_prompt=...)",
}
"""RLlib's settings -> what to use instead."""

_KEPT = {"sections", "class", "callbacks", *(f"callbacks_{name}" for name in CALLBACKS)}


def problems(settings: Mapping[str, Any], untouched: Mapping[str, Any]) -> Iterator[str]:
    """Yield what of RLlib's own settings was changed, and what of the callbacks would never be called.

    Args:
        settings: of an `AlgorithmConfig`, as its `to_dict` returns them.
        untouched: those of one that nobody has changed.
    """
    for name, value in settings.items():
        if name in _KEPT or name.startswith("__"):  # Tune's own
            continue
        if name not in untouched:
            yield f"{name} is neither a setting of RLlib nor a section of a run; settings are in section(name, ...)"
        elif _listed(value) != _listed(untouched[name]):
            use = f"use {_SETTINGS[name]}" if name in _SETTINGS else "leave it as it is"
            yield f"{name} must be left at {untouched[name]!r}, got {value!r}: a run has no use of RLlib's own; {use}"
    callbacks = settings["callbacks"]
    for callback in callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]:
        for name in (name for name in dir(RLlibCallback) if name.startswith("on_")):
            if name not in CALLBACKS and _function(callback, name) is not getattr(RLlibCallback, name):
                yield f"{callback.__name__} must have no {name}, which a run never calls; it has {', '.join(CALLBACKS)}"


def _listed(value: Any) -> Any:
    """Return a setting with its tuples as lists, which they are in a sweep that Tune has written and restored."""
    if isinstance(value, dict):
        return {name: _listed(part) for name, part in value.items()}
    return [_listed(part) for part in value] if isinstance(value, (list, tuple)) else value


def refusing(methods: Mapping[str, str]) -> Callable[[Class], Class]:
    """Return a decorator of classes whose methods of these names say what to use instead."""

    def decorate(algorithm: Class) -> Class:
        for name, instead in methods.items():
            setattr(algorithm, name, _refusal(name, instead))
        return algorithm

    return decorate


def _refusal(name: str, instead: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{name} must not be called, a run has nothing of RLlib's behind it; {instead}")

    return staticmethod(refuse)


def _function(callback: Any, name: str) -> Any:
    """Return a callback's function; a `functools.partial` of the class has its class inside."""
    return getattr(getattr(callback, "func", callback), name, getattr(RLlibCallback, name))
