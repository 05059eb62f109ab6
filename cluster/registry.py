"""Metrics by the names under which Prometheus knows them: unit, meaning, and how a row's name becomes name and tags.

A run's row is flat (`idle_rollout_learner`); a time series has a name and tags, so that one query covers all workers,
reasons or judges.  Ray puts `ray_` in front of every name.

    score_mean              concord_score_mean{role="reward", index="all", split="training"}
    eval_score_mean         concord_score_mean{role="reward", index="all", split="held_out"}
    idle_rollout_learner    concord_idle_share{role="rollout", index="all", reason="learner"}
    resident_mb_reward_1    concord_resident_mb{role="reward", index="1"}

Pure: nothing here is measured or sent.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

PREFIX = "concord_"
HELD_OUT = "eval_"
"""First part of the names of figures of held-out prompts."""

PROCESS = "process_"
"""First part of the names of figures of one worker: process_<role>_<slot>_<name>; too many for a run's row."""

_ALL = "all"
_COMPONENT = "COMPONENT"
"""In a pattern: any of the run's judges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A name in Prometheus, with all that is measured under it."""

    name: str
    help: str
    role: str = ""
    """Whose work it is about; empty where the pattern says so."""
    unit: str = "short"
    """Grafana's name for it."""
    pattern: str = ""
    """Regular expression of the names in a row, whose named groups become tags; empty = the name itself."""

    @property
    def tags(self) -> tuple[str, ...]:
        """Return the tags of each of its series, beside `run`."""
        groups = tuple(re.findall(r"\(\?P<(\w+)>", self.pattern))
        has_split = bool(self.role) and (not self.pattern or _COMPONENT in self.pattern)
        split = ("split",) if has_split else ()
        return tuple(dict.fromkeys(("role", "index", *groups, *split)))


def _judge(figure: str, help_: str) -> Metric:
    pattern = rf"(?P<component>{_COMPONENT})_{figure}"
    return Metric(name=f"component_{figure}", role="reward", pattern=pattern, help=help_)


_OF_WORKER = rf"{PROCESS}(?P<role>rollout|reward)_(?P<index>\d+)"

METRICS = (
    Metric(name="step", role="driver", help="Last step that is done."),
    Metric(name="tokens_per_s", role="driver", help="Response tokens learnt from per second, whole loop."),
    Metric(name="buffer_bytes", role="driver", unit="bytes", help="Rollouts that wait for the learner."),
    Metric(name="score_mean", role="reward", help="Mean composed score of the step's responses."),
    Metric(name="score_std", role="reward", help="Standard deviation of the composed score."),
    Metric(name="kl", role="reward", help="How far the policy has moved from the reference, nats per response."),
    Metric(name="response_length_mean", role="rollout", help="Tokens per response."),
    Metric(name="eos_fraction", role="rollout", unit="percentunit", help="Responses that end by themselves."),
    Metric(name="truncated_fraction", role="rollout", unit="percentunit", help="Responses cut off at the limit."),
    Metric(name="entropy", role="learner", help="Of the next-token distribution, nats per token."),
    Metric(name="approx_kl", role="learner", help="KL of one update, nats per token."),
    Metric(name="clip_fraction", role="learner", unit="percentunit", help="Tokens whose ratio is clipped."),
    Metric(name="grad_norm", role="learner", help="Gradient norm before clipping."),
    Metric(name="policy_loss", role="learner", help="Mean over the step's updates."),
    Metric(name="staleness_mean", role="learner", help="Mean age of the tokens learnt from, policy versions."),
    Metric(
        name="mismatch_k3", role="learner", help="KL from the policy that sampled to the learner's, nats per token."
    ),
    Metric(
        name="mismatch_ess", role="learner", unit="percentunit", help="Effective sample size of importance weights."
    ),
    Metric(
        name="learner_logprob_gap",
        role="learner",
        help="Largest difference between a recorded log-prob and the learner's own, on-policy.",
    ),
    _judge("mean", "Raw score of a judge, before its weight."),
    _judge("std", "Standard deviation of a judge's raw scores."),
    _judge("num_absent", "Responses to which a judge does not apply."),
    _judge("weight", "Weight of a judge that follows a schedule."),
    Metric(
        name="phase_s",
        role="driver",
        unit="s",
        pattern="(?P<phase>generate|score|learn|publish|step)_s",
        help="Seconds of the last step; generating and scoring may overlap with learning.",
    ),
    Metric(
        name="idle_share_max",
        unit="percentunit",
        pattern="idle_(?P<role>[a-z]+)_max",
        help="Idle share of the role's idlest process in the last step.",
    ),
    Metric(
        name="idle_share",
        unit="percentunit",
        pattern="idle_(?P<role>[a-z]+)_(?P<reason>[a-z]+)",
        help="Share of the last step in which a role's processes waited, by what they waited for.",
    ),
    Metric(
        name="staleness_share",
        role="learner",
        unit="percentunit",
        pattern=r"staleness_(?P<versions>\d+)",
        help="Tokens learnt from, by their age in policy versions.",
    ),
    Metric(name="queue_groups", role="driver", pattern="queue_(?P<queue>[a-z]+)", help="Groups on their way."),
    Metric(name="groups", role="driver", pattern="groups_(?P<state>[a-z_]+)", help="The ledger: groups by state."),
    Metric(
        name="faults",
        role="driver",
        pattern="faults_(?:num_)?(?P<kind>[a-z_]+)",
        help="What went wrong in this process's life, by kind.",
    ),
    Metric(
        name="resident_mb",
        unit="mbytes",
        pattern=r"resident_mb_(?P<role>[a-z]+)(?:_(?P<index>\d+))?",
        help="Main memory of a process, MiB; of the learner's ranks the largest.",
    ),
    Metric(
        name="process_busy_share",
        unit="percentunit",
        pattern=rf"{_OF_WORKER}_busy_share",
        help="Share of the last step in which a worker had groups.",
    ),
    Metric(
        name="process_score_s",
        unit="s",
        pattern=rf"{_OF_WORKER}_score_s_(?P<component>{_COMPONENT})",
        help="Seconds that a worker has spent in a judge so far.",
    ),
    Metric(
        name="process_kv_bytes",
        unit="bytes",
        pattern=rf"{_OF_WORKER}_kv_bytes",
        help="Keys and values that a rollout worker holds.",
    ),
)
"""What has a meaning, a unit or tags of its own; any other figure is exported under its own name.

In a pattern the first match counts, in this order.
"""

