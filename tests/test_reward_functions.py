"""Rule functions: TRL's signature, and what counts as a score."""

import pickle
import sys
import types

import numpy as np
import pytest
import torch

from reward.errors import RewardError
from reward.functions import RewardFunction

CHAT = [{"role": "user", "content": "q"}]


def reward(function: object, **arguments: object) -> RewardFunction:
    module = types.ModuleType("rules_under_test")
    module.rule = function
    sys.modules["rules_under_test"] = module
    return RewardFunction("rule", "rules_under_test:rule", arguments)


def score(function: RewardFunction, prompt: object = "q", responses: tuple = ("a", "b"), **extras: object) -> list:
    ids = [[index, 9] for index in range(len(responses))]
    return function.score("p1", prompt, list(responses), response_ids=ids, extras=extras)


def test_plain_prompts_come_as_strings_with_columns_and_arguments():
    def rule(prompts, completions, answer, scale, completion_ids, **columns):
        assert (prompts, completions, answer) == (["q", "q"], ["a", "b"], ["x", "x"])
        assert completion_ids == [[0, 9], [1, 9]]
        assert columns == {"other": [1, 1]}
        return [scale, None]

    assert score(reward(rule, scale=3), answer="x", other=1) == [3.0, None]


def test_chat_prompts_come_as_messages():
    def rule(prompts, completions, **columns):
        assert prompts == [CHAT, CHAT]
        return [len(completion[0]["content"]) for completion in completions]

    assert score(reward(rule), CHAT, ("a", "bcd")) == [1.0, 3.0]


def test_a_function_without_columns_gets_what_it_names():
    matches = reward(lambda prompts, completions, answer: [float(c == answer[0]) for c in completions])
    assert score(matches, answer="b", unused=1) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        ([1.0], "must be 2, one per response, got 1"),
        ([1.0, 2.0, 3.0], "got 3"),
        (None, "must be a list, got NoneType"),
        (1.0, "must be a list, got float"),
        ([float("nan"), 0.0], "must be finite, got nan"),
        ([0.0, float("-inf")], "must be finite, got -inf"),
        (["1", 0.0], "must be a number or None, got '1'"),
    ],
)
def test_anything_but_a_finite_number_per_response_is_an_error(returned, problem):
    function = reward(lambda prompts, completions, **columns: returned)
    with pytest.raises(RewardError, match=problem) as caught:
        score(function)
    assert "'rule'" in str(caught.value)
    assert "'p1'" in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.component, copy.prompt_id) == (str(caught.value), "rule", "p1")


def test_numpy_scores_are_numbers():
    assert score(reward(lambda prompts, completions, **columns: np.array([0.5, 1.5], dtype=np.float32))) == [0.5, 1.5]


def test_a_missing_column_and_a_failing_function_name_component_and_prompt():
    with pytest.raises(RewardError, match="missing a required argument: 'answer'"):
        score(reward(lambda prompts, completions, answer: [0.0, 0.0]))

    def fails(prompts, completions, **columns):
        raise KeyError("oops")

    with pytest.raises(
        RewardError, match=r"component 'rule', prompt 'p1': .* must not raise, got KeyError: 'oops'"
    ) as c:
        score(reward(fails))
    assert isinstance(c.value.__cause__, KeyError)
    assert str(pickle.loads(pickle.dumps(c.value))) == str(c.value), "Ray sends it to another process"


def refused(prompts, completions, **columns):
    import socket
    import urllib.request

    with socket.socket() as probe:  # bound, but nobody listens
        probe.bind(("127.0.0.1", 0))
        urllib.request.urlopen(f"http://127.0.0.1:{probe.getsockname()[1]}", timeout=5)


def silent(prompts, completions, **columns):
    import socket

    with socket.socket() as judge, socket.socket() as client:
        judge.bind(("127.0.0.1", 0))
        judge.listen()
        client.settimeout(0.05)
        client.connect(judge.getsockname())
        client.recv(1)


def raising(error: BaseException) -> object:
    def rule(prompts, completions, **columns):
        raise error

    return rule


def wrapped(prompts, completions, **columns):
    try:
        raise ConnectionRefusedError("away")
    except ConnectionError:
        raise LookupError("as httpx does") from None


@pytest.mark.parametrize(
    ("kind", "cause", "function"),
    [
        (ConnectionError, "URLError", refused),  # a library's own kind over ConnectionRefusedError
        (ConnectionError, "LookupError", wrapped),
        (TimeoutError, "TimeoutError", silent),
        (ConnectionError, "ConnectionResetError", raising(ConnectionResetError("by peer"))),
        (MemoryError, "MemoryError", raising(MemoryError())),
        (torch.OutOfMemoryError, "OutOfMemoryError", raising(torch.OutOfMemoryError("CUDA out of memory"))),
        (RewardError, "OSError", raising(OSError("no such file"))),
        (RewardError, "KeyError", raising(KeyError("column"))),
    ],
)
def test_an_outage_crosses_as_such_and_anything_else_as_the_functions_fault(kind, cause, function):
    with pytest.raises(kind) as caught:
        score(reward(function))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is kind
    assert str(copy) == str(caught.value)
    assert "reward component 'rule', prompt 'p1': " in str(copy)
    assert f"got {cause}: " in str(copy)


def test_import_path_must_exist():
    with pytest.raises(ValueError, match="no module 'no_such_rules'"):
        RewardFunction("rule", "no_such_rules:rule", {})
    with pytest.raises(ValueError, match=r"json has .*dumps"):
        RewardFunction("rule", "json:dump_all", {})
