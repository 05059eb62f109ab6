"""The learner's state on disk: full float32 tensors, so that it resumes at any number of ranks and any ZeRO stage.

    learner.json                            which files, and each engine's number of updates
    learner-00001-of-00002.safetensors      `<engine>/<parameter>/<param | exp_avg | exp_avg_sq>`, `rng/torch/<rank>`

Saving has two halves.  Gathering is collective and copies a rank's share to host memory; the share that each rank has
follows from the tensors' order and sizes.  Writing is a rank's own, and may go on while the next step changes the
engines.  Only what is trained is here: frozen weights come from the model directory.  Nothing is pickled.  Each rank
syncs the files it writes; temporary names and hashes are the run storage's.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors import safe_open

from actors.faults import fault

INDEX = "learner.json"
FORMAT = 2
_PARAM = "param"
_PARTS = (_PARAM, "exp_avg", "exp_avg_sq")
"""Of a parameter; what is not trained by an optimizer has the first one only."""
_DTYPES = {torch.float32: "F32", torch.uint8: "U8"}


class StateError(RuntimeError):
    """A saved state does not fit the learner, or saving was asked for out of turn; the message names the difference."""


class Stateful(Protocol):
    """Tensors that a checkpoint holds: an optimizer engine, or a reference policy that moves."""

    rank: int
    world_size: int

    @property
    def num_updates(self) -> int:
        """Updates so far."""

    def full_state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yield name -> full tensors by part, in one order on all ranks; collective."""

    def load_full_state(self, state: Mapping[str, Mapping[str, torch.Tensor]], num_updates: int) -> None:
        """Take a mapping shaped like `full_state`; collective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank writes: copies, which no later step changes."""

    rank: int
    num_ranks: int
    tensors: Mapping[str, torch.Tensor]
    num_updates: Mapping[str, int]

    @property
    def files(self) -> list[str]:
        """Names of all ranks' files of tensors, in rank order."""
        return [f"learner-{rank:05d}-of-{self.num_ranks:05d}.safetensors" for rank in range(1, self.num_ranks + 1)]


def gather(engines: Mapping[str, Stateful]) -> Share:
    """Copy this rank's share of parameters and optimizer state, and its random state, to host memory; collective."""
    first = next(iter(engines.values()))
    rank, num_ranks = first.rank, first.world_size
    fault("learner.gather", rank)
    tensors: dict[str, torch.Tensor] = {}
    loads = [0] * num_ranks
    for engine_name, engine in engines.items():
        for name, state in engine.full_state():
            owner = loads.index(min(loads))
            loads[owner] += state["param"].numel()
            if owner == rank:
                tensors |= {f"{engine_name}/{name}/{part}": state[part].cpu().contiguous() for part in state}
    tensors[_rng_name(rank)] = torch.get_rng_state()
    updates = {name: engine.num_updates for name, engine in engines.items()}
    return Share(rank=rank, num_ranks=num_ranks, tensors=tensors, num_updates=updates)


def write(share: Share, directory: str) -> list[str]:
    """Write a share and sync it; rank 0 adds the index.

    Returns:
        Names of the files that this rank wrote, relative to `directory`, which must be there.

    Raises:
        OSError: when the disk does not take it; what was written so far lies there.
    """
    name = share.files[share.rank]
    _write_tensors(os.path.join(directory, name), share)
    if share.rank != 0:
        return [name]
    index = {"format": FORMAT, "files": share.files, "num_updates": share.num_updates}
    with open(os.path.join(directory, INDEX), "w", encoding="utf-8") as file:
        json.dump(index, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    return [name, INDEX]


WriteShare = Callable[[Share, str], list[str]]


class Saver:
    """Writes one share at a time, on a thread of its own.

    Args:
        write_share: does it, as `write`.
    """

    def __init__(self, write_share: WriteShare = write) -> None:
        self._write = write_share
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="learner-state")
        self._saving: Future[list[str]] | None = None

    def begin(self, directory: str, engines: Mapping[str, Stateful]) -> None:
        """Gather, collective, and begin to write.

        Raises:
            StateError: when the one before is not finished; on all ranks, as all are asked for the same.
        """
        if self._saving is not None:
            raise StateError(f"a save must be finished before the next is begun ({directory}); call finish_save")
        self._saving = self._executor.submit(self._write, gather(engines), directory)

    def finish(self) -> list[str]:
        """Wait for the writing; return the names of the files that this rank wrote.

        Raises:
            StateError: when nothing was begun.
            OSError: what writing met; another save may be begun.
        """
        if self._saving is None:
            raise StateError("a save must be begun before it is finished; call begin_save")
        saving, self._saving = self._saving, None
        return saving.result()


