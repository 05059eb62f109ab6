"""The report's sample browser in a real browser: search, sort, diff; and nothing that a model wrote becomes markup."""

import html
import json
import os
import re
import shutil
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.report import build_report
from cluster.sample_browser import as_script_data, browser_data
from cluster.storage import RunStorage
from reward.schema import SCORED
from tests.test_cluster_report import HOSTILE, write_run

ANSWERS = {0: ("a plain film about chess", "no film"), 40: ("a moving film about chess", HOSTILE)}
"""Step -> the answers of the policy of that step to one prompt."""


def _scored(answers, *, with_reference):
    rows = [
        {
            "prompt_id": "p0",
            "prompt": "Review a film about chess.",
            "prompt_ids": [1],
            "extras": "{}",
            "run_id": "run",
            "incarnation": 0,
            "group_id": "0/p0",
            "sample_index": index,
            "lease_id": 0,
            "response_ids": [5] * (3 - index),
            "response_text": text,
            "logprobs": [-1.0] * (3 - index),
            "policy_versions": [0] * (3 - index),
            "loss_mask": [True] * (3 - index),
            "finish_reason": "eos",
            "components": {"sentiment": 0.5 + index} | ({} if index else {"topic": 1.0}),
            "reward_version": 0,
            "ref_logprobs": [-1.5] * (3 - index) if with_reference else None,
            "reference_version": 0,
        }
        for index, text in enumerate(answers)
    ]
    return pa.Table.from_pylist(rows, schema=SCORED)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    directory = write_run(tmp_path_factory.mktemp("run") / "films")
    (directory / "rollouts").mkdir()
    for step, answers in ANSWERS.items():
        pq.write_table(_scored(answers, with_reference=True), directory / "evaluation" / f"step-{step}.parquet")
    pq.write_table(_scored(("learnt from",), with_reference=False), directory / "rollouts" / "step-7.parquet")
    return directory


def test_the_data_of_the_browser(run_dir):
    data = browser_data(RunStorage(str(run_dir)), {"sentiment": 2.0, "topic": -1.0})
    assert [one["name"] for one in data["sets"]] == [
        "held-out, before training",
        "held-out, after step 40",
        "training, step 7",
    ]
    assert data["prompts"] == ["Review a film about chess."]
    assert data["sets"][1]["samples"][0] == {
        "p": 0,
        "r": "a moving film about chess",
        "n": 3,
        "w": 0.0,
        "c": {"sentiment": 0.5, "topic": 1.0},
        "f": "eos",
        "k": 1.5,
        "b": "a plain film about chess",
    }
    training = data["sets"][2]["samples"][0]
    assert "k" not in training, "there is no reference"
    assert "b" not in training, "the first policy was not asked"
    assert browser_data(RunStorage(str(run_dir / "rollouts")), {}) is None


@pytest.mark.parametrize("text", ["</script><script>alert(1)</script>", "<!--", "\u2028", "<b>é漢</b>"])
def test_data_cannot_leave_its_element(text):
    written = as_script_data({"r": text})
    assert "<" not in written
    assert "\u2028" not in written
    assert json.loads(written) == {"r": text}


@pytest.fixture(scope="module")
def look(run_dir, tmp_path_factory):
    """Open the report at a state of its controls; return the page as it then is."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "the tests marked browser need chromium; leave them out with -m 'not browser'"
    report, profile = build_report(str(run_dir)), tmp_path_factory.mktemp("profile")

    def open_at(state, page=report):
        command = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
            "--virtual-time-budget=2000", "--dump-dom", f"file://{page}#{state}",
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    return open_at


def _section(page):
    return re.search(r'<section id="samples".*?</section>', page, flags=re.DOTALL).group()


def _cards(page):
    """Return the text of each card's answer, as a person reads it."""
    quotes = re.findall(r"<blockquote>(.*?)</blockquote>", _section(page), flags=re.DOTALL)
    return [html.unescape(re.sub(r"</?(ins|del)[^>]*>", "|", quote)) for quote in quotes]


@pytest.mark.browser
def test_the_newest_held_out_answers_come_first(look):
    page = look("")
    assert _cards(page) == list(ANSWERS[40])
    assert '<section id="samples">' in page, "it is no longer hidden"


@pytest.mark.browser
@pytest.mark.parametrize(
    ("state", "answers"),
    [
        ("set=0", ANSWERS[0]),
        ("set=0&q=PLAIN", ANSWERS[0][:1]),
        ("set=0&q=review+a+film", ANSWERS[0]),
        ("set=0&q=nowhere", ()),
        ("set=0&by=c:sentiment", ANSWERS[0][::-1]),
        ("set=0&by=c:sentiment&up=1", ANSWERS[0]),
        ("set=0&by=k", ANSWERS[0]),
        ("set=0&by=c:topic", ANSWERS[0]),
        ("set=0&by=c:topic&up=1", ANSWERS[0]),
        ("set=0&by=n&up=1", ANSWERS[0][::-1]),
        ("set=2&by=k", ("learnt from",)),
        ("set=99&by=nonsense", ANSWERS[0]),
    ],
)
def test_search_and_sort(look, state, answers):
    assert _cards(look(state)) == list(answers)


@pytest.mark.browser
def test_the_difference_to_the_first_policy_s_answer(look):
    assert _cards(look("set=1&diff=1"))[0] == "a| plain|| moving| film about chess"


@pytest.mark.browser
def test_what_a_model_wrote_stays_text(look):
    page = look("set=1&q=alert")
    section = _section(page)
    assert _cards(page) == [HOSTILE]
    assert "<img" not in section
    assert "<script" not in section


@pytest.mark.browser
def test_a_script_that_is_not_the_page_s_own_does_not_run(run_dir, look, tmp_path):
    """The policy's check can fail: with the policy taken out, the same injected script does run."""
    with open(build_report(str(run_dir)), encoding="utf-8") as file:
        page = file.read()
    injected = page.replace("</main>", '<script>document.title = "owned"</script></main>')
    (tmp_path / "guarded.html").write_text(injected)
    (tmp_path / "open.html").write_text(re.sub(r"<meta http-equiv=[^>]*>", "", injected))
    assert "<title>owned" not in look("", tmp_path / "guarded.html")
    assert "<title>owned" in look("", tmp_path / "open.html")


def test_the_script_makes_text_and_no_markup():
    with open(os.path.join("cluster", "report_browser.js"), encoding="utf-8") as file:
        script = file.read()
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", script)
