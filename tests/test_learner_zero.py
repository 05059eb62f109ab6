import math

import pytest
import torch
from torch import nn

from learner.config import OptimizerConfig
from learner.optimizer import NonFiniteError, OptimizerEngine, ParameterGroup, make_engine
from learner.zero import deepspeed_config

STAGES = [0, 1, 2, 3]
SLOW_BIAS = ParameterGroup(names=frozenset({"2.bias"}), scale=0.0)


def toy_module(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 30))


def engine(
    stage: int | None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    groups: tuple[ParameterGroup, ...] = (),
    offloads: bool = False,
) -> OptimizerEngine:
    """Return an engine of a ZeRO stage, or of plain torch for None."""
    return make_engine(
        toy_module(seed),
        OptimizerConfig(weight_decay=0.1),
        backend="local" if stage is None else "zero",
        zero_stage=stage or 0,
        dtype=dtype,
        groups=groups,
        offloads=offloads,
    )


def update(engine: OptimizerEngine, *, num_parts: int = 4) -> float:
    """Run one update on fixed data, cut into micro-batches; return the gradient norm."""
    torch.manual_seed(1)
    data = torch.randn(8, 40, dtype=next(engine.module.parameters()).dtype)
    for part in data.chunk(num_parts):
        engine.backward(engine.forward(part).float().pow(2).sum() / 8)
    return engine.step(1e-2)


def weights(engine: OptimizerEngine) -> dict[str, torch.Tensor]:
    return {name: state["param"].clone() for name, state in engine.full_state()}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_learns_what_plain_torch_learns(stage):
    plain, sharded = engine(None), engine(stage)
    for num_parts in (4, 2, 1):  # the number of micro-batches may change between updates
        assert update(sharded, num_parts=num_parts) == pytest.approx(update(plain), rel=1e-5)
    assert largest_difference(weights(plain), weights(sharded)) < 1e-6
    assert sharded.num_updates == 3
    sharded.close()


def test_the_norm_is_before_clipping_and_clipping_happens():
    plain = engine(None)
    assert update(plain) > 2.0
    unclipped = make_engine(toy_module(), OptimizerConfig(max_grad_norm=1e9), backend="local", zero_stage=0)
    clipped = make_engine(toy_module(), OptimizerConfig(max_grad_norm=1e-9), backend="local", zero_stage=0)
    update(unclipped), update(clipped)
    assert largest_difference(weights(clipped), weights(unclipped)) > 1e-4  # eps matters only for tiny gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_that_is_cut_into_shards_first_learns_the_same_to_the_bit(dtype):
    whole, cut = (
        make_engine(toy_module().to(dtype), OptimizerConfig(), backend="zero", zero_stage=3, dtype=dtype, device=device)
        for device in (None, torch.device("cpu"))
    )
    assert [update(cut) for _ in range(3)] == [update(whole) for _ in range(3)]
    assert largest_difference(weights(whole), weights(cut)) == 0
    cut.load_full_state(dict(whole.full_state()), whole.num_updates)
    assert update(cut) == update(whole)


@pytest.mark.parametrize("stage", [None, *STAGES])
@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_non_finite_loss_or_gradient_skips_the_update_and_leaves_nothing_behind(stage, poison):
    tested, reference = engine(stage), engine(stage)
    update(tested), update(reference)
    before = weights(tested)
    output = tested.forward(torch.ones(1, 40)).sum()
    # 0 * inf is NaN in the gradient while this loss itself is finite
    loss = output * math.nan if poison == "loss" else (output - output.detach()).abs().sqrt()
    tested.backward(loss)
    with pytest.raises(NonFiniteError, match="must be finite"):
        tested.step(1e-2)
    assert largest_difference(before, weights(tested)) == 0.0
    assert tested.num_updates == 1
    update(tested), update(reference)
    assert largest_difference(weights(reference), weights(tested)) == 0.0


@pytest.mark.parametrize("stage", [None, *STAGES])
def test_discarded_gradients_leave_nothing_behind(stage):
    tested, reference = engine(stage), engine(stage)
    tested.backward(tested.forward(torch.ones(1, 40)).sum())
    tested.discard()
    assert update(tested) == update(reference)
    assert largest_difference(weights(reference), weights(tested)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [None, *STAGES])
