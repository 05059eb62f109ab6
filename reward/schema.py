"""Arrow schemas of judged rollouts, and the small metadata table that travels to the driver in their place."""

import pyarrow as pa

from actors.schema import ROLLOUTS, declare

COMPONENTS = pa.map_(pa.string(), pa.float32())

SCORED = declare(
    "scored",
    1,
    [
        *ROLLOUTS,
        pa.field("components", COMPONENTS, nullable=False),  # name of a judge -> its raw scalar; absent: does not apply
        pa.field("token_scores", pa.list_(pa.float32())),  # aligned to response_ids, what `reward.credit` asked for
        pa.field("score_std", pa.float32()),  # disagreement of an ensemble
        pa.field("reward_version", pa.int32(), nullable=False),
        pa.field("ref_logprobs", pa.list_(pa.float32())),  # at the run's temperature
        pa.field("reference_version", pa.int32(), nullable=False),
    ],
)
"""ROLLOUTS + what the judges said."""

SAMPLES = declare(
    "samples",
    1,
    [
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("num_prompt_tokens", pa.int32(), nullable=False),
        pa.field("num_response_tokens", pa.int32(), nullable=False),
        pa.field("num_loss_tokens", pa.int32(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("components", COMPONENTS, nullable=False),
        pa.field("kl", pa.float32()),  # nats per sequence: sum over tokens of logprob - ref_logprob
        pa.field("oldest_version", pa.int32(), nullable=False),
        pa.field("newest_version", pa.int32(), nullable=False),
    ],
)
"""One row per sample, numbers only: what the driver needs to compose scores and plan a step."""
