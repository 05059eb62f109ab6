"""Drawing tokens: temperature, truncation for evaluation, and random numbers that depend on nothing but identity.

A draw is a pure function of (seed of the group, sample index, token position).  There is no generator state, so neither
the batch a sample shares nor a retry on another worker changes a single bit.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from actors.engine import SamplingParams

_BLOCK = 128
"""Tokens whose probabilities are summed before the running sum."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def group_seed(run_seed: int, group_id: str) -> int:
    """Return the 63-bit seed of a group's draws, a pure function of the run's seed and the group's identity."""
    digest = hashlib.blake2b(f"{run_seed}\x00{group_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def uniforms(seeds: np.ndarray, sample_index: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return one uniform number per row, counter-based.

    The three counters are absorbed one after another, each followed by a full SplitMix64 finaliser, so that
    neighbouring samples and positions are unrelated.

    Args:
        seeds: [B] group seeds, non-negative, below 2**64.
        sample_index: [B] index of the sample in its group.
        positions: [B] index of the token within the response.

    Returns:
        [B] float64 in [0, 1), multiples of 2**-53.

    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators" (SplitMix64).
    """
    state = _splitmix(np.asarray(seeds).astype(np.uint64))
    state = _splitmix(state ^ np.asarray(sample_index).astype(np.uint64))
    state = _splitmix(state ^ np.asarray(positions).astype(np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniforms_on_device(seeds: torch.Tensor, sample_index: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the numbers of `uniforms`, bit for bit, without leaving the device; all arguments [B] int64."""
    state = _splitmix_on_device(seeds)
    state = _splitmix_on_device(state ^ sample_index)
    state = _splitmix_on_device(state ^ positions)
    return _shifted(state, 11).double() * 2.0**-53


def draw(logits: torch.Tensor, temperatures: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row as `sample` does where nothing is truncated, without a question to the host.

    Args:
        logits: [B, V].
        temperatures: [B] float32, 0 where greedy.
        uniform: [B] float64 in [0, 1).

    Returns:
        As `sample`.
    """
    logits = logits.float()
    is_greedy = temperatures == 0
    tempered = logits / torch.where(is_greedy, 1.0, temperatures)[:, None]
    logprobs = torch.log_softmax(tempered, dim=-1)
    drawn = _inverse_cdf(torch.softmax(tempered, dim=-1), uniform).clamp(max=logits.shape[1] - 1)
    tokens = torch.where(is_greedy, logits.argmax(dim=-1), drawn)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], uniform: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting its cumulative distribution.

    A row's result has the same bits in whatever batch it stands.  Truncation (top-k, top-p) decides what can be drawn;
    the recorded log-prob stays that of the full distribution.

    Args:
        logits: [B, V] any floating dtype; computed in float32.
        params: [B] how each row is drawn.
        uniform: [B] float64 in [0, 1).

    Returns:
        tokens [B] int64, and their logprobs [B] float32: log-softmax(logits / temperature), temperature 1 where greedy.
        A row with a non-finite logit has a NaN log-prob.
    """
    logits = logits.float()
    tempered = _tempered(logits, params)
    logprobs = torch.log_softmax(tempered, dim=-1)
    if all(p.temperature == 0 for p in params):
        tokens = logits.argmax(dim=-1)
    else:
        # Softmax works row by row; exp(logprobs) would run across rows, with other bits at the end of the last one.
        probs = _truncated(torch.softmax(tempered, dim=-1), params)
        place = torch.from_numpy(np.ascontiguousarray(uniform)).to(probs.device)
        tokens = _inverse_cdf(probs, place).clamp(max=logits.shape[1] - 1)
        greedy = [p.temperature == 0 for p in params]
        if any(greedy):
            tokens = torch.where(torch.tensor(greedy, device=logits.device), logits.argmax(dim=-1), tokens)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _splitmix(state: np.ndarray) -> np.ndarray:
    state = state + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def _splitmix_on_device(state: torch.Tensor) -> torch.Tensor:
    """`_splitmix` in int64, whose sums and products wrap around to the same 64 bits."""
    state = state + _signed(_GOLDEN)
    state = (state ^ _shifted(state, 30)) * _signed(_MIX_1)
    state = (state ^ _shifted(state, 27)) * _signed(_MIX_2)
    return state ^ _shifted(state, 31)


def _shifted(state: torch.Tensor, count: int) -> torch.Tensor:
    """Return int64 bits shifted to the right, zeros coming in where an arithmetic shift would repeat the sign."""
    return (state >> count) & (2 ** (64 - count) - 1)


def _signed(constant: np.uint64) -> int:
    return int(constant.astype(np.int64))


def _tempered(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    temperatures = [p.temperature or 1.0 for p in params]
    if all(temperature == 1.0 for temperature in temperatures):
        return logits  # dividing by one changes no bit and reads the vocabulary once more
    return logits / torch.tensor(temperatures, dtype=torch.float32, device=logits.device)[:, None]


def _truncated(probs: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Zero the tokens that top-k and top-p forbid, in place; nothing is normalised again."""
    for row, p in enumerate(params):
        if p.top_k or p.top_p < 1:
            probs[row] = _truncate_row(probs[row], p)
    return probs


def _truncate_row(probs: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    # Stable, so that ties keep the lower token id whatever the device.
    ordered, order = probs.sort(descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if params.top_k:
        keep[params.top_k :] = False
    if params.top_p < 1:
        # Like the field: top-p looks at what top-k left, and the token that crosses the threshold stays.
        ordered = ordered.where(keep, torch.zeros_like(ordered))
        before = ordered.cumsum(0, dtype=torch.float64) - ordered
        keep &= before < params.top_p * ordered.sum(dtype=torch.float64)
    kept = order[keep]
    truncated = torch.zeros_like(probs)
    truncated[kept] = probs[kept]
    return truncated


def _inverse_cdf(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return the first token whose cumulative probability exceeds `uniform` times the total, [B].

    One uniform per row, because noise for every token of a large vocabulary costs a tenth of all generation; and in two
    levels, blocks of the vocabulary and then tokens of one block, because a running sum is slow.
    """
    blocks = F.pad(probs, (0, -probs.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    mass = blocks.sum(dim=2).double().cumsum(dim=1)
    total = mass[:, -1:].contiguous()
    threshold = uniform[:, None] * total
    block = _first_above(mass, threshold)
    before = torch.where(block > 0, mass.gather(1, (block - 1).clamp(min=0)), 0.0)
    rows = torch.arange(len(probs), device=probs.device)
    inside = blocks[rows, block[:, 0]].double().cumsum(dim=1)
    return (block * _BLOCK + _first_above(inside, threshold - before))[:, 0]


def _first_above(cumulative: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Return the first index whose value exceeds the row's threshold, else the last one that added anything, [B, 1]."""
    above = torch.searchsorted(cumulative, threshold, right=True)
    # Rounding can lift the threshold to the total itself: then the last one that has any probability is meant.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    # NaN probabilities find no place at all; the NaN log-prob then tells, the index only has to exist.
    return torch.minimum(above, last).clamp(max=cumulative.shape[1] - 1)
