"""Sends the policy's weights out: gathered bucket by bucket, named as Hugging Face names them, adapters merged.

The value head is not part of the policy and never leaves; tied weights leave once.  A model directory for
`from_pretrained` is the same tensors, written by transformers.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from actors.cache import swapped_in
from actors.weights import Bucket, Publication, WeightTransport, pack_bucket
from learner.model import ADAPTER
from learner.optimizer import OptimizerEngine

BUCKET_BYTES = 32 * 2**20
"""Tensors are gathered and sent in runs of about this size: it bounds what sharded ranks hold at one time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where one published tensor comes from."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    """What must be whole to compute it; the first one gives dtype and shape."""
    adapted: nn.Module | None
    """The LoRA layer whose update is added."""

    @property
    def num_bytes(self) -> int:
        """Size of the published tensor, also while the parameter is sharded."""
        weight = self.parameters[0]
        return int(getattr(weight, "ds_numel", weight.numel())) * weight.element_size()

    def tensor(self) -> torch.Tensor:
        """Return the published tensor; inside the engine's `gathered`."""
        weight = self.parameters[0].detach()
        if self.adapted is None:
            return weight
        update = self.adapted.get_delta_weight(ADAPTER)  # type: ignore[operator]
        return (weight.float() + update.detach().float()).to(weight.dtype)


class Publisher:
    """Announces versions of the policy.  Every method is called on all ranks together.

    Args:
        policy: the Hugging Face model inside the engine's module.
        engine: owns its parameters.
        transport: rank 0 puts buffers there.
    """

    def __init__(self, policy: PreTrainedModel, engine: OptimizerEngine, transport: WeightTransport) -> None:
        self.policy = policy
        self._engine = engine
        self._transport = transport
        self._buckets = _into_buckets(_sources(policy))
        self._newest: Publication | None = None

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank is the one that sends and writes."""
        return self._engine.rank == 0

    def publish(self, version: int, incarnation: int) -> Publication | None:
        """Send all weights; return the announcement on rank 0.

        The newest announcement is kept, and with it the transport's handles; the one before is let go first.
        """
        self._newest = None
        buckets = [
            Bucket(entries=entries, num_bytes=buffer.nbytes, handle=self._transport.put(buffer))
            for buffer, entries in (pack_bucket(named) for named in self.tensors() if named)
        ]
        if self.is_first_rank:
            self._newest = Publication(version=version, incarnation=incarnation, buckets=tuple(buckets))
        return self._newest

    def tensors(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Yield buckets of (canonical name, tensor on the CPU) on rank 0, empty ones elsewhere; collective."""
        for bucket in self.gathered():
            yield [(name, tensor.cpu()) for name, tensor in bucket()] if self.is_first_rank else []

    def gathered(self) -> Iterator[Callable[[], list[tuple[str, torch.Tensor]]]]:
        """Yield, bucket by bucket, a function to (canonical name, whole tensor on the device); collective."""
        for bucket in self._buckets:
            with self._engine.gathered([p for source in bucket for p in source.parameters]), torch.no_grad():
                yield lambda bucket=bucket: [(source.name, source.tensor()) for source in bucket]  # type: ignore[misc]


def export_policy(publisher: Publisher, directory: str, *, model_dir: str) -> None:
    """Write a directory that `AutoModelForCausalLM.from_pretrained` loads, with the tokenizer of `model_dir`.

    Weights are safetensors in the dtype of the forward pass, adapters merged.  The directory is whole or as it was
    before: a policy that lies there is replaced by a complete one only.

    Raises:
        OSError: when the disk does not take it, or something else lies there.
    """
    weights = {name: tensor.clone() for named in publisher.tensors() for name, tensor in named}
    if not publisher.is_first_rank:
        return
    policy = publisher.policy
    with torch.device("meta"):  # a skeleton without adapters, sharding or a swapped head
        skeleton = type(policy)(policy.config)
    persistent = {name: buffer for name, buffer in policy.named_buffers() if name in skeleton.state_dict()}
    skeleton.load_state_dict(weights | persistent, strict=False, assign=True)
    skeleton.tie_weights()
    skeleton.generation_config = policy.generation_config
    directory = os.path.realpath(directory)
    if os.path.lexists(directory) and not _is_replaceable(directory):
        raise FileExistsError(
            f"{directory} must be empty or hold a policy's config.json to be replaced; choose another"
        )
    with swapped_in(directory) as temporary:
        try:
            skeleton.save_pretrained(temporary)
        except SafetensorError as error:
            raise OSError(f"the weights could not be written to {temporary}: {error}") from error
        _copy_companions(model_dir, temporary)


def _copy_companions(model_dir: str, directory: str) -> None:
    for name in sorted(os.listdir(model_dir)):
        source, target = os.path.join(model_dir, name), os.path.join(directory, name)
        if os.path.isfile(source) and _is_companion(name) and not os.path.exists(target):
            shutil.copyfile(source, target)


def _is_replaceable(directory: str) -> bool:
    return os.path.isdir(directory) and (not os.listdir(directory) or "config.json" in os.listdir(directory))


def _is_companion(name: str) -> bool:
    """Return whether a model directory's file goes with any weights: tokenizer, chat template, code."""
    return not name.endswith((".safetensors", ".bin", ".index.json", ".pt", ".pth", ".gguf", ".msgpack", ".h5"))


def _sources(policy: PreTrainedModel) -> list[_Source]:
    """List what is published, in the model's order."""
    modules = dict(policy.named_modules())
    sources = []
    for name, parameter in policy.named_parameters():  # tied weights come once
        owner, _, leaf = name.rpartition(".base_layer.")
        layer = modules[owner] if owner else None
        if ".lora_A." in name or ".lora_B." in name:
            continue
        if layer is None or leaf != "weight":
            sources.append(_Source(name=name.replace(".base_layer.", "."), parameters=(parameter,), adapted=None))
            continue
        adapters = tuple(getattr(layer, part)[ADAPTER].weight for part in ("lora_A", "lora_B"))
        sources.append(_Source(name=f"{owner}.weight", parameters=(parameter, *adapters), adapted=layer))
    return sources


def _into_buckets(sources: list[_Source]) -> list[list[_Source]]:
    buckets: list[list[_Source]] = []
    used = BUCKET_BYTES
    for source in sources:
        if used + source.num_bytes > BUCKET_BYTES:
            buckets.append([])
            used = 0
        buckets[-1].append(source)
        used += source.num_bytes
    return buckets
