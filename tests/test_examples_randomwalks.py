"""RandomWalks: the published facts of its graph, its score, its exact solution, and the files it writes."""

import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.policy import load_model, materialize
from cluster.checks import check_run
from cluster.config import RunConfig, load
from cluster.start import start_config
from examples.randomwalks.graph import GOAL, MAX_NODES, NODES, Task, make_task, write_prompts, write_walks
from examples.randomwalks.rewards import optimality
from learner.config import SFTConfig
from tests.checks import Case, Check, with_twins
from tests.randomwalks_exact import (
    Outcomes,
    frontier,
    frontier_at_beta,
    frontier_at_kl,
    language_model,
    markov_walk,
    outcomes,
    uniform_legal_walk,
)

ROOT = Path(__file__).parent.parent

# Exact frontier of seed 1000 against the uniform legal walk: beta -> (mean optimality, nats per walk).
PUBLISHED = {
    math.inf: (0.3462, 0.0),
    1.0: (0.5068, 0.0815),
    0.5: (0.6623, 0.3128),
    0.2: (0.9070, 1.0865),
    0.1: (0.9749, 1.5408),
    0.05: (0.9954, 1.8189),
    0.02: (1.0000, 1.9364),
}


@pytest.fixture(scope="module")
def task():
    return make_task(1000)


def _small_task(edges: dict[str, str]) -> Task:
    matrix = np.zeros((len(NODES), len(NODES)), dtype=bool)
    for source, targets in edges.items():
        matrix[NODES.index(source), [NODES.index(target) for target in targets]] = True
    shortest = np.full(len(NODES), MAX_NODES)
    shortest[:4] = (1, 2, 2, 3)
    return Task(seed=0, edges=matrix, shortest=shortest, walks=())


SMALL = _small_task({"a": "a", "b": "ac", "c": "a", "d": "c", "e": "e"})


def test_seed_1000_has_the_published_facts(task):
    scores = [task.optimality(walk) for walk in task.walks]
    assert task.edges.sum() == 52
    assert len(task.walks) == 1000
    assert np.mean(scores) == pytest.approx(0.3515, abs=5e-5)
    assert np.mean([walk.endswith("a") for walk in task.walks]) == 0.56
    assert len(task.starts) == 20


def test_the_order_of_draws_matters(task):
    """Planted bug: walks drawn by a generator of their own have other figures."""
    generator = np.random.RandomState(1000)
    walks = [_any_walk(generator, task.edges) for _ in range(1000)]
    assert np.mean([walk.endswith("a") for walk in walks]) != 0.56


def _any_walk(generator, edges):
    node, walk = generator.randint(1, len(NODES)), ""
    while len(walk) < MAX_NODES and not walk.endswith("a"):
        walk += NODES[node]
        node = generator.choice(np.flatnonzero(edges[node]))
    return walk


@pytest.mark.parametrize("seed", [1000, 1001, 1002, 1003, 1004])
def test_every_seed_gives_a_task_that_can_be_won(seed):
    task = make_task(seed)
    assert task.starts
    assert task.edges.any(axis=1).all()
    assert task.edges[GOAL].tolist() == [True] + [False] * 20
    assert not np.diagonal(task.edges)[1:].any()
    for walk in task.walks[:100]:
        assert all(task.edges[NODES.index(i), NODES.index(j)] for i, j in itertools.pairwise(walk))


@pytest.mark.parametrize(
    ("walk", "expected"),
    [
        ("ba", 1.0),  # shortest: 2 nodes
        ("bca", 7 / 8),  # 3 nodes, (10 - 3) / (10 - 2)
        ("dca", 1.0),  # shortest: 3 nodes
        ("bac", 1.0),  # what follows the goal does not matter
        ("bc", 0.0),  # does not arrive
        ("bba", 0.0),  # no edge from b to b
        ("da", 0.0),  # no edge from d to a
        ("b?a", 0.0),  # not a letter of the graph
        ("b", 0.0),
        ("e", None),  # no walk can arrive
    ],
)
def test_optimality_by_hand(walk, expected):
    assert SMALL.optimality(walk) == expected


