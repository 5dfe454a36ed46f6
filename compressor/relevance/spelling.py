"""A composite as text and back: a preset's name or a JSON table, as a recipe's `composite` holds it.

Everything that can be wrong in such a text is a RecipeError naming the field. Knows no file and no network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from ..errors import RecipeError, did_you_mean
from ..files import Json
from .composite import BY_DEPTH, LAYERS, OWNERS, PRESETS, RULES, SPACE, Composite, Rule, preset, require_inside

_LARGEST = 1e30  # float32, in which rules compute, ends at 3e38; NaN is in no range


def composite_of(text: str) -> Composite:
    """A recipe's `composite`: empty for the default, a preset's name, or a table spelled as JSON.

    `{"low": {"name": "gamma", "gamma": 0.3}, "fc": "epsilon", "linear": "depth", "softmax": "cp"}`: what is not
    named stays as in the default. Raises RecipeError naming the field.
    """
    if not text:
        return Composite()
    if not text.lstrip().startswith("{"):
        return preset(text)
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"the LRP composite {text[:200]!r} is not valid JSON: {error}") from error
    _require_names(table, Composite, "an LRP composite has no field")
    choices: dict[str, Any] = {name: _entry(name, value) for name, value in table.items()}
    return replace(Composite(), **choices)


def _require_names(table: Mapping[str, Json], record: type[Composite | Rule], complaint: str) -> None:
    """Raises RecipeError for a key that is no field of the record."""
    names = [field.name for field in fields(record)]
    for name in table:
        if name not in names:
            raise RecipeError(f"{complaint} {name!r}.{did_you_mean(name, names)}")


def _entry(name: str, value: Json) -> object:
    """One field of a composite from what JSON says of it."""
    if name in _READERS:
        return _READERS[name](name, value)
    axis = next(axis for axis in SPACE if axis.field == name)
    require_inside(axis, value)
    return value


def _rule_of(layer: str, value: Json) -> Rule | None:
    """`"zplus"`, `{"name": "gamma", "gamma": 0.3}` or, for inner linear layers, `"depth"`."""
    match value:
        case str() if value == BY_DEPTH and layer == "linear":
            return None
        case str():
            # a name of RULES may stand for parameters too ("zplus-unbiased"); Rule itself refuses unknown ones
            return RULES[value] if value in RULES else Rule(value)  # type: ignore[arg-type]
        case dict() if "name" in value:
            return _rule_of_table(layer, value)
        case _:
            raise RecipeError(
                f'{layer} = {value!r} is no LRP rule; write a name or a table as {{"name": "gamma", ...}}'
            )


def _rule_of_table(layer: str, table: Mapping[str, Any]) -> Rule:
    """`{"name": "gamma", "gamma": 0.3}`, with or without `bias` and `box`."""
    _require_names(table, Rule, f"the rule of {layer!r} has no parameter")
    numbers = {name: _number(f"{layer}.{name}", table[name]) for name in OWNERS if name in table}
    bias = table.get("bias", True)
    if not isinstance(bias, bool):
        raise RecipeError(f"{layer}.bias = {bias!r} is neither true nor false")
    # Rule itself refuses unknown names
    return Rule(table["name"], bias=bias, box=_box(layer, table.get("box")), **numbers)


def _box(layer: str, value: Json) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The lowest and the highest pixel values, one for each channel."""
    match value:
        case None:
            return None
        case [list() as low, list() as high]:
            return tuple(_numbers(f"{layer}.box", low)), tuple(_numbers(f"{layer}.box", high))
        case _:
            raise RecipeError(f"{layer}.box = {value!r} is not the lowest and the highest values, [[...], [...]]")


def _boundaries(name: str, value: Json) -> tuple[float, float]:
    match _numbers(name, value):
        case [low, high] if 0 <= low <= high <= 1:
            return low, high
        case _:
            raise RecipeError(f"{name} = {value!r} are not two shares of the depth, 0 <= low <= high <= 1")


def _numbers(name: str, value: Json) -> list[float]:
    """The numbers of a JSON list; of anything else none."""
    if not isinstance(value, list):
        return []
    return [_number(name, number) for number in value]


def _number(name: str, value: Json) -> float:
    match value:
        case True | False:  # would pass as the numbers 1 and 0
            pass
        case int() | float() if -_LARGEST < value < _LARGEST:
            return float(value)
    raise RecipeError(f"{name} = {repr(value)[:80]} is not a number, or none of a size that counts")


# how each field is read that is no choice of the space
_READERS: Mapping[str, Callable[[str, Json], object]] = {
    **dict.fromkeys(LAYERS, _rule_of),
    "boundaries": _boundaries,
    "epsilon": _number,
}


def to_text(composite: Composite) -> str:
    """The composite as `composite_of` reads it: a preset's name where it is one, else JSON of all its fields."""
    for name, preset_composite in PRESETS.items():
        if composite == preset_composite:
            return name
    return json.dumps({field.name: _spelled(getattr(composite, field.name)) for field in fields(composite)})


def _spelled(value: object) -> object:
    """A composite's field as JSON holds it."""
    match value:
        case None:
            return BY_DEPTH
        case Rule():
            return _spelled_rule(value)
        case tuple():
            return list(value)
        case _:
            return value


def _spelled_rule(rule: Rule) -> object:
    """Its name alone where the rest is as always, else a table."""
    names = [name for name, rules_with_it in OWNERS.items() if rule.name in rules_with_it]
    parameters: dict[str, object] = {name: getattr(rule, name) for name in names}
    if rule.epsilon != Rule(rule.name).epsilon:
        parameters["epsilon"] = rule.epsilon
    if not rule.bias:
        parameters["bias"] = False
    if rule.box is not None:
        parameters["box"] = [list(bound) for bound in rule.box]
    if not parameters:
        return rule.name
    return {"name": rule.name, **parameters}
