"""One judging process: every component and the reference policy, applied to one group at a time.

Stateless: raw components are recorded, and composing and normalising them is the learner's business.  What a group gets
depends on that group alone, bit for bit, so a retried call on another worker gives the same.
"""

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from actors.config import PolicyConfig
from actors.encoding import Prompt, parse_prompt
from actors.faults import fault
from actors.policy import resolve_dtype
from actors.schema import ROLLOUTS, SchemaError, check
from reward.config import ComponentConfig, RewardConfig
from reward.ensemble import Ensemble
from reward.errors import RewardError
from reward.functions import RewardFunction, finite
from reward.reference import ReferencePolicy
from reward.samples import samples_of
from reward.schema import COMPONENTS, SCORED

Components = list[dict[str, float]]
"""For each sample: name of a judge -> its raw score; absent where it does not apply."""


class RewardWorker:
    """Judges groups.

    Args:
        reward: the components.
        policy: dtype and trust of the reference policy.
        reference_dir: model directory of the reference policy, None for none.
        temperature: the run's sampling temperature.
        device: torch device name.
        num_threads: torch threads, 0 = leave as they are.
    """

    def __init__(
        self,
        *,
        reward: RewardConfig,
        policy: PolicyConfig,
        reference_dir: str | None,
        temperature: float,
        device: str,
        num_threads: int,
    ) -> None:
        if num_threads > 0:
            torch.set_num_threads(num_threads)
        self._configs = reward.components
        self._functions: dict[str, RewardFunction] = {}
        self._models: dict[str, Ensemble] = {}
        place = torch.device(device)
        for name, config in reward.components.items():
            if config.function is not None:
                self._functions[name] = RewardFunction(name, config.function, config.arguments)
            else:
                members = [config.model, *config.ensemble] if config.model else []
                self._models[name] = Ensemble.load(members, device=place, dtype=resolve_dtype("auto", place))
        self._reference: ReferencePolicy | None = None
        if reference_dir is not None:
            self._reference = ReferencePolicy(reference_dir, policy, temperature=temperature, device=place)

    def ping(self) -> str:
        """Return as soon as the worker is ready."""
        return "ready"

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
        components, deviations = self._judge(rollouts)
        scored = _scored(rollouts, components, deviations, self._reference_logprobs(rollouts))
        return check(scored, SCORED, "RewardWorker.score"), samples_of(scored)

    def _judge(self, rollouts: pa.Table) -> tuple[Components, list[float | None]]:
        prompt_id = rollouts["prompt_id"][0].as_py()
        prompt = parse_prompt(rollouts["prompt"][0].as_py())
        responses = rollouts["response_text"].to_pylist()
        components: Components = [{} for _ in responses]
        deviations: list[float | None] = [None] * len(responses)
        for name, config in self._configs.items():
            if name in self._models:
                scores, stds = self._ask_model(name, config, prompt_id, prompt=prompt, responses=responses)
                deviations = [_largest(*pair) for pair in zip(deviations, stds, strict=True)]
            else:
                scores = self._functions[name].score(
                    prompt_id,
                    prompt,
                    responses,
                    response_ids=rollouts["response_ids"].to_pylist(),
                    extras=json.loads(rollouts["extras"][0].as_py()),
                )
            for sample, score in zip(components, scores, strict=True):
                if score is not None:
                    sample[name] = score
        if not all(components):
            index = components.index({})
            raise RewardError(
                ", ".join(self._configs), prompt_id, f"one must apply to each response, got none for {index}"
            )
        return components, deviations

    def _ask_model(
        self, name: str, config: ComponentConfig, prompt_id: str, *, prompt: Prompt, responses: Sequence[str]
    ) -> tuple[list[float | None], list[float | None]]:
        shown = prompt if config.input == "prompt_response" else None
        scores, deviations = self._models[name].score(responses, prompt=shown, max_tokens=config.max_tokens)
        return [finite(name, prompt_id, score) for score in scores], deviations

    def _reference_logprobs(self, rollouts: pa.Table) -> list[np.ndarray] | None:
        if self._reference is None:
            return None
        return self._reference.logprobs(rollouts["prompt_ids"][0].as_py(), rollouts["response_ids"].to_pylist())


def _largest(first: float | None, second: float | None) -> float | None:
    return max((value for value in (first, second) if value is not None), default=None)


def _scored(
    rollouts: pa.Table,
    components: Components,
    deviations: Sequence[float | None],
    references: Sequence[np.ndarray] | None,
) -> pa.Table:
    num_rows = rollouts.num_rows
    version = pa.array([0] * num_rows, pa.int32())
    columns = {
        **dict(zip(rollouts.column_names, rollouts.columns, strict=True)),
        "components": _as_maps(components),
        "token_scores": pa.nulls(num_rows, SCORED.field("token_scores").type),
        "score_std": pa.array(deviations, pa.float32()),
        "reward_version": version,
        "ref_logprobs": pa.array([None] * num_rows if references is None else references, pa.list_(pa.float32())),
        "reference_version": version,
    }
    return pa.table([columns[name] for name in SCORED.names], schema=SCORED)


def _as_maps(components: Components) -> pa.Array:
    return pa.array([list(sample.items()) for sample in components], COMPONENTS)
