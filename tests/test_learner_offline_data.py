"""Offline data: which rows mean what, what is refused, and which pairs are made of scores."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.config import ArchitectureConfig, CharacterTokenizerConfig, PolicyConfig
from actors.dataset import Dataset
from actors.policy import load_tokenizer, materialize
from learner import offline_data
from learner.offline_config import ScoreConfig
from learner.offline_data import Judged, Trajectory, preference_pairs, rated_pairs, read_offline_data, standardized
from reward.schema import SCORED

POLICY = PolicyConfig(
    model=ArchitectureConfig(
        architecture={"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 32},
        tokenizer=CharacterTokenizerConfig(characters="abcdef"),
    )
)
EOS = 7  # after six letters and <pad>


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(materialize(POLICY, seed=0, cache_dir=str(tmp_path_factory.mktemp("cache"))))


def _read(path, tokenizer, *, max_tokens=16, strict=False, **score):
    return read_offline_data(Dataset(str(path)), tokenizer, ScoreConfig(**score), max_tokens=max_tokens, strict=strict)


def _jsonl(tmp_path, rows) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def _scored(**changes) -> dict:
    row = {
        "prompt_id": "p",
        "prompt": "ab",
        "prompt_ids": [0, 1],
        "extras": "{}",
        "run_id": "run",
        "incarnation": 0,
        "group_id": "0/p",
        "sample_index": 0,
        "lease_id": 0,
        "response_ids": [2, 3, EOS],
        "response_text": "cd",
        "logprobs": [-1.0] * 3,
        "policy_versions": [0] * 3,
        "loss_mask": [True, False, True],
        "finish_reason": "eos",
        "components": [("good", 2.0), ("long", 0.5)],
        "token_scores": None,
        "score_std": None,
        "reward_version": 0,
        "ref_logprobs": None,
        "reference_version": 0,
    }
    return {**row, **changes}


CUT_OFF = {"response_ids": [2, 3], "logprobs": [-1.0] * 2, "policy_versions": [0] * 2, "loss_mask": [True] * 2}
CUT_OFF |= {"finish_reason": "length", "components": [("good", 1.0)], "sample_index": 1}


def _parquet(tmp_path, rows) -> str:
    directory = tmp_path / "rollouts"
    directory.mkdir(exist_ok=True)
    for step, row in enumerate(rows, start=1):  # a run writes one file a step, with more metadata than the schema's
        table = pa.Table.from_pylist([row], schema=SCORED).replace_schema_metadata({b"concord.after": b"{}"})
        pq.write_table(table, directory / f"step-{step}.parquet")
    return str(directory)


def test_preferences_are_two_trajectories_and_a_pair(tmp_path, tokenizer):
    data = _read(_jsonl(tmp_path, [{"prompt": "ab", "chosen": "c", "rejected": "de"}]), tokenizer)
    assert data.kind == "preferences"
    better, worse = data.trajectories
    assert (better.prompt_ids, better.response_ids, better.score) == ([0, 1], [2, EOS], 1.0)
    assert (worse.prompt_ids, worse.response_ids, worse.score) == ([0, 1], [3, 4, EOS], -1.0)
    assert better.is_terminal
    assert worse.is_terminal
    assert all(better.is_learnt + worse.is_learnt)
    (pair,) = preference_pairs(data.judged)
    assert (pair.chosen_ids, pair.rejected_ids) == (better.response_ids, worse.response_ids)


def test_ratings_are_scores_and_all_of_the_completion_is_learnt(tmp_path, tokenizer):
    data = _read(_jsonl(tmp_path, [{"prompt": "ab", "completion": "cd", "rating": 3}]), tokenizer)
    assert data.kind == "ratings"
    assert data.trajectories == [
        Trajectory(prompt_ids=[0, 1], response_ids=[2, 3, EOS], is_learnt=[True] * 3, score=3.0, is_terminal=True)
    ]


def test_rollouts_of_a_run_are_read_as_they_are(tmp_path, tokenizer):
    path = _parquet(tmp_path, [_scored(), _scored(**CUT_OFF)])
    ended, cut_off = _read(path, tokenizer).trajectories
    assert (ended.response_ids, ended.is_learnt) == ([2, 3, EOS], [True, False, True])
    assert (ended.score, ended.is_terminal) == (2.5, True)
    assert (cut_off.score, cut_off.is_terminal) == (1.0, False)
    weighted = _read(path, tokenizer, weights={"long": 4.0}, missing_eos_penalty=0.25).trajectories
    assert [(one.score, one.is_terminal) for one in weighted] == [(4.0, True), (0.75, True)]


def test_what_marks_rollouts_is_part_of_their_schema():
    assert set(SCORED.names) >= offline_data._ROLLOUTS


def test_wrong_rows_are_left_out_and_named(tmp_path, tokenizer):
    good = {"prompt": "a", "completion": "b", "rating": 1.0}
    bad = [
        ({"prompt": "a", "completion": "b", "rating": "high"}, "rating must be a finite number, got 'high'"),
        ({"prompt": "a", "completion": "b", "rating": True}, "rating must be a finite number, got True"),
        ({"prompt": "a", "completion": "b"}, "rating must be a finite number, got None"),
        ({"prompt": "a", "completion": "Z", "rating": 1.0}, "alphabet"),
        ({"prompt": "a", "completion": "b" * 20, "rating": 1.0}, "at most 16 tokens, got 22"),
    ]
    path = _jsonl(tmp_path, [good, *(row for row, _ in bad)])
    data = _read(path, tokenizer)
    assert len(data.judged) == 1
    assert [row.line for row in data.quarantined] == [2, 3, 4, 5, 6]
    for row, (_, reason) in zip(data.quarantined, bad, strict=True):
        assert reason in row.reason
    with pytest.raises(ValueError, match="5 of 6 rows are malformed"):
        _read(path, tokenizer, strict=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"response_text": "ce"}, "must spell response_text with the policy's tokenizer, got 'cd' for 'ce'"),
        ({"response_ids": [2, 99, EOS]}, "must spell response_text with the policy's tokenizer, got None"),
        ({"prompt_ids": [0, 99]}, "must spell response_text with the policy's tokenizer, got None"),
        ({"components": []}, "at least one component"),
        ({"components": [("good", float("nan"))]}, "component 'good' must be a finite number"),
        ({"loss_mask": [False] * 3}, "loss_mask must be true on some of 3"),
        ({"loss_mask": [True] * 2}, "loss_mask must be true on some of 3"),
        ({"finish_reason": "tired"}, "finish_reason must be one of eos, stop, length, got 'tired'"),
        ({"response_ids": [], "loss_mask": []}, "at least one token, got 2 and 0"),
    ],
)
def test_a_wrong_rollout_is_left_out_and_says_why(tmp_path, tokenizer, changes, reason):
    data = _read(_parquet(tmp_path, [_scored(), _scored(**changes)]), tokenizer)
    assert len(data.judged) == 1
    assert reason in data.quarantined[0].reason
    assert data.quarantined[0].file.endswith("step-2.parquet")


RATED = {"prompt": "a", "completion": "b", "rating": 1.0}
PREFERRED = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("row", "score", "reason"),
    [
        ({"prompt": "a", "completion": "b"}, {}, r"chosen and rejected, or rating, or those of a run's rollouts, got"),
        (RATED, {"weights": {"good": 2.0}}, "must not be set for ratings"),
        (RATED, {"missing_eos_penalty": 1.0}, "must not be set for ratings"),
        (PREFERRED, {"standardize": True}, "must be false for preferences"),
    ],
)
def test_data_of_no_kind_and_settings_of_another_are_refused(tmp_path, tokenizer, row, score, reason):
    with pytest.raises(ValueError, match=reason):
        _read(_jsonl(tmp_path, [row]), tokenizer, **score)


def test_a_weight_for_no_component_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"got \['god'\] for \['good', 'long'\]"):
        _read(_parquet(tmp_path, [_scored()]), tokenizer, weights={"god": 2.0})


def _judged(key: str, response: list[int], score: float) -> Judged:
    trajectory = Trajectory(
        prompt_ids=[1], response_ids=response, is_learnt=[True] * len(response), score=score, is_terminal=True
    )
    return Judged(prompt_key=key, trajectories=(trajectory,))


def test_pairs_by_hand():
    """Prompt p: 2 over both 1s, which tie; prompt q alone; prompt r: the same tokens, whatever their scores."""
    rows = [_judged("p", [5], 1.0), _judged("q", [6], 9.0), _judged("p", [7], 2.0), _judged("p", [8], 1.0)]
    rows += [_judged("r", [9], 0.0), _judged("r", [9], 1.0)]
    pairs, num_ties = rated_pairs(rows, limit=None, seed=0)
    assert [(pair.chosen_ids, pair.rejected_ids) for pair in pairs] == [([7], [5]), ([7], [8])]
    assert num_ties == 2


def _all_couples(scores, *, is_pair) -> set[tuple[int, int]]:
    numbers = range(len(scores))
    return {(i, j) for i in numbers for j in numbers if is_pair(scores[i], scores[j])}


def _found(scores, *, limit=None, seed=0):
    pairs, num_ties = rated_pairs([_judged("p", [i], s) for i, s in enumerate(scores)], limit=limit, seed=seed)
    return [(pair.chosen_ids[0], pair.rejected_ids[0]) for pair in pairs], num_ties


def test_all_couples_are_made_once_and_ties_are_counted():
    scores = np.random.default_rng(0).integers(0, 6, 30).tolist()
    couples, num_ties = _found(scores)
    assert sorted(couples) == sorted(_all_couples(scores, is_pair=lambda better, worse: better > worse))
    assert num_ties == len(_all_couples(scores, is_pair=lambda first, second: first == second)) // 2 - 15
    # Planted bug: a couple with equal scores is no pair, and a test that misses it would not see the twin.
    assert sorted(couples) != sorted(_all_couples(scores, is_pair=lambda better, worse: better >= worse))


def test_a_limit_draws_without_repetition_by_seed():
    scores = np.random.default_rng(0).integers(0, 6, 30).tolist()
    every, _ = _found(scores)
    first, again, other = (_found(scores, limit=20, seed=seed)[0] for seed in (3, 3, 4))
    assert len(first) == len(set(first)) == 20
    assert set(first) <= set(every)
    assert first == again != other
    drawn = [couple for seed in range(400) for couple in _found(scores[:5], limit=2, seed=seed)[0]]
    few = _found(scores[:5])[0]
    counts = [drawn.count(couple) for couple in few]
    expected = 800 / len(few)
    assert sum((count - expected) ** 2 / expected for count in counts) < 2.5 * len(few), "each couple is as likely"


def test_ids_of_other_runs_and_other_prompts_do_not_meet(tmp_path, tokenizer):
    same_id = _scored(prompt="b", prompt_ids=[1])
    other_columns = _scored(prompt_id="q")
    data = _read(_parquet(tmp_path, [_scored(), same_id, other_columns, _scored(sample_index=1)]), tokenizer)
    keys = [row.prompt_key for row in data.judged]
    assert keys[0] == keys[3]
    assert len(set(keys)) == 3


def test_standardized_scores_by_hand():
    rows = [_judged("p", [1], score).trajectories[0] for score in (1.0, 3.0)]
    assert [one.score for one in standardized(rows)] == [-1.0, 1.0]
    assert [one.score for one in standardized(rows[:1] * 2)] == [0.0, 0.0]
