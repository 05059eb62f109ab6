"""RandomWalks as data that is there already: the 1,000 random walks with their optimality as rating."""

import json
import os

from examples.randomwalks.graph import make_task


def write_rated_walks(directory: str, *, seed: int) -> None:
    """Write the random walks for offline learning: `prompt` is the first letter, `completion` the rest.

    Walks from a start that cannot reach the goal have no optimality and are left out.

    Args:
        directory: where `walks.jsonl` is written.
        seed: which graph.
    """
    task = make_task(seed)
    rated = [(walk, task.optimality(walk)) for walk in task.walks]
    rows = [
        {"prompt": walk[0], "completion": walk[1:], "rating": rating} for walk, rating in rated if rating is not None
    ]
    with open(os.path.join(directory, "walks.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
