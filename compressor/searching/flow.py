"""The attribution's own parameters, searched for pruning (Hatefi et al. 2024): a recipe in, a better one out.

`search` reads as it runs: images apart, groups, what counts on this network, trials, finalists, report. Trials live
in a database (a file in the search's folder, or one that machines share), so the same command goes on or joins, and
more processes may help with them.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from optuna.study import Study
from torch import nn

from .. import __version__
from ..criteria import LEARNED
from ..device.usage import Usage
from ..errors import FolderError, RecipeError
from ..files import Json, content_hash, write_json
from ..inputs.checkpoints import state_hash
from ..inputs.images import batches
from ..inputs.models import Model
from ..pipeline import READING, find_units, keep_units, require_name
from ..placement import computing
from ..recipe import Recipe, make_recipe, read_recipe
from ..relevance.criteria import criterion_named
from ..run.stages import Notify
from ..run.task_choice import NO_PARTS, UserParts, parted_options
from ..run.tasking import task_in_memory
from ..run.work import Request, Work, prepare
from .bench import Bench, Kept, first_images
from .crew import Helper, crew, device_of, limited_threads, share_of_threads, wait_for
from .finalists import check_finalists, finalists_of
from .options import SearchOptions, make_options
from .outcome import Outcome, SearchResult, write_outcome
from .space import Space, find_space, presets, recipe_at, require_holdable
from .storage import open_study, require_storage
from .study import Progress, TrialRow, enqueue_presets, importances, rows, run_trials
from .watching import Look, watched

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
    on_study: Callable[[Look], None] | None = None,
    model: Model | None = None,
    data: object = None,
    parts: UserParts = NO_PARTS,
) -> SearchResult:
    """One search from a recipe, continued or joined where its study stands.

    `notify` gets stages and the share done, `on_trial` every trial as it finishes, `on_study` what looks at all of
    them; `model`, `data` and the task's `parts` are those in memory.
    Raises CompressorError's subclasses.
    """
    heard = Heard(notify or (lambda stage, share: None), on_trial or (lambda progress: None), on_study)
    if options.workers > 1 and (model is not None or data is not None or parts):
        raise RecipeError(
            f"workers = {options.workers}: other processes can't see what is in this one's memory; give the model, the "
            "images and functions by name (file.py:function, a path), or leave workers at 1"
        )
    with computing():
        return _run_search(recipe, options, heard, Request(recipe, model, data, parts))


@dataclass(frozen=True, slots=True)
class Heard:
    """Who is told of what: stages, finished trials, and once of what looks at the study."""

    notify: Notify
    on_trial: Callable[[Progress], None] = lambda progress: None
    on_study: Callable[[Look], None] | None = None


@dataclass(frozen=True, slots=True)
class Tried:
    """The study's finished trials, what each choice weighs, and a line for each helper that ended before its time."""

    rows: tuple[TrialRow, ...]
    weights: Mapping[str, float]
    lost_workers: tuple[str, ...]


def _run_search(recipe: Recipe, options: SearchOptions, heard: Heard, request: Request) -> SearchResult:
    began = time.monotonic()
    families = _families_of(recipe, options)
    _require_searchable(recipe, families, options)

    in_folder = replace(recipe, out=str(folder_of(recipe)))
    bench, spent = _prepared(replace(request, recipe=in_folder), options, heard.notify)
    options = replace(options, budgets=bench.within_reach(options.budgets))

    with _begun(bench.work):
        keep_units(bench.work, bench.structure, spent)
        bench, space = _spaced(bench, recipe, families, options)
        tried = _try(bench, space, families, options, began, heard)
        return write_outcome(_choose(bench, space, options, began, tried))


def join_trials(recipe: Recipe, options: SearchOptions, study_name: str) -> None:
    """Trials of a search that another process of this machine began, until the study has enough of them.

    `recipe` and `options` are that process's, folder, budgets and storage filled in; finalists and report are its
    affair. Raises CompressorError's subclasses.
    """
    began = time.monotonic()
    with computing():
        bench, _ = _prepared(Request(recipe), options, lambda stage, share: None)
        bench, space = _spaced(bench, recipe, _families_of(recipe, options), options)
        name = _study_name(bench.work, space, options)
        if name != study_name:
            raise RecipeError(f"this process would search {name!r}, not {study_name!r}: model or images have changed")
        with open_study(options.storage, name, seed=space.base.seed, images=bench.trial_image_count) as study:
            _run_trials(study, bench, space, options, began, lambda progress: None)


