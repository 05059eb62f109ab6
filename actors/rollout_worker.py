"""A rollout worker: one policy replica that answers leases, as a plain class that `cluster/` puts into a process.

Callers live on an asyncio loop, many at once; the engine lives on a thread of its own (`actors.engine_thread`).
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import pyarrow as pa
import torch

from actors.config import PolicyConfig, RolloutsConfig
from actors.engine import Completion, Engine, Request, SamplingParams, UpdateMode
from actors.engine_thread import Close, EngineThread, Generate, RolloutError, Sleep, Stats, Update
from actors.faults import fault
from actors.memory import resident_bytes
from actors.policy import eos_ids, load_generation_config, load_model, load_tokenizer, resolve_dtype
from actors.sampling import group_seed
from actors.schema import PROMPTS, ROLLOUTS, check, from_stream
from actors.streams import IncomingStream, StreamError, StreamReceiver, StreamSeat
from actors.torch_engine import TorchEngine
from actors.weights import Bucket, Fetched, InProcessTransport, Publication, WeightTransport

__all__ = ["Lease", "RolloutError", "RolloutWorker"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right, and the order, to generate one group."""

    lease_id: int  # grows when the group is issued again
    epoch: int
    group_id: str
    incarnation: int
    num_samples: int
    sampling: SamplingParams
    seed: int  # the run's or the evaluation's; with the group it fixes every draw


class RolloutWorker:
    """Answers leases with rollouts, and takes new weights between them.

    Args:
        model_dir: local directory with config, tokenizer and weights.
        policy: dtype and trust.
        rollouts: engine and its rows.
        transport: how published weights are fetched.
        run_id: written into every row.
        seed: of torch's global generator; draws do not use it, a lease brings their seed.
        device: where the engine runs, e.g. "cpu" or "cuda:0".
        num_threads: of torch; 0 = leave as it is.
        fetch_timeout_s: longest wait for published weights; shorter than the caller's own patience, so that a learner
            which went away is told from a worker which hangs.
        update_mode: what becomes of unfinished samples when weights change.
        stall_s: longest time between two turns of a busy engine before `ping` says that it hangs; 0 = any.
    """

    def __init__(
        self,
        *,
        model_dir: str,
        policy: PolicyConfig,
        rollouts: RolloutsConfig,
        transport: WeightTransport,
        run_id: str,
        seed: int,
        device: str,
        num_threads: int,
        fetch_timeout_s: float = 600.0,
        stall_s: float = 0.0,
        update_mode: UpdateMode = "drain",
    ) -> None:
        if num_threads > 0:
            torch.set_num_threads(num_threads)
        torch.manual_seed(seed)
        self._run_id = run_id
        self._shown = f"run {run_id}, engine {rollouts.engine}, {rollouts.max_rows} rows, {device}"
        self._transport = transport
        self._fetch_timeout_s = fetch_timeout_s
        self._stall_s = stall_s
        self._update_mode = update_mode
        self._receiver = StreamReceiver()
        self._thread = EngineThread(make_engine(model_dir, policy, rollouts, torch.device(device)))

    def __repr__(self) -> str:
        """Say what is here, for process lists such as Ray's dashboard."""
        return f"RolloutWorker({self._shown})"

    async def generate(self, prompt: pa.Table | bytes, lease: Lease) -> tuple[pa.Table, dict[str, float]]:
        """Generate one group.

        Args:
            prompt: PROMPTS, one row, as it is or as an Arrow stream.
            lease: what to generate for it.

        Returns:
            ROLLOUTS, one row per sample, and small numbers: `num_tokens`, `num_bytes` of the table, `generate_s` with
            the wait for rows.

        Raises:
            ValueError: if the prompt can never be served.
            RolloutError: if generation failed.
        """
        start = time.perf_counter()
        fault("rollout.generate")
        if isinstance(prompt, bytes):
            prompt = from_stream(prompt)
        check(prompt, PROMPTS, "rollout worker")
        if prompt.num_rows != 1:
            raise ValueError(f"a lease must come with one prompt, got {prompt.num_rows} rows ({lease.group_id})")
        request = self._request(prompt, lease)
        completions: list[Completion] = await self._thread.ask(Generate(request=request))
        table = rollouts_table(
            prompt,
            completions,
            run_id=self._run_id,
            group_id=lease.group_id,
            lease_id=lease.lease_id,
            incarnation=lease.incarnation,
        )
        num_tokens = sum(len(completion.response_ids) for completion in completions)
        numbers = {"num_tokens": num_tokens, "num_bytes": table.nbytes, "generate_s": time.perf_counter() - start}
        return table, numbers

    async def update_weights(self, publication: Publication | StreamSeat) -> float:
        """Take a version, published or streamed, that comes while the engine decodes on; return the seconds it took.

        Raises:
            WeightError: if what came is not what was announced or expected.
            RolloutError: if it could not be fetched in time.
        """
        start = time.perf_counter()
        incoming: Fetched | IncomingStream
        if isinstance(publication, StreamSeat):
            incoming = await self._meet(publication)
        else:
            incoming = await self._fetch(publication)
        try:
            await self._thread.ask(Update(incoming=incoming, mode=self._update_mode))
        except StreamError as error:
            raise RolloutError(f"{error}; publish the version again") from error
        return time.perf_counter() - start

    async def sleep(self) -> None:
        """Give the memory of weights and KV back, until new weights come; no group may be in flight.

        Raises:
            RolloutError: if one is.
        """
        fault("rollout.sleep")
        await self._thread.ask(Sleep())

    async def ping(self) -> int:
        """Return the policy version.

        Raises:
            RolloutError: if somebody waits for the engine, and it has not taken a turn for longer than `stall_s`.
        """
        stalled_s = self._thread.stalled_s
        if 0 < self._stall_s < stalled_s:
            raise RolloutError(
                f"the engine must take a turn within {self._stall_s:g} s while calls wait, and has not for "
                f"{stalled_s:.1f} s; start the worker again"
            )
        return self._thread.version

    async def stats(self) -> dict[str, float]:
        """Return the engine's counters, and this process's `resident_bytes`."""
        counters = asdict(await self._thread.ask(Stats()))
        extra: dict[str, float] = counters.pop("extra")
        return {"resident_bytes": float(resident_bytes()), **counters, **extra}

    async def close(self) -> None:
        """End the engine thread; calls still waiting fail.  A second call does nothing."""
        if not self._thread.is_closed:
            await self._thread.ask(Close())

    def _request(self, prompt: pa.Table, lease: Lease) -> Request:
        """Return what the engine is asked for a prompt, PROMPTS of one row."""
        return Request(
            request_id=f"{lease.group_id}#{lease.lease_id}",
            prompt_ids=prompt["prompt_ids"][0].as_py(),
            num_samples=lease.num_samples,
            seed=group_seed(lease.seed, lease.group_id),
            sampling=lease.sampling,
        )

    async def _meet(self, seat: StreamSeat) -> IncomingStream:
        """Join the stream's group and wait for its first bucket; the engine decodes on meanwhile."""
        try:
            return await asyncio.get_running_loop().run_in_executor(None, self._receiver.open, seat)
        except StreamError as error:
            raise RolloutError(f"{error}; publish the version again") from error

    async def _fetch(self, publication: Publication) -> Fetched:
        """Return the publication with the buffers themselves as handles; the engine decodes on meanwhile."""
        fetching = asyncio.get_running_loop().run_in_executor(None, self._get_buckets, publication)
        try:
            buckets = await asyncio.wait_for(fetching, self._fetch_timeout_s)
        except TimeoutError as error:  # its thread may wait for ever
            raise RolloutError(
                f"version {publication.version} must be fetched within {self._fetch_timeout_s:g} s and was not; "
                "publish it again"
            ) from error
        return Fetched(publication=replace(publication, buckets=buckets), transport=InProcessTransport())

    def _get_buckets(self, publication: Publication) -> tuple[Bucket, ...]:
        try:
            fault("rollout.fetch_weights")
            return tuple(replace(bucket, handle=self._transport.get(bucket.handle)) for bucket in publication.buckets)
        except Exception as error:  # whatever a transport raises; its own kinds need not survive the way back
            what = f"version {publication.version} could not be fetched"
            raise RolloutError(f"{what}: {type(error).__name__}: {error}; publish it again") from error


