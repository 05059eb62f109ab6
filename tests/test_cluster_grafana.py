"""The dashboard is what Grafana reads, and asks for what is exported."""

import copy
import json

import jsonschema
import promql_parser
import pytest

from cluster import grafana
from cluster.config import ConfigError
from cluster.grafana import SECTIONS, Panel, dashboard, install, queries
from cluster.registry import METRICS

_SOURCE = {
    "type": "object",
    "properties": {"type": {"const": "prometheus"}, "uid": {"const": "${datasource}"}},
    "required": ["type", "uid"],
}
_PLACE = {
    "type": "object",
    "properties": {
        "h": {"type": "integer", "minimum": 1},
        "w": {"type": "integer", "minimum": 1, "maximum": 24},
        "x": {"type": "integer", "minimum": 0, "maximum": 23},
        "y": {"type": "integer", "minimum": 0},
    },
    "required": ["h", "w", "x", "y"],
    "additionalProperties": False,
}
_TARGET = {
    "type": "object",
    "properties": {
        "refId": {"type": "string", "pattern": "^[A-Z]$"},
        "expr": {"type": "string", "minLength": 1},
        "legendFormat": {"type": "string"},
        "datasource": _SOURCE,
    },
    "required": ["refId", "expr", "legendFormat", "datasource"],
}
_CHART = {
    "properties": {
        "type": {"const": "timeseries"},
        "datasource": _SOURCE,
        "targets": {"type": "array", "items": _TARGET, "minItems": 1},
        "fieldConfig": {"type": "object", "required": ["defaults", "overrides"]},
        "options": {"type": "object", "required": ["legend", "tooltip"]},
    },
    "required": ["datasource", "targets", "fieldConfig", "options", "description"],
}
_ROW = {
    "properties": {"type": {"const": "row"}, "panels": {"type": "array"}, "collapsed": {"type": "boolean"}},
    "required": ["panels", "collapsed"],
}
SCHEMA = {
    "type": "object",
    "properties": {
        "uid": {"type": "string", "minLength": 1, "maxLength": 40},
        "title": {"type": "string", "minLength": 1},
        "schemaVersion": {"type": "integer", "minimum": 36},
        "refresh": {"type": "string"},
        "time": {"type": "object", "required": ["from", "to"]},
        "templating": {
            "type": "object",
            "properties": {
                "list": {"type": "array", "items": {"type": "object", "required": ["name", "type", "query"]}}
            },
            "required": ["list"],
        },
        "panels": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {"id": {"type": "integer", "minimum": 1}, "gridPos": _PLACE},
                "required": ["id", "title", "type", "gridPos"],
                "anyOf": [_CHART, _ROW],
            },
        },
    },
    "required": ["uid", "title", "schemaVersion", "time", "templating", "panels"],
}
"""What Grafana's classic model asks of the parts that are used."""


def check_dashboard(found):
    jsonschema.validate(found, SCHEMA)
    numbers = [panel["id"] for panel in found["panels"]]
    assert len(numbers) == len(set(numbers)), "panels have numbers of their own"
    cells = [cell for panel in found["panels"] for cell in _cells(panel["gridPos"])]
    assert len(cells) == len(set(cells)), "panels lie beside each other"
    assert max(x for x, _ in cells) < 24


def _cells(place):
    rows = range(place["y"], place["y"] + place["h"])
    return [(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in rows]


def check_queries(found, exported):
    """Check that every query is PromQL and names a metric, and tags of it, that Prometheus sees.

    Args:
        found: the dashboard.
        exported: metric -> names of its tags.
    """
    for panel in found["panels"]:
        for target in panel.get("targets", []):
            aggregate = promql_parser.parse(target["expr"])
            selector = aggregate.expr
            assert selector.name in exported, f"{panel['title']} asks for {selector.name}, which is not exported"
            used = {matcher.name for matcher in selector.matchers.matchers} | set(aggregate.modifier.labels)
            assert used <= exported[selector.name], f"{panel['title']} splits {selector.name} by {used}"


def test_the_dashboard_is_what_grafana_reads():
    found = json.loads(json.dumps(dashboard()))
    check_dashboard(found)
    charts = [panel for panel in found["panels"] if panel["type"] == "timeseries"]
    assert len(charts) == sum(map(len, SECTIONS.values()))
    assert [variable["name"] for variable in found["templating"]["list"]] == ["datasource", "run"]


def test_every_query_asks_for_what_the_registry_declares():
    declared = {f"ray_concord_{metric.name}": {"run", *metric.tags} for metric in METRICS}
    check_queries(dashboard(), declared)


def test_a_query_for_the_reader():
    panel = Panel(title="x", metrics=("idle_share",), by=("reason",), where='role="rollout"')
    assert queries(panel) == ['max by (run, reason) (ray_concord_idle_share{run=~"$run", role="rollout"})']


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found.pop("schemaVersion"),
        lambda found: found["panels"][1].pop("targets"),
        lambda found: found["panels"][1]["targets"][0].update(refId=""),
        lambda found: found["panels"][2].update(id=found["panels"][1]["id"]),
        lambda found: found["panels"][2].update(gridPos=found["panels"][1]["gridPos"]),
        lambda found: found["panels"][1]["gridPos"].update(x=20),
    ],
)
def test_a_damaged_dashboard_is_caught(damage):
    found = copy.deepcopy(dashboard())
    damage(found)
    with pytest.raises((AssertionError, jsonschema.ValidationError)):
        check_dashboard(found)


def test_queries_that_cannot_be_answered_are_caught():
    """Planted bugs: no PromQL; a tag that the metric does not have."""
    declared = {f"ray_concord_{metric.name}": {"run", *metric.tags} for metric in METRICS}
    found = copy.deepcopy(dashboard())
    found["panels"][1]["targets"][0]["expr"] = "max by (run ray_concord_kl"
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        check_queries(found, declared)
    with pytest.raises(AssertionError, match="asks for ray_concord_kl"):
        check_queries(dashboard(), {name: tags for name, tags in declared.items() if name != "ray_concord_kl"})
    with pytest.raises(AssertionError, match="has the tags"):
        queries(Panel(title="x", metrics=("step",), by=("reason",)))


def test_it_goes_where_a_grafana_of_one_s_own_looks(tmp_path):
    path, next_step = install(str(tmp_path))
    with open(path, encoding="utf-8") as file:
        check_dashboard(json.load(file))
    assert "import the file" in next_step


def test_it_goes_where_ray_s_grafana_looks(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    folder = tmp_path / "ray" / "session_latest" / "metrics" / "grafana" / "dashboards"
    with pytest.raises(ConfigError, match=r"ray start --head.*--output"):
        install("")
    folder.mkdir(parents=True)
    path, next_step = install("")
    assert path == str(folder / grafana.FILE_NAME)
    assert f"--config.file={tmp_path}/ray/session_latest/metrics/prometheus/prometheus.yml" in next_step
