"""Curves of a run as inline SVG.  Colours are CSS variables of the page around them, so charts follow light and dark.

Which metrics are drawn together is declared in `charts_of`; where a run does not have a metric, the others are drawn.
"""

import html
import io
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Columns = Mapping[str, np.ndarray]
"""Metric name -> [number of rows] float64, NaN where a row does not have it."""

_INK, _GRID = "#010101", "#020202"
_SERIES = ("#030301", "#030302", "#030303", "#030304")
# What matplotlib is told -> what the page says.
_COLOURS = {_INK: "currentColor", _GRID: "var(--grid)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, start=1)
}
_MAX_POINTS_WITH_MARKERS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One metric in a chart."""

    column: str
    label: str
    colour: Literal[1, 2, 3, 4]
    is_held_out: bool = False  # drawn as joined points: it has a value each so many steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Metrics that share axes."""

    title: str
    note: str
    series: tuple[Series, ...]
    is_stacked: bool = False
    spread: str = ""  # a column: half the width of a band around the first series

    def recorded(self, columns: Columns) -> tuple[Series, ...]:
        """Return the series that have at least one number."""
        return tuple(series for series in self.series if _is_recorded(series.column, columns))


def charts_of(components: Sequence[str], columns: Container[str]) -> list[Chart]:
    """Return the charts of a run whose reward has these components; some need a metric that only some runs have."""
    judges = [
        _pair(f"Judge: {name}", "Raw score of this judge, before its weight.", f"{name}_mean") for name in components
    ]
    return [
        Chart(
            title="Score",
            note="Mean composed score of the step's responses; the band is one standard deviation.",
            series=_training_and_held_out("score_mean"),
            spread="score_std",
        ),
        *(judges if len(judges) > 1 else []),
        _pair("KL to the reference", "How far the policy has moved, nats per response.", "kl"),
        _pair("Response length", "Tokens per response.", "response_length_mean"),
        _pair("Responses that end by themselves", "Share that is not cut off at the length limit.", "eos_fraction"),
        _single("Entropy", "Of the next-token distribution, nats per token.", "entropy"),
        _single("Clip fraction", "Share of tokens whose probability ratio is clipped.", "clip_fraction"),
        _single(
            "KL of one update", "From the policy that sampled to the one that learned, nats per token.", "approx_kl"
        ),
        _single("Policy loss", "Mean over the step's updates.", "policy_loss"),
        *(chart for chart in _OF_SOME_RUNS if chart.series[0].column in columns),
        _single("Gradient norm", "Before clipping.", "grad_norm"),
        _single("Learning rate", "At the step's last update.", "learning_rate"),
        Chart(
            title="Where the time goes",
            note="Seconds per step.",
            series=(
                Series(column="generate_s", label="generate", colour=1),
                Series(column="score_s", label="score", colour=2),
                Series(column="learn_s", label="learn", colour=3),
                Series(column="publish_s", label="publish", colour=4),
            ),
            is_stacked=True,
        ),
        _single("Throughput", "Response tokens learned from per second, whole loop.", "tokens_per_s"),
    ]


