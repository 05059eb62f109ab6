"""vLLM behind the engine protocol: paged memory and tensor parallelism, for an environment that has it.

vLLM's requests are single samples here; samples of a group share their prompt's keys and values through vLLM's prefix
cache.  Cached prompts are salted with the policy version, so none outlives the weights that made it.  Draws are vLLM's
own: a sample is not the same in other company, so what was lost is not generated again bit for bit.

With tensor parallelism vLLM has processes of its own on the same node, each with a part of every weight; a new version
reaches them through shared memory, as a file from which each takes its part.

Outside vLLM's own environment nothing here can be imported.  Written against vLLM 0.32; the engine itself is in this
process.
"""

import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from vllm import EngineArgs, TokensPrompt
from vllm import SamplingParams as VLLMSamplingParams
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from actors.buckets import Load
from actors.engine import (
    Capability,
    Completion,
    EngineError,
    EngineStats,
    FinishReason,
    Request,
    UpdateMode,
    check_requests,
)
from actors.live_rows import Endings, LiveGroup, LiveRow
from actors.weights import InPlaceWeights

_BLOCK_TOKENS = 32
"""Of the paged cache; only whole blocks of a prompt are shared."""

_SHARED_MEMORY = "/dev/shm"


class VLLMEngine:
    """Implements `actors.engine.Engine`.

    Args:
        model_dir: local directory with config and weights.
        tokenizer: decodes responses.
        dtype: of weights and forward passes.
        max_rows: samples decoded together.
        eos_ids: tokens that end a response.
        max_len: longest prompt with response, tokens; None = what the model's positions allow.
        tensor_parallel: processes, each with a GPU of this process, that share the weights.
        trust_remote_code: run code that comes with the model.
    """

    def __init__(
        self,
        model_dir: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype,
        max_rows: int,
        eos_ids: frozenset[int],
        max_len: int | None = None,
        tensor_parallel: int = 1,
        trust_remote_code: bool = False,
    ) -> None:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31 - 1
        self._max_len = min(positions, max_len or positions)
        self._max_rows = max_rows
        self._endings = Endings(tokenizer, eos_ids)
        self._eos_ids = eos_ids
        is_on_gpu = torch.cuda.is_available()
        arguments = EngineArgs(
            model=model_dir,
            skip_tokenizer_init=False,
            dtype=str(dtype).removeprefix("torch."),
            enforce_eager=not is_on_gpu,
            max_model_len=self._max_len,
            max_num_seqs=max_rows,
            block_size=_BLOCK_TOKENS,
            logprobs_mode="processed_logprobs",  # after the temperature
            generation_config="vllm",  # not the model's own sampling defaults
            async_scheduling=False,  # a step's tokens are of the weights that are there when it is taken
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel,
            # Children of this process, not Ray actors: its GPUs are theirs.
            distributed_executor_backend="mp" if tensor_parallel > 1 else None,
        )
        with _hidden("llvmlite.binding.ffi"):
            self._engine = LLMEngine.from_engine_args(arguments)
        self._has_processes = tensor_parallel > 1
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        self._staging = model.to_empty(device="cpu")
        self._staging.tie_weights()
        self._weights = InPlaceWeights(self._staging)
        self._weights.release()  # there while an update is
        self._version = -1
        self._next: tuple[int, UpdateMode] | None = None
        self._waiting: deque[LiveRow] = deque()
        self._live: dict[str, LiveRow] = {}  # by the name that vLLM knows it under
        self._ids: set[str] = set()
        self._stats = EngineStats()

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What this engine promises."""
        return frozenset({"in_flight_update"})

    @property
    def version(self) -> int:
        """The policy version that the next token is sampled with; -1 before the first update."""
        return self._version

    @property
    def is_updating(self) -> bool:
        """Whether an update has begun and not ended."""
        return self._next is not None

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something."""
        return bool(self._live or self._waiting)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; all of them or, when one is refused, none."""
        self._ids |= check_requests(requests, in_flight=self._ids, max_len=self._max_len)
        for group in [LiveGroup(request=request) for request in requests]:
            self._waiting.extend(LiveRow(group=group, sample_index=i) for i in range(group.request.num_samples))

    def step(self) -> list[Completion]:
        """Give vLLM as many samples as it has rows for, decode once, return the samples that finished."""
        if self._next is not None:
            raise EngineError("the engine must be between updates to step; call end_update() first")
        while self._waiting and len(self._live) < self._max_rows:
            self._start(self._waiting.popleft())
        start = time.perf_counter()
        outputs = self._engine.step()
        self._stats.decode_s += time.perf_counter() - start
        self._stats.num_decode_steps += 1
        return [completion for output in outputs for completion in self._taken(output)]

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests and free their rows; unknown ids are ignored."""
        unwanted = set(request_ids)
        self._ids -= unwanted
        live = [name for name, row in self._live.items() if row.group.request.request_id in unwanted]
        self._engine.abort_request(live, internal=False)
        for name in live:
            del self._live[name]
        self._waiting = deque(row for row in self._waiting if row.group.request.request_id not in unwanted)

    def begin_update(self, version: int, mode: UpdateMode) -> None:
        """Start replacing the weights; a second call starts over.

        Raises:
            EngineError: if `mode` is drain and a request is live.
        """
        if mode == "drain" and self._live:
            raise EngineError(f"no request must be live in a drain update, got {len(self._live)} rows; step until idle")
        self._next = (version, mode)
        self._weights.begin()

    def load(self, tensors: Iterable[tuple[str, Load]]) -> None:
        """Take named tensors, or the next parts of some; vLLM gets them when all are there."""
        self._weights.load(tensors)

    def end_update(self) -> None:
        """Hand all weights to vLLM, take the new version."""
        if self._next is None:
            raise EngineError("an update must have begun before it ends; call begin_update() first")
        self._weights.end()
        start = time.perf_counter()
        self._hand_over()
        self._weights.release()
        (self._version, mode), self._next = self._next, None
        self._engine.reset_prefix_cache(reset_running_requests=mode == "reprefill")
        self._stats.load_s += time.perf_counter() - start

    def weight_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return what `load` expects: canonical name -> (shape, dtype name), tied tensors once."""
        return self._weights.shapes()

    def sleep(self) -> None:
        """Give the memory of weights and KV back, on a GPU; no request may be live."""
        if self._live:
            raise EngineError(f"no request must be live when the engine sleeps, got {len(self._live)} rows; abort them")
        self._engine.sleep(level=2)

    def stats(self) -> EngineStats:
        """Return a snapshot of the counters."""
        return replace(self._stats, num_live_rows=len(self._live), num_waiting_requests=len(self._waiting))

    def _hand_over(self) -> None:
        """Give vLLM's workers all weights: as they are in this process, as a file in memory to other processes."""
        if not self._has_processes:
            self._engine.collective_rpc(_reload, args=(self._staging.named_parameters(),))
            return
        where = _SHARED_MEMORY if os.path.isdir(_SHARED_MEMORY) else None
        with tempfile.TemporaryDirectory(dir=where, prefix="concord-weights-") as directory:
            path = os.path.join(directory, "version.safetensors")
            save_file({name: tensor.detach() for name, tensor in self._staging.named_parameters()}, path)
            self._engine.collective_rpc(_reload_file, args=(path,))

    def _start(self, row: LiveRow) -> None:
        request, sampling = row.group.request, row.group.request.sampling
        length = request.forced_lengths[row.sample_index] if request.forced_lengths else sampling.max_new_tokens
        is_free = not request.forced_lengths
        parameters = VLLMSamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k or -1,
            top_p=sampling.top_p,
            seed=(request.seed + row.sample_index) % 2**63,
            max_tokens=length,
            ignore_eos=True,
            stop_token_ids=sorted(self._eos_ids) if is_free else None,
            stop=list(sampling.stop) if is_free else None,
            logprobs=0,
            detokenize=is_free and bool(sampling.stop),
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = TokensPrompt(prompt_token_ids=list(request.prompt_ids), cache_salt=f"version {self._version}")
        name = f"{request.request_id}#{row.sample_index}"
        self._engine.add_request(name, prompt, parameters)
        self._live[name] = row
        self._stats.num_prefill_tokens += len(request.prompt_ids)

    def _taken(self, output: Any) -> Iterator[Completion]:
        """Append what a step has drawn for a sample; yield its completion where it ended."""
        row = self._live.get(output.request_id)
        if row is None:  # aborted
            return
        (drawn,) = output.outputs
        for token, logprobs in zip(drawn.token_ids, drawn.logprobs or (), strict=True):
            row.append(token, logprobs[token].logprob, self._version)
        self._stats.num_decode_tokens += len(drawn.token_ids)
        if output.finished:
            del self._live[output.request_id]
            yield self._completed(row, drawn.finish_reason)

    def _completed(self, row: LiveRow, reason: str) -> Completion:
        row.group.num_finished += 1
        if row.group.num_finished == row.group.request.num_samples:
            self._ids.discard(row.group.request.request_id)
        self._stats.num_completions += 1
        finish: FinishReason = "length"
        if reason == "stop":
            finish = "eos" if row.tokens[-1] in self._eos_ids else "stop"
        return self._endings.completion(row, finish)


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Take a module out of sight of those who look through all that are loaded.

    vLLM 0.32 does, for its kernels, and stumbles over the library that Numba's compiler is wrapped in, which answers to
    every name: `vllm/triton_utils/dispatcher.py`.
    """
    loaded = sys.modules.pop(module, None)
    try:
        yield
    finally:
        if loaded is not None:
            sys.modules[module] = loaded


def _reload_file(worker: Any, path: str) -> None:
    """In a process of vLLM's: its worker takes its part of every tensor in a file."""
    with safe_open(path, framework="pt") as file:
        _reload(worker, ((name, file.get_tensor(name)) for name in file.keys()))  # noqa: SIM118  # no mapping


def _reload(worker: Any, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """In vLLM's worker: its own layers, which are packed and fused, take a checkpoint's tensors."""
    worker.model_runner.reload_weights(weights_iterator=tensors, is_checkpoint_format=True)
    for layer in worker.model_runner.get_model().modules():
        if isinstance(layer, VocabParallelEmbedding):
            # On a CPU a head that shares its weight with the embedding would keep the packed copy of the old one.
            layer.quant_method.process_weights_after_loading(layer)
