"""Concord and TRL side by side: the same model, prompts, response lengths and update, in turn, on the same two cores.

    python -m benchmarks.trl --model DIRECTORY [--only uniform_grpo,realistic_ppo] [--output FILE]

PPO against `trl.experimental.ppo.PPOTrainer` of TRL 1.12 (policy, reference, reward model and critic, all as large as
the policy), with Concord's critic a network of its own (`*_ppo`) or a head on the policy's trunk (`*_ppo_trunk`); GRPO
against TRL 1.16 with the same scripted reward on both sides. Two workloads: `uniform` and `realistic`
(`benchmarks.trl_workload`). Each side makes one iteration to warm up, then `--repeats` that count. With `uniform_grpo`
both sides live through the comparison and iterations alternate: while one side works the other one waits, and how much
it computes meanwhile is measured. The others need more than 23 GB for both sides at one time, so that one ends before
the other one begins, and the machine's speed is measured before each; both PPO comparisons of a workload that are made
in one run have the same iterations of TRL, which come after Concord's of the first one and before Concord's of the
second one. Prints the phases, and last one line of JSON: TRL's median time over Concord's by comparison.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import psutil
from transformers import PreTrainedTokenizerBase

from actors.cache import cache_directory
from actors.encoding import PromptEncoder
from actors.policy import load_tokenizer
from benchmarks.flops import PHASES, Critic, Group, gemm_peak, needed_flops
from benchmarks.machine import finish
from benchmarks.trl_peer import PeerError, Trl, trl_environment
from benchmarks.trl_workload import THREADS, Algorithm, Settings, Workload, make_workload
from cluster.model_config import read_shape

VERSIONS: dict[Algorithm, str] = {"ppo": "1.12.0", "grpo": "1.16.0"}
"""TRL's, by algorithm: the last one with PPO, and the one that is current."""
SETTINGS = Settings()
OUR_SETTINGS = ("rollouts.num_workers=2", "reward.num_workers=2", "learner.backend=local")
"""What suits one machine with two cores: workers of one thread each, a learner without ranks."""
MAX_IDLE_SHARE = 0.1
"""Of one core, that a side may use while the other one works; Ray's own processes look after themselves with less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One key of the result."""

    workload: str
    algorithm: Algorithm
    critic: Critic

    @property
    def is_apart(self) -> bool:
        """Whether one side ends before the other one begins."""
        return self.has_judge or self.workload == "realistic"

    @property
    def peer(self) -> tuple[str, Algorithm]:
        """What TRL is asked to do."""
        return self.workload, self.algorithm

    @property
    def has_judge(self) -> bool:
        """Whether a reward model as large as the policy reads every response."""
        return self.algorithm == "ppo"


_KINDS: tuple[tuple[str, Algorithm, Critic], ...] = (
    ("ppo", "ppo", "separate"),
    ("ppo_trunk", "ppo", "trunk"),
    ("grpo", "grpo", "none"),
)
COMPARISONS = {
    f"{workload}_{name}": Comparison(workload=workload, algorithm=algorithm, critic=critic)
    for workload in ("uniform", "realistic")
    for name, algorithm, critic in _KINDS
}


@dataclass(slots=True, kw_only=True)
class Turns:
    """What one side did in a comparison."""

    iterations: list[dict[str, Any]] = field(default_factory=list)
    """The first one is for warming up."""
    ready: Any = None
    """How it was set up."""
    memory_gib: float = 0.0
    """Its processes' own, after the last iteration."""
    peak: float = 0.0
    """Operations per second of a product just before."""


class Side(Protocol):
    """What takes part.  Use as a context manager."""

    ready: Any
    """How it is set up."""

    def __enter__(self) -> "Side":
        """Be ready."""

    def __exit__(self, *exception: object) -> None:
        """End every process."""

    def step(self) -> dict[str, Any]:
        """Make an iteration; return what it took and saw."""

    def processes(self) -> list[psutil.Process]:
        """Return all that belong to it."""


