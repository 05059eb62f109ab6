"""Two learner ranks as two processes: everything that needs them, in one pair to save start-up time.

Each rank writes what it found to `<directory>/rank-<r>.pt`; `test_learner_learner.py` and `test_learner_state.py` look
at it through `pair_results`, which runs the pair once.
"""

import functools
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.weights import unpack_bucket
from learner import state
from learner.batch import StepPlan
from learner.config import LoraConfig
from learner.learner import LearnerRank, Skipped
from tests.learner_toys import learner_config, learner_rank, parameters, toy_batch, toy_directory

WORLD_SIZE = 2
VARIANTS: dict[str, dict[str, Any]] = {
    "stage 0": {"zero_stage": 0},
    "stage 1": {"zero_stage": 1},
    "stage 2": {"zero_stage": 2, "microbatch_tokens": 1000},
    "stage 3": {"zero_stage": 3, "microbatch_tokens": 20, "chunk_tokens": 7},
    "empty micro-batches": {"zero_stage": 3, "num_minibatches": 4, "gradient_checkpointing": True},
    "separate critic": {"zero_stage": 3, "critic": "separate"},
    "lora": {"zero_stage": 2, "lora": LoraConfig(rank=4, alpha=8.0)},
    "kept graphs": {"zero_stage": 2, "num_minibatches": 1, "microbatch_tokens": 30},
}
"""Settings whose results must equal those of one process."""
RESUMES = {
    "1 -> 1": ("stage 1", 1),
    "2 -> 2": ("stage 2", 2),
    "3 -> 3": ("stage 3", 3),
    "2 -> 3": ("stage 2", 3),
    "one -> 2": ("one", 2),
}
"""Whose state after three steps, resumed at which ZeRO stage; `one` is a single process in plain torch."""


def num_empty(plan: StepPlan) -> int:
    return sum(not m for update in plan.updates for rank in update.ranks for m in rank)


def learn(rank: int, directory: str, settings: dict[str, Any], steps: range = range(1, 4)) -> dict[str, Any]:
    """Run steps with one setting; return parameters, metrics and how many micro-batches were empty."""
    config = learner_config(backend="zero", num_ranks=WORLD_SIZE, **settings)
    learner = learner_rank(directory, config, rank=rank)
    metrics, empty = [], 0
    for step in steps:
        batch = toy_batch(directory, config, step=step)
        empty += num_empty(batch.plan)
        metrics.append(learner.step(batch.tables, batch.plan))
    return {"learner": learner, "parameters": parameters(learner), "metrics": metrics, "num_empty": empty}


def with_local_denominators(rank: int, directory: str) -> dict[str, torch.Tensor]:
    """The planted bug: divide by this rank's own tokens and sequences, as a loss's `mean` would."""
    original = LearnerRank._microbatch

    def local(self: LearnerRank, microbatch: Any, scored: Any, update: Any, batch: Any) -> Any:
        pieces = [piece for m in update.ranks[rank] for piece in m]
        samples = [batch.samples[batch.plan.offsets[p.group] + i] for p in pieces for i in p.samples]
        num_tokens = max(1, sum(int(s.loss_mask.sum()) for s in samples)) * WORLD_SIZE
        fields = {name: getattr(update, name) for name in ("epoch", "minibatch", "learning_rate", "ranks")}
        update = type(update)(num_tokens=num_tokens, num_sequences=len(samples) * WORLD_SIZE, **fields)
        return original(self, microbatch, scored, update, batch)

    LearnerRank._microbatch = local  # type: ignore[method-assign]
    try:
        return learn(rank, directory, {"zero_stage": 2})["parameters"]
    finally:
        LearnerRank._microbatch = original  # type: ignore[method-assign]


def non_finite_on_one_rank(rank: int, directory: str, stage: int) -> dict[str, Any]:
    """Poison one rank's loss; return whether both skipped, and that nothing moved."""
    config = learner_config(backend="zero", num_ranks=WORLD_SIZE, zero_stage=stage)
    learner = learner_rank(directory, config, rank=rank)
    batch = toy_batch(directory, config, step=1)
    before = parameters(learner)
    if rank == 1:
        learner._networks._scoring = type(learner._networks._scoring)(temperature=float("nan"), chunk_tokens=16)
    answer = learner.step(batch.tables, batch.plan)
    after = parameters(learner)
    return {
        "skipped": isinstance(answer, Skipped) and not answer.has_changed,
        "unchanged": all(torch.equal(before[name], after[name]) for name in before),
    }


def non_finite_in_the_second_update(rank: int, directory: str) -> dict[str, Any]:
    """Poison one rank's loss after the first update; return what both say, and their parameters."""
    config = learner_config(backend="zero", num_ranks=WORLD_SIZE, zero_stage=2)
    learner = learner_rank(directory, config, rank=rank)
    batch = toy_batch(directory, config, step=1)
    before, original = parameters(learner), learner._update

    def update(*arguments: Any, is_first: bool) -> Any:
        if rank == 1 and not is_first:
            learner._networks._scoring = type(learner._networks._scoring)(temperature=float("nan"), chunk_tokens=16)
        return original(*arguments, is_first=is_first)

    learner._update = update  # type: ignore[method-assign]
    answer = learner.step(batch.tables, batch.plan)
    after = parameters(learner)
    return {
        "has_changed": isinstance(answer, Skipped) and answer.has_changed,
        "changed": any(not torch.equal(before[name], after[name]) for name in before),
        "num_updates": learner.ping(),
        "parameters": after,
    }


