"""The tables of a simulated world: the declared schemas, with one short row a sample that names what it was made of."""

from functools import cache
from typing import Any

import pyarrow as pa

from actors.rollout_worker import Lease
from actors.schema import PROMPTS, ROLLOUTS
from reward.samples import samples_of
from reward.schema import SCORED
from tests.simulated_world import Data, share

NUM_SAMPLES = 2


@cache
def prompt_row(prompt_id: str) -> pa.Table:
    """Return one row of PROMPTS."""
    row = {"prompt_id": prompt_id, "prompt": prompt_id, "prompt_ids": [1], "extras": "{}"}
    return pa.Table.from_pylist([row], schema=PROMPTS)


def rollouts_of(content: str, prompt: pa.Table, lease: Lease, version: int) -> pa.Table:
    """Return a group's rows; the text is the content, which hangs on weights, group and seed."""
    count = lease.num_samples
    columns: dict[str, Any] = {name: prompt[name].to_pylist() * count for name in PROMPTS.names}
    columns |= {
        "run_id": ["simulated"] * count,
        "incarnation": [lease.incarnation] * count,
        "group_id": [lease.group_id] * count,
        "sample_index": list(range(count)),
        "lease_id": [lease.lease_id] * count,
        "response_ids": [[7]] * count,
        "response_text": [content] * count,
        "logprobs": [[-1.0]] * count,
        "policy_versions": [[version]] * count,
        "loss_mask": [[True]] * count,
        "finish_reason": ["eos"] * count,
    }
    return pa.table(columns, schema=ROLLOUTS)


def judged(rollouts: pa.Table, data: Data) -> tuple[pa.Table, pa.Table]:
    """Return SCORED and SAMPLES of rows; what is said of them hangs on the content."""
    count = rollouts.num_rows
    scores = [[("share", score_of(text))] for text in rollouts["response_text"].to_pylist()]
    if data.max_waves is not None:  # the samples of a group have one text and one score, so another judge differs
        for index, text in enumerate(rollouts["response_text"].to_pylist()):
            scores[index].append(("passed", 1.0 if data.is_alike(text) else float(index % 2)))
    judgement: dict[str, Any] = {
        "components": scores,
        "token_scores": [None] * count,
        "score_std": [None] * count,
        "reward_version": [0] * count,
        "ref_logprobs": [None] * count,
        "reference_version": [0] * count,
    }
    added = [pa.array(judgement[field.name], field.type) for field in SCORED if field.name in judgement]
    scored = pa.table([*rollouts.columns, *added], schema=SCORED)
    return scored, samples_of(scored)


def score_of(content: str) -> float:
    """Return what the judge says of a text: a float that float32 holds exactly."""
    return int(share("score", content) * 1024) / 1024
