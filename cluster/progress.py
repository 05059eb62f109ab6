"""What a person sees while a run works: one line a step, and a live bar with the time that is left."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class Display:
    """Prints to the terminal; on a pipe only the lines remain."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._steps = self._progress.add_task("steps", total=None, note="", visible=False)

    def say(self, text: str) -> None:
        """Print one line; text is shown as it is, never as markup."""
        self._console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show that something long is going on."""
        self.say(f"{name} ...")
        task = self._progress.add_task(name, total=None, note="")
        with self._live():
            yield
        self._progress.remove_task(task)

    @contextmanager
    def training(self, done: int, total: int) -> Iterator[None]:
        """Show the bar over all steps."""
        self._progress.update(self._steps, completed=done, total=total, visible=True)
        with self._live():
            yield

    def groups(self, what: str, done: int, total: int) -> None:
        """Show how far the step's generation and judging are."""
        self._progress.update(self._steps, note=f"{done}/{total} {what}")

    def step(self, row: Mapping[str, Any], num_steps: int) -> None:
        """Print one step's line and move the bar."""
        parts = [f"step {row['step']:>{len(str(num_steps))}}/{num_steps}"]
        labels = {"score_mean": "score", "eval_score_mean": "held-out", "kl": "KL", "eval_kl": "held-out KL"}
        known = {label: row[name] for name, label in labels.items() if math.isfinite(row.get(name, math.nan))}
        parts += [f"{label} {value:+.3f}" for label, value in known.items()]
        if "tokens_per_s" in row:
            parts.append(f"{row['response_length_mean']:.1f} tokens  {row['tokens_per_s']:.0f} tokens/s")
            parts.append(f"{row['step_s']:.1f} s")
        self.say("  ".join(parts))
        self._progress.update(self._steps, completed=row["step"], note="")

    def stop(self) -> None:
        """Give the screen back."""
        self._progress.stop()

    @contextmanager
    def _live(self) -> Iterator[None]:
        # Phases nest: only the outermost one owns the screen.
        if self._progress.live.is_started:
            yield
            return
        with self._progress:
            yield
