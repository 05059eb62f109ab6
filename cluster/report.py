"""`concord report`: one self-contained HTML page about a run.

Everything in the page comes from the run directory, and nothing is fetched when it is read.  Text from data sets and
models is escaped, or data that the sample browser makes text of: it can only ever be text.  The browser's is the one
script that the page's policy lets run.
"""

import html
import json
import time
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from cluster.charts import Chart, Columns, charts_of, draw
from cluster.metrics import read_journal
from cluster.remote_storage import open_storage
from cluster.report_parts import policy, render_browser, render_ledger, render_timeline
from cluster.sample_browser import MAX_SAMPLES, browser_data
from cluster.samples import render_samples
from cluster.status import run_status
from cluster.storage import RunStorage
from cluster.timeline import TIMELINE

_MAX_QUARANTINED_SHOWN = 50


def build_report(run_dir: str) -> str:
    """Write `report.html` into a run directory; return its path.

    Raises:
        ValueError: when nothing has been measured yet.
    """
    storage = open_storage(run_dir)
    config_text = storage.read_text("config.yaml")
    config = yaml.safe_load(config_text)
    columns = _read_metrics(storage)
    summary = json.loads(storage.read_text("summary.json")) if storage.exists("summary.json") else {}
    charts = charts_of(list(config["reward"]["components"]), columns)
    before, after = _evaluations(storage)
    weights = {name: component["weight"] for name, component in config["reward"]["components"].items()}
    browser, script = render_browser(browser_data(storage, weights), limit=MAX_SAMPLES)
    page = Template(files("cluster").joinpath("report_page.html").read_text(encoding="utf-8"))
    text = page.substitute(
        title=html.escape(storage.name),
        subtitle=_subtitle(config, columns),
        tiles="\n".join(_tiles(columns)),
        missing=_missing(charts, columns),
        charts="\n".join(_figure(chart, columns, f"c{number}") for number, chart in enumerate(charts)),
        samples=render_samples(before, after),
        policy=policy(script),
        browser=browser,
        timeline=render_timeline(columns),
        ledger=render_ledger(run_status(run_dir, now=time.time())),
        data=_data(summary),
        metrics=_metrics_table(columns),
        config=html.escape(config_text),
    )
    storage.write_text(text, "report.html")
    return storage.shown("report.html")


def _read_metrics(storage: RunStorage) -> dict[str, np.ndarray]:
    if storage.exists("metrics.parquet"):
        table = storage.read_table("metrics.parquet")
    elif storage.exists("metrics.jsonl"):
        rows = read_journal(storage)
        names = {name for row in rows for name in row}
        table = pa.table({name: [row.get(name) for row in rows] for name in sorted(names)})
    else:
        table = pa.table({})
    if not table.num_rows:
        raise ValueError(f"{storage.shown()} must hold at least one step to report on, and has none; train first")
    return {name: np.array(table[name].to_pylist(), dtype=np.float64) for name in table.column_names}


def _evaluations(storage: RunStorage) -> tuple[pa.Table | None, pa.Table | None]:
    """Return the first and the last evaluation's responses; None where there are fewer than two."""
    names = storage.names("evaluation")
    steps = sorted(int(name[5:-8]) for name in names if name.startswith("step-") and name.endswith(".parquet"))
    if len(steps) < 2:
        return None, None
    before, after = (storage.read_table("evaluation", f"step-{step}.parquet") for step in (steps[0], steps[-1]))
    return before, after


def _subtitle(config: dict[str, Any], columns: Columns) -> str:
    model = config["policy"]["model"]
    name = (
        model if isinstance(model, str) else f"{model['architecture'].get('model_type', 'random')} from random weights"
    )
    rollouts = config["rollouts"]
    batch = f"{rollouts['prompts_per_step']} prompts × {rollouts['samples_per_prompt']} responses a step"
    progress = f"{columns['step'].max():.0f} of {config['run']['num_steps']} steps"
    return html.escape(" · ".join((config["algorithm"]["name"].upper(), name, batch, progress)))


