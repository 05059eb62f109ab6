"""What one GPU makes of the engine, the learner and the way between them: speeds beside what the hardware allows.

Without Ray and DeepSpeed, on models with random weights: nothing is fetched.  First the kernels are compared with
float64.  Then, for a decoder of 135 million and one of 1.5 billion parameters: tokens a second decoded operation by
operation and with CUDA graphs, at 64 and 256 rows, and as a share of what memory bandwidth allows; the learner's share
of the GPU's peak; seconds to bring new weights to the engine, through main memory and, to one in another process,
through memory that both share; how a step of generating, learning and publishing divides; and how far apart the
log-probs of engine and learner are.  Bandwidth is measured by copying, the peak is the maker's figure for dense
bfloat16, or measured where it is not known.  Under ten minutes.  Prints a table, and last one line of JSON.  `--smoke`
runs all of it on tiny models, on a CPU too, to see that it runs.

    python -m benchmarks.gpu [--output FILE]
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from actors.architecture import character_tokenizer
from actors.engine import Completion, Request, SamplingParams
from actors.policy import load_model, load_tokenizer, resolve_dtype
from actors.rollout_worker import rollouts_table
from actors.schema import PROMPTS, ROLLOUTS
from actors.torch_engine import GPU_PACE, Pace, TorchEngine
from actors.weights import InProcessTransport, Publication, receive
from benchmarks.flops import Group, needed_flops
from benchmarks.gpu_sync import shared_memory_sync
from benchmarks.learner_workload import Workload, learner_rank, scored_tables, step_plan
from benchmarks.machine import finish, now
from cluster.model_config import read_shape
from cluster.model_shape import ModelShape
from learner.config import LearnerConfig
from reward.schema import SCORED

_LLAMA = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip
_QWEN = {
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip
_TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip

_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12}
"""Dense bfloat16 operations a second, from the makers' data sheets, by a part of the device's name; longest names first
where one is within another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured."""

    models: dict[str, dict[str, Any]]
    rows: tuple[int, ...] = (64, 256)
    prompt: int = 128
    response: int = 256
    groups: int = 8
    samples: int = 8
    repeats: int = 3


FULL = Sizes(models={"135m": _LLAMA, "1b5": _QWEN})
SMOKE = Sizes(
    models={"135m": _LLAMA | _TINY, "1b5": _QWEN | _TINY}, rows=(4, 8), prompt=9, response=12, groups=2, samples=2,
    repeats=1,
)  # fmt: skip


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    sizes = SMOKE if arguments.smoke else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.smoke:
        raise SystemExit("this measures a GPU, and torch finds none here; --smoke runs it on tiny models")
    report: dict[str, Any] = {"smoke": arguments.smoke}
    report["kernel_error_bf16"] = kernel_error(device)
    report["bandwidth_gb_s"] = round(bandwidth(device) / 1e9, 1)
    report["peak_tflops"] = round(peak(device) / 1e12, 1)
    with tempfile.TemporaryDirectory() as cache:
        for model, architecture in sizes.models.items():
            for key, value in _measure(architecture, sizes, device, report, cache).items():
                report[f"{model}_{key}"] = value
                print(f"{model:5} {key:30} {value:12.4g}", flush=True)
    finish(report, arguments.output)


def _measure(
    architecture: dict[str, Any], sizes: Sizes, device: torch.device, machine: dict[str, Any], cache: str
) -> dict[str, float]:
    """Return everything about one model."""
    directory = os.path.join(cache, str(architecture["hidden_size"]))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
    model.save_pretrained(directory)
    character_tokenizer("abcdefghijklmnopqrstuvwxyz").save_pretrained(directory)
    del model
    shapes = read_shape(directory)
    report = _generation(directory, shapes, sizes, device, machine["bandwidth_gb_s"] * 1e9)
    report |= _loop(directory, shapes, sizes, device, machine["peak_tflops"] * 1e12)
    report["sync_shared_s"] = shared_memory_sync(directory, device, _dtype(device), sizes.repeats)
    return report


def _generation(
    directory: str, shapes: ModelShape, sizes: Sizes, device: torch.device, bytes_per_s: float
) -> dict[str, float]:
    """Return tokens a second with and without graphs, and the share of what bandwidth allows."""
    report = {}
    model = load_model(directory, dtype=_dtype(device), device=device)
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    key_bytes = shapes.kv_bytes(rows=1, tokens=1, item_bytes=next(model.parameters()).element_size())
    paces = {"eager": Pace(steps=1, prefill_tokens=GPU_PACE.prefill_tokens), "graphs": GPU_PACE}
    for rows in sizes.rows:
        for kind, pace in paces.items():
            engine = TorchEngine(
                model, load_tokenizer(directory), max_rows=rows, eos_ids=frozenset(), max_len=2048, pace=pace
            )
            requests = _requests(rows // sizes.samples or 1, min(rows, sizes.samples), sizes)
            generate(engine, requests)  # graphs are captured, memory is taken
            seconds = _median(lambda: generate(engine, requests), device, sizes.repeats)  # noqa: B023
            report[f"{kind}_tokens_per_s_{rows}"] = rows * sizes.response / seconds
        read = model_bytes + rows * key_bytes * (sizes.prompt + sizes.response / 2)  # bytes of an average step
        bound = rows * bytes_per_s / read
        report[f"graphs_over_eager_{rows}"] = (
            report[f"graphs_tokens_per_s_{rows}"] / report[f"eager_tokens_per_s_{rows}"]
        )
        report[f"share_of_bandwidth_{rows}"] = report[f"graphs_tokens_per_s_{rows}"] / bound
    return report


def _loop(
    directory: str, shapes: ModelShape, sizes: Sizes, device: torch.device, peak_flops: float
) -> dict[str, float]:
    """Return what steps of bringing weights, generating and learning cost."""
    row_tokens = sizes.prompt + sizes.samples * sizes.response
    config = LearnerConfig(backend="local", microbatch_tokens=4 * row_tokens)
    transport = InProcessTransport()
    learner = learner_rank(
        directory, config, "grpo", num_threads=1, device=device.type, dtype="auto", transport=transport
    )
    model = load_model(directory, dtype=_dtype(device), device=device)
    engine = TorchEngine(model, load_tokenizer(directory), max_rows=sizes.rows[-1], eos_ids=frozenset(), max_len=2048)
    work = Workload(
        num_groups=sizes.groups,
        num_samples=sizes.samples,
        prompt_tokens=sizes.prompt,
        lengths=np.full(sizes.groups * sizes.samples, sizes.response),
    )
    plan, requests, judged = (
        step_plan(work, config),
        _requests(sizes.groups, sizes.samples, sizes),
        _judged(work, shapes),
    )
    seconds: dict[str, list[float]] = {"sync_s": [], "generate_s": [], "learn_s": []}
    gaps = []
    for step in range(sizes.repeats + 1):
        start = now(device)
        publication = learner.publish(0, 0)
        assert isinstance(publication, Publication), "one rank publishes"
        receive(publication, transport, engine)
        synced = now(device)
        tables = _scored(generate(engine, requests), requests, judged)
        generated = now(device)
        metrics = learner.step(tables, plan)
        learnt = now(device)
        assert isinstance(metrics, dict), "the update was finite"
        if step:  # the first one takes memory and captures graphs
            gaps.append(metrics["learner_logprob_gap"])
            for name, value in zip(seconds, (synced - start, generated - synced, learnt - generated), strict=True):
                seconds[name].append(value)
    report = {name: statistics.median(values) for name, values in seconds.items()}
    group = Group(prompt=sizes.prompt, lengths=(sizes.response,) * sizes.samples)
    flops = needed_flops(shapes, [group] * sizes.groups, critic="none", has_judge=False)["train"]
    report["learner_tflops"] = flops / report["learn_s"] / 1e12
    report["learner_mfu"] = flops / report["learn_s"] / peak_flops
    report["logprob_gap"] = statistics.median(gaps)
    return report


def generate(engine: TorchEngine, requests: list[Request]) -> list[Completion]:
    """Draw all samples of some requests."""
    engine.submit(requests)
    completions = []
    while engine.has_work:
        completions += engine.step()
    return completions


def _requests(groups: int, samples: int, sizes: Sizes) -> list[Request]:
    random = np.random.default_rng(0)
    return [
        Request(
            request_id=str(group),
            prompt_ids=random.integers(0, 26, sizes.prompt).tolist(),
            num_samples=samples,
            seed=group,
            sampling=SamplingParams(max_new_tokens=sizes.response),
            forced_lengths=(sizes.response,) * samples,
        )
        for group in range(groups)
    ]


def _judged(work: Workload, shapes: ModelShape) -> list[dict[str, Any]]:
    """Return what judges would have said, row by row."""
    names = set(SCORED.names) - set(ROLLOUTS.names)
    return [
        {name: row[name] for name in names} for table in scored_tables(work, shapes.vocab) for row in table.to_pylist()
    ]


def _scored(completions: list[Completion], requests: list[Request], judged: list[dict[str, Any]]) -> list[pa.Table]:
    """Return one SCORED table a group of what the engine drew."""
    tables = []
    for number, request in enumerate(requests):
        own = sorted((c for c in completions if c.request_id == request.request_id), key=lambda c: c.sample_index)
        row = {"prompt_id": request.request_id, "prompt": "", "prompt_ids": request.prompt_ids, "extras": "{}"}
        prompt = pa.Table.from_pylist([row], schema=PROMPTS)
        drawn = rollouts_table(prompt, own, run_id="benchmark", group_id=f"g{number:03}").to_pylist()
        said = judged[number * len(own) : (number + 1) * len(own)]
        tables.append(pa.Table.from_pylist([a | b for a, b in zip(drawn, said, strict=True)], schema=SCORED))
    return tables


def kernel_error(device: torch.device) -> float:
    """Return the largest error of the decoding kernel in bfloat16, as a share of the largest true value.

    The truth is attention in float64 of the same rounded inputs.  0 where there is no kernel: torch's own is used then.
    """
    if device.type != "cuda":
        return 0.0
    from actors.decode_attention import decode_attention

    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for rows, heads, kv_heads, head_dim, length in ((64, 9, 3, 64, 384), (256, 12, 2, 128, 384), (3, 32, 8, 128, 2048)):
        query = torch.randn(rows, heads, head_dim, generator=generator)
        keys, values = (torch.randn(rows, kv_heads, length, head_dim, generator=generator) for _ in range(2))
        positions = torch.randint(0, length, (rows,), generator=generator)
        query, keys, values = (one.to(device, torch.bfloat16) for one in (query, keys, values))
        found = decode_attention(
            query, keys, values, positions.to(device), window=length, scaling=head_dim**-0.5
        ).double()
        mask = torch.arange(length, device=device) <= positions.to(device)[:, None]
        expected = torch.nn.functional.scaled_dot_product_attention(
            query.double()[:, :, None],
            keys.double().repeat_interleave(heads // kv_heads, 1),
            values.double().repeat_interleave(heads // kv_heads, 1),
            attn_mask=mask[:, None, None],
        )[:, :, 0]
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst


def bandwidth(device: torch.device, num_bytes: int = 2**30) -> float:
    """Return bytes a second that the device's memory takes in and gives out, by copying."""
    source = torch.empty(num_bytes if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median(lambda: target.copy_(source), device, 10)


def peak(device: torch.device) -> float:
    """Return bfloat16 operations a second: the maker's figure, or measured where it is not known."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    known = [flops for part, flops in _PEAKS.items() if part in name]
    if known:
        return known[0]
    size = 8192 if device.type == "cuda" else 256
    left, right = (torch.randn(size, size, device=device, dtype=_dtype(device)) for _ in range(2))
    return 2.0 * size**3 / _median(lambda: left @ right, device, 10)


def _median(task: Callable[[], Any], device: torch.device, repeats: int) -> float:
    task()
    seconds = []
    for _ in range(repeats):
        start = now(device)
        task()
        seconds.append(now(device) - start)
    return statistics.median(seconds)


def _dtype(device: torch.device) -> torch.dtype:
    return resolve_dtype("auto", device)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny models, on a CPU too")
    parser.add_argument("--output", help="file for the line of JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
