"""How much cheaper the torch engine samples than Hugging Face `generate`, in one process, in turn.

Workload: 16 chat prompts with 4 samples each at temperature 1, response lengths forced (lognormal, mean 50, at most 128
tokens).  `generate` gets left-padded batches of as many sequences as the engine has rows, and each batch runs to its
longest response.  Prints a table, and last one line of JSON.

    python -m benchmarks.engine --model DIRECTORY [--output FILE]
"""

import os

os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
from functools import partial

import torch

from actors.policy import eos_ids, load_model, load_tokenizer
from actors.torch_engine import TorchEngine
from benchmarks.engine_workload import (
    common_arguments,
    cpu_seconds_in_turn,
    demo_model,
    run_engine,
    run_generate,
    spread_workload,
    warm_up,
)
from benchmarks.machine import finish


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    directory = arguments.model or demo_model()
    tokenizer = load_tokenizer(directory)
    workload = spread_workload(tokenizer)
    cpu = torch.device("cpu")
    plain, owned = (load_model(directory, dtype=torch.float32, device=cpu) for _ in range(2))
    warm_up(plain, workload)
    report: dict[str, float] = {"num_tokens": workload.num_tokens, "threads": arguments.threads}
    for rows in arguments.rows:
        engine = TorchEngine(
            owned, tokenizer, max_rows=rows, eos_ids=eos_ids(owned, tokenizer), pack_weights=arguments.pack_weights
        )
        seconds = cpu_seconds_in_turn(
            [partial(run_generate, plain, workload, rows), partial(run_engine, engine, workload)],
            repeats=arguments.repeats,
        )
        for name, spent in zip(("generate", "engine"), seconds, strict=True):
            report[f"{name}_tokens_per_cpu_s_{rows}"] = round(workload.num_tokens / spent, 1)
            print(f"{name:9} {rows:3} rows: {workload.num_tokens / spent:7.1f} tokens per CPU-second", flush=True)
        report[f"speedup_{rows}"] = round(seconds[0] / seconds[1], 2)
    first = arguments.rows[0]
    report["speedup_over_generate"] = report[f"speedup_{first}"]
    report["tokens_per_cpu_s"] = report[f"engine_tokens_per_cpu_s_{first}"]
    finish(report, arguments.output)


def _arguments() -> argparse.Namespace:
    parser = common_arguments(__doc__)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument(
        "--pack-weights", action=argparse.BooleanOptionalAction, default=True, help="see actors/packed_linear.py"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