def _tiles(columns: Columns) -> list[str]:
    """Return the headline figures: held-out ones where the run evaluates, those of training otherwise."""
    is_evaluated = bool(_known("eval_score_mean", columns).size)
    prefix, where = ("eval_", "held-out prompts") if is_evaluated else ("", "training prompts")
    tiles = [
        _change_tile("Score", where, _known(f"{prefix}score_mean", columns), "{:.3g}"),
        _last_tile("KL to the reference", f"nats per response, {where}", _known(f"{prefix}kl", columns), "{:.2f}"),
        _change_tile("Ends by itself", where, _known(f"{prefix}eos_fraction", columns), "{:.0%}"),
        _change_tile("Response length", f"tokens, {where}", _known(f"{prefix}response_length_mean", columns), "{:.1f}"),
        _last_tile("Time", "in all steps", _known("step_s", columns).sum(keepdims=True), None),
        _last_tile("Tokens per second", "median over steps", _median(_known("tokens_per_s", columns)), "{:,.0f}"),
    ]
    return [tile for tile in tiles if tile]


def _known(column: str, columns: Columns) -> np.ndarray:
    values = columns.get(column, np.empty(0))
    return values[np.isfinite(values)]


def _median(values: np.ndarray) -> np.ndarray:
    return np.median(values, keepdims=True) if values.size else values


def _change_tile(label: str, detail: str, values: np.ndarray, form: str) -> str:
    if not values.size:
        return ""
    first, last = form.format(values[0]), form.format(values[-1])
    return _tile(label, f'<span class="soft">{first} →</span> {last}' if values.size > 1 else last, detail)


def _last_tile(label: str, detail: str, values: np.ndarray, form: str | None) -> str:
    if not values.size or not values[-1]:
        return ""
    return _tile(label, form.format(values[-1]) if form else _duration(values[-1]), detail)


def _tile(label: str, value: str, detail: str) -> str:
    return (
        f'<div class="card tile"><div class="label">{label}</div><div class="value">{value}</div>'
        f'<div class="detail">{detail}</div></div>'
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _figure(chart: Chart, columns: Columns, salt: str) -> str:
    recorded = chart.recorded(columns)
    if not recorded:
        return ""
    swatches = [f'<span><i class="s{series.colour}"></i>{series.label}</span>' for series in recorded]
    legend = f'<div class="legend">{"".join(swatches)}</div>' if len(chart.series) > 1 else ""
    title, note = html.escape(chart.title), html.escape(chart.note)
    svg = draw(chart, columns, salt=salt)
    return f'<figure class="card"><figcaption><h3>{title}</h3><p>{note}</p>{legend}</figcaption>{svg}</figure>'


def _missing(charts: Sequence[Chart], columns: Columns) -> str:
    wanted = [series.column for chart in charts for series in chart.series]
    recorded = {series.column for chart in charts for series in chart.recorded(columns)}
    missing = [column for column in wanted if column not in recorded]
    return f"Not recorded in this run: {html.escape(', '.join(missing))}." if missing else ""


def _data(summary: dict[str, Any]) -> str:
    if not summary:
        return '<p class="note">The run has not written its summary.json yet.</p>'
    groups = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in summary.get("groups", {}).items())
    rows, total = summary.get("quarantined_rows", []), summary.get("num_quarantined_rows", 0)
    text = f'<p class="note">Groups (a prompt with its responses): {html.escape(groups)}. '
    text += f"Malformed rows of the data sets that were left out: {total:,}.</p>"
    if not rows:
        return text
    shown = rows[:_MAX_QUARANTINED_SHOWN]
    cells = [[f"{row['file']}:{row['line']}", row["reason"]] for row in shown]
    body = "".join(
        f'<tr><td>{html.escape(place)}</td><td class="reason">{html.escape(reason)}</td></tr>'
        for place, reason in cells
    )
    caption = f"Malformed rows ({len(shown)} of {total:,})"
    table = f'<table><tr><th>row</th><th class="reason">reason</th></tr>{body}</table>'
    return f'{text}<details class="card"><summary>{caption}</summary><div class="scroll">{table}</div></details>'


def _metrics_table(columns: Columns) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("metric", "first", "last", "lowest", "highest"))
    body = ""
    for name in columns:
        if name.startswith(TIMELINE):
            continue
        known = _known(name, columns)
        numbers = (known[0], known[-1], known.min(), known.max()) if known.size else ()
        cells = "".join(f"<td>{number:.6g}</td>" for number in numbers) or '<td colspan="4">never measured</td>'
        body += f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"