def main() -> None:
    """Compare and print."""
    arguments = _arguments()
    keys = arguments.only.split(",") if arguments.only else list(COMPARISONS)
    unknown = set(keys) - set(COMPARISONS)
    if unknown:
        sys.exit(f"--only must name {', '.join(COMPARISONS)}, got {', '.join(sorted(unknown))}")
    try:
        environments = {
            algorithm: trl_environment(version, arguments.environments)
            for algorithm, version in VERSIONS.items()
            if any(COMPARISONS[key].algorithm == algorithm for key in keys)
        }
        with tempfile.TemporaryDirectory(prefix="benchmark-trl-") as directory:
            model = arguments.model or _demo_model()
            judge = _make_judge(model, os.path.join(directory, "judge"))
            details = _measured_before(arguments.output)
            peers: dict[tuple[str, Algorithm], Turns] = {}
            for key in keys:
                with _own_directory(directory, key) as place:
                    comparison = COMPARISONS[key]
                    details[key], peers[comparison.peer] = compare(
                        comparison, arguments, place, model=model, judge=judge,
                        environment=environments[comparison.algorithm],
                        peer=peers.get(comparison.peer) if comparison.is_apart else None,
                    )  # fmt: skip
                    print(f"{key}: TRL takes {details[key]['ratio']:.2f} times as long as Concord\n", flush=True)
                finish(_result(details), arguments.output)
    except PeerError as error:
        sys.exit(f"error: {error}")


def _result(details: dict[str, Any]) -> dict[str, Any]:
    return {key: round(details[key]["ratio"], 3) for key in COMPARISONS if key in details} | {"details": details}


def _measured_before(path: str | None) -> dict[str, Any]:
    """Return the comparisons that a file of results holds: those that are not made again stay in it."""
    if path is None or not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        details: dict[str, Any] = json.load(file)["details"]
    return details


def compare(
    comparison: Comparison,
    arguments: argparse.Namespace,
    directory: str,
    *,
    model: str,
    judge: str,
    environment: str,
    peer: Turns | None,
) -> tuple[dict[str, Any], Turns]:
    """Run both sides in turn, or Concord alone after what TRL has done in this run already.

    Returns:
        The ratio of their medians and everything measured; what TRL did.
    """
    workload = make_workload(comparison.workload, PromptEncoder(load_tokenizer(model)).encode)
    load = os.getloadavg()[0]
    sides = _sides(comparison, arguments, workload, directory, model=model, judge=judge, environment=environment)
    turns = {name: Turns() for name in sides}
    if peer is not None:
        del sides["trl"]
        turns["trl"] = peer
    for together in [[name] for name in reversed(sides)] if comparison.is_apart else [list(sides)]:
        _run_together({name: sides[name] for name in together}, turns, 1 + arguments.repeats)
    _print_rules(workload, turns["trl"].ready, turns["concord"].ready, is_apart=comparison.is_apart)
    for pair in zip(turns["trl"].iterations, turns["concord"].iterations, strict=True):
        _check_same(*pair, workload)
    counted = {name: found.iterations[1:] for name, found in turns.items()}
    report = _summary(comparison, workload, counted, model=model, peak=max(found.peak for found in turns.values()))
    _print_phases(report)
    report |= {
        "load": load,
        "memory_gib": {name: found.memory_gib for name, found in turns.items()},
        "settings": {"trl": turns["trl"].ready, "concord": [*OUR_SETTINGS, *arguments.set]},
        "gemm_peaks_gflops": {name: round(found.peak / 1e9, 1) for name, found in turns.items()},
    }
    return report, turns["trl"]


def _sides(
    comparison: Comparison,
    arguments: argparse.Namespace,
    workload: Workload,
    directory: str,
    *,
    model: str,
    judge: str,
    environment: str,
) -> dict[str, Callable[[Sequence[int]], Side]]:
    """Return what starts each side, given the processes that are there already and not its own."""
    from benchmarks.trl_ours import Concord, make_config

    iterations = 1 + arguments.repeats
    job = {
        "algorithm": comparison.algorithm,
        "model": model,
        "judge": judge,
        "directory": directory,
        "workload": workload.plain(),
        "settings": asdict(SETTINGS),
        "iterations": iterations,
        "microbatch": arguments.microbatch,
        "rollout_rows": arguments.rollout_rows,
    }
    config = make_config(
        directory,
        workload,
        model=model,
        judge=judge,
        algorithm=comparison.algorithm,
        critic="separate" if comparison.critic == "separate" else "trunk",
        num_steps=iterations,
        settings=SETTINGS,
        overrides=[*OUR_SETTINGS, *arguments.set],
    )
    return {
        "trl": lambda _: Trl(environment, job, directory),
        "concord": lambda strangers: Concord(config, strangers=strangers),
    }


