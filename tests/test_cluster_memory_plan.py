"""Planned memory against DeepSpeed's estimators, against tables worked by hand, and against what is really held."""

import gc
from functools import partial

import pytest
import torch

from actors import packed_linear
from actors.rows import PromptGroup
from actors.shared_attention import uninstall
from actors.slots import Prefix, SlotCache
from cluster import memory_plan
from cluster.memory_plan import (
    learner_memory,
    object_store_bytes,
    prompt_tokens,
    reward_memory,
    rollout_memory,
    vllm_rows,
)
from cluster.model_config import shape_of
from learner.config import LearnerConfig, OptimizerConfig
from learner.first_pass import SavedBytes
from learner.model import Scoring
from learner.networks import Networks
from learner.optimizer import make_engine
from tests.checks import Case, Check, with_twins
from tests.plan_toys import LLAMA_7B, LLAMA_70B, NUM_7B, NUM_70B, run_of_7b, run_of_70b, sizes_of
from tests.run_toys import minimal_config

STATES = ("weights", "gathered", "gradients", "optimizer")


def states_of(memory):
    return sum(memory.part(name) for name in STATES)


def trunk_critic(config):
    """Return 7B with one engine only: the value head on the trunk."""
    learner = config.learner.model_copy(update={"critic": "trunk"})
    return config.model_copy(update={"learner": learner})


@pytest.mark.parametrize(
    ("run", "shape", "ranks", "nodes"),
    [
        (run_of_7b, LLAMA_7B, 4, 1),
        (run_of_7b, LLAMA_7B, 8, 1),
        (run_of_70b, LLAMA_70B, 32, 4),
        (run_of_70b, LLAMA_70B, 64, 8),
    ],
    ids=["7b-4", "7b-8", "70b-32", "70b-64"],
)
def test_zero_3_is_near_what_deepspeed_estimates(run, shape, ranks, nodes):
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    config, sizes = trunk_critic(run(learner={"num_ranks": ranks})), sizes_of(shape)
    _, expected, _ = estimate_zero3_model_states_mem_needs(
        sizes.policy_parameters,
        sizes.policy.largest_module,
        num_gpus_per_node=ranks // nodes,
        num_nodes=nodes,
        cpu_offload=False,
    )
    assert states_of(learner_memory(config, sizes)) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_zero_2_is_near_what_deepspeed_estimates(ranks):
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    config = trunk_critic(run_of_7b(learner={"num_ranks": ranks, "zero_stage": 2}))
    memory = learner_memory(config, sizes_of(LLAMA_7B))
    _, expected = estimate_zero2_model_states_mem_needs(NUM_7B, num_gpus_per_node=ranks, cpu_offload=False)
    assert states_of(memory) == pytest.approx(expected, rel=0.15)


def test_offloaded_states_are_near_what_deepspeed_estimates():
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    config, sizes = trunk_critic(run_of_7b(learner={"num_ranks": 8, "offload": "optimizer"})), sizes_of(LLAMA_7B)
    memory = learner_memory(config, sizes)
    host, device, _ = estimate_zero3_model_states_mem_needs(
        NUM_7B, sizes.policy.largest_module, num_gpus_per_node=8, cpu_offload_params=False, additional_buffer_factor=1.0
    )
    # Of the device DeepSpeed counts the largest layer alone; more layers than one are gathered at a time.
    assert sum(p.num_bytes for p in memory.device if p.name == "weights") == pytest.approx(
        device - 4 * sizes.policy.largest_module, rel=0.15
    )
    in_main = sum(part.num_bytes for part in memory.host if part.name in ("gradients", "optimizer"))
    assert 8 * in_main == pytest.approx(host, rel=0.15)


