"""One judging process: every component and the reference policy, applied to one group at a time.

Stateless: raw components are recorded, and composing and normalising them is the learner's business.  What a group gets
depends on that group alone, bit for bit, so a retried call on another worker gives the same.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from actors.config import PolicyConfig
from actors.encoding import Prompt, parse_prompt
from actors.faults import fault
from actors.memory import resident_bytes
from actors.policy import load_tokenizer, resolve_dtype
from actors.schema import ROLLOUTS, SchemaError, check
from reward.config import ComponentConfig, RewardConfig
from reward.credit import token_ends, token_shares
from reward.credit_config import CreditConfig
from reward.ensemble import Ensemble
from reward.errors import RewardError
from reward.functions import RewardFunction, finite
from reward.reference import ReferencePolicy
from reward.samples import samples_of
from reward.schema import COMPONENTS, SCORED

Components = list[dict[str, float]]
"""For each sample: name of a judge -> its raw score; absent where it does not apply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """What the judges are shown: responses to one prompt."""

    prompt_id: str
    prompt: Prompt
    extras: dict[str, Any]
    responses: list[str]
    response_ids: list[list[int]]


class RewardWorker:
    """Judges groups.

    Args:
        reward: the components.
        policy: dtype and trust of the reference policy.
        policy_dir: directory of the policy that training starts from, None for none; credit takes the tokenizer from
            there.
        temperature: the run's sampling temperature.
        device: torch device name.
        num_threads: torch threads, 0 = leave as they are.
        has_reference: whether log-probs under that policy are measured here.
    """

    def __init__(
        self,
        *,
        reward: RewardConfig,
        policy: PolicyConfig,
        policy_dir: str | None,
        temperature: float,
        device: str,
        num_threads: int,
        has_reference: bool = True,
    ) -> None:
        if num_threads > 0:
            torch.set_num_threads(num_threads)
        self._configs = reward.components
        self._device = device
        self._functions: dict[str, RewardFunction] = {}
        self._models: dict[str, Ensemble] = {}
        place = torch.device(device)
        for name, config in reward.components.items():
            if config.function is not None:
                self._functions[name] = RewardFunction(name, config.function, config.arguments)
            else:
                members = [config.model, *config.ensemble] if config.model else []
                self._models[name] = Ensemble.load(
                    members, device=place, dtype=resolve_dtype("auto", place), pack_weights=policy.pack_weights
                )
        self._reference: ReferencePolicy | None = None
        if policy_dir is not None and has_reference:
            self._reference = ReferencePolicy(policy_dir, policy, temperature=temperature, device=place)
        names = ("num_groups", "num_sequences", *map(_seconds_of, reward.components), "reference_s")
        self._counters = dict.fromkeys(names, 0.0)
        self._credit = reward.credit
        if self._credit is not None:
            if policy_dir is None:
                raise ValueError("reward.credit must come with the policy's directory, got none; it has the tokenizer")
            self._tokenizer = load_tokenizer(policy_dir, trust_remote_code=policy.trust_remote_code)

    def __repr__(self) -> str:
        """Say what is here, for process lists such as Ray's dashboard."""
        judges = [*self._configs, *(["reference policy"] if self._reference is not None else [])]
        return f"RewardWorker({', '.join(judges)}, {self._device})"

    def ping(self) -> str:
        """Return as soon as the worker is ready."""
        return "ready"

    def stats(self) -> dict[str, float]:
        """Return what this process holds and has done so far.

        `resident_bytes` of main memory; `num_groups` and `num_sequences` judged; `score_s_<component>`, seconds in each
        judge, for credit too; `reference_s`, seconds in the reference policy.
        """
        return {"resident_bytes": float(resident_bytes()), **self._counters}

    def score(self, rollouts: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Judge one group.

        Args:
            rollouts: ROLLOUTS rows of one group.

        Returns:
            The group as SCORED and as SAMPLES, rows in the given order.

        Raises:
            SchemaError: if the table is not one group of ROLLOUTS.
            RewardError: if a judge does not return one finite score per response, or none applies to a response.
            ConnectionError, TimeoutError, MemoryError, torch.OutOfMemoryError: if a judge was not to be had.
        """
        fault("reward.score")
        check(rollouts, ROLLOUTS, "RewardWorker.score")
        groups = set(rollouts["group_id"].to_pylist())
        if len(groups) != 1:
            raise SchemaError(
                f"RewardWorker.score: rollouts must be one group, got {len(groups)}: {sorted(groups)[:3]}"
            )
        group = _group(rollouts)
        components, deviations = self._judge(group)
        token_scores = None
        if self._credit is not None:
            with self._counted(_seconds_of(self._credit.component)):
                token_scores = self._token_scores(self._credit, group, components)
        scored = _scored(rollouts, components, deviations, token_scores, self._reference_logprobs(rollouts))
        answer = check(scored, SCORED, "RewardWorker.score"), samples_of(scored)
        self._counters["num_groups"] += 1
        self._counters["num_sequences"] += rollouts.num_rows
        return answer

    def _judge(self, group: _Group) -> tuple[Components, list[float | None]]:
        components: Components = [{} for _ in group.responses]
        deviations: list[float | None] = [None] * len(group.responses)
        for name in self._configs:
            with self._counted(_seconds_of(name)):
                scores, stds = self._ask(name, group)
            deviations = [_largest(*pair) for pair in zip(deviations, stds, strict=True)]
            for sample, score in zip(components, scores, strict=True):
                if score is not None:
                    sample[name] = score
        if not all(components):
            index = components.index({})
            raise RewardError(
                ", ".join(self._configs), group.prompt_id, f"one must apply to each response, got none for {index}"
            )
        return components, deviations

    def _ask(self, name: str, group: _Group) -> tuple[list[float | None], list[float | None]]:
        """Return a judge's scores of the responses, and its disagreement with itself."""
        if name in self._functions:
            scores = self._functions[name].score(
                group.prompt_id, group.prompt, group.responses, response_ids=group.response_ids, extras=group.extras
            )
            return scores, [None] * len(scores)
        config = self._configs[name]
        found, deviations = self._models[name].score(
            group.responses, prompt=_shown(config, group.prompt), max_tokens=config.max_tokens
        )
        return [finite(name, group.prompt_id, score) for score in found], deviations

    def _token_scores(self, credit: CreditConfig, group: _Group, components: Components) -> list[np.ndarray]:
        """Return [R] float32 for each response: shares of attention, or the judge's scores of its prefixes."""
        try:
            ends = [
                token_ends(self._tokenizer, ids, text)
                for ids, text in zip(group.response_ids, group.responses, strict=True)
            ]
        except ValueError as error:
            raise RewardError(credit.component, group.prompt_id, str(error)) from error
        if credit.kind == "potential":
            return self._potentials(credit.component, group, components, ends)
        config = self._configs[credit.component]
        attention = self._models[credit.component].character_attention(
            group.responses, prompt=_shown(config, group.prompt), max_tokens=config.max_tokens
        )
        return [token_shares(*pair) for pair in zip(attention, ends, strict=True)]

    def _potentials(
        self, name: str, group: _Group, components: Components, ends: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """Return a judge's score of each prefix, 0 where it does not apply; whole responses have been judged before."""
        samples = list(zip(group.responses, group.response_ids, ends, strict=True))
        prefixes = replace(
            group,
            responses=[text[:end] for text, _, row in samples for end in row[:-1]],
            response_ids=[ids[:count] for _, ids, _ in samples for count in range(1, len(ids))],
        )
        scores = iter(self._ask(name, prefixes)[0] if prefixes.responses else [])
        potentials = []
        for (_, _, row), whole in zip(samples, components, strict=True):
            found = [*(next(scores) for _ in row[:-1]), whole.get(name)]
            potentials.append(np.array([0.0 if score is None else score for score in found], dtype=np.float32))
        return potentials

    def _reference_logprobs(self, rollouts: pa.Table) -> list[np.ndarray] | None:
        if self._reference is None:
            return None
        prompt_ids, responses = rollouts["prompt_ids"][0].as_py(), rollouts["response_ids"].to_pylist()
        with self._counted("reference_s"):
            return self._reference.logprobs(prompt_ids, responses)

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to a counter, also where it fails."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._counters[name] += time.perf_counter() - started


def _seconds_of(component: str) -> str:
    """Return the name of a judge's counter."""
    return f"score_s_{component}"


def _group(rollouts: pa.Table) -> _Group:
    return _Group(
        prompt_id=rollouts["prompt_id"][0].as_py(),
        prompt=parse_prompt(rollouts["prompt"][0].as_py()),
        extras=json.loads(rollouts["extras"][0].as_py()),
        responses=rollouts["response_text"].to_pylist(),
        response_ids=rollouts["response_ids"].to_pylist(),
    )


def _shown(config: ComponentConfig, prompt: Prompt) -> Prompt | None:
    """Return what a reward model sees of the prompt."""
    return prompt if config.input == "prompt_response" else None


def _largest(first: float | None, second: float | None) -> float | None:
    return max((value for value in (first, second) if value is not None), default=None)


def _scored(
    rollouts: pa.Table,
    components: Components,
    deviations: Sequence[float | None],
    token_scores: Sequence[np.ndarray] | None,
    references: Sequence[np.ndarray] | None,
) -> pa.Table:
    num_rows = rollouts.num_rows
    version = pa.array([0] * num_rows, pa.int32())
    floats = pa.list_(pa.float32())
    columns = {
        **dict(zip(rollouts.column_names, rollouts.columns, strict=True)),
        "components": _as_maps(components),
        "token_scores": pa.array([None] * num_rows if token_scores is None else token_scores, floats),
        "score_std": pa.array(deviations, pa.float32()),
        "reward_version": version,
        "ref_logprobs": pa.array([None] * num_rows if references is None else references, floats),
        "reference_version": version,
    }
    return pa.table([columns[name] for name in SCORED.names], schema=SCORED)


def _as_maps(components: Components) -> pa.Array:
    return pa.array([list(sample.items()) for sample in components], COMPONENTS)
