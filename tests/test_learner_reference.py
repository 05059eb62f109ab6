"""A reference policy that moves: it is the policy of an earlier step, or the average of its steps, to the bit."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.policy import load_model
from actors.scoring import reference_logprobs
from learner.algorithm_config import AlgorithmConfig
from learner.batch import StepPlan
from learner.config import LearnerConfig, LoraConfig
from learner.learner import LearnerRank, Skipped
from learner.reference import MovingReference
from learner.samples import Sample, read_samples
from learner.state import StateError
from tests.checks import Case, Check, with_twins
from tests.learner_toys import TEMPERATURE, learner_config, learner_rank, learnt, parameters, toy_batch, toy_directory

Weights = dict[str, torch.Tensor]

SWAP = {"mode": "swap", "every": 2}
EMA = {"mode": "ema", "decay": 0.8}
CONFIG = learner_config(num_minibatches=1, epochs=1, microbatch_tokens=1000)


@cache
def toy() -> str:
    """Return the directory of a tiny policy that lives as long as the process."""
    return toy_directory(Path(tempfile.mkdtemp(prefix="reference-")), tie_word_embeddings=True)


def algorithm(reference: dict[str, Any], **settings: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate({"name": "rloo", "reference": reference, **settings})


def rank(reference: dict[str, Any], **settings: Any) -> LearnerRank:
    return learner_rank(toy(), CONFIG, algorithm=algorithm(reference, **settings))


def step(learner: LearnerRank, number: int) -> dict[str, float]:
    batch = toy_batch(toy(), CONFIG, step=number)
    return learnt(learner.step(batch.tables, batch.plan))


def policy_weights(learner: LearnerRank) -> Weights:
    return {
        name.removeprefix("policy/policy."): value
        for name, value in parameters(learner).items()
        if name.startswith("policy/policy.")
    }


def reference_weights(learner: LearnerRank) -> Weights:
    return {name: parts["param"] for name, parts in learner._moving.full_state()}


def same(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# What the reference is after each of five steps, as a function of the policies 0 (the start) to 5.


def swapped(policies: Sequence[Weights]) -> list[Weights]:
    return [policies[index] for index in (0, 2, 2, 4, 4)]


def averaged(policies: Sequence[Weights]) -> list[Weights]:
    found, average = [], policies[0]
    for policy in policies[1:]:
        average = {name: average[name].lerp(policy[name], 1.0 - 0.8) for name in average}
        found.append(average)
    return found


Follow = Callable[[MovingReference, int], None]
shipped: Follow = MovingReference.follow


def one_step_late(reference: MovingReference, number: int) -> None:
    shipped(reference, number - 1)


def swap_at_every_step(reference: MovingReference, number: int) -> None:
    shipped(reference, 2 * number)


def never(reference: MovingReference, number: int) -> None:
    return


def with_decay(decay: float) -> Follow:
    def follow(reference: MovingReference, number: int) -> None:
        reference._config = reference._config.model_copy(update={"decay": decay})
        shipped(reference, number)

    return follow


def twice(reference: MovingReference, number: int) -> None:
    shipped(reference, number)
    shipped(reference, number)


def follows(setting: dict[str, Any], expected: Callable[[Sequence[Weights]], list[Weights]], follow: Follow):
    learner = rank(setting)
    learner._moving.follow = lambda number: follow(learner._moving, number)
    policies, references = [policy_weights(learner)], []
    assert same(reference_weights(learner), policies[0])
    for number in range(1, 6):
        step(learner, number)
        policies.append(policy_weights(learner))
        references.append(reference_weights(learner))
    assert not any(same(first, second) for first, second in pairwise(policies))
    for found, wanted in zip(references, expected(policies), strict=True):
        assert same(found, wanted)


CHECKS = (
    Check(
        id="swap",
        run=lambda follow: follows(SWAP, swapped, follow),
        part=shipped,
        twins={"late": one_step_late, "every-step": swap_at_every_step, "never": never},
    ),
    Check(
        id="ema",
        run=lambda follow: follows(EMA, averaged, follow),
        part=shipped,
        twins={"other-share": with_decay(0.2), "twice": twice, "never": never},
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


# Log-probs of a step are compared with the reference that the step before left.


def scored(learner: LearnerRank, samples: Sequence[Sample]) -> list[torch.Tensor]:
    """Return log(recorded / moving reference) of each response's own tokens, scored outside the learner."""
    found = []
    for sample in samples:
        model, responses = learner._moving._model, [sample.response_ids]
        logprobs = reference_logprobs(model, sample.prompt_ids, responses, temperature=TEMPERATURE)[0]
        found.append((sample.logprobs - torch.from_numpy(logprobs))[sample.loss_mask])
    return found


