"""Reward-model training on human ratings or preferences, and cost-model training on judgements of safety.

The result is measured on texts (or prompts) that it never saw.  A reward model is normalised to mean 0 and standard
deviation 1 on training texts; a cost model is left as it is: 0 is its boundary, and sigmoid(cost) the probability that
a response is unsafe.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actors.cache import replace_directory
from actors.dataset import Quarantined, open_dataset
from actors.encoding import Prompt
from actors.policy import resolve_dtype
from learner.config import RewardModelConfig
from learner.judgements import Rating, Split, parse_preference, parse_rating, parse_safety, split
from learner.optimizer import ParameterGroup, make_engine
from learner.rating_metrics import pairwise_accuracy, pearson, preference_accuracy, sign_accuracy
from learner.reward_objectives import MICROBATCH_TOKENS, BradleyTerry, CostModel, Regression
from learner.training import (
    SETTINGS_FILE,
    Objective,
    Progress,
    fit,
    limited,
    microbatches,
    read_examples,
    silent,
    training_device,
    write_settings,
)
from reward.model import RewardModel, pad_rows

METRICS_FILE = "metrics.json"
_NUM_REFERENCE_TEXTS = 512
_PARSERS = {"regression": parse_rating, "bradley_terry": parse_preference, "cost": parse_safety}

Metrics = dict[str, float]
"""`test_pearson` and such; `..._low` and `..._high` are the ends of its 95% interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelResult:
    """What reward-model training did."""

    directory: str
    num_train: int
    metrics: Metrics
    """Of the validation and the test part, each figure with its 95% interval."""
    quarantined: tuple[Quarantined, ...]


def train(config: RewardModelConfig, *, cache_dir: str, progress: Progress = silent) -> RewardModelResult:
    """Train, measure and write the reward model to `config.output`, which appears at once when all is done.

    Raises:
        ValueError: for settings or data that cannot be trained on.
    """
    if config.training.num_threads:
        torch.set_num_threads(config.training.num_threads)
    dataset = open_dataset(config.data.path, config.data.make, cache_dir=cache_dir)
    parse: Any = _PARSERS[config.objective]
    judgements, quarantined = read_examples(dataset, parse, strict=config.data.strict)
    seed = config.training.seed
    parts = split(judgements, held_out_fraction=config.held_out_fraction, seed=seed)
    if config.objective == "regression":
        _check_margin(parts, config.pair_margin)
    training = limited(parts.train, config.data.limit, seed=seed)
    parts = Split(train=training, validation=parts.validation, test=parts.test)
    metrics: Metrics = {}

    def build(directory: str) -> None:
        model = RewardModel.build(
            config.model, pooling=config.pooling, seed=seed, trust_remote_code=config.trust_remote_code
        )
        trainer = _Trainer(config, model.to(training_device()))
        metrics.update(trainer.run(parts, directory=directory, progress=progress))
        _write(config, metrics, directory)

    directory = replace_directory(config.output, build, marker=SETTINGS_FILE)
    return RewardModelResult(
        directory=directory, num_train=len(training), metrics=metrics, quarantined=tuple(quarantined)
    )