def _run_together(
    sides: Mapping[str, Callable[[Sequence[int]], Side]], turns: Mapping[str, Turns], iterations: int
) -> None:
    """Start sides, and let them make iterations in turn."""
    from benchmarks.trl_ours import resident_bytes

    peak = gemm_peak(threads=THREADS)
    with ExitStack() as stack:
        live: dict[str, Side] = {}
        for name, start in sides.items():
            strangers = [process.pid for side in live.values() for process in side.processes()]
            live[name] = stack.enter_context(start(strangers))
            turns[name].ready, turns[name].peak = live[name].ready, peak
        for _ in range(iterations):
            for name, side in live.items():
                others = [process for other in live if other != name for process in live[other].processes()]
                turns[name].iterations.append(_take_turn(name, side, others))
        for name, side in live.items():
            turns[name].memory_gib = round(resident_bytes(side.processes()) / 2**30, 2)


def _take_turn(name: str, side: Side, others: Sequence[psutil.Process]) -> dict[str, Any]:
    """Let a side make an iteration; add what it used and what the other processes used meanwhile."""
    from benchmarks.trl_ours import cpu_s

    working = side.processes()
    before = cpu_s(working), cpu_s(others)
    turn = side.step()
    turn["cpu_s"] = cpu_s(working) - before[0]
    turn["other_used"] = (cpu_s(others) - before[1]) / turn["seconds"]
    print(f"  {name:8} {turn['seconds']:7.2f} s", flush=True)
    return turn


def _check_same(trl: dict[str, Any], concord: dict[str, Any], workload: Workload) -> None:
    """Make sure that both sides sampled for the same prompts, token by token, as many tokens, and learnt from all."""
    prompts = sorted(ids for ids in workload.prompt_ids for _ in range(workload.num_samples))
    lengths = sorted(length for row in workload.lengths for length in row)
    for name, turn in (("TRL", trl), ("Concord", concord)):
        assert sorted(map(tuple, turn["prompt_ids"])) == prompts, f"{name} has the workload's prompts"
        assert sorted(turn["lengths"]) == lengths, f"{name}'s responses have the workload's lengths"
    assert concord["loss_tokens"] == sum(lengths), "Concord learns from every response token"


def _summary(
    comparison: Comparison, workload: Workload, turns: dict[str, list[dict[str, Any]]], *, model: str, peak: float
) -> dict[str, Any]:
    """Return medians, phases and shares of the peak of one comparison."""
    shape = read_shape(model)
    groups = [
        Group(prompt=len(ids), lengths=lengths)
        for ids, lengths in zip(workload.prompt_ids, workload.lengths, strict=True)
    ]
    report: dict[str, Any] = {"gemm_peak_gflops": round(peak / 1e9, 1)}
    tokens = sum(sum(lengths) for lengths in workload.lengths)
    medians = {}
    for name, found in turns.items():
        critic = "separate" if name == "trl" and comparison.algorithm == "ppo" else comparison.critic
        needed = needed_flops(shape, groups, critic=critic, has_judge=comparison.has_judge)
        seconds = [turn["seconds"] for turn in found]
        medians[name] = statistics.median(seconds)
        floor = sum(needed.values()) / peak
        report[name] = {
            "median_s": round(medians[name], 3),
            "seconds": [round(value, 3) for value in seconds],
            "cpu_s": round(statistics.median(turn["cpu_s"] for turn in found), 3),
            "floor_s": round(floor, 3),
            "over_floor": round(medians[name] / floor, 2),
            "other_side_used": round(max(turn["other_used"] for turn in found), 4),
            "phases": _phases(found, needed, peak=peak, tokens=tokens),
        }
    report["ratio"] = medians["trl"] / medians["concord"]
    return report


def _phases(
    turns: Sequence[dict[str, Any]], needed: dict[str, float], *, peak: float, tokens: int
) -> dict[str, dict[str, float]]:
    """Return each phase's median seconds, response tokens, needed operations and share of the peak."""
    phases: dict[str, dict[str, float]] = {}
    names = [*PHASES, *sorted({name for turn in turns for name in turn["phases"]} - set(PHASES))]
    for name in names:
        seconds = statistics.median(turn["phases"].get(name, 0.0) for turn in turns)
        phases[name] = {"seconds": round(seconds, 3)}
        if name in PHASES:
            phases[name]["tokens"] = tokens
            phases[name]["needed_gflop"] = round(needed[name] / 1e9, 1)
            phases[name]["share_of_peak"] = round(needed[name] / seconds / peak, 4) if seconds > 0 else 0.0
        positions = [turn["positions"].get(name, 0) for turn in turns if "positions" in turn]
        if positions and positions[-1]:
            phases[name]["positions"] = positions[-1]
    return phases


