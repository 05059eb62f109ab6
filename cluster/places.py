"""Places that a Ray cluster keeps for a run's processes, and the request for them, which has a deadline.

The learner's ranks have a placement group, and so has a pool whose workers want GPUs or certain nodes.  The learner's
is asked for first: it may need a whole node, and workers fit into what is left.  Workers that want nothing but a share
of the cores are placed by Ray one by one.

Inside a Tune trial nothing is asked for: the trial's own placement group has a bundle for each process, so that a trial
which has begun has all that it needs, and no two of them wait for what the other one holds.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from cluster.bundles import SETTINGS, BundleGroup, describe, fit
from cluster.hardware import live_nodes
from cluster.placement import Placement, PlacementError, enclosing_group

logger = logging.getLogger(__name__)

_SAY_EVERY_S = 30.0


def ask_for(group: BundleGroup, *, timeout_s: float) -> Any:
    """Return a placement group with a group's bundles; what is waited for is said every half a minute.

    Args:
        group: the bundles.
        timeout_s: longest wait; meanwhile an autoscaler may add nodes.

    Raises:
        PlacementError: when the cluster cannot hold them in time; says what is wanted, what there is, what to change.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    labels: dict[str, Any] = {"bundle_label_selector": [dict(group.labels)] * group.count} if group.labels else {}
    asked = placement_group([group.resources] * group.count, strategy=group.strategy, **labels)
    deadline = time.monotonic() + timeout_s
    while not asked.wait(max(0.01, min(_SAY_EVERY_S, deadline - time.monotonic()))):
        if time.monotonic() >= deadline:
            remove_placement_group(asked)
            raise PlacementError(_refusal(group, timeout_s))
        logger.warning("waiting for %s; free: %s", _wanted(group), describe(live_nodes(free=True)))
    return asked


def check_trial(placement: Placement) -> None:
    """Make sure, inside a Tune trial, that it has a bundle for each process: without one Ray lets it wait for ever.

    Raises:
        PlacementError: naming what the cluster lacks, or what the trial was given instead.
    """
    trial = enclosing_group()
    if trial is None:
        return
    wanted = [_rounded(group.resources) for group, _ in placement.trial_bundles()]
    given = [_rounded(bundle) for bundle in trial.bundle_specs]
    if given != wanted:
        nodes = live_nodes()
        shortages = [found.shortage for found in fit(placement.groups(nodes), nodes) if found.shortage]
        raise PlacementError(
            f"the trial's bundles must be those of its processes, {wanted}, got {given}: "
            + (shortages[0] if shortages else "leave a trial's resources to RLHF, and set placement.cores")
        )


def _rounded(bundle: Mapping[str, float]) -> dict[str, float]:
    """Return what a bundle has of cores and GPUs, to Ray's own grain."""
    return {name: round(bundle[name], 4) for name in ("CPU", "GPU") if bundle.get(name)}


def _wanted(group: BundleGroup) -> str:
    """Return e.g. `8 x {'CPU': 1.0, 'GPU': 1} for the learner (STRICT_PACK)`."""
    return f"{group.count} x {group.resources} for the {group.role} ({group.strategy})"


def _refusal(group: BundleGroup, timeout_s: float) -> str:
    there, free = live_nodes(), live_nodes(free=True)
    # What would not fit on empty nodes either is the better reason.
    reason = fit([group], there)[0].shortage or fit([group], free)[0].shortage
    reason = reason or f"they came too late; raise placement.ready_timeout_s or lower {SETTINGS[group.role][0]}"
    return (
        f"{_wanted(group)} must be free within placement.ready_timeout_s = {timeout_s:g} s, and free are "
        f"{describe(free)} of {describe(there)}: {reason}"
    )


class Places:
    """Where workers go.

    Args:
        placement: the run's processes.
        gang: returns the placement group of the learner's ranks, in whose bundles rollout workers are where they share
            the ranks' GPUs.
        timeout_s: longest wait for each pool's places.
    """

    def __init__(self, placement: Placement, gang: Callable[[], Any], *, timeout_s: float) -> None:
        self._placement = placement
        self._gang = gang
        self._timeout_s = timeout_s
        self._groups: dict[str, Any] = {}
        self._roomy: list[str] = []
        self._trial: Any = None

    def reserve(self) -> None:
        """Ask for the places of pools that want more than cores.

        Raises:
            PlacementError: when the cluster cannot hold them in time.
        """
        self._trial = enclosing_group()
        if self._trial is not None:
            return
        for group in self._placement.groups(live_nodes()):
            if group.role != "learner" and (group.gpus or group.labels):
                self._groups[group.role] = ask_for(group, timeout_s=self._timeout_s)

    @property
    def can_grow(self) -> bool:
        """Whether workers may go where there is room; inside a Tune trial they may not."""
        return self._trial is None

    def grow(self, nodes: list[str]) -> None:
        """Have rollout workers beyond those that the run begins with start on nodes, by Ray's ids."""
        self._roomy = nodes

    def options(self, role: str, slot: int) -> dict[str, Any]:
        """Return Ray's options for where the worker of a slot goes, also for its successors."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        rollout = self._placement.rollout
        if role == "rollout" and slot >= rollout.count:
            selectors = {**rollout.labels, "ray.io/node-id": f"in({','.join(self._roomy)})"}
            return {"num_cpus": rollout.busy_cpus, "label_selector": selectors}
        is_guest = role == "rollout" and self._placement.shares_gpus
        if self._trial is None:
            group, bundle = self._gang() if is_guest else self._groups.get(role), slot
        else:
            owners = [(group.role, number) for group, number in self._placement.trial_bundles()]
            group, bundle = self._trial, owners.index(("learner" if is_guest else role, slot))
        if group is not None:
            return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)}
        labels = (rollout if role == "rollout" else self._placement.reward).labels
        spread = {"scheduling_strategy": "SPREAD"} if role == "rollout" else {}
        return spread | ({"label_selector": dict(labels)} if labels else {})

    def close(self) -> None:
        """Free the places."""
        from ray.util.placement_group import remove_placement_group

        while self._groups:
            remove_placement_group(self._groups.popitem()[1])
