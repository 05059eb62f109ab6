"""Attention of one new token per row over its slot, compiled for the processor: here too, memory is what it costs.

Every row reads its own keys and no more, however long its neighbours are, and the query heads that share a key head
read it together; what is needed next is fetched while the processor computes.  A row is computed alone, so its bits are
the same in any company.  torch's own kernel reads every row up to the longest one's end, in products too small for the
maths library: it takes three times as long for 16 rows of SmolLM2-135M.

The reference is `actors.slots.Decode` with torch's own attention.  Numba compiles once for each shape of heads, in a
second or two, and keeps the result beside this file or in the user's cache.  One thread, whatever torch has.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

_LINE = 16
"""Float32 numbers in a line of the processor's cache."""

_REORDER = {"reassoc", "contract", "nsz"}
"""What the compiler may do with sums, so that they become vectors; infinities and NaN keep their meaning."""

_compiled: Callable[..., Any] = functools.partial(njit, fastmath=_REORDER, error_model="numpy", nogil=True)
_inlined: Callable[..., Any] = functools.partial(_compiled, forceinline=True)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Store each row's new key and value in its slot, and return its attention output, [B, heads, head_dim] float32.

    Args:
        query: [B, heads, head_dim] float32.
        key: [B, kv heads, head_dim] float32, of the new token.
        value: likewise.
        keys: [slots, kv heads, max_len, head_dim] float32, contiguous; row b has slot b.
        values: likewise.
        positions: [B] int64, of the new token in its slot; the query sees it and those before it.
        scaling: of the scores, above 0.
        sliding_window: a query sees this many keys, itself included; None = all.
        softcap: scores become softcap * tanh(scores / softcap); None = as they are.
    """
    heads, head_dim = query.shape[1:]
    output = torch.empty(query.shape)
    attend = _kernel(heads // keys.shape[1], head_dim)
    new = (tensor.contiguous().numpy() for tensor in (query, key, value))
    attend(
        *new, keys.numpy(), values.numpy(), positions.numpy(), output.numpy(),
        np.float32(scaling), sliding_window or keys.shape[2], np.float32(softcap or 0.0),
    )  # fmt: skip
    return output


@functools.cache
def _kernel(shared: int, head_dim: int) -> Callable[..., None]:
    """Return the kernel for `shared` query heads to a key head; constants, so that its loops become straight code."""

    def attend(  # type: ignore[no-untyped-def]
        query, key, value, keys, values, positions, output, scaling, sliding_window, softcap
    ):
        rows, kv_heads, max_len = query.shape[0], keys.shape[1], keys.shape[2]
        scores = np.empty((shared, max_len), np.float32)
        exponents = np.empty(max_len, np.int32)
        for row in range(rows):
            end = positions[row] + 1
            first = max(0, end - sliding_window)
            keys[row, :, end - 1] = key[row]
            values[row, :, end - 1] = value[row]
            for head in range(kv_heads):
                heads = slice(head * shared, (head + 1) * shared)
                mine, result = query[row, heads], output[row, heads]
                its_keys, its_values = keys[row, head, first:end], values[row, head, first:end]
                line = (row * kv_heads + head) * max_len + first
                _score(scores, mine, its_keys, values, line, shared, head_dim)
                for index in range(shared):
                    _softmax(scores[index, : end - first], exponents, scaling, softcap)
                _average(result, scores, its_values, keys, line + max_len, shared, head_dim)

    try:
        kernel: Callable[..., None] = _compiled(cache=True)(attend)
    except RuntimeError:  # neither this directory nor the user's cache can be written
        kernel = _compiled()(attend)
    return kernel


@_inlined
def _score(scores, query, keys, next_values, line, shared, head_dim):  # type: ignore[no-untyped-def]
    """Set `scores[index, place]` to query times key; fetch the values of the same places, from `line` on."""
    for place in range(len(keys)):
        for element in range(0, head_dim, _LINE):
            _prefetch(next_values, (line + place) * head_dim + element)
        for index in range(shared):
            total = np.float32(0)
            for element in range(head_dim):
                total += query[index, element] * keys[place, element]
            scores[index, place] = total


@_inlined
def _average(result, weights, values, next_keys, line, shared, head_dim):  # type: ignore[no-untyped-def]
    """Set `result[index]` to the weighted sum of the values; fetch the next head's keys, from `line` on."""
    result[:] = np.float32(0)
    in_fours = len(values) // 4 * 4
    for place in range(0, in_fours, 4):  # so that the result is read and written a quarter as often
        for element in range(0, 4 * head_dim, _LINE):
            _prefetch(next_keys, (line + place) * head_dim + element)
        for index in range(shared):
            a, b = weights[index, place], weights[index, place + 1]
            c, d = weights[index, place + 2], weights[index, place + 3]
            for element in range(head_dim):
                result[index, element] += (
                    a * values[place, element] + b * values[place + 1, element]
                    + c * values[place + 2, element] + d * values[place + 3, element]
                )  # fmt: skip
    for place in range(in_fours, len(values)):
        for index in range(shared):
            for element in range(head_dim):
                result[index, element] += weights[index, place] * values[place, element]


@functools.partial(_inlined, fastmath={"nnan", "nsz"})
def _largest(numbers):  # type: ignore[no-untyped-def]
    """Return the largest number, or any where one is NaN, which is what lets the compiler make vectors of it."""
    largest = numbers[0]
    for place in range(len(numbers)):
        largest = max(largest, numbers[place])
    return largest


@_inlined
def _softmax(scores, exponents, scaling, softcap):  # type: ignore[no-untyped-def]
    """Turn scores into weights that sum to 1, in place.

    exp(x) = 2^n exp(r), n whole and |r| <= ln(2) / 2, and a polynomial for exp(r): what a library calls per number goes
    into vectors like this.  The coefficients and the two parts of ln(2) are those of Moshier's Cephes, `expf.c`;
    relative error below 2e-7.
    """
    if softcap > 0:
        for place in range(len(scores)):
            scores[place] = softcap / scaling * math.tanh(scores[place] * scaling / softcap)
    peak = _largest(scores)
    for place in range(len(scores)):
        x = scaling * (scores[place] - peak)
        x = np.float32(-87) if x < np.float32(-87) else x  # as comparisons with NaN are false, NaN stays
        n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
        exponents[place] = np.int32(n)
        r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        scores[place] = p * r * r + r + np.float32(1)
    powers = exponents.view(np.float32)  # 2^n is a float32 whose bits are the exponent alone
    total = np.float32(0)
    for place in range(len(scores)):
        exponents[place] = (exponents[place] + np.int32(127)) << np.int32(23)
        scores[place] *= powers[place]
        total += scores[place]
    for place in range(len(scores)):
        scores[place] /= total


@intrinsic
def _prefetch(typing_context, array, index):  # type: ignore[no-untyped-def]
    """Ask for the line of the cache that holds `array[index]`, for reading; waits for nothing."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        wanted = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, wanted, "llvm.prefetch.p0")
        line = builder.bitcast(builder.gep(data, [arguments[1]]), pointer)
        # for reading, to be kept in every level, data and not instructions
        builder.call(function, [line, *(ir.Constant(number, setting) for setting in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate
