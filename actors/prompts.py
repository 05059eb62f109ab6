"""Prompts in a deterministic order that can be resumed at any row, with constant memory.

An epoch is a seeded permutation of the data set's blocks, cut into windows of `shuffle_window` rows, each permuted as
well; so the position is an epoch and a row number, and a resume reads one window again.  Rows are validated when they
are drawn; a malformed one is quarantined with its file and line.

Identities are settled once, in file order, by one pass at the start that keeps an 8-byte hash per row until it has
found the repeats: of two rows with one given id the first is the prompt and the second is malformed, in every epoch
and after every resume.  Rows without an id are named by a hash of their content, and by an occurrence number from the
second on.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from actors.dataset import Quarantined, RawRow, describe, open_dataset
from actors.encoding import PromptEncoder
from actors.prompt_row import parse_row
from actors.quarantine import Quarantine

if TYPE_CHECKING:
    from actors.config import PromptsConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnPrompt:
    """A prompt in an epoch."""

    epoch: int
    prompt_id: str
    table: pa.Table
    """One row of PROMPTS."""


class PromptSource:
    """Draws prompts for ever, epoch after epoch, leaving malformed rows out.

    `quarantined` are the malformed rows met, the first ones if they are many; `num_quarantined` counts each row once,
    however many epochs or resumes have met it.
    """

    def __init__(self, config: "PromptsConfig", encoder: PromptEncoder, *, seed: int, cache_dir: str) -> None:
        self._config = config
        self._encoder = encoder
        self._seed = seed % 2**63
        self._dataset = open_dataset(config.path, config.make, cache_dir=cache_dir)
        self._repeats = _Repeats(self._dataset, self._dataset.num_rows)
        self._quarantine = Quarantine(self._dataset.num_rows)
        self._identity = [self._dataset.fingerprint, self._seed, config.shuffle, config.shuffle_window]
        self._rewind(epoch=0, row=0)
        self._num_good = 0
        self._num_counted = 0
        if config.strict:
            self.scan()

    @property
    def num_rows(self) -> int:
        """Rows of the data set, malformed ones included."""
        return self._dataset.num_rows

    @property
    def quarantined(self) -> list[Quarantined]:
        """Malformed rows met so far, in file order, at most `quarantine.MAX_KEPT` of them."""
        return self._quarantine.rows

    @property
    def num_quarantined(self) -> int:
        """How many rows have been found malformed, each counted once."""
        return max(self._num_counted, len(self._quarantine))

    @property
    def position(self) -> dict[str, Any]:
        """Where the next draw continues, as a small JSON-able record for `seek`."""
        return {
            **self.place,
            "num_good": self._num_good,
            "num_quarantined": self._num_counted,
            "quarantined": self._quarantine.record(),
            "source": self._identity,
        }

    @property
    def place(self) -> dict[str, int]:
        """The part of `position` that finds the next prompt."""
        return {"epoch": self._epoch, "row": self._row}

    def seek(self, position: dict[str, Any]) -> None:
        """Continue exactly where `position` was taken.

        Raises:
            ValueError: if it belongs to other data, another seed or another order.
        """
        if position["source"] != self._identity:
            raise ValueError(
                f"a prompt position must belong to the same files, seed and order, got {position['source']} "
                f"for {self._identity} ({self._dataset.path}); restore the files or start a new run"
            )
        self._rewind(epoch=position["epoch"], row=position["row"])
        self._num_good = position["num_good"]
        self._num_counted = position["num_quarantined"]
        self._quarantine.restore(position["quarantined"])

    def draw(self, n: int) -> list[DrawnPrompt]:
        """Return the next `n` prompts, going on to the next epoch where one ends.

        Raises:
            ValueError: if a whole epoch has no good row.
        """
        drawn: list[DrawnPrompt] = []
        while len(drawn) < n:
            row = next(self._rows, None)
            if row is None:
                self._finish_epoch()
                continue
            self._row += 1
            table = self._prompt(row)
            if table is not None:
                self._num_good += 1
                drawn.append(_drawn(self._epoch, table))
            elif self._epoch == 0:
                self._num_counted += 1
        return drawn

    def first(self, n: int) -> list[DrawnPrompt]:
        """Return the first `n` good prompts in file order, fewer if there are no more; the next draw stays the same.

        Raises:
            ValueError: if there is no good row.
        """
        good = (table for row in self._dataset if (table := self._prompt(row)) is not None)
        prompts = [_drawn(0, table) for table in islice(good, n)]
        if n > 0 and not prompts:
            raise ValueError(self._nothing_good())
        return prompts

    def scan(self) -> None:
        """Validate every row.

        Raises:
            ValueError: that counts the malformed rows and names the first ones.
        """
        for row in self._dataset:
            self._prompt(row)
        if self.num_quarantined:
            raise ValueError(f"{self._malformed()}\nmend them, or set strict to false")

    def _prompt(self, row: RawRow) -> pa.Table | None:
        try:
            return self._validate(row)
        except ValueError as error:
            self._quarantine.add(row, str(error))
            return None

    def _validate(self, row: RawRow) -> pa.Table:
        parts = parse_row(row)
        repeat = self._repeats.find(row.ordinal)
        if repeat and parts.is_id_given:
            first = self._dataset.place(repeat.first)
            raise ValueError(f"prompt_id must be unique, got {parts.prompt_id!r} again, after {first}")
        ids = self._encoder.encode(parts.prompt)
        longest = self._config.max_prompt_tokens or sys.maxsize
        if not 0 < len(ids) <= longest:
            raise ValueError(f"prompt must have 1 to {longest} tokens, got {len(ids)}")
        return parts.table(ids, occurrence=repeat.occurrence if repeat else 0)

    def _rewind(self, *, epoch: int, row: int) -> None:
        self._epoch, self._row = epoch, row
        self._rows = self._ordered(epoch, row)

    def _finish_epoch(self) -> None:
        if self._num_good == 0:
            raise ValueError(self._nothing_good())
        self._rewind(epoch=self._epoch + 1, row=0)
        self._num_good = 0

    def _nothing_good(self) -> str:
        return f"{self._dataset.path} must hold at least one good prompt; {self._malformed()}"

    def _malformed(self) -> str:
        return describe(self.quarantined, self.num_rows, num_malformed=self.num_quarantined)

    def _ordered(self, epoch: int, start: int) -> Iterator[RawRow]:
        """Yield the rows of an epoch from row `start` of its order on."""
        size = self._config.shuffle_window
        window, skip = divmod(start, size)
        stream = self._stream(epoch, window * size)
        while rows := list(islice(stream, size)):
            if self._config.shuffle:
                order = np.random.default_rng([self._seed, epoch, 1, window]).permutation(len(rows))
                rows = [rows[index] for index in order]
            yield from rows[skip:]
            window, skip = window + 1, 0

    def _stream(self, epoch: int, skip: int) -> Iterator[RawRow]:
        """Yield rows block by block, the blocks permuted, without the first `skip` rows."""
        blocks = self._dataset.blocks
        order: Any = range(len(blocks))
        if self._config.shuffle:
            order = np.random.default_rng([self._seed, epoch, 0]).permutation(len(blocks))
        for index in order:
            block = blocks[index]
            if skip < block.num_rows:
                yield from self._dataset.rows(block, skip)
            skip = max(0, skip - block.num_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Repeat:
    first: int  # ordinal of the first row of that identity
    occurrence: int  # 1 for the second row, 2 for the third


class _Repeats:
    """Which rows repeat an earlier row's identity: 20 bytes for each that does."""

    def __init__(self, rows: Iterable[RawRow], num_rows: int) -> None:
        hashes = np.zeros(num_rows, dtype=np.uint64)
        readable = np.zeros(num_rows, dtype=bool)
        for row in rows:
            try:
                hashes[row.ordinal] = parse_row(row).identity_hash
            except ValueError:
                continue
            readable[row.ordinal] = True
        ordinals = np.flatnonzero(readable)
        ordinals = ordinals[np.argsort(hashes[ordinals], kind="stable")]
        sorted_hashes = hashes[ordinals]
        starts_run = np.concatenate([[True], sorted_hashes[1:] != sorted_hashes[:-1]])[: len(ordinals)]
        run_start = np.maximum.accumulate(np.where(starts_run, np.arange(len(ordinals)), 0))
        repeats = np.flatnonzero(~starts_run)
        by_ordinal = repeats[np.argsort(ordinals[repeats])]
        self._ordinals = ordinals[by_ordinal]
        self._firsts = ordinals[run_start[by_ordinal]]
        self._occurrences = (by_ordinal - run_start[by_ordinal]).astype(np.int32)

    def find(self, ordinal: int) -> _Repeat | None:
        """Return how a row repeats an earlier one, None if it does not."""
        at = int(np.searchsorted(self._ordinals, ordinal))
        if at == len(self._ordinals) or self._ordinals[at] != ordinal:
            return None
        return _Repeat(first=int(self._firsts[at]), occurrence=int(self._occurrences[at]))


def _drawn(epoch: int, table: pa.Table) -> DrawnPrompt:
    return DrawnPrompt(epoch=epoch, prompt_id=table["prompt_id"][0].as_py(), table=table)


def fitting(
    prompts: "PromptsConfig", where: str, *, positions: int | None, max_new_tokens: tuple[int, str]
) -> "PromptsConfig":
    """Return the section with a limit under which every prompt and its response fit the policy's positions.

    Args:
        prompts: the section.
        where: its place in the configuration.
        positions: tokens that the policy can attend to; None = any number.
        max_new_tokens: longest response, and the setting that says so.

    Raises:
        ValueError: if the section's own limit, or a prompt of one token, leaves no room for the longest response.
    """
    if positions is None:
        positions = sys.maxsize
    longest, setting = max_new_tokens
    room = positions - longest
    if room < (prompts.max_prompt_tokens or 1):
        raise ValueError(
            f"{where}.max_prompt_tokens + {setting} must be at most {positions}, the policy's positions, got "
            f"{prompts.max_prompt_tokens or 1} + {longest}; lower one of them"
        )
    return prompts.model_copy(update={"max_prompt_tokens": prompts.max_prompt_tokens or room})