def test_a_rank_of_7b_with_a_critic_by_hand():
    """4 ranks, ZeRO 3, bfloat16: the policy, and a critic without an output head, each with its engine."""
    policy, critic = NUM_7B, NUM_7B - 32000 * 4096 + 4097  # no head, but one for values
    both = policy + critic
    memory = learner_memory(run_of_7b(), sizes_of(LLAMA_7B))
    assert memory.part("weights") == pytest.approx(2 * both / 4, rel=1e-6)
    assert memory.part("gathered") == 2 * 10**9
    assert memory.part("gradients") == pytest.approx(4 * both / 4, rel=1e-6)
    assert memory.part("optimizer") == pytest.approx(12 * both / 4, rel=1e-6)
    assert memory.part("buffers") == 2 * 2 * 5 * 10**8, "a bucket of 5e8 numbers for each engine"
    # 1024 tokens: of each of 32 layers the input, and one layer's graph, 2 x 4096 x 8 + 2 (5 x 4096 + 4 x 11008) bytes
    graph = 1024 * (32 * 4096 * 2 + 2 * 4096 * 8 + 2 * (5 * 4096 + 4 * 11008))
    assert memory.part("activations") == 2 * graph + 1024 * 1024 * 3
    # softmax of 1024 tokens, a chunk of 512 in three forms, the head's gradient in two
    assert memory.part("logits") == 4 * 1024 * 32000 + 512 * 32000 * 8 + 32000 * 4096 * 6
    assert memory.device_bytes == pytest.approx(67.0e9, rel=0.01)


def test_workers_of_7b_by_hand():
    config = run_of_7b()
    sizes = sizes_of(LLAMA_7B, judges=(("liking", NUM_7B),))
    rollout, reward = rollout_memory(config, sizes), reward_memory(config, sizes)
    assert rollout.part("weights") == 2 * NUM_7B
    assert rollout.part("kv cache") == 32 * 1024 * 2 * 32 * 4096 * 2, "32 rows of 1024 tokens, half a megabyte each"
    assert rollout.device_bytes == pytest.approx(31.8e9, rel=0.01)
    assert reward.part("reference") == reward.part("reward model liking") == 2 * NUM_7B
    assert reward.device_bytes == pytest.approx(28.4e9, rel=0.02)


def test_a_version_in_shared_memory_is_the_learners_and_not_the_stores():
    sizes = sizes_of(LLAMA_7B)
    sections = {"learner": {"num_ranks": 1}, "rollouts": {"num_workers": 1}, "placement": {"colocated": True}}
    turns = run_of_7b(**sections)
    shared = run_of_7b(**sections, pipeline={"weights": {"transport": "shared_memory"}})
    assert learner_memory(turns, sizes).part("published") == 0
    assert learner_memory(shared, sizes).part("published") == 2 * NUM_7B
    assert object_store_bytes(turns, sizes) - object_store_bytes(shared, sizes) == 2 * NUM_7B


def test_ranks_and_replicas_of_70b_by_hand():
    config, sizes = run_of_70b(), sizes_of(LLAMA_70B)
    rank, replica = learner_memory(config, sizes), rollout_memory(config, sizes)
    assert states_of(rank) == pytest.approx(18 * NUM_70B / 32 + 2e9, rel=1e-6)
    assert rank.device_bytes == pytest.approx(48.0e9, rel=0.03)
    assert replica.part("weights") == 2 * NUM_70B // 4
    # 8 key-value heads of 128 in 80 layers: 327,680 bytes a token, a quarter of them on each GPU
    assert replica.part("kv cache") == 32 * 2048 * 327_680 // 4
    left = 0.92 * 80e9 - (replica.device_bytes - replica.part("kv cache"))
    assert vllm_rows(config, replica, 80 * 10**9) == int(left) // (2048 * 327_680 // 4)
    assert vllm_rows(config, replica, 24 * 10**9) == 0


def test_adapters_are_trained_and_the_rest_is_not():
    sizes = sizes_of(LLAMA_7B)
    config = run_of_7b(learner={"critic": "trunk", "zero_stage": 2, "lora": {"rank": 16}})
    memory = learner_memory(config, sizes)
    # of each layer 4 matrices of 4096 x 4096 and 3 of 4096 x 11008
    adapters = 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert adapters == 39_976_960, "as peft reports for rank 16"
    assert memory.part("optimizer") == 12 * (adapters + 4097) // 4
    assert memory.part("weights") == 2 * (NUM_7B + adapters + 4097)


