"""How much of what a run's processes are given, and when patience with them ends."""

import math
from dataclasses import dataclass

from cluster.config import RunConfig
from cluster.fleet import FleetConfig
from cluster.messages import Role

_REWARD_CAPACITY = 2
"""One group is judged while the next one is on its way."""


class RetriesError(RuntimeError):
    """The machinery failed a group more often than allowed; the message names the group, the failure and the remedy."""


class DataError(RuntimeError):
    """More groups than allowed failed through their own fault; the message names the last one and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When the dispatcher loses patience, and how far it works ahead."""

    timeout_s: float
    """Longest wait for one call, seconds."""
    heartbeat_s: float
    """A rollout worker that generates is asked after half of this time, and must answer within it, seconds."""
    max_retries: int
    """Failures of the machinery one group may meet."""
    max_quarantined: int
    """Groups a run may lose through their own fault."""
    loads_late: bool = False
    """Rollout workers take on weights when there is something to generate with them, not before."""
    max_buffer_bytes: float = math.inf
    """Rollouts that may wait for their batch, bytes, beside those of the first open step."""

    def too_many_retries(self, group_id: str, cause: str) -> RetriesError:
        """Return what ends a run when the machinery has failed a group once too often."""
        return RetriesError(
            f"group {group_id} must get through in {self.max_retries + 1} attempts and did not; the last failure was "
            f"{cause}; mend the cause and resume, or raise pipeline.max_retries"
        )

    def too_many_quarantined(self, group_id: str, reason: str) -> DataError:
        """Return what ends a run when a group is quarantined that is one too many."""
        return DataError(
            f"at most {self.max_quarantined} groups may be quarantined, and group {group_id} is one more: {reason}; "
            "mend prompts or judges, or raise pipeline.max_quarantined"
        )


def limits(config: RunConfig) -> Limits:
    """Return a run's limits."""
    pipeline = config.pipeline
    return Limits(
        timeout_s=pipeline.timeout_s,
        heartbeat_s=pipeline.heartbeat_s,
        max_retries=pipeline.max_retries,
        max_quarantined=pipeline.max_quarantined,
        loads_late=config.placement.colocated,
        max_buffer_bytes=pipeline.max_buffer_bytes,
    )


def fleets(config: RunConfig) -> dict[Role, FleetConfig]:
    """Return what each role's fleet is."""
    rollouts = config.rollouts
    # The engine's rows are filled three times over: a group holds its place until its longest sample is done.
    in_rows = 3 * -(-rollouts.max_rows // rollouts.samples_per_prompt)
    ready_timeout_s, max_restarts = config.placement.ready_timeout_s, config.pipeline.max_restarts
    return {
        role: FleetConfig(
            count=count,
            max_count=max_count,
            capacity=capacity,
            ready_timeout_s=ready_timeout_s,
            max_restarts=max_restarts,
        )
        for role, count, max_count, capacity in (
            (Role.ROLLOUT, rollouts.num_workers, rollouts.max_workers or 0, in_rows),
            (Role.REWARD, config.reward.num_workers, 0, _REWARD_CAPACITY),
        )
    }
