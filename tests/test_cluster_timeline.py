"""When phases began and how long they took, and the bars that are drawn of them."""

import re

import numpy as np
import pytest

from cluster.groups import Batch
from cluster.timeline import Phase, Timeline, span_of
from cluster.timeline_chart import bars_of, draw_timeline


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def batch(**times):
    return Batch(step=1, group_ids=(), tables=(), samples=None, **times)


def test_phases_of_a_step():
    """The step begins at 100 s; its rollouts were begun 3 s before, and a phase that comes twice is one."""
    clock = Clock()
    timeline = Timeline(clock)
    for phase, seconds in ((Phase.WAIT, 2.0), (Phase.LEARN, 4.0), (Phase.PUBLISH, 0.5), (Phase.PUBLISH, 0.25)):
        with timeline.phase(phase):
            clock.now += seconds
    made = batch(generate_s=4.5, score_s=0.5, finished_at=102.0)
    figures = timeline.take(100.0, made)
    spans = {phase: tuple(figures[name] for name in span_of(phase)) for phase in Phase if span_of(phase)[0] in figures}
    assert spans == {
        Phase.GENERATE: (-3.0, 4.5),
        Phase.SCORE: (1.5, 0.5),
        Phase.WAIT: (0.0, 2.0),
        Phase.LEARN: (2.0, 4.0),
        Phase.PUBLISH: (6.0, 0.75),
    }
    assert list(timeline.take(106.0, batch())) == ["timeline_started_at"], "each phase is told once"


def test_a_phase_that_fails_is_noted():
    clock = Clock()
    timeline = Timeline(clock)

    def fail():
        with timeline.phase(Phase.LEARN):
            clock.now += 1.0
            raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        fail()
    assert timeline.take(100.0, batch())["timeline_learn_for_s"] == 1.0


def columns():
    """Two steps of 10 s; the second one's rollouts are generated while the first is learnt."""
    return {
        "step": np.array([0.0, 1.0, 2.0]),
        "timeline_started_at": np.array([np.nan, 1000.0, 1010.0]),
        "timeline_learn_from_s": np.array([np.nan, 2.0, 1.0]),
        "timeline_learn_for_s": np.array([np.nan, 8.0, 9.0]),
        "timeline_generate_from_s": np.array([np.nan, 0.0, -7.0]),
        "timeline_generate_for_s": np.array([np.nan, 2.0, 7.5]),
    }


def test_bars_lie_where_the_phases_were():
    bars = [(bar.step, str(bar.phase), bar.start, bar.end) for bar in bars_of(columns())]
    assert bars == [
        (1, "generate", 1000.0, 1002.0),
        (1, "learn", 1002.0, 1010.0),
        (2, "generate", 1003.0, 1010.5),
        (2, "learn", 1011.0, 1020.0),
    ]
    assert {bar.step for bar in bars_of(columns(), num_steps=1)} == {2}
    assert bars_of({"step": np.array([1.0])}) == []


def test_the_drawing_is_to_scale():
    svg = draw_timeline(bars_of(columns()))
    rects = re.findall(r'class="p-(\w+)" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', svg)
    generate, learn = ([(float(x), float(w)) for name, x, w in rects if name == kind] for kind in ("generate", "learn"))
    scale = learn[0][1] / 8.0
    assert learn[1][0] - learn[0][0] == pytest.approx(9.0 * scale, abs=0.05)
    assert generate[1][1] == pytest.approx(7.5 * scale, abs=0.05)
    assert learn[1][0] + learn[1][1] == pytest.approx(1000.0, abs=0.05)
    assert "<title>step 2: generate 7.5 s</title>" in svg