class _Trainer:
    """One reward model on its way from new head to measured result."""

    def __init__(self, config: RewardModelConfig, model: RewardModel) -> None:
        self._config = config
        self._model = model
        self._device = model.head.weight.device
        _freeze(model, config)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        head = frozenset(name for name in trainable if name.startswith("head."))
        optimizer, settings = config.training.optimizer, config.training.engine
        self._engine = make_engine(
            model,
            optimizer,
            backend=settings.backend,
            zero_stage=settings.zero_stage,
            groups=[ParameterGroup(names=head, scale=config.head_learning_rate / optimizer.learning_rate)],
            dtype=resolve_dtype("auto", self._device),
        )

    def run(self, parts: Split[Any], *, directory: str, progress: Progress) -> Metrics:
        objective = self._objective(parts.train)
        fit(self._engine, objective, self._config.training, directory=directory, progress=progress)
        if self._config.objective != "cost":  # moved or scaled, 0 and the sigmoid would no longer mean what they do
            reference = limited(_texts(parts.train), _NUM_REFERENCE_TEXTS, seed=self._config.training.seed)
            self._model.normalize(self._scores(reference).tolist())
        length_sign = self._length_sign(parts.train)
        metrics: Metrics = {"num_train": len(parts.train)}
        for name, part in (("validation", parts.validation), ("test", parts.test)):
            measured = self._measure(part, length_sign=length_sign)
            metrics |= {f"{name}_{key}": value for key, value in measured.items()}
        with self._engine.gathered(list(self._model.parameters())):
            self._model.save(directory)
        self._engine.close()
        return metrics

    def _objective(self, part: Sequence[Any]) -> Objective:
        if self._config.objective == "regression":
            return Regression([self._encode(r.text) for r in part], [r.rating for r in part], self._device)
        encoded = [self._encode(text, prompt) for prompt, text in _texts(part)]
        higher, lower = encoded[: len(part)], encoded[len(part) :]
        if self._config.objective == "bradley_terry":
            return BradleyTerry(higher, lower, self._device)
        is_safe = [(pair.less_safe_is_safe, pair.safer_is_safe) for pair in part]
        return CostModel(higher, lower, is_safe=is_safe, device=self._device)

    def _encode(self, text: str, prompt: Prompt | None = None) -> list[int]:
        return self._model.encode(text, prompt=prompt, max_tokens=self._config.training.max_tokens)

    def _scores(self, texts: Sequence[tuple[Prompt | None, str]]) -> np.ndarray:
        """Return [N] scores, reading texts of similar length together."""
        rows = [self._encode(text, prompt) for prompt, text in texts]
        lengths = [len(row) for row in rows]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        scores = np.zeros(len(rows))
        for part in microbatches(order, lengths, max_tokens=MICROBATCH_TOKENS):
            with torch.no_grad():
                found = self._engine.forward(*pad_rows([rows[index] for index in part], device=self._device))
            scores[part] = found.float().cpu().numpy()
        return scores

    def _measure(self, part: Sequence[Any], *, length_sign: float) -> Metrics:
        seed, margin = self._config.training.seed, self._config.pair_margin
        scores = self._scores(_texts(part))
        lengths = length_sign * _lengths(part)
        if self._config.objective == "regression":
            ratings = np.array([rating.rating for rating in part])
            estimates = {
                "pearson": pearson(scores, ratings, seed=seed),
                "pairwise_accuracy": pairwise_accuracy(scores, ratings, margin=margin, seed=seed),
                "length_only_accuracy": pairwise_accuracy(lengths, ratings, margin=margin, seed=seed),
            }
        else:
            prompts = np.unique([pair.split_key for pair in part], return_inverse=True)[1]
            judges = {"pairwise_accuracy": np.split(scores, 2), "length_only_accuracy": np.split(lengths, 2)}
            estimates = {
                name: preference_accuracy(higher, lower, prompts, seed=seed) for name, (higher, lower) in judges.items()
            }
        if self._config.objective == "cost":
            is_safe = np.array([pair.less_safe_is_safe for pair in part] + [pair.safer_is_safe for pair in part])
            estimates["sign_accuracy"] = sign_accuracy(scores, is_safe, np.tile(prompts, 2), seed=seed)
        metrics: Metrics = {"num_rows": len(part)}
        for name, estimate in estimates.items():
            metrics |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        return metrics

    def _length_sign(self, part: Sequence[Any]) -> float:
        """Return whether longer (1) or shorter (-1) texts score higher, so that the baseline knows as well."""
        lengths = _lengths(part)
        if self._config.objective == "regression":
            liking = np.cov(lengths, [rating.rating for rating in part])[0, 1]
        else:
            higher, lower = np.split(lengths, 2)
            liking = np.sign(higher - lower).sum()
        return 1.0 if liking >= 0 else -1.0


def _check_margin(parts: Split[Rating], margin: float) -> None:
    for name, part in (("validation", parts.validation), ("test", parts.test)):
        ratings = [rating.rating for rating in part]
        if max(ratings) - min(ratings) <= margin:
            raise ValueError(
                f"the {name} part must have ratings more than pair_margin apart, got {min(ratings)} to {max(ratings)} "
                f"with pair_margin {margin}; lower it, or give more data"
            )


def _freeze(model: RewardModel, config: RewardModelConfig) -> None:
    if config.freeze_embeddings:
        model.trunk.get_input_embeddings().requires_grad_(False)
    for name, parameter in model.trunk.named_parameters():
        if name.startswith("pooler."):  # BERT's own pooling, which is not used, so that it never gets a gradient
            parameter.requires_grad_(False)


def _texts(part: Sequence[Any]) -> list[tuple[Prompt | None, str]]:
    """Return (prompt, text) of everything judged; for pairs all that must score higher, then all the others."""
    if isinstance(part[0], Rating):
        return [(None, rating.text) for rating in part]
    higher: list[tuple[Prompt | None, str]] = [(pair.prompt, pair.ordered[0]) for pair in part]
    return higher + [(pair.prompt, pair.ordered[1]) for pair in part]


def _lengths(part: Sequence[Any]) -> np.ndarray:
    return np.array([float(len(text)) for _, text in _texts(part)])


def _write(config: RewardModelConfig, metrics: Metrics, directory: str) -> None:
    write_settings(config, directory)
    with open(os.path.join(directory, METRICS_FILE), "w", encoding="utf-8") as file:
        json.dump(metrics, file, indent=2)
