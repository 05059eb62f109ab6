"""C16: what the engine samples is softmax(logits / T), and the log-probs that it records are the trainer's."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import numpy as np
import torch

from actors.engine import Completion
from actors.rows import PromptGroup
from actors.sampling import uniforms
from learner.model import PolicyAndValue, Scoring
from tests.checks import Case, Check, with_twins
from tests.engine_toys import PROMPTS, VOCAB, build, make_engine, request, serve
from tests.test_actors_sampling import chi_square_p

TEMPERATURE = 0.7
NUM_SAMPLES = 3000
PROMPT = PROMPTS["a"]

Sampler = Callable[[float], list[Completion]]
"""From a temperature to samples."""


def sampled(temperature: float) -> list[Completion]:
    engine = make_engine("llama", max_rows=256)
    return list(serve(engine, request("x", PROMPT, NUM_SAMPLES, temperature=temperature, max_new_tokens=2)).values())


def probabilities(prefix: list[int], temperature: float) -> np.ndarray:
    """Return the next token's distribution by one forward pass of an untouched model, [V] float64."""
    with torch.no_grad():
        logits = build("llama")(input_ids=torch.tensor([prefix])).logits[0, -1]
    return torch.softmax(logits.double() / temperature, -1).numpy()


def fit(tokens: list[int], expected: np.ndarray) -> float:
    """Return the chi-square test's p; tokens expected fewer than five times are counted together."""
    counts = np.bincount(tokens, minlength=VOCAB)
    is_rare = expected * len(tokens) < 5
    pooled = np.append(counts[~is_rare], counts[is_rare].sum())
    return chi_square_p(pooled, np.append(expected[~is_rare], expected[is_rare].sum()))


def samples_the_tempered_softmax(sampler: Sampler) -> None:
    """The first token's distribution, and the second's after the three first tokens seen most often."""
    for temperature in (TEMPERATURE, 1.6):
        completions = sampler(temperature)
        assert len(completions) == NUM_SAMPLES
        first = [int(completion.response_ids[0]) for completion in completions]
        assert fit(first, probabilities(PROMPT, temperature)) > 0.001
        for token, _ in Counter(first).most_common(3):
            second = [
                int(completion.response_ids[1]) for completion in completions if completion.response_ids[0] == token
            ]
            assert fit(second, probabilities([*PROMPT, token], temperature)) > 0.001


def one_draw_for_all_positions(temperature: float) -> list[Completion]:
    """The second token is drawn with the first one's random number."""

    def of_the_first(seeds: np.ndarray, sample_index: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return uniforms(seeds, sample_index, np.zeros_like(positions))

    with mock.patch("actors.torch_engine.uniforms", of_the_first):
        return sampled(temperature)


def recorded(temperature: float) -> list[Completion]:
    engine = make_engine("llama")
    return list(
        serve(engine, *(request(name, ids, 3, temperature=temperature) for name, ids in PROMPTS.items())).values()
    )


def records_the_trainers_logprobs(recorder: Sampler) -> None:
    module = PolicyAndValue(build("llama"), has_value_head=False)
    for temperature in (TEMPERATURE, 1.0):
        completions = recorder(temperature)
        groups = [PromptGroup(prompt_ids=PROMPTS[c.request_id], responses=[c.response_ids]) for c in completions]
        row = module.scorer.row(groups)
        scoring = Scoring(temperature=temperature, chunk_tokens=16)
        logprobs, _, _ = module(row, scoring)
        theirs = np.concatenate([completion.logprobs for completion in completions])
        assert np.abs(logprobs.detach().numpy() - theirs).max() < 1e-5


def changed(recorder: Sampler, change: Callable[[Completion], np.ndarray]) -> Sampler:
    return lambda temperature: [replace(c, logprobs=change(c)) for c in recorder(temperature)]


CHECKS = (
    Check(
        id="C16-distribution",
        run=samples_the_tempered_softmax,
        part=sampled,
        twins={
            "no-temperature": lambda _: sampled(1.0),
            "temperature-multiplied": lambda temperature: sampled(1 / temperature),
            "one-draw-for-all-positions": one_draw_for_all_positions,
        },
    ),
    Check(
        id="C16-logprobs",
        run=records_the_trainers_logprobs,
        part=recorded,
        twins={
            "no-temperature": lambda _: recorded(1.0),
            "next-token": changed(recorded, lambda c: np.roll(c.logprobs, -1)),
        },
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()
