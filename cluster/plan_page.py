"""How a plan looks in a terminal."""

from rich.console import Group, RenderableType
from rich.table import Table

from cluster.bundles import describe
from cluster.memory_plan import ProcessMemory, object_store_bytes
from cluster.plan import Plan, batch_plan, threads
from cluster.plan_layout import device_need, gigabytes


def render(plan: Plan) -> RenderableType:
    """Return tables for the terminal."""
    layout, config = plan.layout, plan.layout.config
    batch = Table("batch", "", title=f"plan of {config.run.dir}", title_justify="left")
    for name, value in batch_plan(config).items():
        batch.add_row(name, str(value))
    parts: list[RenderableType] = [batch, _processes(plan)]
    if layout.memory:
        parts.append(_memory(plan))
    parts.append(_step_time(plan))
    parts += [
        f"{layout.hardware.source}: {describe(layout.hardware.nodes)}. {_together(plan)}",
        *map(_note, plan.notes),
    ]
    parts += [
        f"[{'red' if p.level == 'fail' else 'yellow'}]{p.level}[/] {p.about}: {_plain(p.message)}"
        for p in plan.problems
    ]
    return Group(*parts)


def verdict(plan: Plan) -> str:
    """Return what the tables come to."""
    return "The run can start." if plan.is_feasible else "The run cannot start as it is."


def _processes(plan: Plan) -> Table:
    layout = plan.layout
    table = Table("process", "count", "CPUs each", "GPUs each", "torch threads each", "device", "where")
    table.add_row("driver", "1", "0", "0", "1", "cpu", "head")
    where = {fit.group.role: f"{fit.group.strategy}, {_num_nodes(len(set(fit.nodes)))}" for fit in layout.fits}
    for role in layout.placement.all:
        table.add_row(
            role.role,
            str(role.count),
            f"{role.cpus:g}",
            f"{role.gpus:g}",
            str(role.threads),
            role.device,
            where.get(role.role, "on the learner's GPUs"),
        )
    return table


def _memory(plan: Plan) -> Table:
    layout = plan.layout
    assert plan.sizes is not None, "memory is planned where sizes are known"
    table = Table("process", "memory", "needs", "has", "of it", title_justify="left")
    table.title = f"policy: {plan.sizes.policy.model_type}, {plan.sizes.policy_parameters / 1e6:,.1f} M parameters"
    for memory in layout.memory:
        if memory.device:
            need, budget = device_need(layout, memory.role)
            table.add_row(
                memory.role, "GPU", gigabytes(need), "?" if budget is None else gigabytes(budget), _parts(memory, True)
            )
        table.add_row(memory.role, "main, each", gigabytes(memory.host_bytes), "", _parts(memory, False))
    store = object_store_bytes(layout.config, plan.sizes)
    sizes = [node.object_store_bytes for node in layout.hardware.nodes if node.object_store_bytes is not None]
    kinds = "rollouts" if layout.config.pipeline.weights.is_shared else "weights, rollouts"
    table.add_row("object store", "main, a node", gigabytes(store), gigabytes(min(sizes)) if sizes else "", kinds)
    return table


def _parts(memory: ProcessMemory, on_device: bool) -> str:
    parts = memory.device if on_device else memory.host
    return ", ".join(f"{part.name} {gigabytes(part.num_bytes)}" for part in parts)


def _step_time(plan: Plan) -> str:
    time = plan.step_time
    if time is None:
        return "Step time: not known; --calibration=RUN_DIR takes it from an earlier run on such hardware"
    phases = ", ".join(f"{name} {seconds:.3g}" for name, seconds in time.phases.items())
    total_h = time.step_s * plan.layout.config.run.num_steps / 3600
    step = f"{time.step_s:.3g} s ({phases}, other {time.other_s:.3g})"
    return f"Step time: about {step}, {total_h:.3g} h in all, scaled from {time.source}"


def _together(plan: Plan) -> str:
    config, placement = plan.layout.config, plan.layout.placement
    together = (
        "Rollout and reward workers are busy together, the learner while they wait"
        if config.pipeline.max_staleness == 0
        else "All of them are busy together"
    )
    return f"{placement.cores} cores. {together}; {threads(config, placement)}."


def _note(text: str) -> str:
    return f"note: {_plain(text)}"


def _plain(text: str) -> str:
    """Return a text whose brackets are no markup."""
    return text.replace("[", "\\[")


def _num_nodes(count: int) -> str:
    return f"{count} node{'s' * (count != 1)}"
