"""The RandomWalks task: reach node `a` of a directed graph in as few steps as possible.

The public task of trlx's `examples/randomwalks`, after the toy task of Decision Transformer (Chen et al. 2021, arXiv
2106.01345): 21 nodes named by letters, walks of at most 10 letters, 1,000 random walks to learn the graph from, and as
score the *optimality* of a walk, in [0, 1].  Everything is a pure function of a numpy seed.

Differs from trlx:
- A graph without an edge to the goal (seeds 1001, 1003, ...) is drawn again: no walk could score.  All other graphs are
  the same (seeds 1000, 1002, 1004, ...), walk for walk.
- A start that cannot reach the goal has no optimality instead of NaN.
"""

import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

NODES = "abcdefghijklmnopqrstu"
"""A node's name; its position is the node's number."""
GOAL = 0
MAX_NODES = 10
"""Longest walk, nodes, the start included."""
_EDGE_PROBABILITY = 0.1
_NUM_WALKS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A graph, how far each node is from the goal, and random walks on it."""

    seed: int
    edges: np.ndarray
    """[N, N] bool; edges[i, j]: a walk may step from i to j.  The goal's only edge leads to itself."""
    shortest: np.ndarray
    """[N] int, nodes on the shortest walk to the goal, both ends counted; MAX_NODES where there is none shorter."""
    walks: tuple[str, ...]
    """Random walks, each from a random start until the goal or MAX_NODES letters."""

    @property
    def starts(self) -> str:
        """Nodes from which the goal can be reached, as letters; the goal itself is none."""
        return "".join(NODES[node] for node in range(len(NODES)) if node != GOAL and self.shortest[node] < MAX_NODES)

    def optimality(self, walk: str) -> float | None:
        """Return how good a walk is: 1 if it is as short as possible, 0 if it is illegal or does not arrive.

        In between (MAX_NODES - nodes) / (MAX_NODES - shortest), the nodes counted up to the first visit of the goal;
        what follows it does not matter.  With edges from `b` to `a` and `c`, and from `c` to `a`: "ba" -> 1,
        "bca" -> 7 / 8, "bac" -> 1, "bc" -> 0, "bba" -> 0.

        Args:
            walk: letters, the start first.

        Returns:
            The optimality, or None where no walk from its start can score.
        """
        start = NODES.index(walk[0])
        if self.shortest[start] >= MAX_NODES:
            return None
        num_nodes = self._nodes_to_goal(walk)
        return max(0.0, float((MAX_NODES - num_nodes) / (MAX_NODES - self.shortest[start])))

    def _nodes_to_goal(self, walk: str) -> int:
        previous = -1
        for position, letter in enumerate(walk):
            node = NODES.find(letter)
            if node < 0 or (position and not self.edges[previous, node]):
                return MAX_NODES
            if node == GOAL:
                return position + 1
            previous = node
        return MAX_NODES


def make_task(seed: int) -> Task:
    """Return the task of a seed, drawn in trlx's order by its legacy generator: its published facts depend on both."""
    generator = np.random.RandomState(seed)
    edges = _draw_edges(generator)
    return Task(
        seed=seed,
        edges=edges,
        shortest=_shortest(edges),
        walks=tuple(_draw_walk(generator, edges) for _ in range(_NUM_WALKS)),
    )


def write_prompts(directory: str, *, seed: int) -> None:
    """Write the prompts of reinforcement learning: one row for each start that can reach the goal.

    The other starts are left out: no answer to them can score, so they say nothing about the policy.

    Args:
        directory: where `prompts.jsonl` is written, with `prompt` (the start's letter), `id` and `graph_seed`.
        seed: which graph.
    """
    rows = [{"id": start, "prompt": start, "graph_seed": seed} for start in make_task(seed).starts]
    _write(os.path.join(directory, "prompts.jsonl"), rows)


def write_walks(directory: str, *, seed: int) -> None:
    """Write the random walks for supervised training: `prompt` is the first letter, `completion` the rest.

    Args:
        directory: where `walks.jsonl` is written.
        seed: which graph.
    """
    rows = [{"prompt": walk[0], "completion": walk[1:]} for walk in make_task(seed).walks]
    _write(os.path.join(directory, "walks.jsonl"), rows)


def _draw_edges(generator: np.random.RandomState) -> np.ndarray:
    num_nodes = len(NODES)
    while True:
        edges = generator.rand(num_nodes, num_nodes) > 1 - _EDGE_PROBABILITY
        np.fill_diagonal(edges, False)
        leads_somewhere = edges.any(axis=1).all()
        edges[GOAL] = False
        edges[GOAL, GOAL] = True
        if leads_somewhere and edges[:, GOAL].sum() > 1:
            return edges


def _draw_walk(generator: np.random.RandomState, edges: np.ndarray) -> str:
    node = GOAL
    while node == GOAL:
        node = generator.randint(len(NODES))
    walk = NODES[node]
    while len(walk) < MAX_NODES and node != GOAL:
        node = generator.choice(np.flatnonzero(edges[node]))
        walk += NODES[node]
    return walk


def _shortest(edges: np.ndarray) -> np.ndarray:
    """Breadth first from the goal, against the edges."""
    shortest = np.full(len(NODES), MAX_NODES)
    reached = np.zeros(len(NODES), dtype=bool)
    frontier = reached.copy()
    frontier[GOAL] = True
    for num_nodes in range(1, MAX_NODES):
        shortest[frontier] = num_nodes
        reached |= frontier
        frontier = edges[:, frontier].any(axis=1) & ~reached
    return shortest


def _write(path: str, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