def test_a_reference_that_moves_is_on_every_rank():
    base = run_of_7b()
    ema = run_of_7b(algorithm={"reference": {"mode": "ema", "decay": 0.9}})
    assert learner_memory(base, sizes_of(LLAMA_7B)).part("reference") == 0
    assert learner_memory(ema, sizes_of(LLAMA_7B)).part("reference") == 4 * NUM_7B


def test_prompts_are_as_long_as_they_may_be_or_as_is_said():
    shape = sizes_of(LLAMA_7B).policy
    assert prompt_tokens(run_of_7b(), shape) == 512
    assert prompt_tokens(run_of_7b(prompts={"max_prompt_tokens": None}), shape) == memory_plan.DEFAULT_PROMPT_TOKENS
    assert prompt_tokens(run_of_7b(rollouts={"max_new_tokens": 4000}), shape) == 96


# What is really held, on models small enough for this machine.

TINY = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2048, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TINY_GPT2 = {
    "model_type": "gpt2", "n_embd": 128, "n_layer": 4, "n_head": 8, "n_positions": 512, "vocab_size": 2048,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny_model(config=TINY, dtype=torch.float32):
    from transformers import AutoConfig, AutoModelForCausalLM

    from actors.policy import without_dropout

    torch.manual_seed(0)
    settings = without_dropout(AutoConfig.for_model(**config))
    return AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").to(dtype)


def tensor_bytes():
    """Return storage -> bytes of all plain tensors that live in this process, gradients too."""
    gc.collect()
    # by type: a proxy of something that is gone, such as Numba leaves, answers no other question
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    # weights that oneDNN has packed, another test's perhaps, have no storage to ask for
    plain = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.layout == torch.strided]
    storages = [tensor.untyped_storage() for tensor in plain]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's, of all that is looked at
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_states_are_those_that_an_engine_holds_before_its_update(stage, dtype):
    before = tensor_bytes()
    model = tiny_model(dtype=dtype)
    backend = "local" if stage is None else "zero"
    engine = make_engine(model, OptimizerConfig(), backend=backend, zero_stage=stage or 0, dtype=dtype)

    def backward():
        logits = engine.forward(input_ids=torch.arange(8)[None], use_cache=False).logits
        engine.backward(logits.float().logsumexp(-1).sum())

    backward()
    engine.step(1e-4)  # plain torch makes the moments here
    backward()
    buckets = {5 * 10**8 * 2, 5 * 10**8 * 4}  # reserved, and on a CPU hardly touched
    held = sum(size for at, size in tensor_bytes().items() if before.get(at) != size and size not in buckets)
    engine.close()
    config = minimal_config(
        policy={"dtype": str(dtype).removeprefix("torch.")},
        learner={"backend": backend, "zero_stage": stage or 0},
        algorithm={"name": "rloo"},
    )
    memory = learner_memory(config, sizes_of(TINY))
    assert held == pytest.approx(sum(memory.part(name) for name in ("weights", "gradients", "optimizer")), rel=0.02)


def graph_bytes(config, dtype, *, layers=4, has_checkpoints=False):
    """Return what the graph of one row really keeps, and its tokens; the softmax over the vocabulary left out."""
    name = "n_layer" if config["model_type"] == "gpt2" else "num_hidden_layers"
    learner = LearnerConfig(backend="local", gradient_checkpointing=has_checkpoints)
    scoring = Scoring(temperature=1.0, chunk_tokens=512, kept_bytes=0)
    model = tiny_model({**config, name: layers}, dtype)
    networks = Networks(model, learner, scoring=scoring, dtype=dtype, rank=0)
    uninstall(model)  # a row under a mask, as on a GPU
    group = PromptGroup(prompt_ids=list(range(64)), responses=[list(range(48)) for _ in range(3)])
    row = networks.module.scorer.row([group])
    saved = SavedBytes(networks.weights())
    with saved:
        networks.forward(row)
    return saved.total, row.input_ids.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", [TINY, TINY_GPT2], ids=["llama", "gpt2"])
