"""Names of figures become metrics with tags, and no two figures the same series."""

import pytest

from cluster.registry import METRICS, exported_names, series_of

JUDGES = ("topic", "topic_tone")


@pytest.mark.parametrize(
    ("figure", "name", "tags"),
    [
        ("score_mean", "score_mean", {"role": "reward", "index": "all", "split": "training"}),
        ("eval_score_mean", "score_mean", {"role": "reward", "index": "all", "split": "held_out"}),
        ("topic_mean", "component_mean", {"component": "topic", "split": "training", "role": "reward", "index": "all"}),
        (
            "eval_topic_tone_num_absent",
            "component_num_absent",
            {"component": "topic_tone", "split": "held_out", "role": "reward", "index": "all"},
        ),
        ("idle_rollout_learner", "idle_share", {"role": "rollout", "index": "all", "reason": "learner"}),
        ("idle_reward_max", "idle_share_max", {"role": "reward", "index": "all"}),
        ("resident_mb_reward_1", "resident_mb", {"role": "reward", "index": "1"}),
        ("resident_mb_learner", "resident_mb", {"role": "learner", "index": "all"}),
        ("groups_in_flight", "groups", {"role": "driver", "index": "all", "state": "in_flight"}),
        ("faults_num_learner_restarts", "faults", {"role": "driver", "index": "all", "kind": "learner_restarts"}),
        ("staleness_1", "staleness_share", {"role": "learner", "index": "all", "versions": "1"}),
        ("learn_s", "phase_s", {"role": "driver", "index": "all", "phase": "learn"}),
        ("process_rollout_3_kv_bytes", "process_kv_bytes", {"role": "rollout", "index": "3"}),
        ("process_rollout_3_num_decode_tokens", "process_num_decode_tokens", {"role": "rollout", "index": "3"}),
        (
            "process_reward_0_score_s_topic",
            "process_score_s",
            {"role": "reward", "index": "0", "component": "topic"},
        ),
        ("my-own figure", "my_own_figure", {"role": "learner", "index": "all", "split": "training"}),
    ],
)
def test_a_figure_is_a_series(figure, name, tags):
    series = series_of(figure, JUDGES)
    assert (series.name, dict(series.tags)) == (f"concord_{name}", tags)
    assert set(series.metric.tags) == set(tags), "Ray wants a value for each tag of a metric"


def test_what_prometheus_sees():
    assert exported_names(["eval_kl", "kl", "queue_ready"], JUDGES) == {
        "ray_concord_kl": {"run", "role", "index", "split"},
        "ray_concord_queue_groups": {"run", "role", "index", "queue"},
    }


def test_names_are_declared_once():
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    assert all(metric.help and (metric.role or "(?P<role>" in metric.pattern) for metric in METRICS)
