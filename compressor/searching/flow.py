"""The attribution's own parameters, searched for pruning (Hatefi et al. 2024): a recipe in, a better one out.

`search` reads as it runs: images apart, groups, what counts on this network, trials, finalists, report. Trials live
in a database (a file in the search's folder, or one that machines share), so the same command goes on or joins.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn

from .. import __version__
from ..criteria import LEARNED
from ..errors import FolderError, RecipeError
from ..files import content_hash, write_json
from ..inputs.checkpoints import state_hash
from ..inputs.images import batches
from ..inputs.models import Model
from ..pipeline import READING, find_units, keep_units, require_name
from ..placement import computing
from ..recipe import Recipe, make_recipe, read_recipe
from ..relevance.criteria import criterion_named
from ..run.choosing import NO_PARTS, UserParts, parted_options
from ..run.stages import Notify
from ..run.tasking import task_in_memory
from ..run.work import Request, Work, prepare
from .bench import Bench, Kept, first_images
from .finalists import check_finalists, finalists_of
from .options import SearchOptions, make_options
from .outcome import Outcome, SearchResult, write_outcome
from .space import Space, find_space, presets, recipe_at, require_holdable
from .storage import open_study, require_storage
from .study import Progress, TrialRow, enqueue_presets, importances, rows, run_trials

# of a recipe, what its scores and the plan made of them depend on
_KEY_FIELDS = (*READING, "accept", "units", "scope", "reduction", "normalisation", "per_cost", "least", "multiple")


def search(
    model: str | nn.Module | None = None,
    images: object = None,
    *,
    notify: Notify | None = None,
    on_trial: Callable[[Progress], None] | None = None,
    **options: object,
) -> SearchResult:
    """Searches a recipe for a model; `options` are SearchOptions' fields and the recipe's.

    `model`, `images` and the task's functions are as in `compress`. Raises CompressorError's subclasses.
    """
    search_fields = SearchOptions.__dataclass_fields__
    search_values = {name: options.pop(name) for name in search_fields if name in options}
    parts, options = parted_options(options)

    if isinstance(images, (str, os.PathLike)):
        options["data"] = os.fspath(images)
        images = None

    model_in_memory = None
    if isinstance(model, nn.Module):
        recipe = make_recipe({**options, "model": type(model).__name__})
        model_in_memory = Model(model, "", "given", None, None, state_hash(model))
    elif model is None:
        recipe = read_recipe(None, **options)
    else:
        recipe = read_recipe(None, model=require_name(model), **options)
    return run_search(
        recipe,
        make_options(search_values),
        notify=notify,
        on_trial=on_trial,
        model=model_in_memory,
        data=images,
        parts=parts,
    )


def run_search(
    recipe: Recipe,
    options: SearchOptions,
    *,
    notify: Notify | None = None,
    on_trial: Callable[[Progress], None] | None = None,
    model: Model | None = None,
    data: object = None,
    parts: UserParts = NO_PARTS,
) -> SearchResult:
    """One search from a recipe, continued or joined where its study stands.

    `notify` gets stages and the share done, `on_trial` every trial of this process; `model`, `data` and the task's
    `parts` are those in memory.
    Raises CompressorError's subclasses.
    """
    with computing():
        return _run_search(recipe, options, notify, on_trial, model, data, parts)


def _run_search(
    recipe: Recipe,
    options: SearchOptions,
    notify: Notify | None,
    on_trial: Callable[[Progress], None] | None,
    model: Model | None,
    data: object,
    parts: UserParts,
) -> SearchResult:
    began = time.monotonic()
    families = tuple(dict.fromkeys((*options.families, recipe.criterion)))
    _require_searchable(recipe, families, options)

    in_folder = replace(recipe, out=str(folder_of(recipe)))
    request = Request(in_folder, model, data, parts, search=options.search_images)
    work = prepare(request, notify or (lambda stage, share: None))
    structure, spent = find_units(work)
    bench = Bench(
        work,
        structure,
        first_images(work.splits.calibration, options.score_images, recipe.batch_size),
        first_images(work.splits.search, options.trial_images, recipe.batch_size),
    )
    options = replace(options, budgets=bench.within_reach(options.budgets))

    with _begun(work):
        keep_units(work, structure, spent)
        bench = replace(bench, task=task_in_memory(work.chosen, work.dense, work.calibration))
        work.stages.notify("what counts on this network", 0.0)
        space = find_space(recipe, families, structure.groups.groups, bench.probe, options.held)
        trials, weights = _try(bench, space, families, options, began, on_trial)
        return write_outcome(_choose(bench, space, options, began, trials, weights))


def _require_searchable(recipe: Recipe, families: Sequence[str], options: SearchOptions) -> None:
    """Raises RecipeError for what can be refused before any image is read."""
    learned = [name for name in families if name in LEARNED]
    if learned:
        raise RecipeError(
            f"criterion {learned[0]} is learned, for a minute or more each time, and has no parameters to search; "
            "compress with it as it is"
        )
    for family in families:
        criterion_named(family)
    require_holdable(options.held)
    if recipe.rounds > 1:
        raise RecipeError(
            f"rounds = {recipe.rounds}: a search judges recipes in one round; leave it out here and give it to "
            "`compressor compress` with the recipe that was found"
        )
    if options.storage:
        require_storage(options.storage)


def _try(
    bench: Bench,
    space: Space,
    families: Sequence[str],
    options: SearchOptions,
    began: float,
    on_trial: Callable[[Progress], None] | None,
) -> tuple[list[TrialRow], dict[str, float]]:
    """The study's trials, with those of earlier starts and other processes, and what each choice weighs."""
    url = options.storage or f"sqlite:///{bench.work.stages.folder / 'study.db'}"
    name = _study_name(bench.work, space, options)
    deadline = began + 60 * options.minutes if options.minutes else math.inf
    with open_study(url, name, seed=space.base.seed, images=bench.trial_image_count) as study:
        enqueue_presets(study, presets(space, families))

        def qualities(point: dict[str, str | float]) -> Iterator[Kept]:
            recipe = recipe_at(space, point)
            scores = bench.comparable(recipe, bench.score_images)
            for share in options.budgets:
                yield bench.judge(recipe, scores, share)

        run_trials(
            study,
            space,
            qualities,
            total=options.trials,
            steps=len(options.budgets),
            until=deadline,
            report=on_trial or (lambda progress: None),
        )
        return rows(study), importances(study)


