"""How a run's weights get to whoever pulls them: implementations of `actors.weights.WeightTransport`."""

from collections.abc import Sequence

import numpy as np
import ray
from torch import Tensor

from actors.shared_memory import SharedMemoryTransport
from actors.weights import WeightTransport, one_room
from cluster.config import RunConfig


def make_transport(config: RunConfig) -> WeightTransport:
    """Return what a run's versions are pulled through, those too that a broadcast could not bring."""
    if config.pipeline.weights.is_shared:
        return SharedMemoryTransport("cuda" if config.placement.learner_gpus else "cpu")
    return ObjectStoreTransport()


class ObjectStoreTransport:
    """Buffers through Ray's object store: rank 0 puts each once, receivers read it without a copy on the same node.

    The store keeps numpy arrays out of band, which is many times faster than torch tensors.
    """

    def rooms(self, sizes: Sequence[int]) -> list[Tensor]:
        """See `one_room`."""
        return one_room(sizes)

    def put(self, buffer: Tensor) -> ray.ObjectRef:
        """Store a bucket; it lives as long as its reference and the process that put it."""
        return ray.put(buffer.numpy())

    def get(self, handle: ray.ObjectRef) -> np.ndarray:
        """Return the bucket, read-only and shared on this node."""
        buffer: np.ndarray = ray.get(handle)
        return buffer
