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
    known = [f.name for f in fields(Composite)]
    for name in table:
        if name not in known:
            raise RecipeError(f"an LRP composite has no field {name!r}.{did_you_mean(name, known)}")
    found: Any = {name: _entry(name, value) for name, value in table.items()}
    return replace(Composite(), **found)


def _entry(name: str, value: Any) -> Any:
    if name in LAYERS:
        return _rule_of(name, value)
    if name == "boundaries":
        return _boundaries(value)
    if name == "epsilon":
        return _number(name, value)
    axis = next(axis for axis in SPACE if axis.field == name)
    require_inside(axis, value)
    return value


def _rule_of(layer: str, value: Any) -> Rule | None:
    """`"zplus"`, `{"name": "gamma", "gamma": 0.3}` or, for inner linear layers, `"depth"`."""
    if value == BY_DEPTH and layer == "linear":
        return None
    if isinstance(value, str):
        return RULES[value] if value in RULES else Rule(value)  # type: ignore[arg-type]
    if not isinstance(value, dict) or "name" not in value:
        raise RecipeError(f'{layer} = {value!r} is no LRP rule; write a name or a table as {{"name": "gamma", ...}}')
    known = [f.name for f in fields(Rule)]
    for name in value:
        if name not in known:
            raise RecipeError(f"the rule of {layer!r} has no parameter {name!r}.{did_you_mean(name, known)}")
    numbers = {name: _number(f"{layer}.{name}", value[name]) for name in OWNERS if name in value}
    bias, box = value.get("bias", True), value.get("box")
    if not isinstance(bias, bool):
        raise RecipeError(f"{layer}.bias = {bias!r} is neither true nor false")
    return Rule(value["name"], bias=bias, box=None if box is None else _box(layer, box), **numbers)


def _box(layer: str, value: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if (
        not isinstance(value, (list, tuple))
        or len(value) != 2
        or not all(isinstance(side, (list, tuple)) for side in value)
    ):
        raise RecipeError(f"{layer}.box = {value!r} is not the lowest and the highest values, [[...], [...]]")
    low, high = (tuple(_number(f"{layer}.box", v) for v in side) for side in value)
    return low, high


def _boundaries(value: Any) -> tuple[float, float]:
    pair = tuple(_number("boundaries", v) for v in value) if isinstance(value, (list, tuple)) else ()
    if len(pair) != 2 or not 0 <= pair[0] <= pair[1] <= 1:
        raise RecipeError(f"boundaries = {value!r} are not two shares of the depth, 0 <= low <= high <= 1")
    return pair


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_LARGEST < value < _LARGEST:
        raise RecipeError(f"{name} = {repr(value)[:80]} is not a number, or none of a size that counts")
    return float(value)


def to_text(composite: Composite) -> str:
    """The composite as `composite_of` reads it: a preset's name where it is one, else JSON of all its fields."""
    for name, known in PRESETS.items():
        if composite == known:
            return name
    table = {f.name: _spelled(getattr(composite, f.name)) for f in fields(composite)}
    return json.dumps({name: BY_DEPTH if value is None else value for name, value in table.items()})


def _spelled(value: Any) -> Any:
    if not isinstance(value, Rule):
        return list(value) if isinstance(value, tuple) else value
    own = {p: getattr(value, p) for p, owners in OWNERS.items() if value.name in owners}
    own |= {} if value.epsilon == Rule(value.name).epsilon else {"epsilon": value.epsilon}
    own |= {} if value.bias else {"bias": False}
    own |= {} if value.box is None else {"box": [list(side) for side in value.box]}
    return {"name": value.name, **own} if own else value.name
