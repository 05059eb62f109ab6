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
    note = (
        f"{placement.cores} cores. Rollout and reward workers are busy together, the learner while they wait: "
        "busy torch threads stay within the cores. Nothing was started."
    )
    return Group(batch, processes, note)
