"""The report: what it shows, what it leaves out with a note, and that hostile text stays text."""

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.charts import charts_of
from cluster.config import RunConfig, to_yaml, validate
from cluster.ledger import GroupState, Ledger
from cluster.ledger_store import LedgerStore
from cluster.report import build_report
from cluster.status import LEDGER_FILE
from reward.schema import SCORED

NUM_STEPS = 40
COMPONENTS = ("sentiment", "topic")
HOSTILE = "<script>alert(\"x\")</script><img src=http://evil.example/a.png onerror=alert(1)> ${config} & 'quoted'"


def write_run(directory, *, hostile="", without=()):
    """Write a run directory like the ones training leaves, with smooth made-up numbers."""
    (directory / "evaluation").mkdir(parents=True)
    (directory / "config.yaml").write_text(to_yaml(_config(directory, hostile)))
    rows = [row for row in _rows() if row]
    table = pa.table({name: [row.get(name) for row in rows] for name in rows[-1] if name not in without})
    pq.write_table(table, directory / "metrics.parquet")
    for step, text in ((0, "It was a film about {}, and then the film was"), (NUM_STEPS, "A moving story of {}.")):
        pq.write_table(_scored(text, hostile, step), directory / "evaluation" / f"step-{step}.parquet")
    quarantined = [{"file": "prompts.jsonl", "line": 7, "reason": hostile or "prompt must be there"}]
    groups = {"accepted": 320, "trained": 320, "dropped": 0, "quarantined": 0, "in_flight": 0}
    summary = {"steps": NUM_STEPS, "groups": groups, "quarantined_rows": quarantined, "num_quarantined_rows": 1}
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def _config(directory, hostile):
    judge = {"function": "tests.rules:share_of_a"}
    raw = {
        "run": {"dir": str(directory), "num_steps": NUM_STEPS},
        "policy": {"model": hostile or "models/smollm2"},
        "prompts": {"path": "prompts.jsonl"},
        "reward": {"components": {"sentiment": judge, "topic": judge}},
    }
    return validate(RunConfig, raw, where="test")


def _rows():
    rng = np.random.default_rng(0)
    for step in range(NUM_STEPS + 1):
        done = 1 - np.exp(-step / 12)
        row = {"step": step, "policy_version": step}
        if step:
            row |= {name: value + rng.normal() * 0.03 * abs(value) for name, value in _training(done).items()}
        if step % 10 == 0:
            row |= {
                "eval_score_mean": 0.1 + 1.1 * done,
                "eval_kl": 9 * done,
                "eval_eos_fraction": 0.31 + 0.6 * done,
                "eval_response_length_mean": 27 - 6 * done,
                **{f"eval_{name}_mean": 0.2 + done for name in COMPONENTS},
            }
        yield row


def _training(done):
    return {
        "score_mean": 0.1 + 1.2 * done,
        "score_std": 0.5 - 0.2 * done,
        **{f"{name}_mean": 0.2 + done for name in COMPONENTS},
        "kl": 10 * done,
        "response_length_mean": 27 - 6 * done,
        "eos_fraction": 0.31 + 0.6 * done,
        "entropy": 1.9 - 0.8 * done,
        "clip_fraction": 0.08 + 0.05 * done,
        "approx_kl": 0.004,
        "policy_loss": -0.01,
        "value_loss": 0.3 - 0.2 * done,
        "value_explained_variance": 0.6 * done,
        "grad_norm": 0.8,
        "learning_rate": 1.5e-5 * (1 - done / 2),
        "generate_s": 9.0,
        "score_s": 2.0,
        "learn_s": 14.0,
        "publish_s": 0.6,
        "step_s": 25.6,
        "tokens_per_s": 55.0,
    }


