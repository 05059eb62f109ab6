import json
from dataclasses import replace

import pytest

from cluster.config import ConfigError, RunConfig, load, to_yaml
from cluster.hardware import GB, Hardware, described
from cluster.placement import plan_placement
from cluster.plan import batch_plan, make_plan, to_json
from cluster.plan_layout import device_need
from tests.plan_toys import GPUS, LLAMA_7B, LLAMA_70B, NUM_7B, model_directory, run_command, run_of_7b, run_of_70b
from tests.run_toys import minimal_config


def test_numbers_of_a_step():
    config = minimal_config(
        rollouts={"prompts_per_step": 6, "samples_per_prompt": 4, "max_new_tokens": 10},
        learner={"epochs": 2, "num_minibatches": 3, "num_ranks": 2},
    )
    plan = batch_plan(config)
    assert plan["sequences per step"] == 24
    assert plan["optimizer updates per step"] == 6
    assert plan["optimizer updates in all"] == 12
    assert plan["sequences per rank"].startswith("about 12")


@pytest.mark.parametrize("cores", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_stages_that_overlap_share_the_cores(cores, workers):
    config = minimal_config(rollouts={"num_workers": workers}, learner={"num_ranks": 2})
    placement = plan_placement(config, cores=cores)
    busy = [role.count * role.threads for role in placement.all]
    minimum = [role.count for role in placement.all]  # a process has at least one thread
    assert busy[0] + busy[1] <= max(cores, minimum[0] + minimum[1])
    assert busy[2] <= max(cores, minimum[2])
    assert sum(role.count * role.cpus for role in placement.all) <= cores, "Ray can place all of them at once"


def test_two_cores():
    placement = plan_placement(minimal_config(), cores=2)
    assert [role.threads for role in placement.all] == [1, 1, 2]


def test_named_threads_win():
    placement = plan_placement(minimal_config(placement={"learner_threads": 1, "rollout_threads": 3}), cores=2)
    assert (placement.rollout.threads, placement.learner.threads) == (3, 1)


def test_cores_that_a_run_is_given_are_all_in_rays_books():
    placement = plan_placement(minimal_config(placement={"cores": 6}), cores=64)
    assert [role.threads for role in placement.all] == [5, 1, 6]
    assert [role.cpus for role in placement.all] == [2.0, 2.0, 2.0], "so that nobody else is given them"


def test_no_process_has_more_threads_than_its_node():
    placement = plan_placement(minimal_config(), cores=64, node_cores=4)
    assert [role.threads for role in placement.all] == [4, 4, 4]


# The whole pre-flight.

EIGHT = "8xH100-80GB"
SIXTY_FOUR = "8x8xH100-80GB,96cpu,2000GB"


def planned(config, cluster=EIGHT, **options):
    return make_plan(config, described(cluster), **options)


def messages(plan, level="fail"):
    return {problem.about: problem.message for problem in plan.problems if problem.level == level}


@pytest.fixture
def models(tmp_path):
    """Directories of a policy of 7B, a reward model of 7B and a policy of 70B, without weights."""
    return {
        "policy": model_directory(tmp_path / "policy", LLAMA_7B),
        "judge": model_directory(tmp_path / "judge", {**LLAMA_7B, "architectures": ["LlamaForSequenceClassification"]}),
        "large": model_directory(tmp_path / "large", LLAMA_70B),
    }


def test_7b_with_critic_and_reward_model_on_8_gpus(models):
    plan = planned(run_of_7b(models["policy"], models["judge"]))
    assert plan.is_feasible, messages(plan)
    assert plan.sizes.policy_parameters == 6_738_415_616
    needs = {role: device_need(plan.layout, role) for role in ("rollout", "reward", "learner")}
    assert {role: need[1] for role, need in needs.items()} == dict.fromkeys(needs, 80 * GB)
    assert needs["learner"][0] == pytest.approx(67.0e9, rel=0.02)
    assert needs["rollout"][0] == pytest.approx(31.8e9, rel=0.02)
    assert needs["reward"][0] == pytest.approx(28.4e9, rel=0.02)
    assert [len(found.nodes) for found in plan.layout.fits] == [4, 2, 2]


def test_7b_that_does_not_fit_names_settings_with_which_it_does(models):
    config = run_of_7b(models["policy"], models["judge"], learner={"zero_stage": 2})
    failures = messages(planned(config))
    assert set(failures) == {"learner"}
    assert "must hold a learner process's 94." in failures["learner"]
    assert "it fits with learner.zero_stage=3" in failures["learner"]


def test_70b_on_64_gpus(models):
    plan = planned(run_of_70b(models["large"]), SIXTY_FOUR)
    assert plan.is_feasible, messages(plan)
    warnings = messages(plan, "warn")
    assert "bit-exact recovery is off" in " ".join(p.message for p in plan.problems)
    assert "no node holds all 32 ranks, which are on 4 nodes" in warnings["learner"]
    gang, rollout, _ = plan.layout.fits
    assert (gang.group.strategy, len(set(gang.nodes)), len(set(rollout.nodes))) == ("PACK", 4, 4)
    assert not set(gang.nodes) & set(rollout.nodes)


def test_70b_whose_reference_fits_on_no_gpu_is_told_what_helps(models):
    config = run_of_70b(
        models["large"], placement={**GPUS, "reward_gpus": 1.0}, learner={"num_ranks": 32, "zero_stage": 3}
    )
    failures = messages(planned(config, SIXTY_FOUR))
    assert "reference 138.0 GB" in failures["reward"]
    assert "placement.reward_gpus=0.0" in failures["reward"]


def test_each_thing_that_is_impossible_is_named(models):
    config = run_of_70b(
        models["large"],
        rollouts={"engine": "vllm", "tensor_parallel": 3, "num_workers": 2, "max_new_tokens": 4096},
        learner={"num_ranks": 4, "zero_stage": 2},
        placement={**GPUS, "reward_labels": {"role": "judge"}},
    )
    plan = planned(config, "1x4xA10G,64GB")
    text = "\n".join(f"{problem.about}: {problem.message}" for problem in plan.problems if problem.level == "fail")
    for expected in (
        "rollout: rollouts.num_workers must be at most 0 here, got 2",
        "reward: placement.reward_labels must be labels of some node, got role=judge",
        "cluster: GPUs of all processes must be at most the 4 there are, got 11 wanted",
        "rollout: rollouts.max_new_tokens must be below the policy's 4096 positions, got 4096",
        "rollout: rollouts.tensor_parallel must divide the policy's 64 attention heads, got 3; use 2",
        "learner: memory of a GPU must hold a learner process's",
        "none of the settings tried makes it fit on this hardware",
        "cluster: main memory of node-0 must hold",
    ):
        assert expected in text, text


def test_a_model_that_is_not_here_leaves_the_rest_of_the_plan(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    plan = planned(run_of_7b("owner/model"))
    assert plan.layout.memory == ()
    assert any("owner/model is not on this machine, so its size is not known" in note for note in plan.notes)
    assert [len(found.nodes) for found in plan.layout.fits] == [4, 2, 2]


def test_shared_gpus_hold_the_learners_state_beside_the_rollouts(models):
    sections = {
        "learner": {"num_ranks": 8, "zero_stage": 3, "gradient_checkpointing": True},
        "rollouts": {"num_workers": 8, "max_new_tokens": 512},
        "placement": {**GPUS, "reward_gpus": 0.0, "colocated": True},
    }
    plan = planned(run_of_7b(models["policy"], **sections))
    assert plan.is_feasible, messages(plan)
    apart = planned(run_of_7b(models["policy"], **{**sections, "placement": GPUS}))
    assert "got 18 wanted" in messages(apart)["cluster"]
    learner, rollout = plan.layout.memory_of("learner"), plan.layout.memory_of("rollout")
    need, budget = device_need(plan.layout, "learner")
    assert max(learner.device_bytes, rollout.device_bytes) < need < learner.device_bytes + rollout.device_bytes
    assert budget == 80 * GB
    moves = planned(run_of_7b(models["policy"], **sections | {"learner": {"num_ranks": 8, "zero_stage": 2}}))
    assert device_need(moves.layout, "learner")[0] == moves.layout.memory_of("learner").device_bytes + 10**9, (
        "beside the worker's context; what stage 2 holds is in main memory while others generate"
    )
    one = {"learner": {"num_ranks": 1}, "rollouts": {"num_workers": 1}, "placement": sections["placement"]}
    needs = [
        device_need(
            planned(run_of_7b(models["policy"], **one, pipeline={"weights": {"transport": t}})).layout, "rollout"
        )
        for t in ("object_store", "shared_memory")
    ]
    assert needs[1][0] - needs[0][0] == pytest.approx(2 * NUM_7B, rel=1e-3), "what is published stays on the GPU"


def test_what_others_use_is_waited_for(models):
    (node,) = described(EIGHT).nodes
    busy = replace(node, gpus=2.0)
    plan = make_plan(run_of_7b(models["policy"]), Hardware(nodes=(node,), free=(busy,), source="test"))
    assert plan.is_feasible
    assert "others use the cluster now, and the run would wait" in messages(plan, "warn")["learner"]


def test_json_has_what_the_tables_have(models):
    found = json.loads(to_json(planned(run_of_7b(models["policy"], models["judge"], learner={"zero_stage": 2}))))
    assert found["feasible"] is False
    learner = next(processes for processes in found["processes"] if processes["role"] == "learner")
    assert learner["device_available_bytes"] == 80 * GB < learner["device_needed_bytes"]
    assert learner["strategy"] == "STRICT_PACK"
    assert any(problem["level"] == "fail" and "zero_stage=3" in problem["message"] for problem in found["problems"])


def recorded(directory, config, *, step_s=10.0, length=100.0):
    """Write what a run of three steps has measured."""
    directory.mkdir()
    (directory / "config.yaml").write_text(to_yaml(config))
    phases = {"generate_s": 4.0, "score_s": 1.0, "learn_s": 3.0, "publish_s": 0.5}
    rows = [{"step": 0}, *({"step": s, **phases, "step_s": step_s, "response_length_mean": length} for s in (1, 2, 3))]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "ge')
    return str(directory)


def test_the_step_time_of_the_same_run_is_what_was_measured(models, tmp_path):
    config = run_of_7b(models["policy"])
    time = planned(config, calibration=recorded(tmp_path / "earlier", config)).step_time
    assert time.step_s == pytest.approx(10.0)
    assert time.other_s == pytest.approx(1.5)


def test_a_run_that_has_begun_is_its_own_measure(models, tmp_path):
    config = run_of_7b(models["policy"], run={"dir": str(tmp_path / "own"), "num_steps": 2})
    recorded(tmp_path / "own", config)
    assert planned(config).step_time.step_s == pytest.approx(10.0)
    assert planned(run_of_7b(models["policy"])).step_time is None


def test_the_step_time_follows_the_work_and_who_shares_it(models, tmp_path):
    earlier = recorded(tmp_path / "earlier", run_of_7b(models["policy"]))
    twice = {"num_workers": 2, "prompts_per_step": 128, "max_new_tokens": 512}
    assert planned(run_of_7b(models["policy"], rollouts=twice), calibration=earlier).step_time.step_s == pytest.approx(
        2 * 8 + 0.5 + 1.5
    )
    more = run_of_7b(models["policy"], rollouts={"num_workers": 4}, learner={"num_ranks": 8, "epochs": 2})
    time = planned(more, "16xH100-80GB", calibration=earlier).step_time
    assert time.phases["generate"] == pytest.approx(2.0)
    assert time.phases["learn"] == pytest.approx(3.0), "twice the passes on twice the ranks"
    beside = run_of_7b(models["policy"], pipeline={"max_staleness": 1})
    assert planned(beside, calibration=earlier).step_time.step_s == pytest.approx(5.0 + 1.5)


def test_a_directory_without_a_run_is_no_calibration(models, tmp_path):
    with pytest.raises(ConfigError, match="--calibration must be the directory of a run"):
        planned(run_of_7b(models["policy"]), calibration=str(tmp_path))


def test_what_a_reward_functions_run_on_a_laptop_takes():
    """The example that ships, on two cores: everything fits, and nothing has a GPU."""
    config = load(RunConfig, "examples/randomwalks.yaml")
    plan = planned(config, "2cpu,8GB")
    assert plan.is_feasible, messages(plan)
    assert plan.sizes.policy_parameters == 6 * (12 * 144**2 + 13 * 144) + (23 + 16 + 2) * 144
    assert not any(memory.device for memory in plan.layout.memory)


def test_the_command_takes_less_than_three_seconds_and_no_torch(models, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(run_of_7b(models["policy"], models["judge"])))
    printed, status, heavy, seconds = run_command("plan", str(path), f"--cluster={EIGHT}")
    assert (status, heavy) == (0, "[]")
    assert "The run can start. Nothing was started." in printed
    assert seconds < 3
    printed, status, heavy, seconds = run_command(
        "plan", str(path), "learner.zero_stage=2", f"--cluster={EIGHT}", "--json"
    )
    assert (status, heavy, json.loads(printed)["feasible"]) == (1, "[]", False)
    assert seconds < 3
