"""From judged rows to the small table that travels to the driver: lengths, components, divergence.

A function of SCORED alone, so a batch that is read back from disk gives the same bits as the one that was judged.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from reward.schema import SAMPLES


def samples_of(scored: pa.Table) -> pa.Table:
    """Return the SAMPLES rows of SCORED rows, in their order."""
    masks = [np.array(mask, dtype=bool) for mask in scored["loss_mask"].to_pylist()]
    versions = scored["policy_versions"].to_pylist()
    columns = {
        "group_id": scored["group_id"],
        "sample_index": scored["sample_index"],
        "num_prompt_tokens": _int32(len(ids) for ids in scored["prompt_ids"].to_pylist()),
        "num_response_tokens": _int32(len(mask) for mask in masks),
        "num_loss_tokens": _int32(int(mask.sum()) for mask in masks),
        "finish_reason": scored["finish_reason"],
        "components": scored["components"],
        "kl": _kl(scored, masks),
        "oldest_version": _int32(map(min, versions)),
        "newest_version": _int32(map(max, versions)),
    }
    return pa.table([columns[name] for name in SAMPLES.names], schema=SAMPLES)


def _kl(scored: pa.Table, masks: list[np.ndarray]) -> pa.Array:
    """Return, per sample, the sum over the policy's own tokens of logprob - ref_logprob, in nats."""
    pairs = zip(scored["logprobs"].to_pylist(), scored["ref_logprobs"].to_pylist(), masks, strict=True)
    sums = [
        None if theirs is None else float((np.array(ours, np.float64) - np.array(theirs, np.float64))[mask].sum())
        for ours, theirs, mask in pairs
    ]
    return pa.array(sums, pa.float32())


def _int32(values: Iterable[int]) -> pa.Array:
    return pa.array(list(values), pa.int32())
