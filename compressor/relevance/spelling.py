"""A composite as text and back: a preset's name or a JSON table, as a recipe's `composite` holds it.

Everything that can be wrong in such a text is a RecipeError naming the field. Knows no file and no network.
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

from ..errors import RecipeError, did_you_mean
from .composite import BY_DEPTH, LAYERS, OWNERS, PRESETS, RULES, SPACE, Composite, Rule, preset, require_inside

_LARGEST = 1e30  # float32, in which rules compute, ends at 3e38; NaN is in no range


def composite_of(text: str) -> Composite:
    """A recipe's `composite`: empty for the default, a preset's name, or a table spelled as JSON.

    `{"low": {"name": "gamma", "gamma": 0.3}, "fc": "epsilon", "linear": "depth", "softmax": "cp"}`: what is not
    named stays as in the default. Raises RecipeError naming the field.
    """
    if not text.lstrip().startswith("{"):
        return preset(text) if text else Composite()
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"the LRP composite {text[:200]!r} is not valid JSON: {error}") from error
    names = [field.name for field in fields(Composite)]
    for name in table:
        if name not in names:
            raise RecipeError(f"an LRP composite has no field {name!r}.{did_you_mean(name, names)}")
    choices: dict[str, Any] = {name: _entry(name, value) for name, value in table.items()}
    return replace(Composite(), **choices)


def _entry(name: str, value: Any) -> Any:
    """One field of a composite from what JSON says of it."""
    if name in LAYERS:
        return _rule_of(name, value)
    if name == "boundaries":
        return _boundaries(value)
    if name == "epsilon":
        return _number(name, value)
    axis = next(axis for axis in SPACE if axis.field == name)
    require_inside(axis, value)
    return value


def _rule_of(layer: str, value: object) -> Rule | None:
    """`"zplus"`, `{"name": "gamma", "gamma": 0.3}` or, for inner linear layers, `"depth"`."""
    if value == BY_DEPTH and layer == "linear":
        return None
    if isinstance(value, str):
        # a name of RULES may stand for parameters too ("zplus-unbiased"); Rule itself refuses unknown ones
        return RULES[value] if value in RULES else Rule(value)  # type: ignore[arg-type]
    if not isinstance(value, dict) or "name" not in value:
        raise RecipeError(f'{layer} = {value!r} is no LRP rule; write a name or a table as {{"name": "gamma", ...}}')
    names = [field.name for field in fields(Rule)]
    for name in value:
        if name not in names:
            raise RecipeError(f"the rule of {layer!r} has no parameter {name!r}.{did_you_mean(name, names)}")

    numbers = {name: _number(f"{layer}.{name}", value[name]) for name in OWNERS if name in value}
    bias = value.get("bias", True)
    if not isinstance(bias, bool):
        raise RecipeError(f"{layer}.bias = {bias!r} is neither true nor false")
    box = None if value.get("box") is None else _box(layer, value["box"])
    return Rule(value["name"], bias=bias, box=box, **numbers)


def _box(layer: str, value: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not _is_pair_of_lists(value):
        raise RecipeError(f"{layer}.box = {value!r} is not the lowest and the highest values, [[...], [...]]")
    low = tuple(_number(f"{layer}.box", pixel) for pixel in value[0])
    high = tuple(_number(f"{layer}.box", pixel) for pixel in value[1])
    return low, high


def _is_pair_of_lists(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    return all(isinstance(bound, (list, tuple)) for bound in value)


def _boundaries(value: object) -> tuple[float, float]:
    shares = value if isinstance(value, (list, tuple)) else ()
    pair = tuple(_number("boundaries", share) for share in shares)
    if len(pair) != 2 or not 0 <= pair[0] <= pair[1] <= 1:
        raise RecipeError(f"boundaries = {value!r} are not two shares of the depth, 0 <= low <= high <= 1")
    return pair


def _number(name: str, value: object) -> float:
    # JSON's true would pass as the number 1
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_LARGEST < value < _LARGEST:
        raise RecipeError(f"{name} = {repr(value)[:80]} is not a number, or none of a size that counts")
    return float(value)


def to_text(composite: Composite) -> str:
    """The composite as `composite_of` reads it: a preset's name where it is one, else JSON of all its fields."""
    for name, preset_composite in PRESETS.items():
        if composite == preset_composite:
            return name
    table: dict[str, object] = {}
    for field in fields(composite):
        value = getattr(composite, field.name)
        table[field.name] = BY_DEPTH if value is None else _spelled(value)
    return json.dumps(table)


def _spelled(value: object) -> object:
    """A composite's field as JSON holds it; a rule as its name alone where the rest is as always."""
    if isinstance(value, tuple):
        return list(value)
    if not isinstance(value, Rule):
        return value

    parameters: dict[str, object] = {}
    for name, rules_with_it in OWNERS.items():
        if value.name in rules_with_it:
            parameters[name] = getattr(value, name)
    if value.epsilon != Rule(value.name).epsilon:
        parameters["epsilon"] = value.epsilon
    if not value.bias:
        parameters["bias"] = False
    if value.box is not None:
        parameters["box"] = [list(bound) for bound in value.box]
    return {"name": value.name, **parameters} if parameters else value.name
