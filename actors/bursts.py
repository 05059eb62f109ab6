"""Several tokens for each look at them: a GPU decodes faster than Python can ask it to.

All that a step needs stands on the device: each row's last token, its position, the counters of its random numbers.  So
a step is a program without a question to the host, which is captured once as a CUDA graph for each (rows, window) and
replayed.  After some steps the host looks at the tokens: a row that ended among them has drawn a few for nothing, never
more than `steps - 1`.  Where graphs cannot be captured the same program runs operation by operation.

On a CPU in float32 the tokens and log-probs are, bit for bit, those of one step at a time.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.live_rows import LiveRow
from actors.sampling import draw, uniforms_on_device
from actors.slots import WINDOW_MULTIPLE, Decode, SlotCache, SlotContext, round_up

logger = logging.getLogger(__name__)

ROW_BUCKETS = (4, 8, 16, 32, 64, 96, 128, 192, 256)
"""Rows that graphs are captured for; more are rounded up to a multiple of the last."""
WINDOW_BUCKETS = (256, 512, 1024, 2048)
"""Key-value windows that graphs are captured for, tokens; longer ones are rounded up to a multiple of the last."""

Forward = Callable[[Tensor, Tensor, SlotContext], Tensor]
"""`forward(ids [B, 1], positions [B, 1], context) -> logits [B, V]`."""


@dataclass(frozen=True, slots=True)
class Burst:
    """What the live rows have drawn, step by step."""

    tokens: np.ndarray
    """[steps, B] int64."""
    logprobs: np.ndarray
    """[steps, B] float32."""
    num_rows: int
    """Rows computed, padding included."""


class BurstDecoder:
    """Decodes some tokens for every live row at a time.

    Args:
        forward: of the model, over one new token per row.
        cache: the slots; row b of a burst is slot b.
        device: of both.
        steps: tokens of a burst, at least 1.
        max_positions: positions the model has an embedding for.
    """

    def __init__(
        self, forward: Forward, cache: SlotCache, device: torch.device, *, steps: int, max_positions: int
    ) -> None:
        self.steps = steps
        self._forward = forward
        self._cache = cache
        self._device = device
        self._max_positions = max_positions
        self._programs: dict[tuple[int, int], _Program] = {}
        self._generation = -1
        self._has_graphs = device.type == "cuda"
        self._pool: Any = None

    def run(self, rows: Sequence[LiveRow]) -> Burst:
        """Draw `steps` tokens for each row; nothing of the rows is changed."""
        if self._generation != self._cache.generation:  # graphs hold on to memory that the cache has given back
            self.forget()
            self._generation = self._cache.generation
        longest = max(row.num_stored for row in rows) + self.steps
        size = self._num_rows(len(rows)), self._window(longest)
        program = self._programs.get(size)
        if program is None:
            program = _Program(self._forward, self._cache, *size, self.steps, self._device, self._max_positions)
        program.set(rows)
        if size not in self._programs:
            self._programs[size] = program
            if self._has_graphs:
                self._capture(program)
                program.set(rows)  # the steps before the capture have moved on
        for _ in range(self.steps):
            program.step()
        tokens, logprobs = program.drawn()
        return Burst(tokens=tokens[:, : len(rows)], logprobs=logprobs[:, : len(rows)], num_rows=size[0])

    def forget(self) -> None:
        """Give graphs and their memory back; needed when weights or slots have moved."""
        self._programs.clear()
        self._pool = None

    def _num_rows(self, live: int) -> int:
        if not self._has_graphs:
            return round_up(live, ROW_BUCKETS[0])
        return min(_bucket(live, ROW_BUCKETS), self._cache.num_slots)

    def _window(self, longest: int) -> int:
        wanted = _bucket(longest, WINDOW_BUCKETS) if self._has_graphs else round_up(longest, WINDOW_MULTIPLE)
        return min(wanted, self._cache.max_len)

    def _capture(self, program: "_Program") -> None:
        try:
            self._pool = program.capture(self._pool)
        except RuntimeError as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning(
                "the model's steps cannot be captured as a CUDA graph (%s): tokens are decoded operation by operation, "
                "several times slower where the model is small",
                said,
            )
            self._has_graphs = False
            self._programs.clear()


class _Program:
    """One step for a number of rows within a window: what it reads and writes stays at the same place."""

    def __init__(
        self,
        forward: Forward,
        cache: SlotCache,
        num_rows: int,
        window: int,
        steps: int,
        device: torch.device,
        max_positions: int,
    ) -> None:
        self._forward = forward
        self._cache = cache
        self._window = window
        self._last_position = min(window, max_positions) - 1
        self._counters = torch.zeros(5, num_rows, dtype=torch.int64, device=device)
        """Last token, its position, number of drawn tokens, seed of the group, index of the sample."""
        self._temperatures = torch.ones(num_rows, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(steps, num_rows, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(steps, num_rows, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def set(self, rows: Sequence[LiveRow]) -> None:
        """Start where the rows stand; rows beyond them are padding in slots that nobody has."""
        counters = np.zeros(tuple(self._counters.shape), dtype=np.int64)
        temperatures = np.ones(self._counters.shape[1], dtype=np.float32)
        for slot, row in enumerate(rows):
            request = row.group.request
            counters[:, slot] = row.tokens[-1], row.num_stored, len(row.tokens), request.seed, row.sample_index
            temperatures[slot] = request.sampling.temperature
        self._counters.copy_(torch.from_numpy(counters))
        self._temperatures.copy_(torch.from_numpy(temperatures))
        self._step.zero_()

    def step(self) -> None:
        """Draw one more token for every row."""
        if self._graph is None:
            self._advance()
        else:
            self._graph.replay()

    def drawn(self) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and log-probs, [steps, B] each; waits for the device."""
        return self._tokens.cpu().numpy().copy(), self._logprobs.cpu().numpy().copy()

    def capture(self, pool: Any) -> Any:
        """Record the step as a graph; return the memory pool that the next one shares."""
        current = torch.cuda.current_stream()
        beside = torch.cuda.Stream()
        beside.wait_stream(current)
        with torch.cuda.stream(beside):  # libraries make their workspaces in a first run, which a capture forbids
            self._advance()
        current.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self._advance()
        self._graph = graph
        return graph.pool()

    def _advance(self) -> None:
        tokens, positions, drawn, seeds, indices = self._counters
        context = Decode(self._cache, positions, self._window)
        logits = self._forward(tokens[:, None], positions[:, None], context)
        new, logprobs = draw(logits, self._temperatures, uniforms_on_device(seeds, indices, drawn))
        self._tokens.index_copy_(0, self._step, new[None])
        self._logprobs.index_copy_(0, self._step, logprobs[None])
        tokens.copy_(new)
        # A row that has ended goes on at the end of its own slot, where nobody looks.
        positions.add_(1).clamp_(max=self._last_position)
        drawn.add_(1)
        self._step.add_(1)


def _bucket(count: int, buckets: Sequence[int]) -> int:
    """Return the first bucket that holds `count`, e.g. 33 rows -> 64."""
    return next((bucket for bucket in buckets if count <= bucket), round_up(count, buckets[-1]))
