"""Prompts that were drawn ahead are drawn again by a resume, before the order goes on."""

import json
from types import SimpleNamespace

from actors.prompts import PromptSource
from cluster.draws import Draws
from tests.run_toys import minimal_config


class Letters:
    """An order of letters; every third one is malformed and passed over, as a data set does."""

    def __init__(self):
        self._at, self.num_passed = 0, 0

    @property
    def place(self):
        return {"at": self._at}

    @property
    def position(self):
        return {"at": self._at, "num_passed": self.num_passed}

    def seek(self, position):
        self._at, self.num_passed = position["at"], position["num_passed"]

    def draw(self, n):
        drawn = []
        while len(drawn) < n:
            self._at += 1
            if self._at % 3:
                drawn.append(SimpleNamespace(prompt_id=chr(96 + self._at)))
            else:
                self.num_passed += 1
        return drawn


def names(draws):
    return "".join(draw.prompt.prompt_id for draw in draws)


def test_the_example_of_the_module():
    draws = Draws(Letters())
    first, second = draws.draw(2), draws.draw(2)
    instead = draws.draw(1)
    assert (names(first), names(second), names(instead)) == ("ab", "de", "g")
    position = json.loads(json.dumps(draws.position([draw.place for draw in second])))
    letters = Letters()
    resumed = Draws(letters)
    resumed.seek(position)
    assert names(resumed.draw(1)) == "d"
    assert names(resumed.draw(3)) == "ehj"
    assert letters.num_passed == 3, "c, f and i, each counted once"


def test_a_position_taken_before_what_is_owed_is_drawn_owes_it_still():
    draws = Draws(Letters())
    draws.draw(2)
    owed = draws.draw(3)
    resumed = Draws(Letters())
    resumed.seek(draws.position([draw.place for draw in owed]))
    ahead = resumed.draw(1)
    again = Draws(Letters())
    again.seek(resumed.position([draw.place for draw in ahead]))
    assert names(again.draw(4)) == "degh"


def test_places_of_a_real_data_set(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "ab"[: 1 + n % 2], "id": f"p{n}"} if n % 4 else {"no": n} for n in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)))
    config = minimal_config(prompts={"path": str(path), "shuffle_window": 5}).prompts
    encoder = SimpleNamespace(encode=lambda prompt: [1] * len(prompt))
    sources = [PromptSource(config, encoder, seed=3, cache_dir=str(tmp_path)) for _ in range(2)]
    straight, resumed = map(Draws, sources)
    drawn = straight.draw(14)
    resumed.seek(straight.position([draw.place for draw in drawn[4:]]))
    assert names(resumed.draw(10)) == names(drawn[4:])
    assert names(resumed.draw(6)) == names(straight.draw(6))
    assert sources[0].position == sources[1].position
