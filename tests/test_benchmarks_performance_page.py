"""The page of measurements is what its command writes, and says honestly what is reached and what is not measured."""

import importlib.util

import pytest

from benchmarks.machine import describe
from benchmarks.performance_page import PAGE, is_reached, read_results, render, value_of
from benchmarks.performance_sections import SECTIONS, SUMMARY

MACHINE = {**dict.fromkeys(describe(), "x"), "cpu": "a processor", "date": "2030-01-02", "cores": 2}


def test_the_page_is_what_its_command_writes():
    assert PAGE.read_text(encoding="utf-8") == render(read_results())


def test_every_command_is_there():
    missing = [section.name for section in SECTIONS if importlib.util.find_spec(f"benchmarks.{section.name}") is None]
    assert not missing


def test_the_summary_asks_for_figures_that_sections_have():
    figures = {section.name: {figure.key for figure in section.figures} for section in SECTIONS}
    for _, name, wanted in SUMMARY:
        assert {figure.key for figure in wanted} <= figures[name], name


def test_without_results_everything_is_listed_with_its_command():
    page = render({})
    for section in SECTIONS:
        assert f"`{section.command}`" in page
    assert page.count("not measured yet") == len(SUMMARY)
    assert "reached" not in page


@pytest.mark.parametrize(("speedup", "shown"), [(1.75, "| 1.75 | ≥ 1.6 | yes |"), (1.55, "| 1.55 | ≥ 1.6 | **no** |")])
def test_a_result_is_shown_against_its_goal_with_its_machine(speedup, shown):
    page = render({"overlap": {"overlap_ratio": 1.08, "speedup_over_sync": speedup, "machine": MACHINE}})
    assert f"| staleness 0 over staleness 1 {shown}" in page
    assert f"staleness 1 over synchronous **{speedup}x**" in page
    assert "| a step at staleness 2, over the slower stage alone | — |  |  |" in page
    assert "2030-01-02, a processor, 2 cores" in page
    assert "## Not measured yet" in page
    assert "`python -m benchmarks.overlap --output benchmarks/results/overlap.json` — 2030" in page


def test_tables_of_whole_results_have_a_row_each():
    side = {"over_floor": 1.5, "phases": {"generate": {"share_of_peak": 0.25}, "train": {"share_of_peak": 0.5}}}
    page = render(
        {
            "trl": {"uniform_ppo": 1.4, "details": {"uniform_ppo": {"trl": {"over_floor": 2.1}, "concord": side}}},
            "soak": {
                "max_slope_mb_per_step": 0.04,
                "slope_mb_per_step": {"driver": 0.04},
                "robust_slope_mb_per_step": {"driver": -0.01},
            },
            "learner": {"best": "group", "tokens_per_s_group": 50.0, "tokens_per_s_1024": 40.0},
            "scale": {
                "by_workers": [{"workers": 256, "efficiency": 0.97, "driver_busy": 0.5, "driver_ms_per_sample": 0.25}]
            },
        }
    )
    assert "| uniform_ppo | 2.10 | 1.50 | 25%, —, 50% |" in page
    assert "| driver | +0.040 | -0.010 |" in page
    assert "| 1024 | 0.80 |" in page
    assert "| 256 | 0.970 | 50.0% | 0.250 |" in page


@pytest.mark.parametrize(
    ("value", "goal", "reached"),
    [(1.3, ">= 1.3", True), (1.29, ">= 1.3", False), (1.15, "<= 1.15", True), (1.16, "<= 1.15", False),
     (0.1, "< 0.1", False), (0.09, "< 0.1", True)],
)  # fmt: skip
def test_goals_have_a_direction(value, goal, reached):
    assert is_reached(value, goal) is reached


def test_a_goal_without_a_direction_is_refused():
    with pytest.raises(ValueError, match=r"got '1\.3'"):
        is_reached(1.3, "1.3")


def test_a_figure_is_found_by_its_path():
    assert value_of({"a": {"b": 2}}, "a.b") == 2
    assert value_of({"a": {"b": 2}}, "a.c") is value_of(None, "a") is None
