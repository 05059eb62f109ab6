"""`make demo`: the whole job on real input, command by command, ending with what changed.

Every step is an ordinary command that you can run by itself; each is printed before it runs.
"""

import os
import subprocess
import sys

from examples.movie_reviews.outcome import outcome, render

RUN_DIR = "runs/movie_reviews/ppo"
ASSETS = "runs/movie_reviews/assets"

COMMANDS = (
    ("Fetch and convert the models", "-m", "examples.movie_reviews.assets", ASSETS),
    ("Train the reward model on human ratings", "-m", "cluster.cli", "reward", "examples/movie_reviews/reward.yaml"),
    ("Show the plan", "-m", "cluster.cli", "plan", "examples/movie_reviews/train.yaml"),
    ("Train the policy with PPO", "-m", "cluster.cli", "train", "examples/movie_reviews/train.yaml"),
    ("Write the report", "-m", "cluster.cli", "report", RUN_DIR),
)


def main() -> None:
    """Run the commands one after another; the first failure ends the demo with its status."""
    for number, (title, *command) in enumerate(COMMANDS, start=1):
        print(f"\n[{number}/{len(COMMANDS)}] {title}\n$ python {' '.join(command)}", flush=True)
        status = subprocess.run([sys.executable, *command], check=False).returncode
        if status:
            raise SystemExit(status)
    print("\n" + render(outcome(RUN_DIR)))
    print(f"\nReport: {os.path.abspath(os.path.join(RUN_DIR, 'report.html'))}")


if __name__ == "__main__":
    main()
