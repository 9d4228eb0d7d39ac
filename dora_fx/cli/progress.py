"""The command's output: a live bar on a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dora_fx.cli.trainer import StepMetrics

_PLAIN_LINES = 20


class Display:
    """Messages, phases of unknown length, and the bar of training steps."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        """`quiet` shows nothing at all: of several processes one talks."""
        self._console = console or Console(quiet=quiet)

    def say(self, text: str = "") -> None:
        """Print a line as it is, whatever brackets it has, and however long."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Announce something that takes a while, and say how long it took."""
        start = time.perf_counter()
        if self._console.is_terminal:
            with self._console.status(f"{text} ..."):
                yield
        else:
            self.say(f"{text} ...")
            yield
        self.say(f"{text}: {time.perf_counter() - start:.1f} s")

    @contextlib.contextmanager
    def training(self, done: int, steps: int) -> Iterator[TrainingDisplay]:
        """Show steps as they come; `done` of `steps` are behind."""
        if not self._console.is_terminal:
            yield TrainingDisplay(self, done, steps, None, None)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console) as bar:
            task = bar.add_task("training", total=steps, completed=done, metrics="")
            yield TrainingDisplay(self, done, steps, bar, task)


class TrainingDisplay:
    """Steps of one training loop, on a bar or as lines."""

    def __init__(self, display: Display, done: int, steps: int, bar: Progress | None, task: TaskID | None) -> None:
        self._display = display
        self._steps = steps
        self._bar = bar
        self._task = task
        self._first = done + 1
        self._seconds = 0.0

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._display.say(text)

    def show(self, metrics: StepMetrics) -> None:
        """Enter one finished step."""
        text = f"loss {metrics.loss:.4f}  {metrics.tokens / metrics.seconds:,.0f} tokens/s{self._time_left(metrics)}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=metrics.step, metrics=text)
            return
        every = max(1, self._steps // _PLAIN_LINES)
        if metrics.step in (self._first, self._steps) or metrics.step % every == 0:
            self._display.say(f"step {metrics.step}/{self._steps}  {text}")

    def _time_left(self, metrics: StepMetrics) -> str:
        # The first step compiles, so it says nothing about the others.
        if metrics.step == self._first:
            return ""
        self._seconds += metrics.seconds
        left = self._seconds / (metrics.step - self._first) * (self._steps - metrics.step)
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return f"  {hours}:{minutes:02}:{seconds:02} left"
