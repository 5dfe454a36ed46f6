"""What is said while something runs: lines on stderr, bars for people, one line a stage for logs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..recipe import Recipe

console = Console(stderr=True)


def say_now(text: str) -> None:
    """As it is, on stderr; nothing when asked to be quiet."""
    if not console.quiet:
        print(text, file=sys.stderr, flush=True)


def say_lines(lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def warn(warnings: Iterable[str]) -> None:
    for text in warnings:
        console.print(f"warning: {text}", style="bold yellow", highlight=False, markup=False, soft_wrap=True)


def announce(task: str, recipe: Recipe) -> None:
    """The first line, before torch is imported: that takes seconds, and what was asked for can be read meanwhile."""
    sources = [source for source in (recipe.data, recipe.evaluation_data) if source]
    images = " and ".join(sources) or "not named"
    say_now(f"{task}: images {images}, folder {recipe.folder}")


class StageBars:
    """A bar for each stage on stderr for people, one line per stage for logs; neither when asked to be quiet."""

    def __init__(self, recipe: Recipe | None) -> None:
        self.recipe = recipe

    def __enter__(self) -> Callable[[str, float], None]:
        from ..progress import Course, course_of

        self.course = course_of(self.recipe) if self.recipe is not None else Course()
        self.live = sys.stderr.isatty() and not console.quiet
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self.bar = Progress(*columns, *times, console=console, disable=not self.live)
        self.bar.start()
        self.tasks: dict[str, Any] = {}
        self.said: set[str] = set()
        return self.notify

    def notify(self, stage: str, share: float) -> None:
        step = self.course.read(stage)
        if step is None:
            return
        if not self.live and str(step) not in self.said:
            self.said.add(str(step))
            say_now(str(step))
        if step.key not in self.tasks:
            self.tasks[step.key] = self.bar.add_task(str(step), total=None)  # moves to and fro until a share is known
        self.bar.update(self.tasks[step.key], description=str(step))
        if share > 0:
            self.bar.update(self.tasks[step.key], total=1.0, completed=share)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


@contextmanager
def search_bars(total: int) -> Iterator[tuple[Callable[[str, float], None], Callable[[Any], None]]]:
    """A bar with the best so far for people; for logs a line per stage. A line per trial for both."""
    from ..report.facts import title_of

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    live = sys.stderr.isatty() and not console.quiet
    said: set[str] = set()
    with Progress(*columns, console=console, disable=not live) as bar:
        task = bar.add_task("search", total=total)

        def notify(stage: str, share: float) -> None:
            bar.update(task, description=title_of(stage, several=False))
            if not live and stage not in said:
                said.add(stage)
                say_now(title_of(stage, several=False))

        def on_trial(progress: Any) -> None:
            best = f"best {percent(progress.best and progress.best.value)}"
            bar.update(task, completed=progress.done, description=f"trials: {best}, {minutes(progress.left_s)} left")
            line = _trial_line(progress)
            if live:
                bar.console.print(line, highlight=False, soft_wrap=True)
            else:
                say_now(line)

        yield notify, on_trial


def _trial_line(progress: Any) -> str:
    row, best = progress.row, progress.best
    reached = ", ".join(f"{p.budget:g}: {100 * p.accuracy:.1f}" for p in row.points)
    named = f" [{row.preset}]" if row.preset else ""
    leads = " (best)" if best is not None and best.number == row.number else ""
    return (
        f"{progress.done}/{progress.total} trial {row.number}{named} {row.state}: area {percent(row.value)}{leads}; "
        f"{reached or row.why}; {row.seconds:.1f} s, {minutes(progress.left_s)} left, best "
        f"{percent(best and best.value)}"
    )


def percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.2f} %"


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
