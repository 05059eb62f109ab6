"""The learner's state on disk: full float32 tensors, so that it resumes at any number of ranks and any ZeRO stage.

    learner.json                            which files, and each engine's number of updates
    learner-00001-of-00002.safetensors      `<engine>/<parameter>/<param | exp_avg | exp_avg_sq>`

Each rank writes the share that the tensors' order and sizes give it.  Only what is trained is here: frozen weights come
from the model directory.  Nothing is pickled.  Durability (temporary names, fsync, hashes) is the run storage's.
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from learner.optimizer import OptimizerEngine

INDEX = "learner.json"
FORMAT = 1
_RNG = "rng/torch"
_PARTS = ("param", "exp_avg", "exp_avg_sq")


class StateError(RuntimeError):
    """A saved state does not fit the learner; the message names the difference."""


def save_state(directory: str, engines: Mapping[str, OptimizerEngine]) -> list[str]:
    """Write this rank's share; collective.

    Returns:
        Names of the files that this rank wrote, relative to `directory`.
    """
    first = next(iter(engines.values()))
    rank, num_ranks = first.rank, first.world_size
    os.makedirs(directory, exist_ok=True)
    share: dict[str, torch.Tensor] = {_RNG: torch.get_rng_state()} if rank == 0 else {}
    loads = [0] * num_ranks
    for engine_name, engine in engines.items():
        for name, tensors in engine.full_state():
            owner = loads.index(min(loads))
            loads[owner] += tensors["param"].numel()
            if owner == rank:
                share |= {f"{engine_name}/{name}/{part}": tensors[part].cpu().contiguous() for part in _PARTS}
    files = [f"learner-{index:05d}-of-{num_ranks:05d}.safetensors" for index in range(1, num_ranks + 1)]
    save_file(share, os.path.join(directory, files[rank]))
    if rank != 0:
        return [files[rank]]
    updates = {name: engine.num_updates for name, engine in engines.items()}
    with open(os.path.join(directory, INDEX), "w", encoding="utf-8") as stream:
        json.dump({"format": FORMAT, "files": files, "num_updates": updates}, stream, indent=1)
    return [files[rank], INDEX]


def load_state(directory: str, engines: Mapping[str, OptimizerEngine]) -> None:
    """Put a saved state into the engines; collective.

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
            "resume with the same learner.critic"
        )
    saved = _Files([os.path.join(directory, name) for name in index["files"]])
    for name, engine in engines.items():
        engine.load_full_state(_EngineState(saved, name), index["num_updates"][name])
    torch.set_rng_state(saved.tensor(_RNG))


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
        return {part: self._files.tensor(f"{self._engine}/{name}/{part}") for part in _PARTS}

    def __iter__(self) -> Iterator[str]:
        ending = f"/{_PARTS[0]}"
        prefix = f"{self._engine}/"
        names = (name for name in self._files.file_of if name.startswith(prefix) and name.endswith(ending))
        return (name[len(prefix) : -len(ending)] for name in names)

    def __len__(self) -> int:
        return sum(1 for _ in self)
