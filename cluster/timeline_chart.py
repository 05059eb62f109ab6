"""The last steps of a run as bars over time: what workers generate and judge while the learner waits, learns, sends."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.timeline import STARTED_AT, Phase, span_of

_NUM_STEPS = 16
_LANES: dict[str, tuple[Phase, ...]] = {
    "rollout": (Phase.GENERATE,),
    "reward": (Phase.SCORE,),
    "learner": (Phase.WAIT, Phase.LEARN, Phase.PUBLISH, Phase.EVALUATE, Phase.CHECKPOINT),
}
"""Who is busy in a phase, or waits."""
_LEFT, _WIDTH, _TOP, _LANE, _BAR = 64.0, 1000.0, 18.0, 30.0, 20.0
"""In the drawing's own units: room for names, right edge, room for step numbers, height of a lane and of a bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A phase of one step; Unix time, seconds."""

    step: int
    phase: Phase
    start: float
    end: float


def bars_of(columns: Mapping[str, np.ndarray], *, num_steps: int = _NUM_STEPS) -> list[Bar]:
    """Return the phases of the last steps in order of time; none for a run that has recorded no timeline.

    Args:
        columns: the run's metrics, with `step`; [rows] each, NaN where a row does not have it.
        num_steps: so many steps at most.
    """
    if STARTED_AT not in columns:
        return []
    rows = np.flatnonzero(np.isfinite(columns[STARTED_AT]))[-num_steps:]
    bars = []
    for row in rows:
        for phase in Phase:
            begin, duration = span_of(phase)
            if duration in columns and np.isfinite(columns[duration][row]):
                start = float(columns[STARTED_AT][row] + columns[begin][row])
                length = float(columns[duration][row])
                bars.append(Bar(step=int(columns["step"][row]), phase=phase, start=start, end=start + length))
    return sorted(bars, key=lambda bar: bar.start)


def draw_timeline(bars: Sequence[Bar]) -> str:
    """Return the bars as an `<svg>` element; each says its step, phase and seconds when it is pointed at."""
    origin, end = min(bar.start for bar in bars), max(bar.end for bar in bars)
    scale = (_WIDTH - _LEFT) / max(end - origin, 1e-9)
    height = _TOP + _LANE * len(_LANES) + 22.0
    parts = [f'<svg viewBox="0 0 {_WIDTH:g} {height:g}" role="img" aria-label="Timeline of the last steps">']
    for lane, (name, phases) in enumerate(_LANES.items()):
        y = _TOP + lane * _LANE
        parts.append(f'<text x="0" y="{y + 0.7 * _BAR:.1f}">{name}</text>')
        parts += [_rect(bar, origin, scale, y) for bar in bars if bar.phase in phases]
    parts += _axis(end - origin, scale, _TOP + _LANE * len(_LANES))
    parts += _step_numbers(bars, origin, scale)
    return "".join(parts) + "</svg>"


def _rect(bar: Bar, origin: float, scale: float, y: float) -> str:
    x, width = _LEFT + (bar.start - origin) * scale, max(0.6, (bar.end - bar.start) * scale)
    title = html.escape(f"step {bar.step}: {bar.phase} {bar.end - bar.start:.3g} s")
    shape = f'x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{_BAR:g}"'
    return f'<rect class="p-{bar.phase}" {shape}><title>{title}</title></rect>'


def _axis(length: float, scale: float, y: float) -> list[str]:
    """Return seconds since the first bar, at a distance of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(max(length, 1e-9) / 6))
    distance = next(power * factor for factor in (1, 2, 5, 10) if length / (power * factor) <= 8)
    ticks = np.arange(0.0, length, distance)
    return [f'<text x="{_LEFT + tick * scale:.1f}" y="{y + 14:.1f}">{tick:,.6g} s</text>' for tick in ticks]


def _step_numbers(bars: Sequence[Bar], origin: float, scale: float) -> list[str]:
    learns = [bar for bar in bars if bar.phase is Phase.LEARN]
    return [f'<text x="{_LEFT + (bar.start - origin) * scale:.1f}" y="12">{bar.step}</text>' for bar in learns]
