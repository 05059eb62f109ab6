"""Offline learning: from preferences, ratings or earlier rollouts to a policy, without sampling anything.

DPO trains on pairs and leaves a model directory; ILQL and token Q-learning train on scored trajectories and leave value
heads beside the model, which guide its sampling.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from actors.cache import replace_directory
from actors.dataset import Quarantined, open_dataset
from actors.policy import load_model, load_tokenizer, max_positions, resolve_dtype
from learner.dpo import DirectPreference
from learner.model import PolicyAndValue
from learner.offline_config import DPOConfig, OfflineConfig
from learner.offline_data import OfflineData, Pair, Trajectory, preference_pairs, rated_pairs, read_offline_data
from learner.offline_data import standardized as standardized_scores
from learner.optimizer import make_engine
from learner.training import (
    JOURNAL_FILE,
    SETTINGS_FILE,
    Progress,
    fit,
    limited,
    silent,
    training_device,
    write_settings,
)
from learner.value_config import ILQLConfig, QLearningConfig
from learner.value_model import PolicyWithValues
from learner.value_objective import ValueObjective

METRICS_FILE = "metrics.json"

Metrics = dict[str, float]
"""`num_pairs` and such."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineResult:
    """What offline training did."""

    directory: str
    """A Hugging Face model directory with tokenizer, journal and settings, and value heads where they are learnt."""
    losses: tuple[float, ...]
    """One per update: of a pair (DPO) or a token (values)."""
    metrics: Metrics
    """What it was trained on: `num_pairs` and `num_ties`, or `num_trajectories`; `data_score_mean` where rows are
    scored; DPO's `implicit_accuracy` and `implicit_margin`, means of the last epoch."""
    quarantined: tuple[Quarantined, ...]


def train(config: OfflineConfig, *, source: str, cache_dir: str, progress: Progress = silent) -> OfflineResult:
    """Train and write the model to `config.output`, which appears at once when all is done.

    Args:
        config: what to learn, from what.
        source: local directory of the policy that training starts from, the supervised start's result if there is one.
        cache_dir: where data sets are kept.
        progress: called after each update.

    Raises:
        ValueError: for settings or data that cannot be trained on.
    """
    if config.training.num_threads:
        torch.set_num_threads(config.training.num_threads)
    tokenizer = load_tokenizer(source, trust_remote_code=config.policy.trust_remote_code)
    positions = max_positions(source, trust_remote_code=config.policy.trust_remote_code) or config.training.max_tokens
    data = read_offline_data(
        open_dataset(config.data.path, config.data.make, cache_dir=cache_dir),
        tokenizer,
        config.score,
        max_tokens=min(config.training.max_tokens, positions),
        strict=config.data.strict,
    )
    task = _prepare(config, data)
    losses: list[float] = []

    def build(directory: str) -> None:
        losses.extend(task.fit(_load(config, source), directory=directory, progress=progress))
        tokenizer.save_pretrained(directory)
        write_settings(config, directory)
        task.metrics.update(_last_epoch(directory))
        write_metrics(task.metrics, directory)

    directory = replace_directory(config.output, build, marker=SETTINGS_FILE)
    return OfflineResult(
        directory=directory, losses=tuple(losses), metrics=task.metrics, quarantined=tuple(data.quarantined)
    )


def write_metrics(metrics: Mapping[str, float], directory: str) -> None:
    """Write metrics beside the result; what is not a number becomes null."""
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    with open(os.path.join(directory, METRICS_FILE), "w", encoding="utf-8") as file:
        json.dump(finite, file, indent=2)


