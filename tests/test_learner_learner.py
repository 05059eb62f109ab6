import math
import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.scoring import reference_logprobs
from learner.algorithm_config import AlgorithmConfig, KLConfig
from learner.config import LoraConfig, OptimizerConfig
from learner.experience import FirstPass, judge
from learner.learner import LearnerRank, MismatchError, Skipped
from learner.off_policy import MISMATCH_NAMES
from learner.samples import read_samples
from tests.learner_pair import VARIANTS, WORLD_SIZE, Pair, pair_results
from tests.learner_toys import TEMPERATURE, ToyBatch, learner_config, learner_rank, parameters, toy_batch

TOLERANCE = 1e-6
STEPS = range(1, 4)
METRICS = {
    "policy_loss",
    "value_loss",
    "entropy",
    "approx_kl",
    "clip_fraction",
    "ratio_max",
    "value_explained_variance",
    "grad_norm",
    "learning_rate",
    "advantage_mean",
    "advantage_std",
    "return_mean",
    "learner_logprob_gap",
    "num_tokens",
    "num_updates",
    "resident_mb_learner",
    *MISMATCH_NAMES,
}


@pytest.fixture(scope="module")
def pair() -> Pair:
    return pair_results()


@pytest.fixture(scope="module")
def toy(pair: Pair) -> str:
    """A Llama without biases."""
    return pair.toy


def learn(directory: str, steps: range = STEPS, **settings: Any) -> LearnerRank:
    config = learner_config(**settings)
    learner = learner_rank(directory, config)
    for step in steps:
        batch = toy_batch(directory, config, step=step)
        learner.step(batch.tables, batch.plan)
    return learner


