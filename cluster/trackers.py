"""Places beside the run directory where a run's metrics are shown: TensorBoard, Weights & Biases, MLflow.

Each is a `Tracker`, and none is needed: the journal in the run directory has everything.  So a tracker that fails is
left out from then on, which is said and counted, and the run goes on.

Where W&B and MLflow send to is their own affair and read from their own variables (WANDB_MODE, WANDB_PROJECT,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ...).  A run that is continued continues its page there: the ids are in the
run directory's `trackers.json`.
"""

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from cluster.config import ConfigError, RunConfig
from cluster.storage import RunStorage
from cluster.timeline import TIMELINE

IDS_FILE = "trackers.json"
_PROJECT = "concord"
_MAX_PARAMS = 100
"""MLflow takes so many at once."""
_MAX_PARAM_LENGTH = 500


class Tracker(Protocol):
    """Shows a run's metrics somewhere."""

    def record(self, step: int, values: Mapping[str, float], processes: Mapping[str, float]) -> None:
        """Show a step's figures, and those of single worker processes, see `registry.PROCESS`."""

    def close(self) -> None:
        """Send what is buffered."""


class Trackers:
    """All trackers of a run; a failing one is left out.

    Args:
        trackers: the first ones.
        say: told of each failure, in one line.
    """

    def __init__(self, trackers: Sequence[Tracker] = (), *, say: Callable[[str], None] = print) -> None:
        self._trackers = list(trackers)
        self._say = say
        self.num_failed = 0

    def add(self, tracker: Tracker) -> None:
        """Show everything from now on there, too."""
        self._trackers.append(tracker)

    def record(self, step: int, values: Mapping[str, float], processes: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for tracker in list(self._trackers):
            self._tell(tracker, lambda told: told.record(step, values, processes))

    def close(self) -> None:
        """See `Tracker`; a second call does nothing."""
        for tracker in list(self._trackers):
            self._tell(tracker, lambda told: told.close())
        self._trackers = []

    def _tell(self, tracker: Tracker, call: Callable[[Tracker], None]) -> None:
        try:
            call(tracker)
        except Exception as error:  # whatever a service's client raises
            self._trackers.remove(tracker)
            self.num_failed += 1
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self._say(f"{type(tracker).__name__} is left out from now on, metrics.jsonl has everything: {text:.400}")


class TensorBoard:
    """Event files in the run directory.

    Args:
        directory: where they go.
        last_step: what was shown of later steps is purged.
    """

    def __init__(self, directory: str, *, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(directory, purge_step=last_step + 1, flush_secs=30)

    def record(self, step: int, values: Mapping[str, float], processes: Mapping[str, float]) -> None:
        """Add a scalar for each figure."""
        for name, value in _curves(values).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases; `step` is the horizontal axis, also of steps that are learnt again.

    Args:
        config: the run's, shown beside its curves.
        storage: where the id is kept, and what W&B writes itself.
    """

    def __init__(self, config: RunConfig, storage: RunStorage) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=_kept_id(storage, "wandb", lambda: secrets.token_hex(4)),
            name=os.path.basename(storage.directory),
            resume="allow",
            dir=storage.directory,
            config=config.model_dump(mode="json"),
        )
        self._run.define_metric("*", step_metric="step")

    def record(self, step: int, values: Mapping[str, float], processes: Mapping[str, float]) -> None:
        """Log one row."""
        self._run.log({"step": step, **_curves(values)})

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


class MLflow:
    """A run of MLflow, with the settings as its parameters.

    Args:
        config: the run's.
        storage: where the id is kept; also MLflow's own files, where MLFLOW_TRACKING_URI names no other place.
    """

    def __init__(self, config: RunConfig, storage: RunStorage) -> None:
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or self.default_uri(storage)
        self._client: Any = MlflowClient(tracking_uri=uri)
        self._run_id = _kept_id(storage, "mlflow", lambda: self._new_run(config, storage.directory))

    @staticmethod
    def default_uri(storage: RunStorage) -> str:
        """Return where it keeps its files unless it is told otherwise: in the run directory."""
        return f"sqlite:///{storage.path('mlflow.db')}"

    def record(self, step: int, values: Mapping[str, float], processes: Mapping[str, float]) -> None:
        """Log one step's figures in one call."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run_id, metrics=[Metric(*pair, now, step) for pair in _curves(values).items()])

    def close(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._run_id)

    def _new_run(self, config: RunConfig, directory: str) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run_id: str = self._client.create_run(experiment_id, run_name=os.path.basename(directory)).info.run_id
        params = [Param(key, f"{value}"[:_MAX_PARAM_LENGTH]) for key, value in _flat(config.model_dump(mode="json"))]
        for start in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(run_id, params=params[start : start + _MAX_PARAMS])
        return run_id


_KINDS: dict[str, Callable[[RunConfig, RunStorage], Tracker]] = {"wandb": WandB, "mlflow": MLflow}


def make_tracker(name: str, config: RunConfig, storage: RunStorage) -> Tracker:
    """Return the tracker that `run.trackers` names.

    Raises:
        ConfigError: when its package refuses, for want of a login for instance.
    """
    try:
        return _KINDS[name](config, storage)
    except Exception as error:  # whatever a service's client raises
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"run.trackers must name services that can be reached, and {name} cannot: {text:.600}; set the variables "
            f"of {name} (for W&B offline: WANDB_MODE=offline), or leave it out"
        ) from error


def _curves(values: Mapping[str, float]) -> dict[str, float]:
    """Return the figures that a curve is drawn of: all numbers but a timeline's."""
    return {name: value for name, value in values.items() if not (name.startswith(TIMELINE) or math.isnan(value))}


def _kept_id(storage: RunStorage, name: str, make: Callable[[], str]) -> str:
    """Return the id of a tracker's run, the one that an earlier process made if there is one."""
    ids: dict[str, str] = json.loads(storage.read_text(IDS_FILE)) if storage.exists(IDS_FILE) else {}
    if name not in ids:
        ids[name] = make()
        storage.write_text(json.dumps(ids), IDS_FILE)
    return ids[name]


def _flat(section: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(section, dict):
        return [(prefix.removesuffix("."), section)]
    return [pair for key, part in section.items() for pair in _flat(part, f"{prefix}{key}.")]
