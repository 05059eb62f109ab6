"""The supervised loop under SFT and reward-model training: order, batches, schedule, journal.

What an example is and what it costs is the objective's business; who updates the parameters is the optimizer engine's.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch

from actors.config import Config
from actors.dataset import Dataset, Quarantined, RawRow, describe
from learner.config import TrainingConfig
from learner.optimizer import OptimizerEngine
from learner.schedule import learning_rate_at

Progress = Callable[[int, int, float], None]
"""Called after each update with (updates done, updates in all, loss)."""

AfterUpdate = Callable[[], Mapping[str, float]]
"""Called after each update, before the next batch; what it returns is added to the update's line in the journal."""

Example = TypeVar("Example")

SETTINGS_FILE = "training.yaml"
JOURNAL_FILE = "metrics.jsonl"
CHUNK_TOKENS = 512
"""Response tokens of a decoder whose logits exist at one time."""
ROW_TOKENS = 512
"""Trunk tokens in one forward-backward of a decoder: attention in a shared row costs its square."""
_BATCHES_SORTED_TOGETHER = 16


class Objective(Protocol):
    """Training examples and their loss."""

    lengths: list[int]
    """Tokens of each example."""
    units: list[int]
    """Terms that each example adds to the loss: tokens, or 1."""
    microbatch_tokens: int
    """Padded tokens in one forward-backward."""

    def loss_sum(self, engine: OptimizerEngine, examples: Sequence[int]) -> torch.Tensor:
        """Return the loss summed over the units of some examples."""


def training_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def silent(done: int, total: int, loss: float) -> None:
    """Report progress to nobody."""


def nothing_more() -> Mapping[str, float]:
    """Do nothing after an update, and add nothing to the journal."""
    return {}


def read_examples(
    dataset: Dataset, parse: Callable[[RawRow], Example], *, strict: bool
) -> tuple[list[Example], list[Quarantined]]:
    """Return what `parse` makes of each row, and the rows that it refuses with a ValueError.

    Raises:
        ValueError: if no row is good, or, when strict, if one is malformed.
    """
    examples: list[Example] = []
    bad: list[Quarantined] = []
    for row in dataset:
        try:
            if row.error:
                raise ValueError(row.error)
            examples.append(parse(row))
        except ValueError as error:
            bad.append(Quarantined(file=row.file, line=row.line, reason=str(error)))
    malformed = describe(bad, dataset.num_rows, num_malformed=len(bad))
    if not examples:
        raise ValueError(f"{dataset.path} must hold at least one good row; {malformed}")
    if strict and bad:
        raise ValueError(f"{malformed}\nmend them, or set data.strict to false")
    return examples, bad


def limited(examples: list[Example], limit: int | None, *, seed: int) -> list[Example]:
    """Return `limit` examples drawn by seed, in their order; all of them without a limit."""
    if limit is None or limit >= len(examples):
        return examples
    chosen = np.random.default_rng([seed % 2**63, 1]).choice(len(examples), size=limit, replace=False)
    return [examples[index] for index in sorted(chosen)]


def fit(
    engine: OptimizerEngine,
    objective: Objective,
    config: TrainingConfig,
    *,
    directory: str,
    progress: Progress,
    after_update: AfterUpdate = nothing_more,
) -> list[float]:
    """Train for `config.epochs`; write one line per update to the directory's journal; return the losses."""
    per_epoch = math.ceil(len(objective.lengths) / config.batch_size)
    total = per_epoch * config.epochs
    losses: list[float] = []
    with open(os.path.join(directory, JOURNAL_FILE), "w", encoding="utf-8") as journal:
        for epoch in range(config.epochs):
            for batch in _batches(objective.lengths, config.batch_size, seed=config.seed, epoch=epoch):
                rate = learning_rate_at(len(losses), total, config.optimizer)
                loss = _accumulate(engine, objective, batch)
                norm = engine.step(rate)
                losses.append(loss)
                record = {"update": len(losses), "epoch": epoch, "loss": loss, "learning_rate": rate, "grad_norm": norm}
                journal.write(json.dumps({**record, **after_update()}) + "\n")
                progress(len(losses), total, loss)
    return losses


def write_settings(config: Config, directory: str) -> None:
    """Write the resolved configuration beside the result."""
    from omegaconf import OmegaConf

    with open(os.path.join(directory, SETTINGS_FILE), "w", encoding="utf-8") as file:
        file.write(OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))


def _accumulate(engine: OptimizerEngine, objective: Objective, batch: Sequence[int]) -> float:
    denominator = sum(objective.units[index] for index in batch)
    loss = 0.0
    for part in microbatches(batch, objective.lengths, max_tokens=objective.microbatch_tokens):
        share = objective.loss_sum(engine, part) / denominator
        engine.backward(share)
        loss += float(share.detach())
    return loss


def microbatches(batch: Sequence[int], lengths: Sequence[int], *, max_tokens: int) -> Iterator[list[int]]:
    """Cut a batch into parts of at most `max_tokens` tokens when padded; a longer example stays alone."""
    part: list[int] = []
    longest = 0
    for index in batch:
        longest = max(longest, lengths[index])
        if part and longest * (len(part) + 1) > max_tokens:
            yield part
            part, longest = [], lengths[index]
        part.append(index)
    if part:
        yield part


def _batches(lengths: Sequence[int], size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Return an epoch's batches: in a seeded order, made of stretches of a seeded order that are sorted by length."""
    random = np.random.default_rng([seed % 2**63, 0, epoch])
    order = random.permutation(len(lengths))
    stretch = size * _BATCHES_SORTED_TOGETHER
    batches: list[list[int]] = []
    for start in range(0, len(order), stretch):
        near = sorted(order[start : start + stretch].tolist(), key=lambda index: lengths[index])
        batches += [near[at : at + size] for at in range(0, len(near), size)]
    return [batches[index] for index in random.permutation(len(batches))]
