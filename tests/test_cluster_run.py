"""The spine, everything real: Ray actors, DeepSpeed, publish, evaluation, checkpoints; only the model is tiny."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch

from actors.schema import check
from cluster.config import ConfigError, to_yaml
from cluster.loop import train, train_step
from cluster.pool import WorkerError
from cluster.run import Run
from cluster.session import Session
from cluster.storage import RunStorage, StorageError
from reward.schema import SCORED
from tests.recovery_toys import calm_place
from tests.run_toys import (
    are_equal,
    assert_each_group_is_trained_once,
    metrics_of,
    replayed,
    tiny_config,
    weights_of,
)

NUM_STEPS = 4


def _config(directory, data, **sections):
    held_out = {"prompts": {"path": str(data / "held_out.jsonl")}, "every": 2, "num_prompts": 4}
    return tiny_config(directory, data, **{"evaluation": held_out} | sections)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    rows = [json.dumps({"prompt": text, "id": f"p{n}"}) for n, text in enumerate("abcdabcd")]
    (directory / "prompts.jsonl").write_text("\n".join([*rows, '{"prompt": 3}']) + "\n")
    (directory / "held_out.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in ("ab", "cd")) + "\n")
    return directory


@pytest.fixture(scope="module")
def straight(ray_cluster, data, tmp_path_factory):
    """A run from start to end without a stop."""
    directory = tmp_path_factory.mktemp("runs") / "straight"
    with Run(_config(directory, data)) as run:
        train(run)
    return directory


def test_metrics_have_a_row_a_step(straight):
    table = pq.read_table(straight / "metrics.parquet")
    assert table["step"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["policy_version"].to_pylist() == [0, 1, 2, 3, 4]
    names = "score_mean score_std kl response_length_mean generate_s score_s learn_s publish_s policy_loss value_loss"
    for name in [*names.split(), "entropy", "approx_kl", "clip_fraction", "grad_norm", "learning_rate"]:
        assert table[name].null_count == 1, f"{name} has a value in each step, and none before training"
    assert [row is None for row in table["eval_score_mean"].to_pylist()] == [False, True, False, True, False]
    assert table["eval_kl"][0].as_py() == pytest.approx(0.0, abs=1e-5), "the start is its own reference"


def test_recorded_logprobs_are_the_learners_after_every_publish(straight):
    gaps = pq.read_table(straight / "metrics.parquet")["learner_logprob_gap"].to_pylist()[1:]
    assert max(gaps) < 1e-4


def test_the_policy_learns(straight):
    scores = pq.read_table(straight / "metrics.parquet")["eval_score_mean"].drop_null().to_pylist()
    assert scores[-1] > scores[0]


def test_rollouts_are_on_disk_with_their_schema(straight):
    for step in range(1, NUM_STEPS + 1):
        table = check(pq.read_table(straight / "rollouts" / f"step-{step}.parquet"), SCORED, "test")
        assert table.num_rows == 16
        versions = {version for row in table["policy_versions"].to_pylist() for version in row}
        assert versions == {step - 1}, "exactly on-policy"


def test_summary_names_the_malformed_row_and_conserves_groups(straight, data):
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["groups"] == {"accepted": 16, "trained": 16, "dropped": 0, "quarantined": 0, "in_flight": 0}
    assert [(row["file"], row["line"]) for row in summary["quarantined_rows"]] == [(str(data / "prompts.jsonl"), 9)]


@pytest.mark.slow
def test_stopped_and_continued_equals_uninterrupted_to_the_bit(straight, ray_cluster, data):
    directory = straight.parent / "stopped"
    with Run(_config(directory, data)) as run:
        run.evaluate_start()
        for step in run.steps():
            train_step(run, step)
            if step == 3:  # after the checkpoint of step 2: step 3 is learnt again
                break
    assert metrics_of(directory)[-1]["step"] == 3
    rollouts = (directory / "rollouts" / "step-3.parquet").read_bytes()
    with Run(_config(directory, data)) as run:
        assert run.step == 2
        assert run.learner.incarnation == 1, "weights published from now on have names of their own"
        train(run)
    assert are_equal(directory, straight)
    assert (directory / "rollouts" / "step-3.parquet").read_bytes() == rollouts, "it was not generated again"
    assert json.loads((directory / "summary.json").read_text())["groups"]["trained"] == 16


@pytest.mark.slow
def test_ahead_of_the_learner_nothing_is_lost_and_a_replay_gives_the_same_weights(straight, ray_cluster, data):
    """Stopped in the middle, with groups of later steps on their way, and continued."""
    directory = straight.parent / "ahead"
    config = _config(directory, data, pipeline={"max_staleness": 2}, evaluation={"prompts": None})
    with Run(config) as run:
        for step in run.steps():
            metrics = train_step(run, step)
            if step == 2:
                break
    assert metrics["groups_in_flight"] > 0, "later steps' groups are on their way"
    assert metrics["staleness_max"] <= 2
    with Run(config) as run:
        train(run)
    assert_each_group_is_trained_once(directory, config)
    again = replayed(directory, config, straight.parent / "again")
    weights = weights_of(directory)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(again).items())


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["object_store", "shared_memory"])
def test_turns_with_the_same_memory_change_no_bit(straight, ray_cluster, data, transport):
    directory = straight.parent / f"turns-{transport}"
    held = {"generated": [], "learning": []}
    weights = {"weights": {"transport": transport}}
    with Run(_config(directory, data, placement={"colocated": True}, pipeline=weights)) as run:
        take, learn = run.take_batch, run.learner.step

        def take_batch(step):
            batch = take(step)
            held["generated"] += _kv_bytes()
            return batch

        def step_on(batch):
            held["learning"] += _kv_bytes()
            return learn(batch)

        run.take_batch, run.learner.step = take_batch, step_on
        train(run)
    assert len(held["learning"]) == len(held["generated"]) == NUM_STEPS
    assert all(held["generated"])
    assert not any(held["learning"]), "rollout workers had given theirs back"
    assert are_equal(directory, straight)


def _kv_bytes():
    """Return the bytes of keys and values that each rollout worker holds."""
    names = [name for name in ray.util.list_named_actors() if "/rollout" in name]
    return [stats["kv_bytes"] for stats in ray.get([ray.get_actor(name).stats.remote() for name in names])]


@pytest.mark.slow
def test_weights_by_broadcast_give_the_same_run_and_a_restarted_worker_catches_up_alone(straight, ray_cluster, data):
    weights = {"transport": "process_group", "bucket_bytes": 2**14, "timeout_s": 20.0}
    directory = straight.parent / "broadcast"
    config = _config(directory, data, rollouts={"num_workers": 2}, pipeline={"weights": weights})
    with Run(config) as run:
        run.evaluate_start()
        for step in run.steps():
            if step == 3:
                workers = run.pipeline._core._workers._actors
                ray_cluster.kill(next(a.handle for worker, a in workers.items() if str(worker) == "rollout-1.0"))
            train_step(run, step)
        run.finish()
        assert run._stream_epoch >= 2, "with the new process the group is another one"
    assert are_equal(directory, straight)
    last = pq.read_table(directory / "metrics.parquet").to_pylist()[-1]
    assert (last["faults_num_restarts"], last["faults_num_learner_restarts"]) == (1, 0)


def test_another_configuration_on_the_same_directory_is_refused(straight, data):
    with pytest.raises(ConfigError, match=r"another configuration \(algorithm.kl.coef 0.01 -> 0.5\)"):
        Run(_config(straight, data, algorithm={"kl": {"coef": 0.5}}))


@pytest.mark.slow
def test_two_ranks_learn_the_same(straight, ray_cluster, data):
    config = _config(straight.parent / "two", data, learner={"num_ranks": 2}, evaluation={"prompts": None})
    with Run(config) as run:
        metrics = train_step(run, next(run.steps()))
    expected = metrics_of(straight)[1]
    assert metrics["score_mean"] == expected["score_mean"]
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


SHARED = {"placement": {"colocated": True}, "pipeline": {"weights": {"transport": "shared_memory"}}}


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, SHARED], ids=["object-store", "shared-memory"])
def test_a_run_that_loses_a_rollout_worker_and_its_learner_equals_an_undisturbed_one(
    straight, ray_cluster, data, tmp_path, sections
):
    directory = tmp_path / "disturbed"
    with Run(_config(directory, data, rollouts={"num_workers": 2}, **sections)) as run:
        run.evaluate_start()
        for step in run.steps():
            if step == 2:
                workers = run.pipeline._core._workers._actors
                ray_cluster.kill(next(a.handle for worker, a in workers.items() if str(worker) == "rollout-1.0"))
            if step == 4:  # its ranks are at step 3, the newest checkpoint is of step 2
                ray_cluster.kill(run.learner._gang._ranks.actors[0])
            train_step(run, step)
        run.finish()
        assert run.learner.num_replayed == 1
    assert are_equal(directory, straight)
    last = pq.read_table(directory / "metrics.parquet").to_pylist()[-1]
    assert last["faults_num_restarts"] == 1
    assert (last["faults_num_learner_restarts"], last["faults_num_replayed_steps"]) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("request_to_end", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_the_last_step_and_leaves_no_process(data, tmp_path, request_to_end):
    directory = tmp_path / "interrupted"
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(_config(directory, data, run={"num_steps": 1000, "dir": str(directory)})))
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "train", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=os.getcwd(),
    )
    journal = directory / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not (journal.exists() and len(journal.read_text().splitlines()) >= 3):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 4, "Ray and three workers"
    process.send_signal(request_to_end)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    last = pq.read_table(directory / "metrics.parquet")["step"].to_pylist()[-1]
    assert last >= 2
    assert RunStorage(str(directory)).newest_checkpoint()[0] == last, "resuming does nothing again"
    assert f"stopped after step {last}" in output
    (line,) = [line for line in output.splitlines() if line.startswith("groups after")]
    ended = rf"{4 * last} trained \+ 0 dropped \+ 0 quarantined"
    found = re.fullmatch(rf"groups after step {last}: (\d+) accepted = {ended} \+ (\d) in flight", line)
    assert found is not None, line
    assert int(found[1]) == 4 * last + int(found[2])


# The real `Run` on simulated processes, without Ray.


def _newest(run):
    return run.storage.newest_checkpoint()[0]


def _raise(error):
    def fail(*arguments, **options):
        raise error

    return fail


FULL = OSError(errno.ENOSPC, "no space left on device")


def test_a_step_that_is_learnt_and_not_recorded_is_not_saved(tmp_path):
    with calm_place(tmp_path) as (start, said):
        with start() as run:
            steps = run.steps()
            for _ in range(2):
                train_step(run, next(steps))
            run.learn(run.take_batch(next(steps)))
            run.save()
            with pytest.raises(AssertionError, match="must be recorded before it is saved"):
                run._begin_checkpoint()
            assert _newest(run) == 2
        assert any("step 3 is not finished and not saved; the same command learns it again" in line for line in said)
        with start() as run:
            assert run.step == 2
            train(run)
            assert run.pipeline.counts()["trained"] == 12


def test_the_last_checkpoint_is_whole_before_the_policy_is_exported(tmp_path):
    seen = []
    with calm_place(tmp_path) as (start, _), start() as run:
        run.learner.export = lambda directory: seen.append(_newest(run))
        train(run)
    assert seen == [4]
    state = json.loads((tmp_path / "checkpoints" / "step-4" / "run.json").read_text())
    assert set(state) == {"step", "model_dir", "pipeline"}


def test_a_last_checkpoint_that_is_damaged_over_the_export_is_written_again(tmp_path):
    with calm_place(tmp_path) as (start, _), start() as run:

        def export_while_ranks_die(directory):
            path = tmp_path / "checkpoints" / "step-4" / "learner-0.json"
            path.write_text("{")
            assert run.storage.newest_checkpoint() is None, "set aside"

        run.learner.export = export_while_ranks_die
        train(run)
        assert _newest(run) == 4


def test_a_directory_that_ranks_cannot_see_ends_the_run(tmp_path):
    with calm_place(tmp_path) as (start, _), start() as run:
        run.learner._write = _raise(StorageError("choose a run.dir on a file system that all nodes share"))
        with pytest.raises(StorageError, match="all nodes share"):
            train(run)
        assert run.step == 2, "with its first checkpoint, not after the last step"


@pytest.mark.parametrize("what", ["storage.keep_checkpoints", "recorder.compact"])
def test_tidying_up_after_a_checkpoint_costs_no_checkpoint_and_no_run(tmp_path, what):
    owner, name = what.split(".")
    with calm_place(tmp_path) as (start, said), start() as run:
        setattr(getattr(run, owner), name, _raise(FULL))
        train(run)
        assert (_newest(run), run._num_failed_checkpoints) == (4, 0)
    assert not any("could not be written" in line for line in said)
    assert (
        sum("is whole, but older ones or metrics.parquet are not tidied up: [Errno 28]" in line for line in said) == 2
    )


def test_the_last_line_counts_groups_in_flight_and_names_its_step(tmp_path):
    with calm_place(tmp_path) as (start, said), start() as run:
        steps = run.steps()
        train_step(run, next(steps))
        run.take_batch(next(steps))
    counts = "6 accepted = 3 trained + 0 dropped + 0 quarantined + 3 in flight"
    assert said[-1].endswith(f"groups after step 1: {counts}")
    assert json.loads((tmp_path / "summary.json").read_text())["groups"]["in_flight"] == 3


def test_records_that_cannot_be_closed_do_not_hide_what_ended_the_run(tmp_path):
    def fail(run):
        with run:
            train_step(run, next(run.steps()))
            run.recorder.close = _raise(FULL)
            run.pipeline.counts = _raise(RuntimeError("the pipeline has ended"))
            raise ZeroDivisionError

    with calm_place(tmp_path) as (start, said), pytest.raises(ZeroDivisionError):
        fail(start())
    assert "could not be brought up to date: [Errno 28]" in said[-2]
    assert "groups after step 1: 3 accepted = 3 trained" in said[-1]


def test_without_a_whole_checkpoint_training_starts_again_and_evaluation_is_refused(tmp_path):
    with calm_place(tmp_path) as (start, said):
        with start() as run:
            train(run)
            undisturbed = [row["kl_coef"] for row in run.recorder.rows]
        for path in tmp_path.glob("checkpoints/step-*/run.json"):
            path.write_text("{")
        with pytest.raises(StorageError, match="must hold a whole checkpoint, and all it has are damaged"):
            Session(run.config, display=run.display)
        with start() as run:
            assert run.step == 0
            train(run)
            assert [row["kl_coef"] for row in run.recorder.rows] == undisturbed
    line = "no whole checkpoint is left; the run starts again and learns the steps in rollouts/ again"
    assert sum(line in text for text in said) == 1


def test_rows_that_are_lost_before_they_are_on_disk_are_generated_again(tmp_path):
    with calm_place(tmp_path) as (start, _):
        with start() as run:
            run.tables = _raise(WorkerError("reading a batch failed: its node is gone"))
            with pytest.raises(WorkerError, match=r"the rows of step 1 .* node is gone; continue the run"):
                train(run)
        with start() as run:
            train(run)
            assert run.pipeline.counts()["trained"] == 12


def test_transitions_that_the_history_loses_are_a_metric(tmp_path):
    with calm_place(tmp_path) as (start, _), start() as run:
        run._store.num_lost = 7
        assert train_step(run, next(run.steps()))["faults_num_lost_ledger_transitions"] == 7
