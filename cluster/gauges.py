"""Every figure of a run as a gauge of Ray's: on Ray's dashboard, and for Prometheus on each node's metrics port.

One `set` a figure and step, all in the driver; what single workers know comes with the counters that the driver asks
them for anyway.  A gauge keeps its last value while the driver lives.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.registry import series_of
from cluster.timeline import TIMELINE


class RayGauges:
    """A `Tracker` that Prometheus reads.

    Args:
        run: name of the run, the tag by which several on one cluster are told apart.
        components: names of its judges.
    """

    def __init__(self, run: str, components: Sequence[str]) -> None:
        self._run = run
        self._components = tuple(components)
        self._gauges: dict[str, Any] = {}
        """By exported name."""
        self._series: dict[str, tuple[Any, dict[str, str]]] = {}
        """Figure -> gauge and tags, so that names are taken apart once."""

    def record(self, step: int, values: Mapping[str, float], processes: Mapping[str, float]) -> None:
        """Set the gauges to a step's figures."""
        for name, value in {"step": step, **values, **processes}.items():
            if not name.startswith(TIMELINE):
                gauge, tags = self._of(name)
                gauge.set(value, tags)

    def close(self) -> None:
        """Do nothing: Ray forgets the gauges of a process that ends."""

    def _of(self, figure: str) -> tuple[Any, dict[str, str]]:
        if figure not in self._series:
            from ray.util.metrics import Gauge

            series = series_of(figure, self._components)
            if series.name not in self._gauges:
                keys = ("run", *series.metric.tags)
                self._gauges[series.name] = Gauge(series.name, description=series.metric.help, tag_keys=keys)
            self._series[figure] = self._gauges[series.name], {"run": self._run, **series.tags}
        return self._series[figure]
