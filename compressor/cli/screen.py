"""What is said while something runs: lines on stderr; bars for people, for logs a line a stage and quarters."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..recipe import Recipe

console = Console(stderr=True)
_SHOWN = 80  # characters of what happens on a device


def say_now(text: str) -> None:
    """As it is, on stderr; nothing of an empty text, or when asked to be quiet."""
    if text and not console.quiet:
        print(text, file=sys.stderr, flush=True)


def say_lines(lines: Iterable[str]) -> None:
    """On stderr, each as long as it is: neither wrapped nor coloured, and brackets are no markup."""
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def warn(warnings: Iterable[str]) -> None:
    """Like `say_lines`, and in a colour where the terminal has one; nothing of empty ones."""
    for text in filter(None, warnings):
        console.print(f"warning: {text}", style="bold yellow", highlight=False, markup=False, soft_wrap=True)


def announce(task: str, recipe: Recipe) -> None:
    """The first line, before torch is imported: that takes seconds, and what was asked for can be read meanwhile."""
    sources = [source for source in (recipe.data, recipe.evaluation_data) if source]
    images = " and ".join(sources) or "not named"
    say_now(f"{task}: images {images}, folder {recipe.folder}")


class StageBars:
    """A bar for each stage on stderr for people, lines for logs (`progress.Log`); neither when asked to be quiet."""

    def __init__(self, recipe: Recipe | None, *, after_training: bool = False) -> None:
        """`recipe` is what stages are counted by, of a run or of what follows on the training of its network."""
        self.recipe, self.after_training = recipe, after_training

    def __enter__(self) -> Callable[[str, float], None]:
        from .progress import Course, Log, course_after_training, course_of

        if self.recipe is None:
            self.course = Course()
        elif self.after_training:
            self.course = course_after_training(self.recipe)
        else:
            self.course = course_of(self.recipe)
        self.live = sys.stderr.isatty() and not console.quiet
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        times = (TimeElapsedColumn(), TextColumn("gone,"), TimeRemainingColumn(), TextColumn("left"))
        self.bar = Progress(*columns, *times, console=console, disable=not self.live)
        self.bar.start()
        self.tasks: dict[str, TaskID] = {}
        self.log = Log()
        return self.notify

    def notify(self, stage: str, share: float) -> None:
        """`share` of the stage that is done, in 0-1; 0 where it is not known."""
        step = self.course.read(stage)
        if step is None:
            return

        text = str(step)
        if not self.live:
            say_now(self.log.line(text, share))

        if step.key not in self.tasks:
            self.tasks[step.key] = self.bar.add_task(text, total=None)  # moves to and fro until a share is known
        task = self.tasks[step.key]
        self.bar.update(task, description=text)
        if share > 0:
            self.bar.update(task, total=1.0, completed=share)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


class DeviceBars:
    """A row for each device for people, lines for logs, each text of a device once."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.lock = threading.Lock()  # devices are served by threads, and a line is written in two pieces

    def __enter__(self) -> Callable[[str, str, float], None]:
        from .progress import Log

        self.live = sys.stderr.isatty() and not console.quiet
        width = max(map(len, self.names), default=0)
        columns = (SpinnerColumn(), TextColumn("{task.fields[name]}"), BarColumn(20), TextColumn("{task.description}"))
        self.bar = Progress(*columns, TimeElapsedColumn(), console=console, disable=not self.live)
        self.bar.start()
        self.tasks: dict[str, TaskID] = {}
        for name in self.names:
            self.tasks[name] = self.bar.add_task("waiting", total=None, name=escape(name.ljust(width)))
        self.log = Log()
        return self.notify

    def notify(self, device: str, text: str, share: float) -> None:
        """What happens on a device now, and how much of it is done; 0 where that is not known."""
        if not self.live:
            with self.lock:
                say_now(self.log.line(f"{device}: {text}", share))
        task = self.tasks[device]
        self.bar.update(task, description=escape(text[:_SHOWN]), total=1.0 if share else None)
        if share:
            self.bar.update(task, completed=share)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


def percent(share: float | None) -> str:
    """A share of one: `0.5` to `50.00 %`, None to `none`."""
    if share is None:
        return "none"
    return f"{100 * share:.2f} %"


def minutes(seconds: float) -> str:
    """`90 s`, and from two minutes on `3 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"