def test_a_walk_that_arrives_too_late_scores_nothing():
    ring = _small_task({"a": "a", "b": "ac", "c": "b"})
    assert ring.optimality("bcbcbcbca") == 0.0, "c does not lead to a"
    assert ring.optimality("bcbcbcba") == 2 / 8, "8 nodes"
    assert ring.optimality("bcbcbcbcba") == 0.0, "10 nodes"
    assert ring.optimality("bcbcbcbcbcba") == 0.0, "12 nodes, not below 0"


def test_the_reward_function_reads_the_graph_of_each_row(task):
    other = make_task(1004)
    rows = [("d", "a"), ("n", "a"), ("b", "")]
    prompts, completions = zip(*rows, strict=True)
    scores = optimality(prompts, completions, graph_seed=[1000, 1000, 1000], id=list(prompts))
    assert scores == [task.optimality("da"), task.optimality("na"), 0.0] == [1.0, 1.0, 0.0]
    assert optimality(prompts, completions, graph_seed=[1000, 1000, 1004])[:2] == scores[:2]
    assert optimality(["d"], ["a"], graph_seed=[1004]) == [other.optimality("da")] == [0.0], "no such edge there"


def test_shortest_walks_are_the_shortest_of_all_legal_walks(task):
    walks = {start: _legal_walks(task, start) for start in task.starts}
    for start, found in walks.items():
        assert min(len(walk) for walk in found if walk.endswith("a")) == task.shortest[NODES.index(start)]
        assert max(task.optimality(walk) for walk in found) == 1.0


def _legal_walks(task, walk):
    if walk.endswith("a") or len(walk) == MAX_NODES:
        return [walk]
    nexts = np.flatnonzero(task.edges[NODES.index(walk[-1])])
    return [longer for node in nexts for longer in _legal_walks(task, walk + NODES[node])]


@pytest.mark.parametrize("beta", PUBLISHED)
def test_the_exact_frontier_is_the_published_one(task, beta):
    point = frontier(task, beta)
    assert (point.value, point.kl) == pytest.approx(PUBLISHED[beta], abs=6e-5)


def test_a_solver_with_another_reference_is_caught(task):
    """Planted bug: every step equally likely, legal or not."""
    anywhere = np.full(task.edges.shape, 1 / len(NODES))
    point = frontier(task, 1.0, reference=anywhere)
    assert (point.value, point.kl) != pytest.approx(PUBLISHED[1.0], abs=6e-5)


def test_a_score_that_counts_moves_is_caught(task):
    """Planted bug: lengths of shortest walks in moves instead of nodes."""
    shifted = dataclasses.replace(task, shortest=task.shortest - 1)
    assert frontier(shifted, 0.2).value != pytest.approx(PUBLISHED[0.2][0], abs=6e-5)


def test_the_frontier_is_the_gibbs_tilt_of_all_walks(task):
    """The same point by another road: enumerate every legal walk and weigh it by exp(score / beta)."""
    beta, reference, points = 0.2, uniform_legal_walk(task), []
    for start in task.starts:
        walks = _legal_walks(task, start)
        prior = np.array([math.prod(reference[NODES.index(i), NODES.index(j)] for i, j in _steps(w)) for w in walks])
        scores = np.array([task.optimality(walk) for walk in walks])
        tilted = prior * np.exp(scores / beta)
        tilted /= tilted.sum()
        points.append((tilted @ scores, tilted @ np.log(tilted / prior)))
    point = frontier(task, beta)
    assert np.mean(points, axis=0) == pytest.approx((point.value, point.kl), abs=1e-9)


def _steps(walk):
    return itertools.pairwise(walk)


RING = dataclasses.replace(
    _small_task({"a": "a", "b": "ac", "c": "b", "d": "cb"}), shortest=np.array([1, 2, 3, 3] + [MAX_NODES] * 17)
)


