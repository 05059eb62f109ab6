"""Reward functions that tests name by import path."""

import os


def share_of_a(prompts, completions, **columns):
    """Return the share of the letter a in each completion."""
    return [text.count("a") / max(1, len(text)) for text in completions]


def enormous(prompts, completions, **columns):
    """Return finite scores whose square is not."""
    return [3e38] * len(completions)


def enormous_for_b(prompts, completions, **columns):
    """Return scores whose square is not finite, for the prompt b only."""
    return [3e38 if prompt == "b" else 0.5 for prompt in prompts]


def end_the_process(prompts, completions, **columns):
    """Take the worker along."""
    os._exit(1)
