"""A run's folder in, what its network can be made again and shipped from out, or the error that says what it lacks.

A gate may have stopped the run: its plan, scores and repairs are there all the same. The folder is data; whether code
that it names may run is `inputs.trust`'s to say.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, FolderError, ModelError, RecipeError
from ..files import read_json, read_record
from ..inputs.trust import require_trusted, require_trusted_function, require_trusted_loader
from ..recipe import Recipe, read_recipe
from ..records import IntArray, Plan
from .locks import require_unlocked
from .saved import Network, read_network
from .stages import require_finished
from .task_choice import PARTS
from .user_code import line_of
from .work import Work

_AGAIN = "finish that run first: the command that began it goes on where it stopped"


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """A run whose network was made. `weights` and `splits` are hashes of the dense weights and the parts of the data.

    `parts` are the task's functions that it was judged with, by name alone, `code` the hashes of files that hold code.
    """

    folder: Path
    recipe: Recipe
    network: Network
    weights: str
    splits: Mapping[str, str]
    parts: tuple[str, ...]
    code: Mapping[str, str]

    @property
    def stages(self) -> tuple[str, ...]:
        """Those whose results a report of its network reads."""
        if self.recipe.as_it_is:
            return ()
        rounds = range(1, self.recipe.rounds + 1)
        depth = ("depth",) if self.recipe.blocks == "drop" else ()
        scores = "measured-1" if self.recipe.normalisation == "measured" else "scores-1"
        return (*depth, scores, *(f"repair-{number}" for number in rounds))


def kept_facts(work: Work) -> dict[str, Any]:
    """What `splits.json` says of a run's data and task: hashes and names."""
    return {
        "schema": "splits/1",
        "hashes": dict(work.splits.hashes),
        "left_out": list(work.splits.left_out),
        "parts": sorted(work.chosen.parts.functions),
    }


def read_finished(folder: Path, recipe: Recipe | None = None) -> Finished:
    """The run in a folder, with `recipe` in place of its own where it is given.

    Raises FolderError for what holds no run, or one that made no network yet.
    """
    require_unlocked(folder)
    if not (folder / "run.json").is_file():
        raise FolderError(f"{folder} holds no run; give the folder that `compress` wrote")
    network = read_network(folder)
    splits = read_json(folder / "splits.json", "splits/1")
    finished = Finished(
        folder=folder,
        recipe=recipe or read_recipe(folder / "recipe.toml"),
        network=network,
        weights=str(read_json(folder / "run.json", "run/1").get("weights", "")),
        splits=dict(splits.get("hashes", {})),
        parts=tuple(splits.get("parts", ())),
        code=network.code_sha256s,
    )
    require_finished(folder, finished.stages, remedy=_AGAIN)
    if network.kept:
        plan = read_record(folder / "plan.json", Plan)
        if not _keep_alike(plan.kept, network.kept):
            raise FolderError(f"{folder} has a newer plan than its network: a run was begun and not finished; {_AGAIN}")
    elif not finished.recipe.as_it_is:
        raise FolderError(f"{folder} asks for '{finished.recipe.budget}' and holds a network of no plan; {_AGAIN}")
    return finished


def _keep_alike(kept: Mapping[str, IntArray], others: Mapping[str, IntArray]) -> bool:
    if kept.keys() != others.keys():
        return False
    return all(np.array_equal(units, others[name]) for name, units in kept.items())


def require_trusted_code(finished: Finished, *, model: bool, in_hand: Collection[str], trust: bool) -> None:
    """Raises InputError's subclasses for code that the folder names and nothing speaks for.

    `model` says whether the dense module is in hand, `in_hand` which of `data`, `evaluation_data` and the task's parts
    are, so that the folder's are not used.
    """
    recipe, network, folder = finished.recipe, finished.network, finished.folder
    if not model:
        if not network.builder:
            raise ModelError(
                f"the run in {folder} began with a model object; ship it from Python, with that model: "
                "compressor.ship(folder, trained, model=..., images=...)"
            )
        sha256 = network.builder_sha256 if network.builder == recipe.model else ""
        require_trusted(recipe.model, sha256, folder, trust=trust)
    for field in ("data", "evaluation_data", *PARTS):
        spec = getattr(recipe, field)
        if not spec or field in in_hand:
            continue
        require = require_trusted_function if field in PARTS else require_trusted_loader
        require(spec, finished.code.get(line_of(field, spec), ""), folder, trust=trust)


def require_same(finished: Finished, work: Work) -> None:
    """Raises InputError's subclasses where model, data or task are not those that the run was made with."""
    if work.model.sha256 != finished.weights:
        raise ModelError(
            f"the dense model is not the one that the run in {finished.folder} was made from (its weights' hash is "
            "another); give that, as it was: the trained weights are given apart from it"
        )
    for purpose in ("calibration", "evaluation"):
        if work.splits.hashes[purpose] != finished.splits.get(purpose):
            raise DataError(
                f"the {purpose} images are not those that the run in {finished.folder} was made with; give the same, "
                "in the same order, so that its figures can be compared"
            )
    lacking = sorted(set(finished.parts) - set(work.chosen.parts.functions))
    if lacking:
        raise RecipeError(
            f"the run in {finished.folder} was judged with {lacking[0]} as a function given in Python; ship it from "
            f"there: compressor.ship(folder, trained, {lacking[0]}=...)"
        )
