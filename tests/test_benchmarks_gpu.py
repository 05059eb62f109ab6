"""The benchmark for a machine with a GPU, all of it on tiny models: it must run there at the first attempt."""

import json
import subprocess
import sys
from pathlib import Path

COMMAND = """
import sys
sys.modules["ray"] = sys.modules["deepspeed"] = None  # importing them is an error from here on
sys.argv = ["gpu", "--smoke"]
from benchmarks.gpu import main
main()
"""


def test_everything_is_measured_without_ray_and_deepspeed():
    done = subprocess.run(
        [sys.executable, "-c", COMMAND], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["smoke"]
    assert report["bandwidth_gb_s"] > 0
    for model in ("135m", "1b5"):
        for rows in (4, 8):
            assert report[f"{model}_graphs_tokens_per_s_{rows}"] > 0
            assert 0 < report[f"{model}_share_of_bandwidth_{rows}"] < 1
        assert min(report[f"{model}_{stage}_s"] for stage in ("sync", "sync_shared", "generate", "learn")) > 0
        assert 0 < report[f"{model}_learner_mfu"] < 1
        assert 0 < report[f"{model}_logprob_gap"] < 1e-4, "the learner has the engine's weights"
