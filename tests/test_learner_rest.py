"""A learner that rests between steps, everything it holds out of the way, learns the same to the last bit."""

import pytest
import torch

from tests.learner_toys import learner_config, learner_rank, parameters, toy_batch, toy_directory

BACKENDS = {
    "local": {"backend": "local"},
    "two networks": {"backend": "local", "critic": "separate"},
    "stage 2": {"backend": "zero", "zero_stage": 2},
    "stage 1": {"backend": "zero", "zero_stage": 1},
    "stage 0": {"backend": "zero", "zero_stage": 0},
}
every_backend = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("stage 0", "stage 1"))) for name in BACKENDS]
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return toy_directory(tmp_path_factory.mktemp("toy"))


def learnt(directory, *, rests, **settings):
    config = learner_config(**settings)
    learner = learner_rank(directory, config)
    for step in range(1, 4):
        batch = toy_batch(directory, config, step=step)
        learner.step(batch.tables, batch.plan)
        learner.publish(step, 0)
        if rests:
            learner.rest()
            learner.rest()
    if rests:
        learner._networks.reload()
    return learner


@every_backend
def test_same_bits(name, directory):
    rested, other = (learnt(directory, rests=rests, **BACKENDS[name]) for rests in (True, False))
    pairs = zip(parameters(rested).items(), parameters(other).items(), strict=True)
    for (name, first), (_, second) in pairs:
        assert torch.equal(first, second), name


def test_nothing_that_is_trained_stays_on_the_device(directory, monkeypatch):
    """There is one device here, so what is asked to move is looked at, not what has moved."""
    learner = learnt(directory, rests=False, backend="local")
    engine = learner._networks.policy
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: moved.append(tensor.data_ptr()) or tensor)
    engine.offload()
    held = [*engine.module.parameters(), *engine.module.buffers(), *engine._masters.values()]
    held += [tensor for moments in engine._optimizer.state.values() for tensor in moments.values()]
    assert {tensor.data_ptr() for tensor in held} <= set(moved)