def draw(chart: Chart, columns: Columns, *, salt: str) -> str:
    """Return the chart as an `<svg>` element.

    Args:
        chart: what to draw; at least one of its series is recorded.
        columns: the run's metrics, with `step`.
        salt: makes the element ids of this chart unlike those of the page's other charts.
    """
    settings: Any = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": salt,
        "text.parse_math": False,  # a metric's name is a name
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _GRID,
        "xtick.color": _GRID,
        "ytick.color": _GRID,
        "xtick.labelcolor": _INK,
        "ytick.labelcolor": _INK,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(3.9, 2.15))
        axes = figure.add_axes((0.0, 0.12, 0.98, 0.83))
        _prepare(axes, columns["step"])
        (_draw_stack if chart.is_stacked else _draw_lines)(axes, chart, columns)
        _make_room_for_labels(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Type": None})
    return _inline(buffer.getvalue(), label=chart.title, salt=salt)


def _is_recorded(column: str, columns: Columns) -> bool:
    return column in columns and bool(np.isfinite(columns[column]).any())


def _training_and_held_out(column: str) -> tuple[Series, ...]:
    return (
        Series(column=column, label="training", colour=1),
        Series(column=f"eval_{column}", label="held-out", colour=2, is_held_out=True),
    )


def _pair(title: str, note: str, column: str) -> Chart:
    return Chart(title=title, note=note, series=_training_and_held_out(column))


def _single(title: str, note: str, column: str) -> Chart:
    return Chart(title=title, note=note, series=(Series(column=column, label="training", colour=1),))


_OF_SOME_RUNS = (
    _single("Value loss", "Squared error of the value head.", "value_loss"),
    _single("Explained variance", "Of returns by the value head; 1 is perfect.", "value_explained_variance"),
    _single("KL term of the loss", "The estimator's mean, before its coefficient.", "kl_loss"),
    _single("KL to the moving reference", "Nats per response.", "reference_kl"),
    _single("Sampler and learner", "KL from the policy that sampled to the learner's, nats per token.", "mismatch_k3"),
    _single("Effective sample size", "Of the importance weights, as a share of the tokens.", "mismatch_ess"),
    _single("Staleness", "Mean age of the tokens learnt from, policy versions.", "staleness_mean"),
    Chart(
        title="Who waits for whom",
        note="Shares of a step that workers are idle, and what for; the learner's ranks by the driver's clock.",
        series=(
            Series(column="idle_rollout_learner", label="rollout for learner", colour=1),
            Series(column="idle_rollout_weights", label="rollout for weights", colour=4),
            Series(column="idle_learner_rollouts", label="learner for rollouts", colour=3),
        ),
    ),
    _single("Groups without contrast", "Left out by dynamic sampling, a step.", "num_uninformative"),
    _single("Cost", "Mean cost of the step's responses; the constraint holds it under its limit.", "cost_mean"),
    _single("Lambda", "Lagrange multiplier of the constraint.", "lambda"),
)


def _prepare(axes: Any, steps: np.ndarray) -> None:
    margin = max(0.5, 0.02 * float(np.ptp(steps)))
    axes.set_xlim(steps.min() - margin, steps.max() + margin)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=4)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))


def _number(value: float) -> str:
    """Return a tick's label, e.g. 0.25, 1,500 or 2e-5."""
    return re.sub(r"e([+-])0*", lambda found: "e" + found[1].strip("+"), f"{value:,.6g}")


def _make_room_for_labels(axes: Any) -> None:
    low, high = axes.get_ylim()
    longest = max(len(_number(tick)) for tick in axes.get_yticks() if low <= tick <= high)
    left, bottom, width, height = axes.get_position().bounds
    room = 0.03 + 0.0195 * longest  # of the figure's width: a digit at this font size
    axes.set_position((left + room, bottom, width - room, height))


def _draw_lines(axes: Any, chart: Chart, columns: Columns) -> None:
    steps = columns["step"]
    for series in chart.recorded(columns):
        values = columns[series.column]
        known = np.isfinite(values)
        has_markers = series.is_held_out or known.sum() <= _MAX_POINTS_WITH_MARKERS
        axes.plot(
            steps[known],
            values[known],
            color=_SERIES[series.colour - 1],
            linewidth=1.6,
            marker="o" if has_markers else None,
            markersize=3.2 if series.is_held_out else 2.4,
        )
    if chart.spread and _is_recorded(chart.spread, columns) and chart.series[0] in chart.recorded(columns):
        middle, half = columns[chart.series[0].column], columns[chart.spread]
        known = np.isfinite(middle) & np.isfinite(half)
        band = (middle - half)[known], (middle + half)[known]
        axes.fill_between(steps[known], *band, color=_SERIES[0], alpha=0.12, linewidth=0)


def _draw_stack(axes: Any, chart: Chart, columns: Columns) -> None:
    recorded = chart.recorded(columns)
    known = np.logical_or.reduce([np.isfinite(columns[series.column]) for series in recorded])
    steps = columns["step"][known]
    edges = np.append(steps - 0.5, steps[-1] + 0.5)
    floor = np.zeros(len(steps))
    for series in recorded:
        top = floor + np.nan_to_num(columns[series.column][known])
        axes.stairs(top, edges, baseline=floor, fill=True, color=_SERIES[series.colour - 1], linewidth=0)
        floor = top
    axes.set_ylim(bottom=0)


def _inline(svg: str, *, label: str, salt: str) -> str:
    """Make a stand-alone SVG file part of a page: no prologue, no namespaces, ids and colours of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', opening)
    assert view_box, "matplotlib writes a viewBox"
    rest = rest.replace("xlink:href=", "href=")
    rest = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{salt}-", rest)
    for colour, variable in _COLOURS.items():
        rest = rest.replace(colour, variable)
    return f'<svg {view_box.group()} role="img" aria-label="{html.escape(label)}">{rest.strip()}'