_BY_NAME = {metric.name: metric for metric in METRICS if not metric.pattern}


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Where a figure goes: a metric, and the values of its tags."""

    metric: Metric
    tags: Mapping[str, str]

    @property
    def name(self) -> str:
        """Return the name as Ray is given it."""
        return PREFIX + self.metric.name


def metric_named(name: str) -> Metric:
    """Return the metric that is exported under a name, e.g. `idle_share`.

    Raises:
        KeyError: when none is declared.
    """
    return {metric.name: metric for metric in METRICS}[name]


def series_of(figure: str, components: Sequence[str]) -> Series:
    """Return where a figure of a run's row, or of a process, goes.

    Args:
        figure: its name, e.g. `eval_kl`.
        components: names of the run's judges.
    """
    plain = figure.removeprefix(HELD_OUT)
    metric, found = _metric_of(plain, tuple(components))
    tags = {"role": metric.role, "index": _ALL, **{name: value for name, value in found.items() if value is not None}}
    if "split" in metric.tags:
        tags["split"] = "training" if plain == figure else "held_out"
    return Series(metric=metric, tags=tags)


def exported_names(figures: Iterable[str], components: Sequence[str]) -> dict[str, set[str]]:
    """Return what Prometheus sees of a run's figures: each metric's name with the names of its tags."""
    found = (series_of(figure, components).metric for figure in figures)
    return {f"ray_{PREFIX}{metric.name}": {"run", *metric.tags} for metric in found}


def _metric_of(figure: str, components: tuple[str, ...]) -> tuple[Metric, dict[str, str | None]]:
    if figure in _BY_NAME:
        return _BY_NAME[figure], {}
    for metric, pattern in _patterns(components):
        match = pattern.fullmatch(figure)
        if match is not None:
            return metric, match.groupdict()
    of_worker = re.fullmatch(rf"{_OF_WORKER}_(\w+)", figure)
    name = figure if of_worker is None else f"{PROCESS}{of_worker[3]}"
    metric = Metric(
        name=re.sub(r"\W", "_", name, flags=re.ASCII),
        role="learner",
        pattern="" if of_worker is None else _OF_WORKER,
        help=f"{name} of the last step.",
    )
    return metric, {} if of_worker is None else of_worker.groupdict()


@lru_cache(maxsize=8)
def _patterns(components: tuple[str, ...]) -> list[tuple[Metric, re.Pattern[str]]]:
    names = "|".join(map(re.escape, components)) or "(?!)"  # nothing matches where there are no judges
    return [(metric, re.compile(metric.pattern.replace(_COMPONENT, names))) for metric in METRICS if metric.pattern]
