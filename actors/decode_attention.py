"""Attention of one new token per row over its slot, as two Triton kernels: for a GPU, where memory is what it costs.

Every row reads its own keys and no more, however long its neighbours are, and the query heads that share a key head
read it together.  A row's keys are divided among `splits` programs, so that few rows fill a GPU as well ("split-K"); a
second kernel puts their results together.  Sums are float32.

The reference is `actors.slots.Decode` with torch's own attention.  `TRITON_INTERPRET=1` runs the kernels on a CPU.

Source: Dao et al. 2023, "Flash-Decoding for long-context inference"; running softmax: Milakov, Gimelshein 2018,
"Online normalizer calculation for softmax", algorithm 3.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 64
"""Keys that a program reads at a time."""
_PROGRAMS = 512
"""Programs that fill a large GPU: a few for each of its 100 to 150 multiprocessors."""
_MIN_TILE = 16
"""The smallest side of a product on tensor cores."""


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    window: int,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return each row's attention output, [B, heads, head_dim].

    Args:
        query: [B, heads, head_dim].
        keys: [slots, kv heads, max_len, head_dim], contiguous; row b reads slot b up to its position.
        values: likewise.
        positions: [B] int64, of the new token; its key and value are in the slot already.
        window: no position is as large; divides the work.
        scaling: of the scores.
        sliding_window: a query sees this many keys, itself included; None = all.
        softcap: scores become softcap * tanh(scores / softcap); None = as they are.
    """
    rows, heads, head_dim = query.shape
    kv_heads, max_len = keys.shape[1:3]
    shared = heads // kv_heads
    splits = max(1, min(-(-_PROGRAMS // (rows * kv_heads)), -(-window // (2 * _BLOCK))))
    query = query.contiguous()
    partial = query.new_empty(rows, heads, splits, head_dim, dtype=torch.float32)
    peaks = query.new_empty(rows, heads, splits, dtype=torch.float32)
    sums = torch.empty_like(peaks)
    output = torch.empty_like(query)
    padded_dim = max(_MIN_TILE, triton.next_power_of_2(head_dim))
    _attend[(rows * kv_heads, splits)](
        query, keys, values, positions, partial, peaks, sums, scaling, softcap or 0.0, max_len, sliding_window or 0,
        KV_HEADS=kv_heads, SHARED=shared, TILE=max(_MIN_TILE, triton.next_power_of_2(shared)), DIM=head_dim,
        PADDED_DIM=padded_dim, SPLITS=splits, BLOCK=_BLOCK, HAS_SOFTCAP=softcap is not None,
        HAS_SLIDING=sliding_window is not None, PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    _combine[(rows * heads,)](
        partial, peaks, sums, output,
        DIM=head_dim, PADDED_DIM=padded_dim, SPLITS=splits, PADDED_SPLITS=triton.next_power_of_2(splits),
    )  # fmt: skip
    return output


@triton.jit
def _attend(  # type: ignore[no-untyped-def]  # Triton's compiler reads it, not Python
    query, keys, values, positions, partial, peaks, sums, scaling, softcap, max_len, sliding,
    KV_HEADS: tl.constexpr, SHARED: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SLIDING: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One row and key head, one part of its keys: running softmax of the heads that share the key head."""
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)  # slots hold more numbers than 32 bits count
    row, kv_head = pair // KV_HEADS, pair % KV_HEADS
    length = tl.load(positions + row).to(tl.int32) + 1
    first = 0
    if HAS_SLIDING:
        first = tl.maximum(length - sliding, 0)
    share = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK) * BLOCK
    start = first + split * share
    stop = tl.minimum(start + share, length)

    tile, dim, block = tl.arange(0, TILE), tl.arange(0, PADDED_DIM), tl.arange(0, BLOCK)
    head = row * KV_HEADS * SHARED + kv_head * SHARED + tile
    is_head, is_dim = tile < SHARED, dim < DIM
    q = tl.load(query + head[:, None] * DIM + dim[None, :], mask=is_head[:, None] & is_dim[None, :], other=0.0)
    peak = tl.full([TILE], -1e30, tl.float32)  # finite: minus infinity less itself is not a number
    total = tl.zeros([TILE], tl.float32)
    result = tl.zeros([TILE, PADDED_DIM], tl.float32)
    slot = pair * max_len * DIM
    for offset in range(start, stop, BLOCK):
        place = offset + block
        is_key = place < stop
        where = slot + place[:, None].to(tl.int64) * DIM + dim[None, :]
        mask = is_key[:, None] & is_dim[None, :]
        k = tl.load(keys + where, mask=mask, other=0.0)
        v = tl.load(values + where, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
        if HAS_SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)  # tanh
        scores = tl.where(is_key[None, :], scores, -1e30)
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        peak = higher
    part = head * SPLITS + split
    tl.store(peaks + part, peak, mask=is_head)
    tl.store(sums + part, total, mask=is_head)
    tl.store(partial + part[:, None] * DIM + dim[None, :], result, mask=is_head[:, None] & is_dim[None, :])


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    partial, peaks, sums, output,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, SPLITS: tl.constexpr, PADDED_SPLITS: tl.constexpr,
):  # fmt: skip
    """One row and head: its parts, each weighted by what it lacks to the highest peak."""
    head = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, PADDED_SPLITS), tl.arange(0, PADDED_DIM)
    is_split, is_dim = split < SPLITS, dim < DIM
    part = head * SPLITS + split
    peak = tl.load(peaks + part, mask=is_split, other=-1e30)
    weight = tl.exp(peak - tl.max(peak, 0))
    total = tl.sum(tl.load(sums + part, mask=is_split, other=0.0) * weight, 0)
    mask = is_split[:, None] & is_dim[None, :]
    parts = tl.load(partial + part[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
    result = tl.sum(parts * weight[:, None], 0) / total
    tl.store(output + head * DIM + dim, result.to(output.dtype.element_ty), mask=is_dim)