def save_and_go_on(learner: LearnerRank, rank: int, directory: str, out: str) -> dict[str, Any]:
    """Save after three steps, each rank with random numbers of its own; return the files, and what comes next."""
    torch.manual_seed(1000 + rank)
    torch.rand(rank + 1)
    os.makedirs(out, exist_ok=True)
    learner.begin_save(out)
    random = torch.rand(4)
    batch = toy_batch(directory, learner_config(num_ranks=WORLD_SIZE, backend="zero"), step=4)
    learner.step(batch.tables, batch.plan)  # while it is written
    return {"files": learner.finish_save(), "random": random, "next": parameters(learner)}


def resume(rank: int, directory: str, saved: str, stage: int) -> dict[str, Any]:
    """Load a state into a new gang; return what comes next."""
    config = learner_config(backend="zero", num_ranks=WORLD_SIZE, **VARIANTS[f"stage {stage}"])
    learner = learner_rank(directory, config, rank=rank)
    learner.load_state(saved)
    random, loaded = torch.rand(4), parameters(learner)
    batch = toy_batch(directory, learner_config(num_ranks=WORLD_SIZE, backend="zero"), step=4)
    learner.step(batch.tables, batch.plan)
    return {"random": random, "loaded": loaded, "next": parameters(learner)}


def with_one_random_state(rank: int, directory: str, saved: str) -> torch.Tensor:
    """The planted bug: only rank 0's random state is taken."""
    original, state._rng_name = state._rng_name, lambda rank: "rng/torch/0"
    try:
        return resume(rank, directory, saved, 2)["random"]
    finally:
        state._rng_name = original


def published(learner: LearnerRank) -> dict[str, torch.Tensor] | None:
    """Return what rank 0 announces, unpacked; None on the other rank."""
    publication = learner.publish(version=1, incarnation=0)
    if publication is None:
        return None
    return {
        name: tensor.clone()
        for bucket in publication.buckets
        for name, tensor in unpack_bucket(bucket.handle, bucket.entries)
    }


def run(rank: int, port: int, directory: str, out: str) -> None:
    """Be one rank."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(WORLD_SIZE),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    results: dict[str, Any] = {"variants": {}}
    for name, settings in VARIANTS.items():
        result = learn(rank, directory, settings)
        learner = result.pop("learner")
        if name in ("stage 3", "lora"):
            result["published"] = published(learner)
        if name == "stage 3":
            learner.export_policy(f"{out}/export")
        if name in ("stage 1", "stage 2", "stage 3"):
            result |= save_and_go_on(learner, rank, directory, f"{out}/state of {name}")
        results["variants"][name] = result
    results["local denominators"] = with_local_denominators(rank, directory)
    results["non-finite"] = {stage: non_finite_on_one_rank(rank, directory, stage) for stage in (2, 3)}
    results["non-finite later"] = non_finite_in_the_second_update(rank, directory)
    results["resumed"] = {
        name: resume(rank, directory, f"{out}/state of {saved}", stage) for name, (saved, stage) in RESUMES.items()
    }
    results["one random state"] = with_one_random_state(rank, directory, f"{out}/state of stage 2")
    torch.save(results, Path(out) / f"rank-{rank}.pt")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What two ranks found and left behind."""

    directory: Path
    """With `toy/` (the model they started from), `state of ...` and `export/` (of stage 3), all after three steps."""
    ranks: list[dict[str, Any]]
    one: dict[str, torch.Tensor]
    """Parameters of a single process after four steps."""

    @property
    def toy(self) -> str:
        return str(self.directory / "toy")

    def variant(self, name: str, rank: int = 0) -> dict[str, Any]:
        return self.ranks[rank]["variants"][name]


_directory = tempfile.TemporaryDirectory(prefix="concord-pair-")


@functools.cache
def pair_results() -> Pair:
    """Run both ranks, once per test session."""
    out = Path(_directory.name)
    toy = toy_directory(out / "toy")
    one = one_process(toy, out / "state of one")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "tests.learner_pair"]
    root = Path(__file__).parent.parent
    ranks = [subprocess.Popen([*command, str(r), str(port), toy, str(out)], cwd=root) for r in range(WORLD_SIZE)]
    codes = [rank.wait(timeout=280) for rank in ranks]
    assert codes == [0, 0], f"the ranks of the pair must end well, got exit codes {codes}"
    loaded = [torch.load(out / f"rank-{rank}.pt", weights_only=False) for rank in range(WORLD_SIZE)]
    return Pair(directory=out, ranks=loaded, one=one)


def one_process(toy: str, out: Path) -> dict[str, torch.Tensor]:
    """Save after three steps of plain torch; return the parameters after the fourth."""
    config = learner_config()
    learner = learner_rank(toy, config)
    out.mkdir()
    for step in range(1, 5):
        batch = toy_batch(toy, config, step=step)
        learner.step(batch.tables, batch.plan)
        if step == 3:
            learner.begin_save(str(out))
            learner.finish_save()
    return parameters(learner)


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