def kl_is_to_the_moving_reference(parts: tuple[dict[str, Any], bool]) -> None:
    """reference_kl in nats per sequence; 0 at first, when the reference is the policy that sampled."""
    setting, is_recorded = parts
    learner = rank(setting)
    first = toy_batch(toy(), CONFIG, step=1)
    assert learner.step(first.tables, first.plan)["reference_kl"] == pytest.approx(0.0, abs=1e-4)
    batch = toy_batch(toy(), CONFIG, step=2)
    samples = read_samples(batch.tables, batch.plan)
    expected = sum(float(row.sum()) for row in scored(learner, samples)) / len(samples)
    if is_recorded:
        expected = sum(float((s.logprobs - s.ref_logprobs)[s.loss_mask].sum()) for s in samples) / len(samples)
    assert abs(expected) > 1e-3
    assert learner.step(batch.tables, batch.plan)["reference_kl"] == pytest.approx(expected, abs=1e-4)


def penalty_is_from_the_moving_reference(coef_of: Callable[[StepPlan], float]) -> None:
    """REINFORCE without whitening: advantages are score - kl_coef * (log policy - log moving reference)."""
    learner = rank(EMA, name="reinforce")
    step(learner, 1)
    batch = toy_batch(toy(), CONFIG, step=2)
    samples = read_samples(batch.tables, batch.plan)
    kls = scored(learner, samples)
    coef = coef_of(batch.plan)
    advantages = [score - coef * kl.flip(0).cumsum(0).flip(0) for score, kl in zip(batch.plan.scores, kls, strict=True)]
    expected = torch.cat(advantages)
    metrics = learner.step(batch.tables, batch.plan)
    assert metrics["advantage_mean"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert metrics["advantage_std"] == pytest.approx(expected.std(correction=0).item(), abs=1e-5)


def loss_term_is_from_the_moving_reference(setting: dict[str, Any]) -> None:
    """Swapped at every step, it is the policy that the only update starts from, whatever is recorded: k2 is 0."""
    learner = rank(setting, name="grpo", kl={"estimator": "k2"})
    assert step(learner, 1)["kl_loss"] == pytest.approx(0.0, abs=1e-8)
    assert step(learner, 2)["kl_loss"] == pytest.approx(0.0, abs=1e-8)


MEASURED = (
    Check(
        id="reference-kl",
        run=kl_is_to_the_moving_reference,
        part=(EMA, False),
        twins={"of-the-recorded-reference": (EMA, True)},
    ),
    Check(
        id="penalty-in-the-reward",
        run=penalty_is_from_the_moving_reference,
        part=lambda plan: plan.kl_coef,
        twins={"none": lambda plan: 0.0, "sign": lambda plan: -plan.kl_coef},
    ),
    Check(
        id="penalty-in-the-loss",
        run=loss_term_is_from_the_moving_reference,
        part={"mode": "swap", "every": 1},
        twins={"not-swapped": SWAP, "recorded": {"mode": "fixed"}},
    ),
)


@with_twins(MEASURED)
def test_measured(case: Case) -> None:
    case.verify()


def test_the_reference_has_no_gradient_and_is_none_where_it_is_fixed() -> None:
    learner = rank(EMA)
    assert not any(parameter.requires_grad for parameter in learner._moving._model.parameters())
    assert rank({"mode": "fixed"})._moving is None
    assert "reference_kl" not in step(rank({"mode": "fixed"}), 1)


def test_a_skipped_step_leaves_the_reference_alone() -> None:
    learner = rank(EMA)
    step(learner, 1)
    before = reference_weights(learner)
    learner._networks.policy._is_finite = False
    batch = toy_batch(toy(), CONFIG, step=2)
    assert isinstance(learner.step(batch.tables, batch.plan), Skipped)
    assert same(reference_weights(learner), before)
    assert learner._moving.num_updates == 1


# Saved and resumed.


def resumed(setting: dict[str, Any], directory: Path) -> LearnerRank:
    half = rank(setting)
    for number in (1, 2, 3):
        step(half, number)
    directory.mkdir()
    half.begin_save(str(directory))
    half.finish_save()
    learner = rank(setting)
    learner.load_state(str(directory))
    return learner


@pytest.mark.parametrize("setting", [SWAP, EMA], ids=["swap", "ema"])
def test_five_steps_are_three_and_two(tmp_path, setting) -> None:
    """Swaps are after steps 2 and 4: the reference at the save is neither the start nor the policy."""
    whole = rank(setting)
    metrics = [step(whole, number) for number in range(1, 6)]
    second = resumed(setting, tmp_path / "state")
    assert not same(reference_weights(second), policy_weights(second))
    assert [step(second, number) for number in (4, 5)] == metrics[3:]
    assert same(parameters(second), parameters(whole))
    assert same(reference_weights(second), reference_weights(whole))
    assert second._moving.num_updates == whole._moving.num_updates


def test_the_comparison_finds_a_reference_that_was_not_saved(tmp_path) -> None:
    whole, lost = resumed(EMA, tmp_path / "one"), resumed(EMA, tmp_path / "other")
    start = reference_weights(rank(EMA))
    lost._moving.load_full_state({name: {"param": value} for name, value in start.items()}, 0)
    assert step(lost, 4)["reference_kl"] != step(whole, 4)["reference_kl"]
    assert not same(parameters(lost), parameters(whole))


def test_a_state_with_another_reference_is_refused(tmp_path) -> None:
    fixed = rank({"mode": "fixed"})
    fixed.begin_save(str(tmp_path))
    fixed.finish_save()
    with pytest.raises(StateError, match=r"same learner\.critic and algorithm\.reference"):
        rank(EMA).load_state(str(tmp_path))


@pytest.mark.parametrize(("mode", "expected"), [(SWAP, torch.bfloat16), (EMA, torch.float32)], ids=["swap", "ema"])
def test_an_average_is_kept_in_full_precision(mode, expected) -> None:
    learner = learner_rank(toy(), CONFIG, algorithm=algorithm(mode), dtype="bfloat16")
    assert {parameter.dtype for parameter in learner._moving._model.parameters()} == {expected}


def test_a_reference_follows_sharded_weights() -> None:
    """ZeRO stage 3 against plain torch: the reference is gathered bucket by bucket."""
    found = []
    for backend in ({}, {"backend": "zero", "zero_stage": 3}):
        config = learner_config(num_minibatches=1, epochs=1, microbatch_tokens=1000, **backend)
        learner = learner_rank(toy(), config, algorithm=algorithm(EMA))
        for number in (1, 2):
            batch = toy_batch(toy(), config, step=number)
            learner.step(batch.tables, batch.plan)
        found.append(reference_weights(learner))
    assert found[0].keys() == found[1].keys()
    assert max(float((found[0][name] - found[1][name]).abs().max()) for name in found[0]) < 1e-6


# The trained policy without its adapters is the policy that training started from.

BASE = {"mode": "base"}
ENGINES = [
    pytest.param({}, id="local"),
    pytest.param({"backend": "zero", "zero_stage": 2}, id="zero-2"),
    pytest.param({"backend": "zero", "zero_stage": 3}, id="zero-3"),
]


def adapted(reference: dict[str, Any], **settings: Any) -> tuple[LearnerRank, LearnerConfig]:
    lora = LoraConfig(rank=4, alpha=64.0)
    config = learner_config(num_minibatches=1, epochs=1, microbatch_tokens=1000, lora=lora, **settings)
    return learner_rank(toy(), config, algorithm=algorithm(reference, name="ppo")), config


def kl_to_the_start(learner: LearnerRank, config: LearnerConfig, number: int) -> tuple[float, dict[str, float]]:
    """Make a step; return the KL of its samples to the start, measured with a model of its own, and its metrics."""
    batch = toy_batch(toy(), config, step=number)
    model = load_model(toy(), dtype=torch.float32, device=torch.device("cpu"))
    total = 0.0
    for sample in read_samples(batch.tables, batch.plan):
        theirs = reference_logprobs(model, sample.prompt_ids, [sample.response_ids], temperature=TEMPERATURE)[0]
        total += float((sample.logprobs - torch.from_numpy(theirs))[sample.loss_mask].sum())
    return total / len(batch.plan.scores), learnt(learner.step(batch.tables, batch.plan))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_base_is_the_start_however_far_the_adapters_are(engine) -> None:
    learner, config = adapted(BASE, **engine)
    for number in (1, 2, 3):
        expected, metrics = kl_to_the_start(learner, config, number)
        assert metrics["reference_kl"] == metrics["kl"] == pytest.approx(expected, abs=1e-4)
        assert metrics["grad_norm"] > 0


def test_the_adapters_count_where_they_are_not_switched_off(monkeypatch) -> None:
    """Planted bug: the reference with adapters is the policy itself."""
    monkeypatch.setattr("learner.networks.without_adapters", lambda module: nullcontext())
    learner, config = adapted(BASE)
    kl_to_the_start(learner, config, 1)
    expected, metrics = kl_to_the_start(learner, config, 2)
    assert abs(metrics["reference_kl"] - expected) > 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_learning_is_the_same_as_from_a_reference_of_its_own(engine) -> None:
    """Switching adapters off for the reference leaves graphs, gradients and optimizer alone."""
    weights = []
    for reference in (BASE, {"mode": "swap", "every": 1000}):  # one that is never swapped is the start, too
        learner, config = adapted(reference, **engine)
        for number in (1, 2):
            kl_to_the_start(learner, config, number)
        weights.append(parameters(learner))
    first, second = ({name: w for name, w in found.items() if not name.startswith("reference/")} for found in weights)
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-5