def load_state(directory: str, engines: Mapping[str, Stateful]) -> None:
    """Put a saved state into the engines, and this rank's random state in its place; collective.

    A rank that the saving gang did not have takes rank 0's random state.

    Raises:
        StateError: if the state is of other engines, lacks a parameter or has one of another shape.
    """
    with open(os.path.join(directory, INDEX), encoding="utf-8") as stream:
        index: dict[str, Any] = json.load(stream)
    if index["format"] != FORMAT:
        raise StateError(f"the learner state's format must be {FORMAT}, got {index['format']} ({directory})")
    if set(index["num_updates"]) != set(engines):
        raise StateError(
            f"the learner state must be of {sorted(engines)}, got {sorted(index['num_updates'])} ({directory}); "
            "resume with the same learner.critic and algorithm.reference"
        )
    saved = _Files([os.path.join(directory, name) for name in index["files"]])
    for name, engine in engines.items():
        engine.load_full_state(_EngineState(saved, name), index["num_updates"][name])
    rank = next(iter(engines.values())).rank
    torch.set_rng_state(saved.tensor(_rng_name(rank if rank < len(index["files"]) else 0)))


class _Files:
    """Reads tensors by name from several safetensors files, one at a time."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths
        self.file_of: dict[str, Any] = {}
        for path in paths:
            handle = safe_open(path, framework="pt")
            self.file_of |= dict.fromkeys(handle.keys(), handle)

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self.file_of:
            raise StateError(
                f"the learner state must have {name!r}, but {self._paths} do not; resume with the same model and "
                "learner.lora"
            )
        return self.file_of[name].get_tensor(name)


class _EngineState(Mapping[str, Mapping[str, torch.Tensor]]):
    """One engine's parameters by name, read when asked for."""

    def __init__(self, files: _Files, engine: str) -> None:
        self._files, self._engine = files, engine

    def __getitem__(self, name: str) -> Mapping[str, torch.Tensor]:
        full = {part: f"{self._engine}/{name}/{part}" for part in _PARTS}
        is_trained = any(full[part] in self._files.file_of for part in _PARTS[1:])
        return {part: self._files.tensor(full[part]) for part in (_PARTS if is_trained else (_PARAM,))}

    def __iter__(self) -> Iterator[str]:
        ending = f"/{_PARAM}"
        prefix = f"{self._engine}/"
        names = (name for name in self._files.file_of if name.startswith(prefix) and name.endswith(ending))
        return (name[len(prefix) : -len(ending)] for name in names)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _rng_name(rank: int) -> str:
    """Return the name of the CPU generator's state: the only one used, as models run without dropout."""
    return f"rng/torch/{rank}"


def _write_tensors(path: str, share: Share) -> None:
    """Write safetensors: the header's length (8 bytes), the header (JSON), the tensors' bytes in the header's order.

    The library's `save_file` would hide the errno of what fails, and writes a file that only its owner can read.
    Source: https://github.com/huggingface/safetensors, "Format".
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in share.tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors' bytes begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        fault("learner.write", share.rank)
        for tensor in share.tensors.values():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
