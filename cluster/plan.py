"""`concord plan`: what a run would do and take, without starting anything."""

from rich.console import Group, RenderableType
from rich.table import Table

from cluster.config import RunConfig
from cluster.placement import Placement, plan_placement
from learner.algorithm_config import AlgorithmConfig


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


def _threads(config: RunConfig, placement: Placement) -> str:
    """Return whether the threads that are busy together stay within the cores."""
    rollout, reward, learner = (role.count * role.threads for role in placement.all)
    busy = max(rollout + reward, learner) if config.pipeline.max_staleness == 0 else rollout + reward + learner
    if busy <= placement.cores:
        return f"at most {busy} torch threads are busy, which stays within the cores"
    return f"up to {busy} torch threads are busy, more than there are cores: lower placement's threads or add cores"


def render(config: RunConfig, placement: Placement | None = None) -> RenderableType:
    """Return tables for the terminal."""
    placement = placement or plan_placement(config)
    batch = Table("batch", "", title=f"plan of {config.run.dir}", title_justify="left")
    for name, value in batch_plan(config).items():
        batch.add_row(name, str(value))
    processes = Table("process", "count", "CPUs each", "GPUs each", "torch threads each", "device")
    processes.add_row("driver", "1", "0", "0", "1", "cpu")
    for role in placement.all:
        processes.add_row(
            role.role, str(role.count), f"{role.cpus:g}", f"{role.gpus:g}", str(role.threads), role.device
        )
    together = (
        "Rollout and reward workers are busy together, the learner while they wait"
        if config.pipeline.max_staleness == 0
        else "All of them are busy together"
    )
    note = f"{placement.cores} cores. {together}; {_threads(config, placement)}. Nothing was started."
    return Group(batch, processes, note)