def _remembers(walks):
    """A reference that looks at the whole walk: a, b, c or the end, with odds that each prefix has of its own."""
    letters = np.array([[NODES.index(letter) + 1.0 for letter in walk] for walk in walks])
    keys = (letters * 1.7 ** np.arange(letters.shape[1])).sum(axis=1)
    odds = 1.1 + np.sin(keys[:, None] * (1.0, 2.3, 3.7, 5.1))
    rows = np.zeros((len(walks), len(NODES) + 1))
    rows[:, [0, 1, 2, len(NODES)]] = odds / odds.sum(axis=1, keepdims=True)
    return rows


def _all_texts(walks, masses):
    """Return every text that `_remembers` can write and its probability, legal or not, however it ends."""
    if len(walks[0]) == MAX_NODES:
        return list(zip(walks, masses, strict=True))
    step = _remembers(walks) * np.array(masses)[:, None]
    longer = [walk + letter for walk in walks for letter in "abc"]
    return [*zip(walks, step[:, -1], strict=True), *_all_texts(longer, step[:, :3].reshape(-1).tolist())]


@functools.cache
def _scored_texts(start):
    texts, masses = zip(*_all_texts([start], [1.0]), strict=True)
    return np.array(masses), np.array([RING.optimality(text) for text in texts])


def outcomes_are_those_of_all_texts(solve):
    """29,524 texts from each start, scored by the task itself and weighed by exp(score / beta)."""
    found = solve(RING, _remembers)
    for beta in (0.1, 0.7):
        points = []
        for start in RING.starts:
            prior, scores = _scored_texts(start)
            tilted = prior * np.exp(scores / beta)
            tilted /= tilted.sum()
            points.append((tilted @ scores, tilted @ np.log(tilted / prior)))
        point = frontier_at_beta(found, beta)
        assert (point.value, point.kl) == pytest.approx(tuple(np.mean(points, axis=0)), abs=1e-10)


def _forgets_the_walk(task, next_letters):
    return outcomes(task, lambda walks: next_letters([walk[-1] for walk in walks]))


def _lost_without_legal_walks(task, next_letters):
    """Planted bug: what does not arrive is left out, and the rest made to add up to 1."""
    found = outcomes(task, next_letters)
    arrived = found.probabilities * (np.arange(MAX_NODES) < MAX_NODES - 1)
    return Outcomes(probabilities=arrived / arrived.sum(axis=1, keepdims=True), values=found.values)


def _every_edge_is_legal(task, next_letters):
    return outcomes(dataclasses.replace(task, edges=np.ones_like(task.edges)), next_letters)


def outcomes_give_the_published_frontier(solve):
    """Of a Markov walk both solvers trace one curve, on any graph."""
    for seed in (1000, 1003):
        task = make_task(seed)
        found = solve(task, markov_walk(uniform_legal_walk(task)))
        for beta in PUBLISHED:
            point, expected = frontier_at_beta(found, beta), frontier(task, beta)
            assert (point.value, point.kl) == pytest.approx((expected.value, expected.kl), abs=1e-12)


def _arrives_one_node_late(task, next_letters):
    found = outcomes(task, next_letters)
    return Outcomes(probabilities=np.roll(found.probabilities, 1, axis=1), values=found.values)


def wanted_kl_is_met_and_beta_is_the_slope(at_kl):
    task = make_task(1001)
    found = outcomes(task, markov_walk(uniform_legal_walk(task)))
    for kl in (0.02, 0.5, 1.2):
        point, more = at_kl(found, kl), at_kl(found, kl + 1e-5)
        assert point.kl == pytest.approx(kl, abs=1e-9)
        assert (more.value - point.value) / 1e-5 == pytest.approx(point.beta, rel=1e-3)
    assert at_kl(found, 0.0).value == pytest.approx(frontier(task, math.inf).value)
    assert (at_kl(found, 99.0).value, at_kl(found, 99.0).beta) == (1.0, 0.0)