def test_activations_are_those_that_a_graph_keeps(config, dtype):
    kept, tokens = graph_bytes(config, dtype)
    more, _ = graph_bytes(config, dtype, layers=8)
    item = 2 if dtype == torch.bfloat16 else 4
    planned = shape_of(config, where="test").activation_bytes(tokens=tokens, item_bytes=item, has_checkpoints=False)
    assert more - kept == pytest.approx(planned, rel=0.05), "four layers"
    assert kept == pytest.approx(planned, rel=0.1), "with what is kept beside the layers"


def test_checkpoints_keep_a_layers_input_alone():
    kept, tokens = graph_bytes(TINY, torch.float32, has_checkpoints=True)
    more, _ = graph_bytes(TINY, torch.float32, layers=8, has_checkpoints=True)
    shape = shape_of(TINY, where="test")
    planned = [
        shape.activation_bytes(tokens=tokens, item_bytes=4, has_checkpoints=has_checkpoints)
        for has_checkpoints in (True, False)
    ]
    assert more - kept == planned[0] - planned[1] // 4, "beside one layer's graph, which is there while it is run again"


def test_packed_weights_are_those_of_an_engine_and_what_packing_them_again_takes(monkeypatch):
    model = tiny_model()
    packed_linear.pack(model)
    packed = sum(4 * piece.numel() for product in packed_linear._products(model) for piece in product.packed)
    config = minimal_config(policy={"dtype": "float32"})
    assert rollout_memory(config, sizes_of(TINY)).part("packed weights") == 2 * packed
    assert memory_plan._PACKING_BYTES == 2 * packed_linear._PIECE_BYTES
    monkeypatch.setattr(memory_plan, "_PACKING_BYTES", 1000)
    assert rollout_memory(config, sizes_of(TINY)).part("packed weights") == packed + 1000, "of larger models a piece"


def test_keys_and_values_are_those_of_the_engines_slots():
    shape = shape_of(TINY, where="test")
    cache = SlotCache(8)
    cache.reserve(100)
    part = torch.zeros(1, shape.kv_heads, 16, shape.head_dim)
    cache.write(0, 1, Prefix(length=16, keys=[part] * shape.layers, values=[part] * shape.layers))
    assert cache.num_bytes == shape.kv_bytes(rows=8, tokens=112, item_bytes=4)


def hand_table_of_7b(states):
    """The worked table above, in one number: (2 + 4 + 12) / 4 of both networks' parameters, and what is gathered."""
    config = run_of_7b()
    sizes = sizes_of(LLAMA_7B)
    found = [states(config, network, 2) for network in memory_plan._networks(config, sizes)]
    both = 2 * NUM_7B - 32000 * 4096 + 4097
    held = sum(state.weights + state.gradients + state.optimizer for state in found)
    assert held == pytest.approx(18 * both / 4, rel=1e-6)
    assert max(state.gathered for state in found) == 2 * 10**9


def _with(states, **factors):
    def changed(config, network, item):
        found = states(config, network, item)
        fields = ("weights", "gathered", "gradients", "optimizer", "update")
        values = {name: getattr(found, name) for name in fields}
        return memory_plan._States(**{name: int(values[name] * factors.get(name, 1)) for name in fields})

    return changed


_TWIN = partial(_with, memory_plan._states)

CHECKS = (
    Check(
        id="states",
        run=hand_table_of_7b,
        part=memory_plan._states,
        twins={
            "no-masters": _TWIN(optimizer=8 / 12),
            "whole-weights": _TWIN(weights=4),
            "half-gradients": _TWIN(gradients=0.5),
            "nothing-gathered": _TWIN(gathered=0),
        },
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()
