"""`concord offline`: learning from data that is there already, in this process, and an evaluation after it.

The environment that fixes bits and threads must be set before torch is loaded, so the trainers are imported late.
"""

import os
from collections.abc import Iterator

from actors.cache import cache_directory
from cluster.checks import check_data, check_policy, check_reward
from cluster.placement import local_environment
from cluster.start import prepare_policy, start_config
from cluster.supervised import CONSOLE, bar, name_quarantined, output_problems, refuse, with_threads
from learner.config import SFTConfig
from learner.offline_config import DPOConfig, OfflineConfig


def run_offline(config: OfflineConfig) -> None:
    """Train the supervised start if there is one, learn, evaluate; say what was learnt from and what it is worth."""
    sft = start_config(config.policy)
    refuse(_problems(config, sft))
    os.environ.update(local_environment())
    config = with_threads(config)
    source = prepare_policy(config.policy, seed=config.training.seed, train=lambda sft: _train_start(sft, config))
    cache = cache_directory()
    from learner.offline import train, write_metrics
    from learner.offline_evaluation import Evaluation

    evaluation: Evaluation | None = None
    if config.evaluation is not None:
        evaluation = Evaluation(config.evaluation, config.policy, source=source, cache_dir=cache)
        name_quarantined(evaluation.quarantined)
    with bar(config.algorithm.name) as progress:
        result = train(config, source=source, cache_dir=cache, progress=progress)
    name_quarantined(result.quarantined)
    metrics = result.metrics
    if evaluation is not None:
        is_guided = not isinstance(config.algorithm, DPOConfig)
        metrics = {**metrics, **evaluation.run(result.directory, is_guided=is_guided)}
        write_metrics(metrics, result.directory)
    for name, value in sorted(metrics.items()):
        CONSOLE.print(f"{name:32} {value:.4f}", markup=False)
    CONSOLE.print(f"Model: {result.directory}", markup=False)


def _problems(config: OfflineConfig, sft: SFTConfig | None) -> Iterator[str]:
    yield from check_policy(config.policy)
    yield from check_data(config.data)
    yield from output_problems(config.output)
    if sft is not None:
        yield from check_data(sft.data, where="policy.start, data")
    if config.evaluation is not None:
        yield from check_data(config.evaluation.prompts, where="evaluation.prompts")
        yield from check_reward(config.evaluation.reward, where="evaluation.reward")


def _train_start(sft: SFTConfig, config: OfflineConfig) -> None:
    from learner.sft import train

    num_threads = sft.training.num_threads or config.training.num_threads
    training = sft.training.model_copy(update={"num_threads": num_threads})
    with bar("supervised start") as progress:
        train(sft.model_copy(update={"training": training}), cache_dir=cache_directory(), progress=progress)