class _Preferences:
    """Trains on pairs by DPO."""

    def __init__(self, config: OfflineConfig, settings: DPOConfig, data: OfflineData) -> None:
        seed, num_ties = config.training.seed, 0
        if data.kind == "preferences":
            _refuse_limit(settings)
            pairs = preference_pairs(data.judged)
        else:
            pairs, num_ties = rated_pairs(data.judged, limit=settings.pairs_per_prompt, seed=seed)
        if not pairs:
            raise ValueError(
                f"the data must hold two responses with different scores to one prompt, got none among "
                f"{len(data.judged)} rows, and {num_ties} ties ({config.data.path or 'data.make'}); give other data"
            )
        self._config = config
        self._settings = settings
        self._pairs: list[Pair] = limited(pairs, config.data.limit, seed=seed)
        self.metrics: Metrics = {"num_pairs": len(self._pairs), "num_ties": num_ties, **_scores(data)}

    def fit(self, policy: PreTrainedModel, *, directory: str, progress: Progress) -> list[float]:
        """Train `policy` and write it; return the losses."""
        module = PolicyAndValue(policy, has_value_head=False)
        objective = DirectPreference(module, self._pairs, self._settings, policy.device)
        return _fit(self._config, module, policy, objective, directory=directory, progress=progress)


class _Values:
    """Trains values of tokens by ILQL or Q-learning."""

    def __init__(self, config: OfflineConfig, settings: ILQLConfig | QLearningConfig, data: OfflineData) -> None:
        trajectories = data.trajectories
        if config.score.standardize:
            trajectories = standardized_scores(trajectories)
        self._config = config
        self._settings = settings
        self._trajectories: list[Trajectory] = limited(trajectories, config.data.limit, seed=config.training.seed)
        self.metrics: Metrics = {"num_trajectories": len(self._trajectories), **_scores(data)}

    def fit(self, policy: PreTrainedModel, *, directory: str, progress: Progress) -> list[float]:
        """Train `policy` with value heads and write both; return the losses."""
        module = PolicyWithValues(policy, self._settings, seed=self._config.training.seed)
        objective = ValueObjective(module, self._trajectories, self._settings, policy.device)
        losses = _fit(self._config, module, policy, objective, directory=directory, progress=progress)
        module.save_heads(directory)
        return losses


def _prepare(config: OfflineConfig, data: OfflineData) -> _Preferences | _Values:
    """Return the algorithm's training; data that it cannot use is refused before any model is loaded."""
    settings = config.algorithm
    if isinstance(settings, DPOConfig):
        return _Preferences(config, settings, data)
    return _Values(config, settings, data)


def _fit(
    config: OfflineConfig,
    module: nn.Module,
    policy: PreTrainedModel,
    objective: DirectPreference | ValueObjective,
    *,
    directory: str,
    progress: Progress,
) -> list[float]:
    settings = config.training.engine
    engine = make_engine(
        module, config.training.optimizer, backend=settings.backend, zero_stage=settings.zero_stage, dtype=policy.dtype
    )
    losses = fit(
        engine,
        objective,
        config.training,
        directory=directory,
        progress=progress,
        after_update=objective.after_update,
    )
    with engine.gathered(list(module.parameters())):
        policy.save_pretrained(directory)
    engine.close()
    return losses


def _load(config: OfflineConfig, source: str) -> PreTrainedModel:
    device = training_device()
    return load_model(
        source,
        dtype=resolve_dtype(config.policy.dtype, device),
        device=device,
        trust_remote_code=config.policy.trust_remote_code,
    )


def _refuse_limit(settings: DPOConfig) -> None:
    if settings.pairs_per_prompt != DPOConfig.model_fields["pairs_per_prompt"].default:
        raise ValueError(
            f"algorithm.pairs_per_prompt must be left out for preferences, which are pairs, got "
            f"{settings.pairs_per_prompt}; use data.limit"
        )


def _scores(data: OfflineData) -> Metrics:
    if data.kind == "preferences":
        return {}
    scores = [trajectory.score for trajectory in data.trajectories]
    return {"data_score_mean": sum(scores) / len(scores)}


def _last_epoch(directory: str) -> Metrics:
    """Return means over the last epoch's updates of what tells how well the pairs are told apart."""
    with open(os.path.join(directory, JOURNAL_FILE), encoding="utf-8") as journal:
        records: list[dict[str, Any]] = [json.loads(line) for line in journal]
    last: Sequence[dict[str, Any]] = [record for record in records if record["epoch"] == records[-1]["epoch"]]
    names = [name for name in ("implicit_accuracy", "implicit_margin") if name in last[0]]
    return {name: sum(record[name] for record in last) / len(last) for name in names}
