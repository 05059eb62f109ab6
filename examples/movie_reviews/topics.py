"""Prompts of the demo: many film topics, good films and bad alike; topics held out for evaluation never train."""

import json
import os
from typing import Literal

TRAIN_TOPICS = (
    "a bank robbery", "a haunted house", "a lost dog", "a jazz singer", "a chess prodigy", "a submarine crew",
    "a small-town wedding", "a retired boxer", "a desert war", "a time machine", "a runaway train", "a school teacher",
    "a pirate ship", "a vampire family", "a mountain rescue", "a courtroom battle", "a circus clown", "a talking cat",
    "a zombie outbreak", "a space station", "a royal scandal", "a football coach", "a snowbound hotel", "a jewel thief",
    "a lighthouse keeper", "a robot uprising", "a country doctor", "a street dancer", "a missing child", "a spy in exile",
    "a volcano eruption", "a rock band", "a samurai warrior", "a shark attack", "a family farm", "a poker game",
    "a blind painter", "a stolen statue", "a ghost pilot", "a plane crash", "a summer camp", "a police detective",
    "a love triangle", "a medieval knight", "a witch hunt", "a cooking contest", "a gold rush", "an alien invasion",
    "a prison escape", "a ballet company", "a news reporter", "a serial killer", "a road trip", "a college reunion",
    "a tropical island", "a hospital strike", "a car race", "a wild horse", "a secret garden", "a nuclear accident",
)  # fmt: skip

HELD_OUT_TOPICS = (
    "a violin teacher", "a polar expedition", "a taxi driver", "a haunted forest", "a gambling priest", "a war nurse",
    "a cattle drive", "a toy maker", "a diamond heist", "a sinking ship", "a werewolf hunter", "a baseball team",
    "a hacker group", "a widowed king", "a fashion designer", "a mining town", "a kidnapped senator", "a comic actor",
    "a dragon slayer", "a lonely astronaut", "a river journey", "a beach romance", "a crime boss", "a dying poet",
    "a night train", "a motorcycle gang", "a corrupt mayor", "a wedding planner", "a flood rescue", "a deaf musician",
    "a bird watcher", "a prairie storm",
)  # fmt: skip


def write_prompts(directory: str, *, split: Literal["train", "held_out"]) -> None:
    """Write chat prompts as JSONL: two for each topic, about a good and about a bad film; the topic travels along."""
    topics = {"train": TRAIN_TOPICS, "held_out": HELD_OUT_TOPICS}[split]
    with open(os.path.join(directory, f"{split}.jsonl"), "w", encoding="utf-8") as file:
        for topic in topics:
            for quality in ("good", "bad"):
                text = f"Write a one-sentence review of a {quality} film about {topic}."
                row = {
                    "id": f"{quality}/{topic.partition(' ')[2].replace(' ', '-')}",
                    "prompt": [{"role": "user", "content": text}],
                    "topic": topic,
                    "quality": quality,
                }
                file.write(json.dumps(row) + "\n")