def _choose(
    bench: Bench,
    space: Space,
    options: SearchOptions,
    began: float,
    trials: list[TrialRow],
    weights: dict[str, float],
) -> Outcome:
    """The best trials and the presets made again as a run makes them, on all search images."""
    work = bench.work
    chosen = finalists_of(trials, options.finalists)
    if not chosen:
        raise RecipeError("no trial of the search was completed; allow more trials or minutes")

    images_by_split = {"search": batches(work.splits.search, space.base.batch_size)}
    if options.evaluate:
        images_by_split["evaluation"] = work.evaluation
    finalists = check_finalists(bench, space, chosen, options.budgets, images_by_split, notify=work.stages.notify)
    dense = {split: bench.quality(work.dense, images) for split, images in images_by_split.items()}

    seconds = time.monotonic() - began
    return Outcome(work, options, space.axes, tuple(trials), tuple(finalists), weights, dense, seconds)


def _study_name(work: Work, space: Space, options: SearchOptions) -> str:
    """Says what a trial's value depends on, so that only processes that measure the same share a study."""
    recipe = {name: getattr(space.base, name) for name in (*_KEY_FIELDS, "compensate", "reestimate", "seed")}
    sizes = [options.budgets, options.trial_images, options.score_images]
    hashes = {split: work.splits.hashes[split] for split in ("calibration", "search")}
    recipe["task"] = [work.chosen.name, work.chosen.parts.prints]
    key = content_hash(__version__, "quality", work.model.sha256, recipe, space.axes, sizes, hashes, work.prepared_as)
    return f"{space.base.model.split('/')[-1]} {key[:12]}"


_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@contextmanager
def _begun(work: Work) -> Iterator[None]:
    """The folder is written inside. Other processes may be at work in it: nothing of theirs is taken away."""
    folder = work.stages.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", {"schema": "run/1", **work.stages.identity})
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise FolderError(
            f"{error.filename or folder} can't be written ({error.strerror}); free space or rights there, and run "
            "the same command again: the search goes on where it stopped"
        ) from error


def folder_of(recipe: Recipe) -> Path:
    """Where the search lies; `timm:facebook/deit_tiny` without an `out` in `runs/deit_tiny-search`."""
    model_name = recipe.model.split(":")[-1].split("/")[-1]
    return Path(recipe.out or f"runs/{model_name}-search")