CHECKS = (
    Check(
        id="outcomes-of-a-reference-that-remembers",
        run=outcomes_are_those_of_all_texts,
        part=outcomes,
        twins={
            "last-letter-only": _forgets_the_walk,
            "lost-walks-left-out": _lost_without_legal_walks,
            "every-edge-is-legal": _every_edge_is_legal,
        },
    ),
    Check(
        id="outcomes-of-the-uniform-walk",
        run=outcomes_give_the_published_frontier,
        part=outcomes,
        twins={"one-node-late": _arrives_one_node_late, "lost-walks-left-out": _lost_without_legal_walks},
    ),
    Check(
        id="frontier-at-a-kl",
        run=wanted_kl_is_met_and_beta_is_the_slope,
        part=frontier_at_kl,
        twins={
            "nats-as-bits": lambda found, kl: frontier_at_kl(found, kl * math.log(2)),
            "beta-upside-down": lambda found, kl: dataclasses.replace(
                frontier_at_kl(found, kl), beta=1 / max(frontier_at_kl(found, kl).beta, 1e-9)
            ),
        },
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


def test_a_saved_model_is_a_reference(tmp_path, task):
    """Its walks have the probability that the learner's code gives their tokens, times the legal letters' alone."""
    config = load(RunConfig, str(ROOT / "examples/randomwalks.yaml"), ["policy.start=null"])
    directory = materialize(config.policy, seed=0, cache_dir=str(tmp_path))
    next_letters = language_model(directory, rows=3)
    model = load_model(directory, dtype=torch.float32, device=torch.device("cpu"))
    walks = ["dtkn", "bcde", "efgh", "uuuu"]
    ids = torch.tensor([[NODES.index(letter) for letter in walk] for walk in walks])
    logprobs = model(input_ids=ids).logits.double().log_softmax(-1).detach()
    expected = logprobs[:, :-1].gather(2, ids[:, 1:, None]).sum((1, 2))
    steps = [next_letters([walk[:length] for walk in walks]) for length in (1, 2, 3)]
    product = math.prod(step[range(4), ids[:, length]] for length, step in enumerate(steps, start=1))
    assert np.log(product) == pytest.approx(expected.numpy(), abs=1e-5)
    assert (steps[0].sum(axis=1) < 0.99).all(), "the end and padding are no letters"
    found = outcomes(task, next_letters)
    assert found.probabilities.sum(axis=1) == pytest.approx(np.ones(20))
    assert found.probabilities[:, -1].min() > 0.9, "random weights hardly ever arrive"


@pytest.mark.parametrize("seed", [1001, 1003, 1004])
def test_the_frontier_rises_with_kl_to_the_optimum(seed):
    points = [frontier(make_task(seed), beta) for beta in (math.inf, 1.0, 0.3, 0.1, 0.03, 0.01, 0.001)]
    values, kls = [point.value for point in points], [point.kl for point in points]
    assert values == sorted(values)
    assert kls == sorted(kls)
    assert values[-1] == pytest.approx(1.0, abs=1e-6)


def test_files_for_training(task, tmp_path):
    write_prompts(str(tmp_path), seed=1000)
    write_walks(str(tmp_path), seed=1000)
    prompts = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    walks = [json.loads(line) for line in (tmp_path / "walks.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in prompts] == list("bcdefghijklmnopqrstu")
    assert {row["graph_seed"] for row in prompts} == {1000}
    assert tuple(row["prompt"] + row["completion"] for row in walks) == task.walks
    assert all(len(row["prompt"]) == 1 for row in walks)


def test_starts_that_cannot_win_are_no_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr("examples.randomwalks.graph.make_task", lambda seed: SMALL)
    write_prompts(str(tmp_path), seed=0)
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert prompts == ["b", "c", "d"]


def test_the_yaml_files_fit_together(monkeypatch):
    """One setting chooses the graph everywhere; the start trains the model that the run names."""
    monkeypatch.chdir(ROOT)
    config = load(RunConfig, "examples/randomwalks.yaml", ["prompts.make.arguments.seed=1004"])
    check_run(config)
    start = start_config(config.policy)
    sources = (config.prompts, config.evaluation.prompts, start.data)
    assert [source.make.arguments for source in sources] == [{"seed": 1004}] * 3
    assert config.run.dir == "runs/randomwalks/1004"
    assert load(SFTConfig, "examples/randomwalks/sft.yaml").policy.model == config.policy.model == start.policy.model
    assert config.policy.model.tokenizer.characters == NODES
    assert config.rollouts.max_new_tokens == MAX_NODES, "all letters but the first, and the end"
