"""Rows of JSONL and Parquet files, block by block: the input of prompts, supervised and reward-model training.

A block is a Parquet row group or a fixed number of JSONL lines, found by byte offset in one streaming pass.  Memory
holds the list of blocks and what one reader is at, never a whole file.  A row that cannot be read is returned with
its error, so that the caller can count it; what a row must contain is the caller's business.
"""

import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.cache import build_once, content_hash
from actors.plugins import import_function

if TYPE_CHECKING:
    from actors.config import FunctionConfig

JSONL = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
_LINES_PER_BLOCK = 1024
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """One row as it stands in its file; `error` says why it could not be read, empty if it could."""

    ordinal: int  # over all files, from 0, in file order
    file: str
    line: int  # from 1; in Parquet the row of the file
    value: dict[str, Any]
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """A row that is left out, and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Consecutive rows of one file: from a byte offset (JSONL) or one row group (Parquet)."""

    file: str
    start: int
    first_ordinal: int
    first_line: int
    num_rows: int


class Dataset:
    """The rows of one file, or of all files in a directory, sorted by name."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._filesystem, self._root = fsspec.core.url_to_fs(path)
        self._names = {file: _shown(path, self._root, file) for file in self._list(self._root)}
        self.blocks: list[Block] = []
        for file in self._names:
            self.blocks += list(self._index(file))
        if not self.blocks:
            raise ValueError(f"a data set must have rows, got none in {path!r}")
        self.num_rows = self.blocks[-1].first_ordinal + self.blocks[-1].num_rows

    @property
    def fingerprint(self) -> str:
        """Identity of the layout: files, their blocks and rows, wherever the whole lies."""
        relative = [(block.file.removeprefix(self._root), block.start, block.num_rows) for block in self.blocks]
        return content_hash(relative)

    def rows(self, block: Block, skip: int = 0) -> Iterator[RawRow]:
        """Yield the rows of a block, without the first `skip`."""
        read = self._read_parquet if block.file.endswith(PARQUET) else self._read_jsonl
        for index, row in enumerate(read(block)):
            if index >= skip:
                yield row

    def __iter__(self) -> Iterator[RawRow]:
        for block in self.blocks:
            yield from self.rows(block)

    def place(self, ordinal: int) -> str:
        """Return `file:line` of a row."""
        starts = [block.first_ordinal for block in self.blocks]
        block = self.blocks[int(np.searchsorted(starts, ordinal, side="right")) - 1]
        row = next(self.rows(block, ordinal - block.first_ordinal))
        return f"{row.file}:{row.line}"

    def _list(self, root: str) -> list[str]:
        known = (*JSONL, *PARQUET)
        if self._filesystem.isfile(root):
            if not root.endswith(known):
                raise ValueError(f"a data file must end in one of {', '.join(known)}, got {self.path!r}")
            return [root]
        if not self._filesystem.isdir(root):
            raise ValueError(f"a data set must be an existing file or directory, got {self.path!r}; check the path")
        files = sorted(file for file in self._filesystem.find(root) if file.endswith(known))
        if not files:
            raise ValueError(
                f"a data directory must hold files ending in {', '.join(known)}, got none in {self.path!r}"
            )
        return files

    def _index(self, file: str) -> Iterator[Block]:
        ordinal = self.blocks[-1].first_ordinal + self.blocks[-1].num_rows if self.blocks else 0
        if file.endswith(PARQUET):
            metadata = self._open_parquet(file).metadata
            sizes = [(group, metadata.row_group(group).num_rows) for group in range(metadata.num_row_groups)]
            starts: list[tuple[int, int, int]] = []
            line = 1
            for group, size in sizes:
                starts.append((group, line, size))
                line += size
        else:
            with self._filesystem.open(file, "rb") as lines:
                starts = list(_jsonl_blocks(lines))
        for start, line, size in starts:
            if size:
                yield Block(file=file, start=start, first_ordinal=ordinal, first_line=line, num_rows=size)
            ordinal += size

    def _read_jsonl(self, block: Block) -> Iterator[RawRow]:
        ordinal, line = block.first_ordinal, block.first_line
        with self._filesystem.open(block.file, "rb") as file:
            file.seek(block.start)
            while ordinal < block.first_ordinal + block.num_rows:
                text = file.readline()
                if not text:
                    raise ValueError(
                        f"{self._names[block.file]} must not change while it is read, and rows are missing"
                    )
                if not _is_blank(text):
                    value, error = _parse(text)
                    yield RawRow(ordinal=ordinal, file=self._names[block.file], line=line, value=value, error=error)
                    ordinal += 1
                line += 1

    def _read_parquet(self, block: Block) -> Iterator[RawRow]:
        index = 0
        for batch in self._open_parquet(block.file).iter_batches(batch_size=1024, row_groups=[block.start]):
            for row in range(batch.num_rows):
                value, error = _convert(batch, row)
                yield RawRow(
                    ordinal=block.first_ordinal + index,
                    file=self._names[block.file],
                    line=block.first_line + index,
                    value=value,
                    error=error,
                )
                index += 1

    def _open_parquet(self, file: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._filesystem.open(file, "rb"))
        except pa.ArrowInvalid as error:
            raise ValueError(f"{self._names[file]} must be a Parquet file: {error}") from error


def open_dataset(path: str | None, make: "FunctionConfig | None", *, cache_dir: str) -> Dataset:
    """Return the data set at `path`, or the one `make` writes, run once and cached by source and arguments."""
    if make is None:
        assert path is not None, "a data section has one of `path` and `make`"
        return Dataset(path)
    function = import_function(make.function)
    source = inspect.getsource(inspect.getmodule(function) or function)
    key = content_hash(make.function, make.arguments, source)
    return Dataset(build_once(f"{cache_dir}/data-{key}", lambda directory: function(directory, **make.arguments)))


def describe(rows: Sequence[Quarantined], num_rows: int, *, num_malformed: int, shown: int = 5) -> str:
    """Return one text that counts quarantined rows and lists the first ones.

    Args:
        rows: The quarantined rows, or the first of them.
        num_rows: Rows of the data set.
        num_malformed: Quarantined rows, those not in `rows` included.
        shown: How many to list.
    """
    more = f"\n... and {num_malformed - shown} more" if num_malformed > shown else ""
    return f"{num_malformed} of {num_rows} rows are malformed:\n" + "\n".join(map(str, rows[:shown])) + more


def _shown(path: str, root: str, file: str) -> str:
    return path.rstrip("/") + file.removeprefix(root.rstrip("/"))


def _is_blank(line: bytes) -> bool:
    return not line.removeprefix(_BOM).strip()


def _jsonl_blocks(lines: IO[bytes]) -> Iterator[tuple[int, int, int]]:
    """Yield (byte offset, first line, rows) of each block; blank lines are not rows."""
    offset = start = 0
    first_line, size = 1, 0
    for number, line in enumerate(lines, start=1):
        offset += len(line)
        size += not _is_blank(line)
        if size == _LINES_PER_BLOCK:
            yield start, first_line, size
            start, first_line, size = offset, number + 1, 0
    if size:
        yield start, first_line, size


def _parse(line: bytes) -> tuple[dict[str, Any], str]:
    try:
        value = json.loads(line.removeprefix(_BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        return {}, f"must be UTF-8, got byte 0x{line[error.start]:02x} at byte {error.start} of the line"
    except json.JSONDecodeError as error:
        return {}, f"must be JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number with too many digits, brackets nested too deep
        return {}, f"must be JSON that can be read: {error}"
    if not isinstance(value, dict):
        return {}, f"must be a JSON object, got {type(value).__name__}"
    return value, ""


def _convert(batch: pa.RecordBatch, row: int) -> tuple[dict[str, Any], str]:
    value = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value[name] = column[row].as_py()
        except UnicodeDecodeError:
            return {}, f"must be UTF-8, and column {name!r} is not"
    return value, ""
