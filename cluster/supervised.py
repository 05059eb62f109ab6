"""`concord sft` and `concord reward`: supervised training in this process, with a progress bar and a last word.

The environment that fixes bits and threads must be set before torch is loaded, so the trainers are imported late.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from actors.cache import cache_directory
from actors.config import PolicyConfig
from cluster.checks import check_data, check_policy
from cluster.config import ConfigError
from cluster.placement import local_environment
from learner.config import RewardModelConfig, SFTConfig, TrainingConfig
from learner.offline_config import OfflineConfig

CONSOLE = Console(highlight=False)


def run_sft(config: SFTConfig) -> None:
    """Train, and say what was trained on and where the model is."""
    refuse([*check_policy(config.policy), *check_data(config.data), *output_problems(config.output)])
    os.environ.update(local_environment())
    from learner.sft import train

    with bar("supervised training") as progress:
        result = train(with_threads(config), cache_dir=cache_directory(), progress=progress)
    name_quarantined(result.quarantined)
    loss = f"{result.losses[0]:.3f} -> {result.losses[-1]:.3f}"
    CONSOLE.print(
        f"{result.num_examples} examples, loss {loss} nats per token\nModel: {result.directory}", markup=False
    )


def run_reward_model(config: RewardModelConfig) -> None:
    """Train, and say how well held-out judgements are predicted and where the model is."""
    refuse(
        [
            *check_policy(PolicyConfig(model=config.model), where="model"),
            *check_data(config.data),
            *output_problems(config.output),
        ]
    )
    os.environ.update(local_environment())
    from learner.reward_modeling import train

    with bar("reward model") as progress:
        result = train(with_threads(config), cache_dir=cache_directory(), progress=progress)
    name_quarantined(result.quarantined)
    for name, value in sorted(result.metrics.items()):
        CONSOLE.print(f"{name:40} {value}", markup=False)
    CONSOLE.print(f"Reward model: {result.directory}", markup=False)


ConfigType = TypeVar("ConfigType", SFTConfig, RewardModelConfig, OfflineConfig)


def with_threads(config: ConfigType) -> ConfigType:
    """Return the configuration with a number of torch threads: all cores unless it has one."""
    threads = config.training.num_threads or os.cpu_count() or 1
    training: TrainingConfig = config.training.model_copy(update={"num_threads": threads})
    return config.model_copy(update={"training": training})


@contextmanager
def bar(name: str) -> Iterator[Callable[[int, int, float], None]]:
    """Show a progress bar; yields what is called with (updates done, updates in all, loss)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=CONSOLE) as progress:
        task = progress.add_task(name, total=None, loss=float("nan"))
        yield lambda done, total, loss: progress.update(task, completed=done, total=total, loss=loss)


def output_problems(path: str) -> Iterator[str]:
    """Yield what is wrong with the place of a result."""
    if os.path.exists(path) and not os.path.isdir(path):
        yield f"output must be a directory, and {path!r} is a file"


def refuse(problems: Iterable[str]) -> None:
    """Raise a ConfigError that lists the problems, if there are any."""
    lines = list(problems)
    if lines:
        raise ConfigError("\n".join(lines))


def name_quarantined(quarantined: Iterable[object]) -> None:
    """Print one line for each row that was left out."""
    for row in quarantined:
        CONSOLE.print(f"quarantined {row}", markup=False, soft_wrap=True)
