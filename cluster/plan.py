"""`concord plan`: what a run would do, take and need, without starting anything and without torch.

Memory, placement and problems have files of their own (`memory_plan`, `bundles`, `plan_checks`), and so has the page.
"""

import json
from dataclasses import dataclass
from typing import Any

from cluster.config import RunConfig
from cluster.hardware import Hardware
from cluster.memory_plan import Part, Sizes, object_store_bytes
from cluster.model_config import UnknownSizeError, find_directory, read_shape, stored_parameters
from cluster.placement import Placement
from cluster.plan_checks import Problem, problems
from cluster.plan_layout import Layout, device_need, lay_out
from cluster.step_time import StepTime, earlier_config, estimate, has_measured
from learner.algorithm_config import AlgorithmConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that is known before a run starts."""

    layout: Layout
    sizes: Sizes | None
    problems: tuple[Problem, ...]
    step_time: StepTime | None
    notes: tuple[str, ...]
    """What was assumed, and what is not known."""

    @property
    def is_feasible(self) -> bool:
        """Whether nothing that is known keeps the run from starting."""
        return not any(problem.level == "fail" for problem in self.problems)


def make_plan(config: RunConfig, hardware: Hardware, *, calibration: str | None = None) -> Plan:
    """Return the plan of a run.

    Args:
        config: the run.
        hardware: what it would run on.
        calibration: directory of an earlier run, whose step times are scaled; None = the run itself, if it has begun.

    Raises:
        ConfigError: when `calibration` is no run directory.
    """
    sizes, notes = read_sizes(config)
    layout = lay_out(config, hardware, sizes)
    step_time = None
    if calibration is None and has_measured(config.run.dir):
        calibration = config.run.dir
    if calibration is not None and sizes is not None:
        measured, _ = read_sizes(earlier_config(calibration))
        step_time = estimate(config, sizes, measured, calibration)
        if step_time is None:
            notes.append(f"{calibration} has no finished step, so there is no step time")
        elif not 0.5 <= step_time.growth <= 2:
            notes.append(f"the step time is rough: the model measured has 1/{step_time.growth:.2g} of the parameters")
    return Plan(
        layout=layout,
        sizes=sizes,
        problems=tuple(problems(layout, sizes)),
        step_time=step_time,
        notes=(*hardware.notes, *notes),
    )


def read_sizes(config: RunConfig) -> tuple[Sizes | None, list[str]]:
    """Return the sizes of a run's models, None where the policy's is not known, and what is not known."""
    notes: list[str] = []
    model = config.policy.model
    try:
        shape = read_shape(model)
        directory = find_directory(model) if isinstance(model, str) else None
        stored = stored_parameters(directory) if directory else None
    except UnknownSizeError as error:
        return None, [f"memory is not planned: {error}"]
    judges = []
    for name, component in config.reward.components.items():
        for member in [*([component.model] if component.model else []), *component.ensemble]:
            try:
                judges.append((name, _parameters(member)))
            except UnknownSizeError as error:
                notes.append(f"reward.components.{name} is left out of memory: {error}")
    return Sizes(policy=shape, policy_parameters=stored or shape.num_parameters, judges=tuple(judges)), notes


def _parameters(model: str) -> int:
    directory = find_directory(model)
    stored = stored_parameters(directory) if directory else None
    return stored or read_shape(model).num_parameters


def batch_plan(config: RunConfig) -> dict[str, int | str]:
    """Return the numbers of one step and of the run."""
    rollouts, learner = config.rollouts, config.learner
    sequences = rollouts.prompts_per_step * rollouts.samples_per_prompt
    updates = learner.epochs * learner.num_minibatches
    per_rank = f"{sequences // learner.num_ranks}" + ("" if sequences % learner.num_ranks == 0 else " or more")
    return {
        "algorithm": _algorithm(config.algorithm),
        "prompts per step": rollouts.prompts_per_step,
        **_drawn(config),
        "samples per prompt": rollouts.samples_per_prompt,
        "sequences per step": sequences,
        "sequences per rank": f"about {per_rank}, dealt by tokens in whole groups",
        "response tokens per step": f"at most {sequences * rollouts.max_new_tokens}",
        "optimizer updates per step": updates,
        "prompts per update": f"about {rollouts.prompts_per_step / learner.num_minibatches:g}",
        "steps": config.run.num_steps,
        "optimizer updates in all": updates * config.run.num_steps,
    }


def to_json(plan: Plan) -> str:
    """Return a plan as one JSON object; sizes in bytes, times in seconds."""
    layout, sizes = plan.layout, plan.sizes
    policy: dict[str, Any] | None = None
    if sizes is not None:
        policy = {
            "model_type": sizes.policy.model_type,
            "parameters": sizes.policy_parameters,
            "reward_models": [{"component": name, "parameters": count} for name, count in sizes.judges],
            "object_store_bytes": object_store_bytes(layout.config, sizes),
        }
    step_time = plan.step_time
    return json.dumps(
        {
            "feasible": plan.is_feasible,
            "run_dir": layout.config.run.dir,
            "batch": batch_plan(layout.config),
            "hardware": {
                "source": layout.hardware.source,
                "nodes": [_node(node) for node in layout.hardware.nodes],
            },
            "models": policy,
            "processes": _processes(layout),
            "step_time": None
            if step_time is None
            else {"step_s": step_time.step_s, **{f"{k}_s": v for k, v in step_time.phases.items()},
                  "other_s": step_time.other_s, "source": step_time.source},
            "problems": [{"level": p.level, "about": p.about, "message": p.message} for p in plan.problems],
            "notes": list(plan.notes),
        },
        indent=2,
    )  # fmt: skip


def threads(config: RunConfig, placement: Placement) -> str:
    """Return whether the threads that are busy together stay within the cores."""
    rollout, reward, learner = (role.count * role.threads for role in placement.all)
    busy = max(rollout + reward, learner) if config.pipeline.max_staleness == 0 else rollout + reward + learner
    if busy <= placement.cores:
        return f"at most {busy} torch threads are busy, which stays within the cores"
    return f"up to {busy} torch threads are busy, more than there are cores: lower placement's threads or add cores"


def _node(node: Any) -> dict[str, Any]:
    return {
        "name": node.name,
        "cpus": node.cpus,
        "gpus": node.gpus,
        "gpu_bytes": node.gpu_bytes,
        "memory_bytes": node.memory_bytes,
        "labels": dict(node.labels),
    }


def _processes(layout: Layout) -> list[dict[str, Any]]:
    found = []
    for processes in layout.placement.all:
        entry: dict[str, Any] = {
            "role": processes.role,
            "count": processes.count,
            "cpus": processes.cpus,
            "gpus": processes.gpus,
            "threads": processes.threads,
            "device": processes.device,
            "nodes": [node.name for node in layout.nodes_of(processes.role)],
        }
        groups = [fit.group for fit in layout.fits if fit.group.role == processes.role]
        entry["strategy"] = groups[0].strategy if groups else "with the learner's ranks"
        if layout.memory:
            memory = layout.memory_of(processes.role)
            need, budget = device_need(layout, processes.role)
            entry |= {
                "device_bytes": _parts(memory.device),
                "host_bytes": _parts(memory.host),
                "device_needed_bytes": need if memory.device else None,
                "device_available_bytes": budget if memory.device else None,
            }
        found.append(entry)
    return found


def _parts(parts: tuple[Part, ...]) -> dict[str, int]:
    return {part.name: part.num_bytes for part in parts}


def _algorithm(algorithm: AlgorithmConfig) -> str:
    """Return e.g. `grpo: advantage group, ppo_clip, sequence_mean_token_mean, KL k3 in the loss x 0.04`."""
    kl = algorithm.kl
    penalty = f"KL {kl.estimator} in the {kl.placement} x {kl.coef:g}" if kl.coef else "no KL penalty"
    parts = (f"advantage {algorithm.advantage}", algorithm.policy_loss, algorithm.aggregation, penalty)
    return f"{algorithm.name}: {', '.join(parts)}"


def _drawn(config: RunConfig) -> dict[str, int | str]:
    """Return what dynamic sampling may draw for one step: at most all places anew in each wave."""
    sampling, num_places = config.algorithm.dynamic_sampling, config.rollouts.prompts_per_step
    if sampling is None:
        return {}
    return {"prompts drawn per step": f"{num_places} to {num_places * sampling.max_waves}, in waves"}
