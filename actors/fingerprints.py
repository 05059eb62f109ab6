"""Fingerprints of weights: 64 bits that change with any byte and with the order of bytes, at the speed of memory.

The bytes, filled up with zeros to words of 8, give `sum_i word_i * weight_i mod 2**64`; weights are odd, fixed and
without a pattern.  An odd weight makes every change of a single word visible, different weights make exchanged words
visible; this finds accidents, not intent.  The sum is linear, so ranks that hold parts of a tensor add up what each of
them finds in its own.

Word i of a tensor is weighed by column weight i % 1024 times row weight i // 1024: a row of weights stays in the cache.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

_WORD = 8
_WIDTH = 1024
_MASK = 2**64 - 1


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Return odd 64-bit numbers without a pattern: the finalizer of SplitMix64."""
    mixed = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)


_COLUMNS = _mixed(np.arange(_WIDTH))


def fingerprint(raw: np.ndarray | Tensor, *, at: int = 0) -> int:
    """Return the fingerprint of bytes.

    Args:
        raw: [N] uint8, an array or a tensor; where that is on a device, it begins at a multiple of 8 bytes.
        at: byte of a whole at which they lie; fingerprints of a whole's parts add up to its own, modulo 2**64.
    """
    if isinstance(raw, Tensor):
        if raw.device.type != "cpu":
            assert at == 0, "parts are told in main memory"
            return fingerprint_there(raw)
        raw = raw.numpy()
    lead = min(-at % _WORD, raw.size)
    body = (raw.size - lead) // _WORD * _WORD
    total = 0
    if lead:
        total += _edge(raw[:lead], at)
    total += _words(raw[lead : lead + body].view(np.uint64), (at + lead) // _WORD)
    if lead + body < raw.size:
        total += _edge(raw[lead + body :], at + lead + body)
    return total & _MASK


def fingerprint_there(raw: Tensor) -> int:
    """Return the fingerprint of bytes, [N] uint8, without taking them off their device: int64 wraps as uint64 does."""
    if not raw.numel():
        return 0
    words = pad(raw, (0, -raw.numel() % _WORD)).view(torch.int64)
    num_rows = -(-words.numel() // _WIDTH)
    rows = pad(words, (0, -words.numel() % _WIDTH)).view(num_rows, _WIDTH)
    columns, weights = (
        torch.from_numpy(numbers.view(np.int64)).to(raw.device) for numbers in (_COLUMNS, _mixed(np.arange(num_rows)))
    )
    return int(((rows * columns).sum(1) * weights).sum()) & _MASK


def _edge(raw: np.ndarray, at: int) -> int:
    """Return the share of less than a word."""
    word = np.zeros(_WORD, dtype=np.uint8)
    word[at % _WORD : at % _WORD + raw.size] = raw
    return _words(word.view(np.uint64), at // _WORD)


def _words(words: np.ndarray, first: int) -> int:
    """Return the share of whole words, `first` being the index of the first one."""
    row, column = divmod(first, _WIDTH)
    head = min(words.size, (_WIDTH - column) % _WIDTH)
    num_rows = (words.size - head) // _WIDTH
    tail = head + num_rows * _WIDTH
    sums = []
    if head:
        sums.append(np.einsum("i,i->", words[:head], _COLUMNS[column : column + head])[None])
    sums.append(np.einsum("ij,j->i", words[head:tail].reshape(num_rows, _WIDTH), _COLUMNS))
    if tail < words.size:
        sums.append(np.einsum("i,i->", words[tail:], _COLUMNS[: words.size - tail])[None])
    found = np.concatenate(sums)
    return int((found * _mixed(np.arange(row, row + found.size))).sum(dtype=np.uint64))
