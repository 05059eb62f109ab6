"""The Grafana dashboard, generated from the metric registry, and where `concord dashboard` puts it.

A panel names metrics; unit, description and the tags it may be split by are the registry's, so a query cannot name what
is not exported.  Grafana's classic model (schema version 39, Grafana 8 and later), which file provisioning reads.
"""

import json
import os
import re
from dataclasses import dataclass
from typing import Any

from cluster.config import ConfigError
from cluster.registry import PREFIX, Metric, metric_named

UID = "concord"
FILE_NAME = "concord_grafana_dashboard.json"
_COLUMNS, _WIDTH, _HEIGHT = 3, 8, 8
"""Panels in a row, on Grafana's grid of 24 columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One chart."""

    title: str
    metrics: tuple[str, ...]
    """Names in the registry."""
    by: tuple[str, ...] = ()
    """Tags with a curve for each value, beside the run."""
    where: str = ""
    """One more condition on tags, PromQL."""
    is_stacked: bool = False


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Learning": (
        Panel(title="Score", metrics=("score_mean",), by=("split",)),
        Panel(title="KL to the reference", metrics=("kl",), by=("split",)),
        Panel(title="Judges", metrics=("component_mean",), by=("component", "split")),
        Panel(title="Response length", metrics=("response_length_mean",), by=("split",)),
        Panel(title="Responses that end by themselves", metrics=("eos_fraction",), by=("split",)),
        Panel(title="Entropy", metrics=("entropy",)),
        Panel(title="KL of one update", metrics=("approx_kl",)),
        Panel(title="Clip fraction", metrics=("clip_fraction",)),
        Panel(title="Gradient norm", metrics=("grad_norm",)),
    ),
    "Pace": (
        Panel(title="Steps done", metrics=("step",)),
        Panel(title="Tokens per second", metrics=("tokens_per_s",)),
        Panel(title="Where the time goes", metrics=("phase_s",), by=("phase",), where='phase!="step"', is_stacked=True),
    ),
    "Who waits for whom": (
        Panel(
            title="Idle rollout workers",
            metrics=("idle_share",),
            by=("reason",),
            where='role="rollout"',
            is_stacked=True,
        ),
        Panel(
            title="Idle reward workers", metrics=("idle_share",), by=("reason",), where='role="reward"', is_stacked=True
        ),
        Panel(title="Idle learner", metrics=("idle_share",), by=("reason",), where='role="learner"', is_stacked=True),
        Panel(title="Busy workers", metrics=("process_busy_share",), by=("role", "index")),
        Panel(title="Groups on their way", metrics=("queue_groups",), by=("queue",), is_stacked=True),
        Panel(title="Rollouts that wait for the learner", metrics=("buffer_bytes",)),
    ),
    "Sampler and learner": (
        Panel(title="Staleness", metrics=("staleness_mean",)),
        Panel(title="Staleness of the tokens", metrics=("staleness_share",), by=("versions",), is_stacked=True),
        Panel(title="Mismatch", metrics=("mismatch_k3",)),
        Panel(title="Effective sample size", metrics=("mismatch_ess",)),
        Panel(title="Log-prob gap", metrics=("learner_logprob_gap",)),
    ),
    "Ledger and faults": (
        Panel(title="Groups accepted", metrics=("groups",), where='state="accepted"'),
        Panel(title="Where they are", metrics=("groups",), by=("state",), where='state!="accepted"', is_stacked=True),
        Panel(title="Faults", metrics=("faults",), by=("kind",)),
    ),
    "Memory": (
        Panel(title="Main memory", metrics=("resident_mb",), by=("role", "index")),
        Panel(title="Keys and values", metrics=("process_kv_bytes",), by=("index",)),
    ),
}
"""What is shown, from top to bottom."""

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> dict[str, Any]:
    """Return the dashboard in Grafana's classic model."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, section in SECTIONS.items():
        place = {"h": 1, "w": 24, "x": 0, "y": y}
        panels.append({"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": place})
        for number, panel in enumerate(section):
            row, column = divmod(number, _COLUMNS)
            place = {"h": _HEIGHT, "w": _WIDTH, "x": column * _WIDTH, "y": y + 1 + row * _HEIGHT}
            panels.append(_chart(panel) | {"gridPos": place})
        y += 1 + _HEIGHT * (1 + (len(section) - 1) // _COLUMNS)
    return {
        "uid": UID,
        "title": "Concord",
        "tags": ["concord", "ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": [_source_variable(), _run_variable()]},
        "panels": [panel | {"id": number} for number, panel in enumerate(panels, start=1)],
    }


def queries(panel: Panel) -> list[str]:
    """Return a panel's queries, PromQL.

    A run that is continued is another process, so another time series: the newest value of both is taken.
    """
    conditions = ", ".join(['run=~"$run"', *([panel.where] if panel.where else [])])
    kept = ", ".join(("run", *panel.by))
    return [f"max by ({kept}) (ray_{PREFIX}{metric.name}{{{conditions}}})" for metric in _metrics_of(panel)]


def _metrics_of(panel: Panel) -> list[Metric]:
    metrics = [metric_named(name) for name in panel.metrics]
    for metric in metrics:
        used = {*panel.by, *re.findall(r"(\w+)[!=]", panel.where)}
        assert used <= set(metric.tags), f"{metric.name} has the tags {metric.tags}, and {panel.title} uses {used}"
    return metrics


def _chart(panel: Panel) -> dict[str, Any]:
    metrics = _metrics_of(panel)
    legend = " ".join(f"{{{{{tag}}}}}" for tag in ("run", *panel.by))
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": metrics[0].help,
        "datasource": _SOURCE,
        "fieldConfig": {
            "defaults": {
                "unit": metrics[0].unit,
                "custom": {
                    "drawStyle": "line",
                    "lineInterpolation": "stepAfter" if panel.is_stacked else "linear",
                    "lineWidth": 1,
                    "fillOpacity": 40 if panel.is_stacked else 0,
                    "showPoints": "auto",
                    "spanNulls": False,
                    "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
                },
            },
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _SOURCE,
                "expr": query,
                "legendFormat": legend,
                "range": True,
            }
            for number, query in enumerate(queries(panel))
        ],
    }


def _source_variable() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "hide": 0,
        "refresh": 1,
        "options": [],
    }


def _run_variable() -> dict[str, Any]:
    query = f"label_values(ray_{PREFIX}step, run)"
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": "runs"},
        "hide": 0,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": ["All"], "value": ["$__all"]},
        "options": [],
    }


def install(output: str) -> tuple[str, str]:
    """Write the dashboard to where Grafana finds it.

    Args:
        output: a directory; empty = the one that Ray's own Grafana configuration on this machine names.

    Returns:
        The file, and what a person does next.

    Raises:
        ConfigError: when no directory is named and no cluster of Ray's runs here, or the directory is not there.
    """
    root = _metrics_root()
    directory = output or os.environ.get("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", f"{root}/grafana/dashboards")
    if not os.path.isdir(directory):
        raise ConfigError(
            f"the dashboard must go to a directory that is there, and {directory} is not; start Ray on "
            "this machine first (`ray start --head`), or name a directory that your Grafana is provisioned from with "
            "--output"
        )
    path = os.path.join(directory, FILE_NAME)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(dashboard(), file, indent=1)
    return path, _next_step(output, root)


def _metrics_root() -> str:
    """Return where Ray's newest cluster on this machine keeps the configuration of Prometheus and Grafana."""
    temporary = os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))
    return os.environ.get("RAY_METRICS_OUTPUT_ROOT", f"{temporary}/ray/session_latest/metrics")


def _next_step(output: str, root: str) -> str:
    if output:
        return (
            "Grafana shows it as `Concord` where a file provider (provisioning/dashboards/*.yml) reads that directory; "
            "or import the file: Dashboards, New, Import."
        )
    return f"""Start Prometheus and Grafana on this machine with the configuration that Ray has written:
  prometheus --config.file={root}/prometheus/prometheus.yml
  grafana server --homepath /usr/share/grafana --config {root}/grafana/grafana.ini
Then open http://localhost:3000/d/{UID}.  Ray writes its directory anew when a head starts: run this again then."""
