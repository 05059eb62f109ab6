"""`concord offline`: learning from data that is there already, in this process, and an evaluation after it.

The environment that fixes bits and threads must be set before torch is loaded, so the trainers are imported late.
"""

import os
from collections.abc import Iterator

from actors.cache import cache_directory, content_hash
from actors.plugins import import_function
from cluster.checks import check_data, check_model, check_policy
from cluster.placement import local_environment
from cluster.start import _content, start_config
from cluster.supervised import _CONSOLE, _bar, _name, _output, _refuse
from learner.config import SFTConfig
from learner.offline_config import DPOConfig, OfflineConfig
from reward.config import RewardConfig


def run_offline(config: OfflineConfig) -> None:
    """Train the supervised start if there is one, learn, evaluate; say what was learnt from and what it is worth."""
    sft = start_config(config)  # type: ignore[arg-type]
    _refuse(_problems(config, sft))
    os.environ.update(local_environment())
    config = _with_threads(config)
    source, cache = _prepare(config, sft), cache_directory()
    from learner.offline import train, write_metrics
    from learner.offline_evaluation import Evaluation

    evaluation: Evaluation | None = None
    if config.evaluation is not None:
        evaluation = Evaluation(config.evaluation, config.policy, source=source, cache_dir=cache)
        _name(evaluation.quarantined)
    with _bar(config.algorithm.name) as progress:
        result = train(config, source=source, cache_dir=cache, progress=progress)
    _name(result.quarantined)
    metrics = result.metrics
    if evaluation is not None:
        is_guided = not isinstance(config.algorithm, DPOConfig)
        metrics = {**metrics, **evaluation.run(result.directory, is_guided=is_guided)}
        write_metrics(metrics, result.directory)
    for name, value in sorted(metrics.items()):
        _CONSOLE.print(f"{name:32} {value:.4f}", markup=False)
    _CONSOLE.print(f"Model: {result.directory}", markup=False)


def _problems(config: OfflineConfig, sft: SFTConfig | None) -> Iterator[str]:
    yield from check_policy(config.policy)
    yield from check_data(config.data)
    yield from _output(config.output)
    if sft is not None:
        yield from check_data(sft.data, where="policy.start, data")
    if config.evaluation is not None:
        yield from check_data(config.evaluation.prompts, where="evaluation.prompts")
        yield from _judges(config.evaluation.reward)


def _judges(reward: RewardConfig) -> Iterator[str]:
    for name, component in reward.components.items():
        where = f"evaluation.reward.components.{name}"
        for model in (*([component.model] if component.model else []), *component.ensemble):
            yield from check_model(f"{where}.model", model)
        if component.function is not None:
            try:
                import_function(component.function)
            except ValueError as error:
                yield f"{where}.function: {error}"


def _prepare(config: OfflineConfig, sft: SFTConfig | None) -> str:
    """Return the directory of the policy to start from, training its supervised start unless it is cached.

    A training run with the same start finds it in the same place.
    """
    cache = cache_directory()
    if sft is None:
        from actors.policy import materialize

        return materialize(config.policy, seed=config.training.seed, cache_dir=cache)
    key = content_hash(sft.model_dump(mode="json", exclude={"output"}), _content(sft.data))
    output = os.path.join(cache, "sft", key)
    if os.path.isfile(os.path.join(output, "config.json")):
        return output
    from learner.sft import train

    with _bar("supervised start") as progress:
        training = sft.training.model_copy(
            update={"num_threads": sft.training.num_threads or config.training.num_threads}
        )
        train(sft.model_copy(update={"output": output, "training": training}), cache_dir=cache, progress=progress)
    return output


def _with_threads(config: OfflineConfig) -> OfflineConfig:
    threads = config.training.num_threads or os.cpu_count() or 1
    return config.model_copy(update={"training": config.training.model_copy(update={"num_threads": threads})})
