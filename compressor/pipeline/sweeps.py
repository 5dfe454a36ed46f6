"""A recipe with several budgets in, a run for each out, with a page over all of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BudgetError, GateError
from ..inputs.models import Model
from ..recipe import Recipe
from ..run.stages import Notify
from ..run.task_choice import NO_PARTS, UserParts
from ..sweeping import Ended, recipes_of, require_free, share, summarise, write_page
from .flow import Run, run, silent

Watch = Callable[[Recipe], AbstractContextManager[Notify]]


@dataclass(frozen=True, slots=True)
class Sweep:
    """Finished runs of one model at several budgets. `summary` is the command's last line: a row for each budget.

    A run that a budget or a gate ended is a row with its reason, and none of `runs`.
    """

    folder: Path
    recipe: Recipe
    runs: tuple[Run, ...]
    summary: dict[str, Any]


def watched_by(notify: Notify | None) -> Watch:
    """Every run of a sweep by one and the same function."""
    return lambda recipe: nullcontext(notify or silent)


def sweep(
    recipe: Recipe,
    *,
    watch: Watch | None = None,
    model: Model | None = None,
    data: object = None,
    parts: UserParts = NO_PARTS,
) -> Sweep:
    """A run for each figure of the budget, below the recipe's folder; groups and scores are found once.

    `watch` gives a run's `notify` while it lasts; `model`, `data` and `parts` as in `run`. A run that its budget or a
    gate ends does not end the others. Raises the first one's error where none is left.
    """
    points = recipes_of(recipe)
    require_free(recipe, points)
    runs: list[Run] = []
    ended: list[Ended] = []
    for point in points:
        share([earlier.recipe for earlier in ended], point)
        try:
            with (watch or watched_by(None))(point) as notify:
                runs.append(run(point, notify=notify, model=model, data=data, parts=parts))
        except (BudgetError, GateError) as error:
            ended.append(Ended(point, error=error))
        else:
            ended.append(Ended(point, runs[-1].summary))

    first_error = ended[0].error
    if not runs and first_error is not None:
        raise first_error
    summary = summarise(recipe, ended)
    write_page(recipe, summary)
    return Sweep(recipe.folder, recipe, tuple(runs), summary)