def test_full_state_continues_to_the_bit(stage, dtype):
    first = engine(stage, dtype=dtype)
    update(first), update(first)
    saved = {name: {key: value.clone() for key, value in state.items()} for name, state in first.full_state()}
    assert {value.dtype for state in saved.values() for value in state.values()} == {torch.float32}
    second = engine(stage, dtype=dtype, seed=9)
    second.load_full_state(saved, first.num_updates)
    assert [update(first), update(first)] == [update(second), update(second)]
    assert largest_difference(weights(first), weights(second)) == 0.0
    assert second.num_updates == 4


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_learns_and_resumes_the_same(stage):
    """Main memory is where everything is on a CPU; the way through DeepSpeed is another."""
    plain, first, second = engine(None), engine(stage, offloads=True), engine(stage, offloads=True, seed=9)
    for _ in range(2):
        assert update(first) == pytest.approx(update(plain), rel=1e-5)
    assert largest_difference(weights(plain), weights(first)) < 1e-6
    saved = {name: {key: value.clone() for key, value in state.items()} for name, state in first.full_state()}
    second.load_full_state(saved, first.num_updates)
    assert update(first) == update(second)
    assert largest_difference(weights(first), weights(second)) == 0.0


@pytest.mark.parametrize("stage", [None, 2, 3])
def test_the_comparison_finds_a_forgotten_step_count(stage):
    first, second = engine(stage), engine(stage, seed=9)
    update(first), update(first)
    second.load_full_state(dict(first.full_state()), 0)  # bias correction starts again
    update(first), update(second)
    assert largest_difference(weights(first), weights(second)) > 1e-4


@pytest.mark.parametrize("stage", [None, *STAGES])
def test_half_precision_keeps_float32_masters(stage):
    """Steps far below bfloat16's resolution must add up."""
    tested = engine(stage, dtype=torch.bfloat16)
    before = weights(tested)
    torch.manual_seed(1)
    for _ in range(4):
        tested.backward(tested.forward(torch.ones(1, 40, dtype=torch.bfloat16)).float().sum())
        tested.step(1e-6)
    moved = (weights(tested)["2.bias"] - before["2.bias"]).abs()
    assert torch.allclose(moved, torch.full_like(moved, 4e-6), rtol=0.05)
    assert next(tested.module.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("stage", [None, 0, 2, 3])
def test_parameter_groups_have_their_own_rate(stage):
    tested = engine(stage, groups=(SLOW_BIAS,))
    before = weights(tested)
    update(tested)
    after = weights(tested)
    assert torch.equal(before["2.bias"], after["2.bias"])
    assert not torch.equal(before["0.bias"], after["0.bias"])


def test_wrong_parameter_groups_are_refused():
    with pytest.raises(ValueError, match="must name trained parameters"):
        engine(None, groups=(ParameterGroup(names=frozenset({"3.bias"}), scale=1.0),))
    with pytest.raises(ValueError, match="must not overlap"):
        engine(None, groups=(SLOW_BIAS, SLOW_BIAS))


@pytest.mark.parametrize("stage", [None, 2, 3])
def test_frozen_parameters_stay(stage):
    module = toy_module()
    module[0].requires_grad_(False)
    frozen = module[0].weight.detach().clone()
    tested = make_engine(module, OptimizerConfig(), backend="local" if stage is None else "zero", zero_stage=stage or 0)
    update(tested)
    assert set(weights(tested)) == {"2.weight", "2.bias"}
    with tested.gathered([module[0].weight]):
        assert torch.equal(module[0].weight, frozen)


def test_gathered_parameters_are_whole():
    tested = engine(3)
    weight = tested.module[2].weight
    assert weight.numel() in (0, 1)  # sharded away
    with tested.gathered([weight]):
        assert weight.shape == (30, 50)


def test_local_is_one_process():
    with pytest.raises(ValueError, match="world_size must be 1"):
        make_engine(toy_module(), OptimizerConfig(), backend="local", zero_stage=0, world_size=2)


def test_nothing_is_compiled_at_start():
    engine(2)
    import deepspeed

    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_float16_is_refused():
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        deepspeed_config(OptimizerConfig(), stage=2, dtype=torch.float16, world_size=1)
