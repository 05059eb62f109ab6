"""Weights from a learner to an engine in another process through memory that both share: on one GPU, CUDA IPC.

Every version changes all weights, and its bits are compared in the end, unmeasured.
"""

import statistics
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing

from actors.policy import load_model
from actors.shared_memory import SharedMemoryTransport
from actors.torch_engine import TorchEngine
from actors.weights import receive
from benchmarks.machine import now
from benchmarks.sync_processes import fingerprints
from learner.config import OptimizerConfig
from learner.optimizer import make_engine
from learner.publisher import Publisher


def shared_memory_sync(directory: str, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Return the seconds from publishing to the moment when the engine has the version, every byte checked.

    Raises:
        RuntimeError: when the engine's weights are not the learner's bit for bit.
        EOFError: when the engine's process ends, which says why.
    """
    model = load_model(directory, dtype=dtype, device=device)
    transport = SharedMemoryTransport(device.type)
    spawn = torch.multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_receive, args=(theirs, directory, device, dtype, transport), daemon=True)
    process.start()
    theirs.close()  # here, so that its end is noticed
    ours.recv()
    engine = make_engine(model, OptimizerConfig(), backend="local", zero_stage=0, dtype=dtype)
    publisher = Publisher(model, engine, transport)
    seconds = []
    for version in range(repeats + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        start = now(device)
        ours.send(publisher.publish(version, 0))
        ours.recv()
        seconds.append(now(device) - start)
        if ours.recv() != fingerprints(model.named_parameters()):
            raise RuntimeError("the engine's weights must be the learner's bit for bit, and are not")
    ours.send(None)
    process.join()
    return statistics.median(seconds[1:])  # the first one takes memory


def _receive(
    learner: Connection, directory: str, device: torch.device, dtype: torch.dtype, transport: SharedMemoryTransport
) -> None:
    tokenizer: Any = None  # no text is made
    model = load_model(directory, dtype=dtype, device=device)
    engine = TorchEngine(model, tokenizer, max_rows=4, eos_ids=frozenset({0}))
    learner.send("ready")
    while (publication := learner.recv()) is not None:
        receive(publication, transport, engine)
        now(device)  # it has them
        learner.send("received")
        learner.send(fingerprints(model.named_parameters()))