@pytest.fixture(scope="module")
def plain(toy: str) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters after three steps of plain torch, by kind of learner."""
    kinds: dict[str, dict[str, Any]] = {
        "trunk": {},
        "separate": {"critic": "separate"},
        "lora": {"lora": LoraConfig(rank=4, alpha=8.0)},
        "four minibatches": {"num_minibatches": 4},
        "two passes": {"num_minibatches": 1, "first_epoch_bytes": 0},
    }
    return {kind: parameters(learn(toy, **settings)) for kind, settings in kinds.items()}


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize(
    "settings",
    [
        {"microbatch_tokens": 1000, "chunk_tokens": 512},
        {"microbatch_tokens": 16, "chunk_tokens": 3},
        {"gradient_checkpointing": True},
        {"backend": "zero", "zero_stage": 2},
        {"backend": "zero", "zero_stage": 3},
    ],
    ids=str,
)
def test_one_process_learns_the_same_however_it_is_cut(toy, plain, settings):
    assert difference(parameters(learn(toy, **settings)), plain["trunk"]) < TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_learn_what_one_process_learns(pair, plain, name):
    kinds = {
        "separate critic": "separate",
        "lora": "lora",
        "empty micro-batches": "four minibatches",
        "kept graphs": "two passes",
    }
    for rank in range(WORLD_SIZE):
        found = pair.variant(name, rank)["parameters"]
        assert difference(found, plain[kinds.get(name, "trunk")]) < TOLERANCE
    assert pair.variant(name, 0)["metrics"] == pair.variant(name, 1)["metrics"]


def test_ranks_without_work_were_part_of_it(pair):
    assert pair.variant("empty micro-batches")["num_empty"] > 0


def test_the_comparison_finds_local_denominators(pair, plain):
    assert difference(pair.ranks[0]["local denominators"], plain["trunk"]) > 1e-4


@pytest.mark.parametrize("stage", [2, 3])
def test_a_non_finite_loss_on_one_rank_stops_the_update_on_both(pair, stage):
    assert [rank["non-finite"][stage] for rank in pair.ranks] == [{"skipped": True, "unchanged": True}] * 2


def test_a_later_update_that_is_skipped_says_that_earlier_ones_were_made(pair):
    first, second = (rank["non-finite later"] for rank in pair.ranks)
    for found in (first, second):
        assert (found["has_changed"], found["changed"], found["num_updates"]) == (True, True, 1)
    assert difference(first["parameters"], second["parameters"]) == 0.0


def test_the_order_of_tables_and_rows_does_not_matter(toy, plain):
    config = learner_config()
    learner = learner_rank(toy, config)
    shuffle = random.Random(0)
    for step in STEPS:
        batch = toy_batch(toy, config, step=step)
        tables = [table.take(shuffle.sample(range(table.num_rows), table.num_rows)) for table in batch.tables]
        shuffle.shuffle(tables)
        learner.step(tables, batch.plan)
    assert difference(parameters(learner), plain["trunk"]) == 0.0
    assert repr(learner) == "LearnerRank(rank 0 of 1, ppo, local, cpu)", "for process lists such as Ray's dashboard"


def test_metrics_of_the_first_step(toy):
    config = learner_config(num_minibatches=1, epochs=1)
    batch = toy_batch(toy, config, step=1)
    metrics = learner_rank(toy, config).step(batch.tables, batch.plan)
    assert set(metrics) == METRICS
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["learner_logprob_gap"] < 1e-4  # the recorded log-probs are this policy's
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-4)  # so nothing is clipped
    assert metrics["clip_fraction"] == 0.0
    assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["num_tokens"] == batch.plan.updates[0].num_tokens
    assert metrics["learning_rate"] == 1e-3


def test_the_gap_counts_only_tokens_of_the_published_version(toy):
    config = learner_config()
    learner = learner_rank(toy, config)
    batch = toy_batch(toy, config, step=1)  # recorded as version 0
    learner.step(batch.tables, batch.plan)
    learner.publish(version=0, incarnation=0)  # claims that these weights sampled the batch
    with pytest.raises(MismatchError, match=r"recorded log-probs must equal the learner's within 0\.001"):
        learner.step(batch.tables, batch.plan)
    learner.publish(version=1, incarnation=0)
    assert learner.step(batch.tables, batch.plan)["learner_logprob_gap"] == 0.0


def learn_one_batch(toy: str, algorithm: AlgorithmConfig, **settings: Any) -> tuple[LearnerRank, ToyBatch, list[Any]]:
    """Repeat one batch with a higher learning rate; return the metrics of each repetition."""
    config = learner_config(optimizer=OptimizerConfig(learning_rate=5e-3), num_minibatches=1, epochs=4, **settings)
    batch = toy_batch(toy, config, step=1)
    learner = learner_rank(toy, config, algorithm=algorithm)
    return learner, batch, [learner.step(batch.tables, batch.plan) for _ in range(6)]


@pytest.mark.parametrize("critic", ["trunk", "separate"])
def test_values_learn_their_returns(toy, critic):
    algorithm = AlgorithmConfig(value_clip_range=None, value_coef=1.0, gae_lambda=1.0)
    _, _, history = learn_one_batch(toy, algorithm, critic=critic)
    assert history[-1]["value_loss"] < 0.5 * history[0]["value_loss"]
    assert history[-1]["value_explained_variance"] > 0.5 > 0.1 > history[0]["value_explained_variance"]


def test_good_responses_become_likelier_and_bad_ones_less_likely(toy):
    algorithm = AlgorithmConfig(kl=KLConfig(coef=0.0), whiten_advantages=False, gae_lambda=1.0, value_coef=0.0)
    learner, batch, _ = learn_one_batch(toy, algorithm)
    gains = []
    for sample in read_samples(batch.tables, batch.plan):
        policy, responses = learner._networks.module.policy, [sample.response_ids]
        after = reference_logprobs(policy, sample.prompt_ids, responses, temperature=TEMPERATURE)[0]
        gains.append(float((torch.from_numpy(after) - sample.logprobs)[sample.loss_mask].sum()))
    assert np.corrcoef(gains, batch.plan.scores)[0, 1] > 0.3


@pytest.mark.parametrize("settings", [{}, {"backend": "zero", "zero_stage": 3}], ids=str)
def test_half_precision_recomputes_the_old_logprobs(toy, settings):
    config = learner_config(num_minibatches=1, epochs=1, **settings)
    batch = toy_batch(toy, config, step=1)
    metrics = learner_rank(toy, config, dtype="bfloat16").step(batch.tables, batch.plan)
    assert metrics["learner_logprob_gap"] > 1e-3  # bfloat16 is not what sampled
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-4)  # yet the old policy is the learner's own
    assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-6)


def targets_of(toy: str, algorithm: AlgorithmConfig, values: float = 0.5) -> Any:
    batch = toy_batch(toy, learner_config(), step=1)
    samples = read_samples(batch.tables, batch.plan)
    first_pass = [FirstPass(values=torch.full((len(s.logprobs) + 1,), values), logprobs=None) for s in samples]
    return samples, batch.plan, judge(samples, first_pass, batch.plan, algorithm)[0]


def test_truncated_responses_bootstrap_unless_a_penalty_ends_them(toy):
    plain = AlgorithmConfig(whiten_advantages=False, gae_lambda=1.0)
    samples, plan, targets = targets_of(toy, plain)
    penalised = targets_of(toy, plain.model_copy(update={"missing_eos_penalty": 1.0}))[2]
    for index, sample in enumerate(samples):
        kl = plan.kl_coef * (sample.logprobs - sample.ref_logprobs) * sample.loss_mask
        end = 0.5 if sample.finish_reason == "length" else 0.0
        assert targets[index].returns[0] == pytest.approx(float(plan.scores[index] - kl.sum()) + end, abs=1e-5)
        assert penalised[index].returns[0] == pytest.approx(float(plan.scores[index] - kl.sum()), abs=1e-5)


def test_whitening_is_over_all_loss_tokens_of_the_batch(toy):
    samples, _, targets = targets_of(toy, AlgorithmConfig())
    advantages = torch.cat([t.advantages[s.loss_mask] for s, t in zip(samples, targets, strict=True)])
    assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(advantages.var(correction=0)) == pytest.approx(1.0, abs=1e-5)


def test_masked_tokens_teach_nothing(toy):
    """What a token not chosen by the policy was recorded with must not matter."""

    def step(shift: float) -> dict[str, torch.Tensor]:
        config = learner_config()
        batch = toy_batch(toy, config, step=1)
        tables = []
        for table in batch.tables:
            rows = table.to_pylist()
            for row in rows:
                row["logprobs"] = [
                    p + (0.0 if keep else shift) for p, keep in zip(row["logprobs"], row["loss_mask"], strict=True)
                ]
            tables.append(pa.Table.from_pylist(rows, schema=table.schema))
        learner = learner_rank(toy, config)
        learner.step(tables, batch.plan)
        return parameters(learner)

    assert difference(step(0.0), step(-5.0)) == 0.0


@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.5), (1.5, 1.5), (9.0, 2.0)])
def test_importance_weights_are_truncated(toy, ratio, weight):
    batch = toy_batch(toy, learner_config(), step=1)
    samples = read_samples(batch.tables, batch.plan)
    shift = math.log(ratio)
    first = [FirstPass(values=torch.zeros(len(s.logprobs) + 1), logprobs=s.logprobs + shift) for s in samples]
    targets, _ = judge(samples, first, batch.plan, AlgorithmConfig())
    for sample, target in zip(samples, targets, strict=True):
        expected = torch.where(sample.loss_mask, weight, 1.0)
        assert torch.allclose(target.importance, expected, atol=1e-5)


def at_version(batch: ToyBatch, version: int) -> list[pa.Table]:
    """The batch's rows as a policy of `version` would have sampled them, log-probs a last digit off the learner's."""
    tables = []
    for table in batch.tables:
        rows = table.to_pylist()
        for row in rows:
            row["policy_versions"] = [version] * len(row["response_ids"])
            row["logprobs"] = [value + 1e-6 for value in row["logprobs"]]
        tables.append(pa.Table.from_pylist(rows, schema=table.schema))
    return tables


def check_replay(toy: str, is_on_policy: Any) -> None:
    """A rank that learns steps again without publishing ends with the bits of the one that published each."""
    config = learner_config(epochs=1, num_minibatches=1)
    ranks = [learner_rank(toy, config) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LearnerRank, "_is_on_policy", is_on_policy)
        for number, learner in enumerate(ranks):
            for step in (1, 2):
                batch = toy_batch(toy, config, step=step)
                if number == 0 and step == 1:  # later weights sampled nothing that is recorded here
                    learner.publish(step - 1, 0)
                metrics = learner.step(at_version(batch, step - 1), batch.plan)
                assert metrics["ratio_max"] == 1.0
    assert difference(parameters(ranks[0]), parameters(ranks[1])) == 0.0


def by_what_was_published(learner: LearnerRank, samples: Any, plan: Any) -> bool:
    return learner._version is not None and all(bool((s.policy_versions == learner._version).all()) for s in samples)


def test_one_update_a_step_is_replayed_bit_for_bit(toy):
    check_replay(toy, LearnerRank._is_on_policy)


def test_a_ratio_that_hangs_on_what_was_published_is_caught(toy):
    with pytest.raises(AssertionError):
        check_replay(toy, by_what_was_published)


@pytest.mark.parametrize("change", ["missing", "twice", "unknown"])
def test_tables_that_do_not_fit_the_plan_are_refused(toy, change):
    batch = toy_batch(toy, learner_config(), step=1)
    tables = list(batch.tables)
    if change == "missing":
        tables[0] = tables[0].slice(1)
    if change == "twice":
        tables.append(tables[0])
    if change == "unknown":
        tables[0] = toy_batch(toy, learner_config(), step=2).tables[0]
    pattern = {"missing": "all 15 samples", "twice": "once", "unknown": "plan"}[change]
    with pytest.raises(ValueError, match=pattern):
        read_samples(tables, batch.plan)


def test_a_non_finite_critic_leaves_the_policy_alone(toy):
    config = learner_config(critic="separate")
    learner = learner_rank(toy, config)
    before = parameters(learner)
    with torch.no_grad():
        learner._networks.critic.module.value_head.bias.fill_(math.inf)
    batch = toy_batch(toy, config, step=1)
    answer = learner.step(batch.tables, batch.plan)
    assert isinstance(answer, Skipped)
    assert not answer.has_changed
    after = parameters(learner)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("policy/"))


def test_a_non_finite_policy_says_that_the_critic_has_changed(toy):
    config = learner_config(critic="separate")
    learner = learner_rank(toy, config)
    before = parameters(learner)
    learner._networks.policy._is_finite = False
    batch = toy_batch(toy, config, step=1)
    answer = learner.step(batch.tables, batch.plan)
    assert isinstance(answer, Skipped)
    assert "must be finite" in answer.reason
    assert answer.has_changed
    changed = {name.partition("/")[0] for name, value in parameters(learner).items() if not value.equal(before[name])}
    assert changed == {"critic"}


def test_after_a_skipped_step_the_others_are_as_if_it_had_not_been(toy, plain):
    config = learner_config()
    learner = learner_rank(toy, config)
    extra = toy_batch(toy, config, step=5)
    learner._networks.policy._is_finite = False
    answer = learner.step(extra.tables, extra.plan)
    assert isinstance(answer, Skipped)
    assert not answer.has_changed
    for step in STEPS:
        batch = toy_batch(toy, config, step=step)
        learner.step(batch.tables, batch.plan)
    assert difference(parameters(learner), plain["trunk"]) == 0.0


def test_fault_points_of_a_step_are_reached_in_order(toy, monkeypatch):
    reached: list[Any] = []
    learner = learner_rank(toy, learner_config())

    def fault(name: str, index: int) -> None:
        reached.append((name, index, learner.ping()))

    monkeypatch.setattr("learner.learner.fault", fault)
    batch = toy_batch(toy, learner_config(), step=1)
    learner.step(batch.tables, batch.plan)
    learner.publish(version=1, incarnation=0)
    points = [("learner.before_backward", 0, 0), ("learner.after_update", 0, 4), ("learner.publish", 0, 4)]
    assert reached == points
