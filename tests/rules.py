"""Reward functions that tests name by import path."""


def share_of_a(prompts, completions, **columns):
    """Return the share of the letter a in each completion."""
    return [text.count("a") / max(1, len(text)) for text in completions]