def _print_rules(workload: Workload, trl: dict[str, Any], concord: str, *, is_apart: bool) -> None:
    """Print what is equal, and how each side is set up."""
    tokens = sum(sum(lengths) for lengths in workload.lengths)
    print(
        f"{workload.name}: {len(workload.prompts)} prompts x {workload.num_samples} samples, prompt "
        f"{len(workload.prompt_ids[0])} tokens, {tokens} response tokens, longest {workload.max_new_tokens}\n"
        f"  EOS rule: {workload.eos_rule}\n"
        f"  order: {'one side after the other' if is_apart else 'iteration by iteration, in turn'}\n"
        f"  both: float32, {THREADS} cores, 1 epoch, 1 minibatch, 1 update; {asdict(SETTINGS)}\n"
        f"  TRL: {trl['ready']}, {trl['settings']}"
    )
    wanted = (
        "backend:",
        "zero_stage:",
        "microbatch_tokens:",
        "critic:",
        "num_minibatches:",
        "epochs:",
        "_threads:",
        "num_workers:",
    )
    lines = [line.strip() for line in concord.splitlines() if any(part in line for part in wanted)]
    print(f"  Concord: {', '.join(lines)}", flush=True)


def _print_phases(report: dict[str, Any]) -> None:
    """Print both sides' phases side by side."""
    print(f"  GEMM peak {report['gemm_peak_gflops']} GFLOP/s with {THREADS} threads")
    heads = f"{'seconds':>8} {'tokens':>7} {'needed GFLOP':>13} {'share of peak':>14} {'positions':>10}"
    print(f"  {'':8} {'phase':9} {heads}")
    for name in ("trl", "concord"):
        side = report[name]
        for phase, row in side["phases"].items():
            share = f"{100 * row['share_of_peak']:.1f} %" if "share_of_peak" in row else ""
            print(
                f"  {name:8} {phase:9} {row['seconds']:8.2f} {row.get('tokens', ''):>7} "
                f"{row.get('needed_gflop', ''):>13} {share:>14} {row.get('positions', ''):>10}"
            )
        print(
            f"  {name:8} {'step':9} {side['median_s']:8.2f}, {side['over_floor']:.2f} times the counted floor of "
            f"{side['floor_s']:.2f} s; {side['cpu_s']:.1f} CPU-seconds; the other side used "
            f"{100 * side['other_side_used']:.1f} % of a core meanwhile"
        )
        if side["other_side_used"] > MAX_IDLE_SHARE:
            print(f"  WARNING: that is above {100 * MAX_IDLE_SHARE:.0f} %, so {name}'s time is too long")


def _make_judge(model: str, directory: str) -> str:
    """Write a reward model as large as the policy: its trunk under a random scalar head, which both sides read."""
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # it would report that the head is new
    logging.disable_progress_bar()
    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    judge.save_pretrained(directory)
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(model)
    tokenizer.save_pretrained(directory)
    return directory


@contextmanager
def _own_directory(parent: str, name: str) -> Iterator[str]:
    path = os.path.join(parent, name)
    os.makedirs(path)
    yield path


def _demo_model() -> str:
    from examples.movie_reviews.assets import smollm2

    directory: str = smollm2(cache_directory())
    return directory


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model directory; without it the demo's SmolLM2, fetched if needed")
    parser.add_argument("--only", help=f"some of {', '.join(COMPARISONS)}, with commas between")
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many pairs of iterations counts")
    parser.add_argument("--environments", default=os.path.join(cache_directory(), "peers"), help="where TRL is kept")
    parser.add_argument("--microbatch", type=int, default=8, help="TRL's sequences in one forward and backward")
    parser.add_argument("--rollout-rows", type=int, default=32, help="TRL PPO's sequences generated and scored at once")
    parser.add_argument("--set", action="append", default=[], help="section.field=value of Concord's configuration")
    parser.add_argument("--output", help="also write the line to this file, after each comparison; others stay in it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
