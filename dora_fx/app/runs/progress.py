"""The command's output: a live progress bar on a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Column

from dora_fx.app.runs.step_metrics import StepMetrics

_PLAIN_LINES = 20
# Width of a terminal that has room for a bar beside the numbers, and the width of the numbers.
_WIDE = 80
_NUMBERS = 66


class Display:
    """Shows messages, phases of unknown length, downloads and training steps."""

    def __init__(
        self,
        console: Console | None = None,
        *,
        quiet: bool = False,
        to_stderr: bool = False,
        longest_silence_s: float = 60.0,
    ) -> None:
        """Make a display.

        Args:
            console: rich's.
            quiet: show nothing; of several processes only one prints.
            to_stderr: print to stderr, so that stdout has results alone.
            longest_silence_s: largest number of seconds between two lines, see `never_silent`.
        """
        self._console = console or Console(quiet=quiet, stderr=to_stderr)
        self._longest_silence_s = longest_silence_s
        self._last_said = time.monotonic()
        self._status: Callable[[], str] = lambda: "at work"

    def say(self, text: str = "") -> None:
        """Print a line unchanged, without markup or wrapping."""
        self._last_said = time.monotonic()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def never_silent(self) -> Iterator[None]:
        """While the block runs, print the current status if nothing was printed for a minute; not on a terminal.

        A step, a compilation or a measurement may take many minutes, and the reader of a log wants to know if it hangs.
        """
        if self._console.is_terminal or self._console.quiet:
            yield
            return
        is_over = threading.Event()

        def talk() -> None:
            while not is_over.wait(max(0.0, self._last_said + self._longest_silence_s - time.monotonic())):
                if time.monotonic() >= self._last_said + self._longest_silence_s:
                    self.say(self._status())

        talker = threading.Thread(target=talk, daemon=True)
        talker.start()
        try:
            yield
        finally:
            is_over.set()
            talker.join()

    @contextlib.contextmanager
    def _under_way(self, status: Callable[[], str]) -> Iterator[None]:
        before, self._status = self._status, status
        try:
            yield
        finally:
            self._status = before

    @contextlib.contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Announce a phase that takes a while, and print how long it took."""
        start = time.perf_counter()
        if self._console.is_terminal:
            # rich's default spinner consists of characters that ASCII lacks.
            with self._console.status(f"{text} ...", spinner="line" if self._console.options.ascii_only else "dots"):
                yield
        else:
            self.say(f"{text} ...")
            with self._under_way(lambda: f"{text} ... {time.perf_counter() - start:.0f} s so far"):
                yield
        self.say(f"{text}: {time.perf_counter() - start:.1f} s")

    @contextlib.contextmanager
    def download(self, text: str, total: int) -> Iterator[Callable[[int], None]]:
        """Announce a download of `total` bytes; yield a function that takes the number of bytes received so far."""
        start, size = time.perf_counter(), f"{total / 1e6:.0f} MB"
        if self._console.is_terminal:
            self.say(f"{text} ({size})")
            columns: tuple[ProgressColumn, ...] = (self._bar_column(), DownloadColumn(), TransferSpeedColumn())
            with Progress(*columns, console=self._console, transient=True) as bar:
                task = bar.add_task("", total=total)
                yield lambda there: bar.update(task, completed=there)
        else:
            self.say(f"{text} ({size}) ...")
            received = [0]

            def show(there: int) -> None:
                received[0] = there

            with self._under_way(lambda: f"{text} ... {received[0] / 1e6:.0f} of {size}"):
                yield show
        self.say(f"downloaded {size}: {time.perf_counter() - start:.1f} s")

    @contextlib.contextmanager
    def training(self, done: int, steps: int) -> Iterator[TrainingDisplay]:
        """Show training steps as they finish; `done` of `steps` are finished already."""
        if not self._console.is_terminal:
            shown = TrainingDisplay(self, done, steps, None, None)
            with self._under_way(shown.status):
                yield shown
            return
        # Text that does not fit is cropped: rich's ellipsis is a character that ASCII lacks.
        metrics = TextColumn("{task.fields[metrics]}", table_column=Column(no_wrap=True, overflow="crop"))
        columns: tuple[ProgressColumn, ...] = (MofNCompleteColumn(), metrics)
        if self.is_wide:
            columns = (TextColumn("{task.description}"), self._bar_column(), *columns, TimeElapsedColumn())
        with Progress(*columns, console=self._console) as bar:
            task = bar.add_task("training", total=steps, completed=done, metrics="")
            yield TrainingDisplay(self, done, steps, bar, task)

    @property
    def is_wide(self) -> bool:
        """Return whether a line has room for all numbers of a step."""
        return self._console.width >= _WIDE

    def _bar_column(self) -> BarColumn:
        return BarColumn(bar_width=max(10, min(40, self._console.width - _NUMBERS)))


class TrainingDisplay:
    """Shows the steps of a training loop, on a bar or as lines."""

    def __init__(self, display: Display, done: int, steps: int, bar: Progress | None, task: TaskID | None) -> None:
        self._display = display
        self._steps = steps
        self._bar = bar
        self._task = task
        self._first = done + 1
        self._seconds = 0.0
        self._done, self._text, self._since = done, "", time.monotonic()

    def status(self) -> str:
        """Return the last finished step, and how long ago it finished."""
        return f"step {self._done}/{self._steps}{self._text}  {time.monotonic() - self._since:.0f} s ago"

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._display.say(text)

    def show(self, metrics: StepMetrics) -> None:
        """Show a finished step."""
        speed = f"  {metrics.tokens / metrics.seconds:,.0f} tokens/s"
        if self._bar is not None and not self._display.is_wide:
            speed = ""
        text = f"loss {metrics.loss:.4f}{speed}{self._time_left(metrics)}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=metrics.step, metrics=text)
            return
        self._done, self._text, self._since = metrics.step, f"  {text}", time.monotonic()
        every = max(1, self._steps // _PLAIN_LINES)
        if metrics.step in (self._first, self._steps) or metrics.step % every == 0:
            self._display.say(f"step {metrics.step}/{self._steps}  {text}")

    def _time_left(self, metrics: StepMetrics) -> str:
        # The first step compiles, so its time says nothing about the others.
        if metrics.step == self._first:
            return ""
        self._seconds += metrics.seconds
        left = self._seconds / (metrics.step - self._first) * (self._steps - metrics.step)
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return f"  {hours}:{minutes:02}:{seconds:02} left"
