"""A search as it runs: for people a live table of its trials under the stage, for logs a line a trial; on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from .screen import console, minutes, percent, say_now

if TYPE_CHECKING:  # bring optuna
    from ..searching.study import Progress as StudyProgress
    from ..searching.study import TrialRow
    from ..searching.watching import Look, TrialView

_ROWS = 20  # trials in the table, where the terminal is high enough
_BESIDE_ROWS = 7  # lines of the terminal for everything else
_COLUMNS = ("trial", "worker", "state", "point", "area", "at the budgets", "seconds")
_POINT = _COLUMNS.index("point")
_GAP = 2  # characters between two columns
_LOOKS_PER_S = 1.0  # each asks the storage


class SearchScreen(NamedTuple):
    """What is to be called at each stage, after each trial, and once with what looks at the study."""

    notify: Callable[[str, float], None]
    on_trial: Callable[[StudyProgress], None]
    on_study: Callable[[Look], None]


@contextmanager
def search_screen(total: int, *, several: bool) -> Iterator[SearchScreen]:
    """Shows a search of `total` trials; `several` workers are at them, whose names are worth a word in a line."""
    from ..report.facts import title_of
    from .progress import Log

    live = sys.stderr.isatty() and not console.quiet
    log = Log()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console)
    task = bar.add_task("search", total=total)
    looks: list[Look] = []

    def notify(stage: str, share: float) -> None:
        title = title_of(stage, several=False)
        bar.update(task, description=escape(title))
        if not live:
            say_now(log.line(title, share))

    def on_trial(progress: StudyProgress) -> None:
        text = f"trials: best {_best_area(progress)}, {minutes(progress.left_s)} left"
        bar.update(task, completed=progress.done, description=text)
        if not live:
            say_now(trial_line(progress, several=several))

    def shown() -> Group:
        if not looks:
            return Group(bar)
        return Group(bar, table_of(looks[0](), height=_height(), width=console.width))

    screen = SearchScreen(notify, on_trial, looks.append)
    if not live:
        yield screen
        return
    with Live(get_renderable=shown, console=console, refresh_per_second=_LOOKS_PER_S):
        yield screen


def _height() -> int:
    return max(1, min(_ROWS, console.height - _BESIDE_ROWS))


def table_of(views: Sequence[TrialView], *, height: int, width: int) -> Table:
    """The trials that run and, of the others, the latest; at most `height` rows of `width` characters."""
    from ..searching.study import best_of

    shown_views = _latest(views, height)
    rows = [_cells(view) for view in shown_views]
    columns = list(zip(_COLUMNS, *rows, strict=True))  # each with its name first
    widths = [max(map(len, column)) + _GAP for column in columns]
    beside = sum(widths) - widths[_POINT]
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for index, name in enumerate(_COLUMNS):
        if index == _POINT:  # whatever room the others leave: a point may be longer than any terminal
            table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=max(len(name), width - beside))
        else:
            table.add_column(name, no_wrap=True, justify="right" if index > _POINT else "left")

    best = best_of([view.row for view in views])
    for view, cells in zip(shown_views, rows, strict=True):
        style = "bold" if _is_best(view.row, best) else None
        table.add_row(*map(escape, cells), style=style)
    return table


def _is_best(row: TrialRow, best: TrialRow | None) -> bool:
    return best is not None and best.number == row.number


def _latest(views: Sequence[TrialView], height: int) -> list[TrialView]:
    """All that run before any that does not, in the order they were begun."""
    running = [view for view in views if view.state == "running"][:height]
    others = [view for view in views if view.state not in ("running", "waiting")]
    space = height - len(running)
    latest = others[-space:] if space else []
    return sorted([*running, *latest], key=lambda view: view.row.number)


def _cells(view: TrialView) -> tuple[str, ...]:
    """As `_COLUMNS` names them."""
    from ..searching.watching import point_text

    row = view.row
    area = "" if row.value is None else told(row.value, row)
    qualities = " ".join(told(point.quality, row) for point in row.points)
    text = f"[{row.preset}]" if row.preset else point_text(row.point)
    return str(row.number), view.worker, view.state, text, area, qualities, f"{row.seconds:.0f}"


def trial_line(progress: StudyProgress, *, several: bool) -> str:
    """A finished trial in one line of a log."""
    from ..searching.takeover import short_name

    row = progress.row
    preset = f" [{row.preset}]" if row.preset else ""
    worker = f" by {short_name(row.worker)}" if several and row.worker else ""
    leads = " (best)" if _is_best(row, progress.best) else ""
    qualities = ", ".join(f"{point.budget:g}: {told(point.quality, row)}" for point in row.points)
    return (
        f"{progress.done}/{progress.total} trial {row.number}{preset} {row.state}{worker}: "
        f"area {told(row.value, row)}{leads}; "
        f"{qualities or row.why}; {row.seconds:.1f} s, {minutes(progress.left_s)} left, best {_best_area(progress)}"
    )


def _best_area(progress: StudyProgress) -> str:
    best = progress.best
    return percent(None) if best is None else told(best.value, best)


def told(value: float | None, row: TrialRow) -> str:
    """A trial's quality: in per cent where it is a share."""
    if value is None or all(point.is_share for point in row.points):
        return percent(value)
    return f"{value:.2f}"
