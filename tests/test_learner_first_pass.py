"""The first epoch's graphs, kept until the targets are known, give the bits of the pass that computes all twice."""

from typing import Any

import pytest
import torch

from learner.algorithm_config import AlgorithmConfig
from learner.config import LoraConfig
from learner.first_pass import SavedBytes
from learner.networks import Networks
from learner.optimizer import OptimizerEngine
from learner.samples import read_samples
from tests.learner_toys import learner_config, learner_rank, learnt, parameters, toy_batch, toy_directory

ALL, FIRST = 2**40, 1
"""Bytes of graphs; the first micro-batch is kept in any case."""
PPO: dict[str, Any] = {"entropy_coef": 0.01}
RECOMPUTED: dict[str, Any] = PPO | {"off_policy": {"old_logprobs": "recomputed"}}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "values": ({}, PPO),
    "old-logprobs": ({"epochs": 1}, {"name": "grpo", "off_policy": {"old_logprobs": "recomputed"}}),
    "both": ({}, RECOMPUTED),
    "separate-critic": ({"critic": "separate"}, RECOMPUTED),
    "separate-critic-values": ({"critic": "separate"}, PPO),
    "checkpointing": ({"gradient_checkpointing": True}, RECOMPUTED),
    "lora": ({"lora": LoraConfig(rank=4, alpha=8.0)}, PPO),
    "moving-reference": ({}, PPO | {"reference": {"mode": "ema", "decay": 0.5}}),
    "target-kl": ({"epochs": 4}, PPO | {"target_kl": 1e-4}),
    "zero-2": ({"backend": "zero", "zero_stage": 2}, RECOMPUTED),
    "zero-3": ({"backend": "zero", "zero_stage": 3}, RECOMPUTED),
}
Learnt = tuple[dict[str, torch.Tensor], list[Any], int]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return toy_directory(tmp_path_factory.mktemp("toy"))


def learn(directory: str, first_epoch_bytes: int | None, setting: str) -> Learnt:
    """Return parameters and metrics after two steps, and how many forward passes of a trunk they took."""
    learner_settings, algorithm_settings = SETTINGS[setting]
    config = learner_config(num_minibatches=1, first_epoch_bytes=first_epoch_bytes, **learner_settings)
    learner = learner_rank(directory, config, algorithm=AlgorithmConfig(**algorithm_settings))
    forwards = [_counted(engine) for engine in learner._networks.engines.values()]
    metrics = []
    for step in (1, 2):
        batch = toy_batch(directory, config, step=step)
        metrics.append(learnt(learner.step(batch.tables, batch.plan)))
    return parameters(learner), metrics, sum(map(len, forwards))


def _counted(engine: OptimizerEngine) -> list[None]:
    """Return a list that grows with every forward pass of an engine."""
    calls: list[None] = []
    forward = engine.forward

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        return forward(*arguments, **options)

    engine.forward = counted  # type: ignore[method-assign]
    return calls


def is_same(first: Learnt, second: Learnt) -> bool:
    return first[1] == second[1] and all(torch.equal(value, second[0][name]) for name, value in first[0].items())


@pytest.mark.parametrize("setting", SETTINGS)
def test_kept_graphs_change_no_bit(toy, setting):
    separate, kept = learn(toy, 0, setting), learn(toy, None, setting)
    assert is_same(separate, kept)
    if setting == "zero-3":
        assert kept[2] == separate[2]  # nothing was kept
    else:
        assert kept[2] < separate[2]


def test_what_does_not_fit_is_computed_twice(toy):
    separate, some, kept = (learn(toy, size, "both") for size in (0, FIRST, ALL))
    assert is_same(separate, some)
    assert separate[2] > some[2] > kept[2]


def test_the_comparison_finds_graphs_kept_where_the_engine_pairs_forward_and_backward(toy, monkeypatch):
    separate = learn(toy, 0, "zero-3")
    original = Networks.__init__

    def build(networks: Networks, *arguments: Any, **options: Any) -> None:
        original(networks, *arguments, **options)
        networks.keeps_graphs = True

    monkeypatch.setattr(Networks, "__init__", build)
    assert not is_same(separate, learn(toy, None, "zero-3"))


def test_a_separate_critic_and_the_policy_run_once_for_each_microbatch(toy):
    """Recorded log-probs are the old ones, so only values are asked for: the policy's graphs need not be kept."""
    config = learner_config(num_minibatches=1, critic="separate")
    learner = learner_rank(toy, config)
    batch = toy_batch(toy, config, step=1)
    counts = {name: _counted(engine) for name, engine in learner._networks.engines.items()}
    samples = read_samples(batch.tables, batch.plan)
    kept = learner._scorer.first_pass(samples, batch.plan)[1]
    microbatches = batch.plan.updates[0].ranks[0]
    assert len(kept) == len(microbatches) == len(counts["critic"]) > 1
    assert not counts["policy"]
    for microbatch in microbatches:
        assert learner._scorer.score(microbatch, samples, batch.plan, kept).forward.logprobs.requires_grad
    assert len(counts["critic"]) == len(counts["policy"]) == len(microbatches)


def test_saved_bytes_are_those_of_activations():
    """x W saves x, 4 x 8 numbers; exp its result, 4 x 16; a second use of x nothing more; the weights do not count."""
    weight = torch.nn.Parameter(torch.ones(8, 16))
    inputs = torch.ones(4, 8, requires_grad=True)
    saved = SavedBytes([weight])
    with saved:
        loss = (inputs @ weight).exp().sum() + (inputs @ weight).sum()
    assert saved.total == 4 * (4 * 8 + 4 * 16)
    loss.backward()
    assert weight.grad is not None


def test_several_minibatches_look_at_the_batch_first(toy):
    """Their targets are whitened over all of it, and the first update changes what later forward passes say."""
    config = learner_config(num_minibatches=2)
    learner = learner_rank(toy, config)
    batch = toy_batch(toy, config, step=1)
    assert not learner._scorer.first_pass(read_samples(batch.tables, batch.plan), batch.plan)[1]