def _scored(text, hostile, version):
    rows = [
        {
            "prompt_id": f"p{number}",
            "prompt": json.dumps([{"role": "user", "content": hostile or f"Review a film about {topic}."}]),
            "prompt_ids": [1, 2],
            "extras": "{}",
            "run_id": "run",
            "incarnation": 0,
            "group_id": f"0/p{number}",
            "sample_index": sample,
            "lease_id": 0,
            "response_ids": [5] * 9,
            "response_text": hostile or text.format(topic),
            "logprobs": [-1.0] * 9,
            "policy_versions": [version] * 9,
            "loss_mask": [True] * 9,
            "finish_reason": "eos" if version else "length",
            "components": {hostile or "sentiment": 0.9, "topic": 1.0},
            "reward_version": 0,
            "reference_version": 0,
        }
        for number, topic in enumerate(
            ("a dog", "the sea", "chess", "a lost key", "robots", "a bakery", "snow", "jazz")
        )
        for sample in (0, 1)
    ]
    return pa.Table.from_pylist(rows, schema=SCORED)


class _Page(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.ids, self.text = [], [], [], ""
        self.scripts, self._in_script = [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        self._in_script = tag == "script"
        self._is_data = ("type", "application/json") in attrs

    def handle_endtag(self, tag):
        self._in_script = False

    def handle_data(self, data):
        if not self._in_script:
            self.text += data + " "
        elif not self._is_data:
            self.scripts.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    directory = write_run(tmp_path_factory.mktemp("run") / "films")
    return _Page(_read(build_report(str(directory))))


def _read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


COLUMNS = ("value_loss", "value_explained_variance")


def test_charts_of_other_algorithms_are_left_out():
    titles = [chart.title for chart in charts_of(COMPONENTS, ("kl_loss", "lambda"))]
    assert "Value loss" not in titles
    assert {"KL term of the loss", "Lambda"} <= set(titles)


def test_every_chart_is_there(page):
    charts = charts_of(COMPONENTS, COLUMNS)
    assert len(charts) == 16
    assert page.tags.count("svg") == len(charts)
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert [chart.title for chart in charts] == labels[1:]
    for wanted in (
        "Score",
        "KL to the reference",
        "Response length",
        "Entropy",
        "Clip fraction",
        "Where the time goes",
    ):
        assert wanted in labels
    assert "Not recorded" not in page.text


def test_headline_figures_are_the_held_out_ones(page):
    text = " ".join(page.text.split())
    final = 1 - np.exp(-NUM_STEPS / 12)
    assert f"Score 0.1 → {0.1 + 1.1 * final:.3g} held-out prompts" in text
    assert f"{9 * final:.2f} nats per response" in text
    assert f"31% → {0.31 + 0.6 * final:.0%}" in text
    assert "17 min" in text, "40 steps of about 25.6 s"
    assert "40 of 40 steps" in text


def test_before_and_after_are_the_same_prompts(page):
    assert "It was a film about a dog, and then the film was" in page.text
    assert "A moving story of a dog." in page.text
    assert page.tags.count("article") == 16
    assert page.text.index("about the sea") < page.text.index("about snow"), "in the file's order"


def test_data_and_configuration_are_named(page):
    assert "320 accepted, 320 trained" in " ".join(page.text.split())
    assert "prompts.jsonl:7" in page.text
    assert "samples_per_prompt: 4" in page.text


def test_the_page_is_self_contained(page):
    """Nothing to fetch, one script to run, no id twice (charts refer to their own parts by id)."""
    assert not {"link", "img", "iframe", "object", "base"} & set(page.tags)
    assert page.tags.count("script") == 2, "the samples, as data, and what browses them"
    assert [value for name, value in page.attributes if name in ("src", "href") and not value.startswith("#")] == []
    assert len(page.ids) == len(set(page.ids))
    assert {value[1:] for name, value in page.attributes if name == "href"} <= set(page.ids)
    policy = next(value for name, value in page.attributes if value.startswith("default-src"))
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    expected = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert policy == f"{expected}; script-src 'sha256-{digest}'"


def test_the_report_holds_no_address(tmp_path):
    assert "http://" not in _read(build_report(str(write_run(tmp_path / "run"))))


def test_hostile_text_stays_text(tmp_path):
    text = _read(build_report(str(write_run(tmp_path / "run", hostile=HOSTILE))))
    page = _Page(text)
    assert page.tags.count("script") == 2
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count('<script>alert("x")</script>') > 30, "prompts, answers, judge, file row and configuration"
    assert "${config}" in page.text, "a placeholder in data is not filled in"


def test_an_unescaped_page_is_caught(tmp_path, monkeypatch):
    """Planted bug: the check above fails where escaping is left out."""
    monkeypatch.setattr(html, "escape", lambda text: text)
    page = _Page(_read(build_report(str(write_run(tmp_path / "run", hostile=HOSTILE)))))
    assert page.tags.count("script") > 2


def test_missing_metrics_are_noted_and_the_rest_is_drawn(tmp_path):
    without = ("clip_fraction", "eval_kl", "publish_s", "score_std")
    page = _Page(_read(build_report(str(write_run(tmp_path / "run", without=without)))))
    assert "Not recorded in this run: eval_kl, clip_fraction, publish_s." in page.text
    assert page.tags.count("svg") == len(charts_of(COMPONENTS, COLUMNS)) - 1, "all but the chart with nothing to draw"


def test_an_evaluation_alone_and_an_interrupted_run_can_be_reported(tmp_path):
    directory = write_run(tmp_path / "run")
    (directory / "metrics.parquet").unlink()
    (directory / "summary.json").unlink()
    (directory / "evaluation" / f"step-{NUM_STEPS}.parquet").unlink()
    (directory / "metrics.jsonl").write_text('{"step": 0, "policy_version": 0, "eval_score_mean": 0.25}\n')
    page = _Page(_read(build_report(str(directory))))
    assert "0.25" in page.text
    assert "not two evaluations" in page.text
    assert "not written its summary" in page.text


def test_a_run_without_a_step_is_one_clear_error(tmp_path):
    directory = write_run(tmp_path / "run")
    (directory / "metrics.parquet").unlink()
    with pytest.raises(ValueError, match="must hold at least one step to report on"):
        build_report(str(directory))


def test_colours_follow_the_page(page, tmp_path):
    text = _read(build_report(str(write_run(tmp_path / "run"))))
    charts = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert set(re.findall(r"(?:stroke|fill): ([^;\"]+)", charts)) <= {
        "none", "currentColor", "var(--grid)", *(f"var(--series-{number})" for number in range(1, 5)),
    }  # fmt: skip


def test_the_ledger_is_in_the_report(tmp_path):
    directory = write_run(tmp_path / "run")
    ledger, store = Ledger(), LedgerStore(str(directory / LEDGER_FILE))
    for name in ("0/a", "0/b"):
        ledger.accept(name)
    ledger.end("0/b", GroupState.QUARANTINED, f"no answer to {HOSTILE}")
    store.append(ledger.take_transitions(), 1000.0)
    store.close()
    page = _Page(_read(build_report(str(directory))))
    text = " ".join(page.text.split())
    assert "accepted 2 trained 0 dropped 0 quarantined 1 in flight 1 accepted = sum of the others yes" in text
    assert " ".join(f"quarantined: no answer to {HOSTILE} 1".split()) in text
    assert page.tags.count("script") == 2


def test_the_timeline_is_in_the_report_where_a_run_has_one(page, tmp_path):
    assert "Timeline" not in page.text
    directory = write_run(tmp_path / "run")
    table = pq.read_table(directory / "metrics.parquet")
    for name, values in (("started_at", 1e9), ("learn_from_s", 2.0), ("learn_for_s", 14.0)):
        column = [None if step == 0 else values + 25.0 * step * (name == "started_at") for step in range(NUM_STEPS + 1)]
        table = table.append_column(f"timeline_{name}", pa.array(column, pa.float64()))
    pq.write_table(table, directory / "metrics.parquet")
    text = _read(build_report(str(directory)))
    assert text.count('<rect class="p-learn"') == 16, "the last steps"
    assert "<title>step 40: learn 14 s</title>" in text
    assert "timeline_started_at" not in text, "it is no curve and no figure"
