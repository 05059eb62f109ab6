"""One writer below a URL: the real code on a clock of the test's own."""

import secrets

import pytest

from cluster.claim import claim
from cluster.config import ConfigError
from cluster.lock import TakenError
from cluster.object_store import ObjectStore
from cluster.ownership import BEAT_S, KEY, SILENCE_S, LostError, Ownership, owner
from cluster.remote_storage import RemoteStorage
from tests.run_toys import minimal_config


class Clock:
    """Seconds that pass when somebody waits; `meanwhile` then acts."""

    def __init__(self):
        self.now = 0.0
        self.meanwhile = lambda: None

    def sleep(self, seconds):
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def store():
    return ObjectStore(f"memory://{secrets.token_hex(8)}/run", sleep=lambda seconds: None)


def own(store, clock, **options):
    return Ownership(store, say=lambda text: None, clock=lambda: clock.now, sleep=clock.sleep, beats=False, **options)


def test_who_beats_keeps_it(store):
    clock = Clock()
    first = own(store, clock)
    last = [clock.now]

    def beat():
        if clock.now - last[0] >= BEAT_S:
            last[0] = clock.now
            first.beat()

    clock.meanwhile = beat
    with pytest.raises(TakenError, match=r"^\d+ on "):
        own(store, clock)
    assert clock.now < 2 * BEAT_S + 5, "the refusal does not wait for the silence"
    first.check()
    first.release()
    started = clock.now
    own(store, clock).check()
    assert clock.now - started < BEAT_S, "what was given up is free at once"


def test_silence_is_taken_for_death_and_the_dead_one_changes_nothing_more(store):
    clock = Clock()
    first = own(store, clock)
    started = clock.now
    second = own(store, clock)
    assert clock.now - started >= SILENCE_S
    second.check()
    for call in (first.check, first.beat):
        with pytest.raises(LostError, match=r"must belong to one process, and process \d+ on .* has taken it over"):
            call()
    first.release()
    second.check()  # what is another's is not deleted
    store.delete(KEY)
    with pytest.raises(LostError, match="was deleted"):
        second.check()


def test_of_two_that_come_at_once_one_has_it(store):
    clock, found = Clock(), []

    def come():
        clock.meanwhile = lambda: None
        found.append(own(store, Clock()))

    clock.meanwhile = come
    with pytest.raises(TakenError):
        own(store, clock)
    found[0].check()


class Hasty(Ownership):
    """Planted bug: does not look whether its object has stayed."""

    def __init__(self, store, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cluster.ownership._SETTLE_S", 0.0)
            sleep = options.pop("sleep")
            super().__init__(store, sleep=lambda seconds: seconds and sleep(seconds), **options)


def test_two_owners_are_noticed(store, monkeypatch):
    monkeypatch.setattr("tests.test_cluster_ownership.Ownership", Hasty)
    with pytest.raises(pytest.fail.Exception):
        test_of_two_that_come_at_once_one_has_it(store)


def test_the_owner_is_shown_while_it_beats(store):
    assert owner(store, now=0.0) is None
    import time

    own(store, Clock())
    assert " on " in owner(store, now=time.time())
    assert owner(store, now=time.time() + SILENCE_S + 1) is None


def test_a_run_directory_in_a_store_has_one_writer(store, tmp_path, monkeypatch):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path))
    monkeypatch.setattr("cluster.ownership._SETTLE_S", 0.0)
    monkeypatch.setattr("cluster.ownership._LOOK_S", 0.01)
    monkeypatch.setattr("cluster.ownership.BEAT_S", 0.02)
    config = minimal_config(run={"dir": store.url})
    first, second = RemoteStorage(store), RemoteStorage(store)
    lock = claim(first, config)
    assert second.holder() is not None
    with pytest.raises(ConfigError, match=r"run.dir memory://.* must belong to one process, and process \d+ on .* is"):
        claim(second, config)
    first.append_text('{"step": 0}\n', "metrics.jsonl")
    lock.close()
    assert second.holder() is None
    assert second.read_text("metrics.jsonl") == '{"step": 0}\n', "what grows is brought at the end"
    with pytest.raises(ConfigError, match="holds a run with another configuration"):
        claim(second, minimal_config(run={"dir": store.url}, algorithm={"clip_range": 0.3}))
    claim(second, config).close()
