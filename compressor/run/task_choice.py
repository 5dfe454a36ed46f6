"""Which task a run's network has: what was asked for, or what its answers and the data show; a user's own functions.

Known before anything is computed over the data; what the task needs of the dense network's answers is `tasking`'s.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import fx

from ..errors import DataError, RecipeError, with_article
from ..graph.interface import answers, output_names, output_nodes
from ..inputs.code import code_of
from ..inputs.images import Batches
from ..inputs.models import Model
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
    module = getattr(function, "__module__", "")
    name = getattr(function, "__qualname__", type(function).__qualname__)
    fields = repr(function) if dataclasses.is_dataclass(function) else ""
    description = f"{module}.{name} {fields}"
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    if not isinstance(code, CodeType):  # a builtin
        return description
    return f"{description} {_code_hash(code)}"


def _code_hash(code: CodeType) -> str:
    """The same in every process: constants that are code themselves (comprehensions) print as where they lie."""
    texts = [*map(_constant, code.co_consts), *code.co_names]
    return hashlib.sha256(code.co_code + "\n".join(texts).encode()).hexdigest()


def _constant(value: object) -> str:
    if isinstance(value, CodeType):
        return _code_hash(value)
    if isinstance(value, frozenset):  # prints in the order of hashes, which every process salts anew
        return str(sorted(map(repr, value)))
    return repr(value)


NO_PARTS = UserParts()


def parted_options(options: Mapping[str, Any]) -> tuple[UserParts, dict[str, Any]]:
    """The functions among a Python caller's options, and the others. Raises RecipeError for a part that is none."""
    functions: dict[str, Callable[..., Any]] = {}
    for part in PARTS:
        function = options.get(part)
        if callable(function):
            functions[part] = function
        elif function is not None and not isinstance(function, str):
            kind = with_article(type(function).__name__)
            raise RecipeError(f"{part} is {kind}, expected a function, or file.py:function")
    others = {name: value for name, value in options.items() if name not in functions}
    return UserParts(functions), others


def decode_of(model: Model, shape: Sequence[int]) -> Callable[..., Any] | None:
    """The model's own decode for images of that shape [..., H, W]; None where it has none."""
    if model.decode is None:
        return None
    height, width = shape[-2:]
    return model.decode.at((height, width))


def _functions_of(recipe: Recipe, parts: UserParts, decode: Callable[..., Any] | None) -> UserParts:
    """The functions that were given, and those that the recipe names (`metrics.py:my_map`).

    `decode` is the model's own, for where there is no other. Raises RecipeError where there is no such function, or its
    file raises.
    """
    functions = dict(parts.functions)
    for part in PARTS:
        spec = getattr(recipe, part)
        if not spec or part in functions:
            continue
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
        if is_plain or self.reason.endswith("as asked for"):
            return ()
        return (self.reason,)


def _parts_for(name: str, parts: UserParts, decode: Callable[..., Any] | None) -> UserParts:
    """A task that has no boxes has no use for the model's own `decode`; a user's is refused there (RecipeError)."""
    if "decode" not in parts.functions or name in ("detection", "any"):
        return parts
    if parts.functions["decode"] is not decode:
        raise RecipeError(
            f"decode makes boxes, and the task is {name}; leave decode out, or say task='detection' and give boxes, or "
            "no labels"
        )
    return UserParts({part: function for part, function in parts.functions.items() if part != "decode"})


def choose(
    recipe: Recipe,
    dense: fx.GraphModule,
    calibration: Batches,
    parts: UserParts = NO_PARTS,
    *,
    decode: Callable[..., Any] | None = None,
) -> Chosen:
    """The task, by one batch of the calibration images.

    Where a task is asked for, labels that it can't use are none. `decode` is the model's own. Raises DataError without
    images, RecipeError for a task that there is not, and for a user's function that can't be had.
    """
    parts = _functions_of(recipe, parts, decode)
    first = next(iter(calibration), None)
    if first is None:
        raise DataError("there are no calibration images; give some")
    inputs, targets = first
    labelled, alone = is_labelled(targets), len(output_nodes(dense)) == 1
    if recipe.task:
        task_named(recipe.task)
        parts = _parts_for(recipe.task, parts, decode)
        return Chosen(recipe.task, f"{recipe.task}, as asked for", parts, labelled, alone)
    with torch.no_grad():
        leaves = answers(dense, inputs_to(inputs, device_of(dense)))
    named = {name: leaf.cpu() for name, leaf in zip(output_names(dense), leaves, strict=True)}
    name, reason = choose_task(named, targets, as_tuple(inputs)[0].shape)
    if "decode" in parts.functions and (name == "any" or not labelled):
        name, reason = "detection", "taken as detection: there is a decode, which makes boxes of the answer"
    return Chosen(name, reason, _parts_for(name, parts, decode), labelled, alone)