def make_engine(model_dir: str, policy: PolicyConfig, rollouts: RolloutsConfig, device: torch.device) -> Engine:
    """Return the engine that `rollouts.engine` names, with a directory's model."""
    trust_remote_code, dtype = policy.trust_remote_code, resolve_dtype(policy.dtype, device)
    tokenizer = load_tokenizer(model_dir, trust_remote_code=trust_remote_code)
    if rollouts.engine == "vllm":
        from actors.vllm_engine import VLLMEngine

        return VLLMEngine(
            model_dir,
            tokenizer,
            dtype=dtype,
            max_rows=rollouts.max_rows,
            eos_ids=eos_ids(load_generation_config(model_dir), tokenizer),
            tensor_parallel=rollouts.tensor_parallel,
            trust_remote_code=trust_remote_code,
        )
    model = load_model(model_dir, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    return TorchEngine(
        model,
        tokenizer,
        max_rows=rollouts.max_rows,
        eos_ids=eos_ids(model, tokenizer),
        pack_weights=policy.pack_weights,
    )


def rollouts_table(
    prompt: pa.Table,
    completions: Sequence[Completion],
    *,
    run_id: str,
    group_id: str,
    lease_id: int = 0,
    incarnation: int = 0,
) -> pa.Table:
    """Return one prompt's samples as ROLLOUTS.

    Args:
        prompt: PROMPTS, one row.
        completions: its samples, in the order of the rows.
        run_id: which run, see `ROLLOUTS`; likewise the rest.
        group_id: the group they are.
        lease_id: 0 where nothing is leased.
        incarnation: of the weights.
    """
    count = len(completions)
    columns = {name: prompt[name].to_pylist() * count for name in PROMPTS.names}
    columns |= {
        "run_id": [run_id] * count,
        "incarnation": [incarnation] * count,
        "group_id": [group_id] * count,
        "sample_index": [completion.sample_index for completion in completions],
        "lease_id": [lease_id] * count,
        "response_ids": [completion.response_ids for completion in completions],
        "response_text": [completion.response_text for completion in completions],
        "logprobs": [completion.logprobs for completion in completions],
        "policy_versions": [completion.policy_versions for completion in completions],
        "loss_mask": [[True] * len(completion.response_ids) for completion in completions],
        "finish_reason": [completion.finish_reason for completion in completions],
    }
    return check(pa.table(columns, schema=ROLLOUTS), ROLLOUTS, "rollouts")
