"""Writes docs/algorithms.md from the registry (`learner/presets.py`) and the committed RandomWalks results.

    python -m benchmarks.algorithms_page

The page is a function of these alone; a test compares it with the committed one.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from learner.parts import ADVANTAGES, POLICY_LOSSES
from learner.presets import PRESETS, Preset

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "algorithms.md"
RESULTS = ROOT / "benchmarks" / "results"

Results = Mapping[int, Mapping[str, Mapping[str, Any]]]
"""Graph seed -> algorithm -> line of the benchmark."""


def read_results() -> Results:
    """Return the committed lines of `benchmarks/randomwalks.py`."""
    found: dict[int, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("randomwalks-*.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found[lines[0]["seed"]] = {line["algorithm"]: line for line in lines}
    return found


def render(results: Results) -> str:
    """Return the page."""
    lines = [_INTRODUCTION, _TASK, *_table(results), *_parts()]
    for name, preset in PRESETS.items():
        lines += _section(name, preset, results)
    return "\n".join(lines) + "\n"


_INTRODUCTION = """# Algorithms

<!-- Written by `python -m benchmarks.algorithms_page` from learner/presets.py and benchmarks/results/. -->

`algorithm: NAME` in a training run's YAML is enough; every part can be set apart:

```yaml
algorithm: {name: rloo, clip_range: 0.1, kl: {coef: 0.02}}
```

In half precision all online ones recompute the old log-probs and weigh each token by the importance weight of the
engine's samples, truncated at 2; `off_policy: {weight: none}` is the papers' form.

The offline ones run with `concord offline CONFIG.yaml`. How to add one: [extending.md](extending.md).
"""

_TASK = """## Scores on an exactly solvable task

RandomWalks: mean optimality (1 = every walk as short as possible) at temperature 1 on held-out random numbers, and KL
from the supervised start in nats per walk; in brackets the exact best at that KL, and the standard error of the
distance to it. No point may lie above by more than three of them. For offline algorithms, which learn from 1,000 random
walks, the share of the way from the data's mean to 1 that they close. Time relative to PPO's.
"""


def _table(results: Results) -> Iterator[str]:
    seeds = list(results)
    heads = [head for seed in seeds for head in (f"seed {seed}: optimality (frontier)", "KL", "closed", "time")]
    yield f"| algorithm | {' | '.join(heads)} |"
    yield "| --- " * (len(heads) + 1) + "|"
    for name, preset in PRESETS.items():
        cells = [cell for seed in seeds for cell in _cells(results[seed], name)]
        yield f"| [{preset.title}](#{name}) | {' | '.join(cells)} |"
    yield ""
    for seed in seeds:
        plot = f"../benchmarks/results/randomwalks-{seed}.png"
        yield f"![All algorithms under the exact frontier, graph seed {seed}]({plot})"
    yield ""
    yield "`python -m benchmarks.randomwalks --seed S` makes the table for any graph."
    yield ""


def _cells(lines: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    if name not in lines:
        raise ValueError(f"results must hold {name}, and do not; run benchmarks.randomwalks --only {name} --write")
    line = lines[name]
    closed = "" if line["gap_closed"] is None else f"{line['gap_closed']:.0%}"
    return [
        f"{line['optimality']:.3f} ({line['frontier_optimality']:.3f} ± {line['standard_error']:.3f})",
        f"{line['kl']:.2f}",
        closed,
        f"{line['seconds'] / lines['ppo']['seconds']:.2f}",
    ]


def _parts() -> Iterator[str]:
    yield from (
        "## Parts",
        "",
        f"- `advantage`: {', '.join(f'`{name}`' for name in ADVANTAGES)}, or `module:function`",
        f"- `policy_loss`: {', '.join(f'`{name}`' for name in POLICY_LOSSES)}, or `module:function`",
        "- `aggregation`, `kl`, `reference`, `off_policy`, `dynamic_sampling`: see `learner/algorithm_config.py`,",
        "  where each setting has its line of documentation",
        "",
    )


def _section(name: str, preset: Preset, results: Results) -> Iterator[str]:
    file, check, bug = preset.proof
    yield from (f'<a id="{name}"></a>', "", f"## {preset.title} (`{name}`, {preset.kind})", "")
    yield from ("$$" + preset.formula + "$$", "")
    yield f"- Source: {preset.source}."
    if preset.differs:
        yield f"- Differs: {preset.differs}."
    yield f"- Proof: `{file}::test_check[{check}]`; planted bug caught: `test_check[{check}/{bug}]`."
    scores = [f"{lines[name]['optimality']:.3f} on seed {seed}" for seed, lines in results.items()]
    yield f"- RandomWalks: {', '.join(scores)}."
    if preset.settings:
        settings = yaml.safe_dump(_plain(preset.settings), default_flow_style=None, sort_keys=False).strip()
        yield from ("", "```yaml", *settings.splitlines(), "```")
    yield ""


def _plain(value: Any) -> Any:
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def main() -> None:
    """Write the page."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(read_results()), encoding="utf-8")


if __name__ == "__main__":
    main()
