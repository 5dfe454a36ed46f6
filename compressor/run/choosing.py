"""Which task a run's network has: what was asked for, or what its answers and the data show; a user's own functions.

Known before anything is computed over the data; what the task needs of the dense network's answers is `tasking`'s.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import fx

from ..errors import DataError, RecipeError, with_article
from ..graph.interface import answers, output_names, output_nodes
from ..inputs.code import code_of
from ..inputs.images import Batches
from ..placement import device_of, inputs_to
from ..recipe import Recipe
from ..tasks import choose_task, is_labelled, task_named
from ..tensors import as_tuple

PARTS = ("quality", "loss", "says", "distance", "decode")
"""What of a task a user may put in place of its own; `decode` makes boxes of a detector's answer."""
CLASSES = "classification"


@dataclass(frozen=True, slots=True)
class UserParts:
    """A user's own functions by the part they stand for, and `decode`, which makes boxes of a detector's answer."""

    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.functions)

    @property
    def prints(self) -> dict[str, str]:
        """What stands for each in a stage's key: its name and its code."""
        return {part: _print_of(function) for part, function in self.functions.items()}


def _print_of(function: Callable[..., Any]) -> str:
    """Of a Python function its own code and constants, of an object that is called its class's and what it holds.

    What it calls is not followed.
    """
    if isinstance(function, functools.partial):
        return f"{_print_of(function.func)} {function.args!r} {function.keywords!r}"
    held = repr(function) if dataclasses.is_dataclass(function) else ""
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    return f"{name} {held} {_code_hash(code)}" if isinstance(code, CodeType) else f"{name} {held}"


def _code_hash(code: CodeType) -> str:
    """The same in every process: constants that are code themselves (comprehensions) print as where they lie."""
    constants = [_constant(value) for value in code.co_consts]
    return hashlib.sha256(code.co_code + "\n".join([*constants, *code.co_names]).encode()).hexdigest()


def _constant(value: object) -> str:
    if isinstance(value, CodeType):
        return _code_hash(value)
    return str(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


NO_PARTS = UserParts()


def parted_options(options: Mapping[str, Any]) -> tuple[UserParts, dict[str, Any]]:
    """The functions among a Python caller's options, and the others. Raises RecipeError for a part that is none."""
    for part in PARTS:
        function = options.get(part)
        if function is not None and not callable(function) and not isinstance(function, str):
            kind = with_article(type(function).__name__)
            raise RecipeError(f"{part} is {kind}, expected a function, or file.py:function")
    functions = {part: options[part] for part in PARTS if callable(options.get(part))}
    return UserParts(functions), {name: value for name, value in options.items() if name not in functions}


def parts_of(recipe: Recipe, given: UserParts, decode: Callable[..., Any] | None = None) -> UserParts:
    """The functions that were given, and those that the recipe names (`metrics.py:my_map`).

    `decode` is the model's own, for where there is no other. Raises RecipeError where there is no such function, or its
    file raises.
    """
    functions = dict(given.functions)
    for part in PARTS:
        spec = getattr(recipe, part)
        if spec and part not in functions:
            place, _, name = spec.rpartition(":")
            if not place:
                raise RecipeError(f"{part} = {spec!r} names no function; write file.py:function")
            with code_of(place, name, role="function", error=RecipeError) as function:
                functions[part] = function
    if decode is not None:
        functions.setdefault("decode", decode)
    return UserParts(functions)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The task's name, why it was taken, and the user's parts of it.

    `labelled`: whether the data have targets; `alone`: whether the network answers with one tensor.
    """

    name: str
    reason: str
    parts: UserParts = field(default_factory=UserParts)
    labelled: bool = True
    alone: bool = True

    @property
    def classifies(self) -> bool:
        """Whether it is the classifier's plain one."""
        return self.name == CLASSES and self.alone and not self.parts

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader is told of a guess; nothing of a classifier with labels, or where the task was asked for."""
        is_plain = self.name == CLASSES and self.labelled and self.alone
        return () if is_plain or self.reason.endswith("as asked for") else (self.reason,)


def _without_decode(name: str, parts: UserParts, *, decoded: bool) -> UserParts:
    """A task that has no boxes has no use for the model's own decode; a user's is refused there (RecipeError)."""
    if "decode" not in parts.functions or name in ("detection", "any"):
        return parts
    if not decoded:
        raise RecipeError(
            f"decode makes boxes, and the task is {name}; leave decode out, or say task='detection' and give boxes, or "
            "no labels"
        )
    return UserParts({part: function for part, function in parts.functions.items() if part != "decode"})


@torch.no_grad()
def choose(
    recipe: Recipe, dense: fx.GraphModule, calibration: Batches, parts: UserParts, *, decoded: bool = False
) -> Chosen:
    """The task, by one batch of the calibration images.

    Where a task is asked for, labels that it can't use are none. `decoded`: the decode among `parts` is the model's.
    Raises DataError without images, RecipeError for a task that there is not.
    """
    first = next(iter(calibration), None)
    if first is None:
        raise DataError("there are no calibration images; give some")
    inputs, targets = first
    labelled, alone = is_labelled(targets), len(output_nodes(dense)) == 1
    if recipe.task:
        task_named(recipe.task)
        parts = _without_decode(recipe.task, parts, decoded=decoded)
        return Chosen(recipe.task, f"{recipe.task}, as asked for", parts, labelled, alone)
    leaves = answers(dense, inputs_to(inputs, device_of(dense)))
    named = {name: leaf.cpu() for name, leaf in zip(output_names(dense), leaves, strict=True)}
    name, reason = choose_task(named, targets, as_tuple(inputs)[0].shape)
    if "decode" in parts.functions and (name == "any" or not labelled):
        name, reason = "detection", "taken as detection: there is a decode, which makes boxes of the answer"
    parts = _without_decode(name, parts, decoded=decoded)
    return Chosen(name, reason, parts, labelled, alone)
