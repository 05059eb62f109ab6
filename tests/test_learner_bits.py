"""A learner step has the same bits in each process, whatever the threads' timing.

The model is wide enough that torch shares its operators among threads; that of the other tests is not.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import learner_toys
from tests.learner_toys import learner_config, learner_rank, learnt, parameters, toy_batch, toy_directory

ROOT = Path(__file__).parent.parent
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "initializer_range": 0.05}
ENVIRONMENT = {"MKL_CBWR": "AVX2,STRICT", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}


def run(directory: str, num_threads: int, critic: str) -> None:
    """Be a fresh process: learn one step and print a digest of gradient norm, losses and parameters."""
    short = learner_toys.tokens
    learner_toys.tokens = lambda generator, count: short(generator, 8 * count)
    config = learner_config(microbatch_tokens=320, chunk_tokens=256, critic=critic)  # about one group each
    learner = learner_rank(directory, config)
    batch = toy_batch(directory, config, step=1)  # with one thread: the inputs are no part of the comparison
    torch.set_num_threads(num_threads)
    metrics = learnt(learner.step(batch.tables, batch.plan))
    digest = hashlib.sha256(repr({name: value.hex() for name, value in sorted(metrics.items())}).encode())
    for name, parameter in sorted(parameters(learner).items()):
        digest.update(name.encode() + parameter.numpy().tobytes())
    print(digest.hexdigest())


def digest(directory: str, num_threads: int, critic: str) -> str:
    command = [sys.executable, "-m", "tests.test_learner_bits", directory, str(num_threads), critic]
    process = subprocess.run(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.split()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["trunk", "separate"])
def test_fresh_processes_learn_the_same_bits(tmp_path, critic):
    directory = toy_directory(tmp_path, **WIDE)
    first = digest(directory, 2, critic)
    assert digest(directory, 2, critic) == first
    # One thread adds in order: two that race for a sum would rarely agree with it, though often with each other.
    assert digest(directory, 1, critic) == first


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), sys.argv[3])
