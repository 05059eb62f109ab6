"""Topics of films, and prompts that ask for a review of a good or a bad film about each.

The held-out topics share no content word with the training topics, so naming the topic cannot be learnt by heart.
"""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

TRAIN = (
    "a chess prodigy",
    "a lighthouse keeper",
    "two rival bakers",
    "a train robbery",
    "a retired boxer",
    "a haunted hotel",
    "a village wedding",
    "a deaf pianist",
    "a mission to Mars",
    "a jewel thief",
    "a stand-up comedian",
    "a mountain rescue",
    "a circus family",
    "a hospital strike",
    "a runaway princess",
    "a submarine crew",
    "a vampire dentist",
    "an opera singer",
    "a football coach",
    "a bank heist",
    "a blind painter",
    "a desert caravan",
    "a court trial",
    "a flooded city",
    "a talking dog",
    "a time machine",
    "a school orchestra",
    "a political scandal",
    "a forgotten poet",
    "an island prison",
    "a robot nanny",
    "a cooking contest",
    "a pirate ship",
    "a lost letter",
    "a motorcycle gang",
    "a ballet academy",
    "a small-town sheriff",
    "a plague doctor",
    "a goldfish salesman",
    "a spy in Berlin",
    "a surfing champion",
    "a stolen violin",
    "a shy teenager",
    "a mining disaster",
    "a zombie outbreak",
    "a dying king",
    "a taxi driver",
    "a snowbound cabin",
    "a newspaper editor",
    "a magician and his twin",
    "a wildlife photographer",
    "a samurai without a master",
    "a hidden treasure",
    "a grieving widow",
    "a fashion designer",
    "a cursed painting",
    "a chemistry teacher",
    "a women's cycling team",
    "a wine merchant",
    "a refugee camp",
    "a puppet maker",
    "a Viking raid",
    "a salsa dancer",
    "a missing astronaut",
)

HELD_OUT = (
    "a clockmaker",
    "a shark attack",
    "a jazz trumpeter",
    "a beekeeper",
    "a divorce lawyer",
    "a dragon egg",
    "an elevator accident",
    "a farmer and a drought",
    "a ghost librarian",
    "a hot-air balloon",
    "a kidnapped ambassador",
    "a marathon runner",
    "a neighbourhood feud",
    "an orphaned elephant",
    "a penguin colony",
    "a radio host",
    "a sleepwalking detective",
    "a tennis umpire",
    "an undercover nun",
    "a volcano eruption",
    "a werewolf barber",
    "a young inventor",
    "an aging rock band",
    "a bridge builder",
    "a childhood friendship",
    "a diamond mine",
    "an escaped tiger",
    "a flight attendant",
    "a gardener and her roses",
    "a hurricane",
    "an ice hockey rink",
    "a judo tournament",
    "a kite festival",
    "a medieval monk",
)

QUALITIES = ("good", "bad")


def write_prompts(directory: str, *, split: str) -> None:
    """Write the prompts of one split, one for each topic and quality, as chat messages; for `prompts.make`.

    Raises:
        ValueError: if there is no such split.
    """
    splits = {"train": TRAIN, "held_out": HELD_OUT}
    if split not in splits:
        raise ValueError(f"split must be one of {', '.join(splits)}, got {split!r}")
    with open(os.path.join(directory, "prompts.jsonl"), "w", encoding="utf-8") as file:
        for row in _rows(splits[split]):
            file.write(json.dumps(row) + "\n")


def _rows(topics: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for topic in topics:
        for quality in QUALITIES:
            request = f"Write a one-sentence review of a {quality} film about {topic}."
            slug = "-".join(re.findall(r"\w+", topic.lower()))
            yield {
                "id": f"{quality}-{slug}",
                "prompt": [{"role": "user", "content": request}],
                "topic": topic,
                "quality": quality,
            }