def _families_of(recipe: Recipe, options: SearchOptions) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*options.families, recipe.criterion)))


def _prepared(request: Request, options: SearchOptions, notify: Notify) -> tuple[Bench, Usage]:
    """Model, images and units, and what finding these took; nothing is written."""
    work = prepare(replace(request, search=options.search_images), notify)
    structure, spent = find_units(work)
    bench = Bench(
        work,
        structure,
        first_images(work.splits.calibration, options.score_images, request.recipe.batch_size),
        first_images(work.splits.search, options.trial_images, request.recipe.batch_size),
    )
    return bench, spent


def _spaced(bench: Bench, recipe: Recipe, families: Sequence[str], options: SearchOptions) -> tuple[Bench, Space]:
    """The bench with the task's meaning of an answer, and what there is to search."""
    work = bench.work
    bench = replace(bench, task=task_in_memory(work.chosen, work.dense, work.calibration))
    work.stages.notify("what counts on this network", 0.0)
    space = find_space(recipe, families, bench.structure.groups.groups, bench.probe, options.held)
    return bench, space


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
    heard: Heard,
) -> Tried:
    """The trials, with those of earlier starts and other processes."""
    lost_workers: list[str] = []

    def lose(line: str) -> None:
        lost_workers.append(line)
        heard.notify(line, 1.0)

    url = options.storage or f"sqlite:///{bench.work.stages.folder / 'study.db'}"
    name = _study_name(bench.work, space, options)
    with open_study(url, name, seed=space.base.seed, images=bench.trial_image_count) as study:
        enqueue_presets(study, presets(space, families))
        with ExitStack() as stack:
            look = stack.enter_context(watched(study))
            if heard.on_study is not None:
                heard.on_study(look)
            helpers = stack.enter_context(_helpers(bench, replace(options, storage=url), name, began, lose))
            _run_trials(study, bench, space, options, began, heard.on_trial)
            if len(rows(study)) < options.trials:  # time is over: what others have begun they finish
                wait_for(helpers)
        return Tried(tuple(rows(study)), importances(study), tuple(lost_workers))


def _run_trials(
    study: Study,
    bench: Bench,
    space: Space,
    options: SearchOptions,
    began: float,
    report: Callable[[Progress], None],
) -> None:
    """This process's share of the trials, of which none is begun when the options' minutes since `began` are over."""

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
        until=began + 60 * options.minutes if options.minutes else math.inf,
        report=report,
    )


@contextmanager
def _helpers(
    bench: Bench, options: SearchOptions, study_name: str, began: float, lose: Callable[[str], None]
) -> Iterator[tuple[Helper, ...]]:
    """The other processes at the trials, where more than one was asked for, and this one's threads shared with them."""
    if options.workers == 1:
        yield ()
        return
    threads = share_of_threads(options.workers)
    gpus = torch.cuda.device_count()
    if options.minutes:
        left = options.minutes - (time.monotonic() - began) / 60
        options = replace(options, minutes=max(left, 1e-3))
    requests: list[dict[str, Json]] = []
    for index in range(1, options.workers):
        recipe = bench.work.recipe
        recipe = replace(recipe, device=device_of(recipe.device, index, gpus))
        requests.append({"recipe": asdict(recipe), "options": asdict(options), "study": study_name})
    with limited_threads(threads), crew(requests, threads, lose) as helpers:
        yield helpers


def _choose(
    bench: Bench,
    space: Space,
    options: SearchOptions,
    began: float,
    tried: Tried,
) -> Outcome:
    """The best trials and the presets made again as a run makes them, on all search images."""
    work = bench.work
    chosen = finalists_of(tried.rows, options.finalists)
    if not chosen:
        raise RecipeError("no trial of the search was completed; allow more trials or minutes")

    images_by_split = {"search": batches(work.splits.search, space.base.batch_size)}
    if options.evaluate:
        images_by_split["evaluation"] = work.evaluation
    finalists = check_finalists(bench, space, chosen, options.budgets, images_by_split, notify=work.stages.notify)
    dense = {split: bench.quality(work.dense, images) for split, images in images_by_split.items()}

    seconds = time.monotonic() - began
    return Outcome(
        work,
        options,
        space.axes,
        tried.rows,
        tuple(finalists),
        tried.weights,
        dense,
        seconds,
        tried.lost_workers,
    )


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
