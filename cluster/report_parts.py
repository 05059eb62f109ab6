"""Parts of the report beside curves and headline figures: sample browser, timeline, ledger."""

import base64
import hashlib
import html
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from cluster.sample_browser import as_script_data
from cluster.status import RunStatus
from cluster.timeline import Phase
from cluster.timeline_chart import bars_of, draw_timeline

_NOTE = (
    "Held-out answers, and what training steps learnt from: of each set the first {} in order, at most. "
    "The weighted score is the judges' raw scores times their weights, without normalisation, clipping and penalties."
)


def policy(script: str) -> str:
    """Return the page's content security policy: nothing is fetched, and no script runs but this one, if any."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"; script-src 'sha256-{digest}'" if script else ""
    return f"default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'{scripts}"


def render_browser(data: Mapping[str, Any] | None, *, limit: int) -> tuple[str, str]:
    """Return the sample browser's HTML, and its script; both empty where there are no samples.

    Args:
        data: see `browser_data`.
        limit: samples of a set at most.
    """
    if data is None:
        return "", ""
    script = files("cluster").joinpath("report_browser.js").read_text(encoding="utf-8")
    page = Template(files("cluster").joinpath("report_samples.html").read_text(encoding="utf-8"))
    return page.substitute(note=html.escape(_NOTE.format(limit)), data=as_script_data(data), script=script), script


def render_timeline(columns: Mapping[str, np.ndarray]) -> str:
    """Return the timeline's section; empty for a run that has recorded none."""
    bars = bars_of(columns)
    if not bars:
        return ""
    present = [phase for phase in Phase if any(bar.phase is phase for bar in bars)]
    legend = "".join(f'<span><i class="p-{phase}"></i>{phase}</span>' for phase in present)
    note = (
        "The last steps. Score is what judging takes after the step's last generation; the numbers above the bars are "
        "steps, where their learning begins."
    )
    return (
        f'<section><h2>Timeline</h2><p class="note">{note}</p><figure class="card timeline">'
        f'<div class="legend">{legend}</div>{draw_timeline(bars)}</figure></section>'
    )


def render_ledger(status: RunStatus) -> str:
    """Return what became of the run's groups, why some were not trained, and what went wrong."""
    groups = status.groups
    rows: list[tuple[str, object]] = [
        (name.replace("_", " "), getattr(groups, name))
        for name in ("accepted", "trained", "dropped", "quarantined", "in_flight")
    ]
    rows.append(("accepted = sum of the others", "yes" if status.is_conserved else "NO"))
    text = f'<p class="note">As {html.escape(groups.source)} counts; a group is a prompt with its responses.</p>'
    text += _table(("groups", "count"), rows)
    if status.reasons:
        text += _table(("reason", "groups"), list(Counter(status.reasons).most_common()))
    faults = [(name, f"{value:g}") for name, value in status.faults.items() if value]
    if faults:
        text += _table(("fault", "times"), faults)
    if status.ended:
        ended = [(group.group_id, f"{group.state}: {group.reason}") for group in status.ended]
        text += (
            f"<details><summary>First groups that were not trained</summary>{_table(('group', 'why'), ended)}</details>"
        )
    return text + "".join(f'<p class="note">{html.escape(note)}</p>' for note in status.notes)


def _table(names: tuple[str, str], rows: Sequence[tuple[str, object]]) -> str:
    head = f'<tr><th class="reason">{names[0]}</th><th class="reason">{names[1]}</th></tr>'
    body = "".join(
        f'<tr><td class="reason">{html.escape(name)}</td><td class="reason">{html.escape(str(value))}</td></tr>'
        for name, value in rows
    )
    return f'<div class="card scroll ledger"><table>{head}{body}</table></div>'
