"""Ray's weight transports: implementations of `actors.weights.WeightTransport`."""

import numpy as np
import ray


class ObjectStoreTransport:
    """Buffers through Ray's object store: rank 0 puts each once, receivers read it without a copy on the same node.

    The store keeps numpy arrays out of band, which is many times faster than torch tensors.
    """

    def put(self, buffer: np.ndarray) -> ray.ObjectRef:
        """Store a uint8 buffer; it lives as long as its reference and the process that put it."""
        return ray.put(buffer)

    def get(self, handle: ray.ObjectRef) -> np.ndarray:
        """Return the buffer, read-only and shared on this node."""
        buffer: np.ndarray = ray.get(handle)
        return buffer
