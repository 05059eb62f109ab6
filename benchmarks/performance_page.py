"""Writes docs/performance.md from the results that benchmarks have left in benchmarks/results/.

    python -m benchmarks.performance_page
    python -m benchmarks.performance_page --measure     run all of them before, one after another

What each benchmark compares and promises is in `benchmarks/performance_sections.py`; the page is a function of that and
of the results alone, and a test compares it with the committed one.  A benchmark without a result is listed as not
measured, with its command.
"""

import argparse
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.performance_sections import INTRODUCTION, LIMITS, SECTIONS, SUMMARY, Figure, Section

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
NOT_MEASURED = "not measured yet"

Result = Mapping[str, Any]
Results = Mapping[str, Result]
"""Benchmark -> the line of JSON that it printed."""


def read_results() -> dict[str, Result]:
    """Return the committed results of the benchmarks on the page."""
    found: dict[str, Result] = {}
    for section in SECTIONS:
        path = RESULTS / f"{section.name}.json"
        if path.exists():
            found[section.name] = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    return found


def render(results: Results) -> str:
    """Return the page."""
    lines = [INTRODUCTION, *_summary(results), LIMITS]
    for section in SECTIONS:
        lines += _section(section, results.get(section.name))
    lines += _unmeasured(results)
    return "\n".join(lines).rstrip() + "\n"


def is_reached(value: float, goal: str) -> bool:
    """Return whether a value is as promised: 1.3 is ">= 1.3", 0.2 is not "< 0.1"."""
    relation, _, bound = goal.partition(" ")
    match relation:
        case ">=":
            return value >= float(bound)
        case "<=":
            return value <= float(bound)
        case "<":
            return value < float(bound)
        case _:
            raise ValueError(f"a goal must be `>= x`, `<= x` or `< x`, got {goal!r}; correct it")


def value_of(result: Result | None, key: str) -> Any:
    """Return a figure by its path, e.g. `details.uniform_ppo.ratio`; None where the result does not have it."""
    found: Any = result
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def _summary(results: Results) -> Iterator[str]:
    """Yield what a reader wants to know first: one row a question, the figures in one cell."""
    yield from ("| question | measured here |", "| --- | --- |")
    for question, name, figures in SUMMARY:
        values = [(figure, value_of(results.get(name), figure.key)) for figure in figures]
        known = [f"{figure.meaning} **{_shown(figure, value)}**" for figure, value in values if value is not None]
        yield f"| [{question}](#{name}) | {', '.join(known) or NOT_MEASURED} |"
    yield ""


def _section(section: Section, result: Result | None) -> Iterator[str]:
    if result is None:
        return
    yield from (f'<a id="{section.name}"></a>', "", f"## {section.title}", "", textwrap.fill(section.text, 119), "")
    goals = any(figure.goal for figure in section.figures)
    yield "| | measured | goal | reached |" if goals else "| | measured |"
    yield "| --- | --- | --- | --- |" if goals else "| --- | --- |"
    for figure in section.figures:
        yield _row(figure, value_of(result, figure.key), has_goals=goals)
    yield ""
    for lines in section.more:
        yield from lines(result)
    if section.picture and (RESULTS / section.picture).exists():
        yield from (f"![{section.title}](../benchmarks/results/{section.picture})", "")
    yield from (f"`{section.command}` — {_machine(result)}", "")


def _row(figure: Figure, value: Any, *, has_goals: bool) -> str:
    shown = "—" if value is None else _shown(figure, value)
    if not has_goals:
        return f"| {figure.meaning} | {shown} |"
    reached = ""
    if figure.goal and value is not None:
        reached = "yes" if is_reached(value, figure.goal) else "**no**"
    return f"| {figure.meaning} | {shown} | {figure.goal.replace('>=', '≥').replace('<=', '≤')} | {reached} |"


def _shown(figure: Figure, value: Any) -> str:
    return str(value) if isinstance(value, str) else f"{value:.{figure.digits}f}{figure.unit}"


def _machine(result: Result) -> str:
    """Return when and on what a result was measured."""
    machine = result.get("machine")
    if machine is None:
        return "machine not recorded."
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "ray", "deepspeed"))
    return f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores, {versions}."


def _unmeasured(results: Results) -> Iterator[str]:
    missing = [section for section in SECTIONS if section.name not in results]
    if not missing:
        return
    yield from ("## Not measured yet", "")
    for section in missing:
        needs = f"; needs {section.needs}" if section.needs else ""
        yield f'- <a id="{section.name}"></a>{section.title}: `{section.command}`{needs}'


def main() -> None:
    """Measure where asked to, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run every benchmark first")
    if parser.parse_args().measure:
        for section in SECTIONS:
            if section.needs:
                print(f"left out: {section.name}, which needs {section.needs}", flush=True)
                continue
            subprocess.run([sys.executable, *section.command.split()[1:]], cwd=ROOT, check=True)
    PAGE.write_text(render(read_results()), encoding="utf-8")


if __name__ == "__main__":
    main()
