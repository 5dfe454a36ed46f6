"""What a search walks on one network: axes that change its scores, and points of them as recipes and back.

An axis or a value that changes no score of this network (a softmax rule without a softmax, the rule of a layer that
only the image feeds) is found by trying it on a few images, and left out. Knows no study and no accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import CompressorError, RecipeError, did_you_mean
from ..recipe import Recipe
from ..records import Group, Scores
from ..relevance.composite import BY_DEPTH, PRESETS, SPACE, Axis, Choice, Composite, Point, Range, at, point_of
from ..relevance.criteria import AtNodes, criterion_named
from ..relevance.spelling import composite_of, to_text

SAME = 1e-2  # of a mean score: what moves no unit by so much (a stabiliser, the order of sums) decides no plan
_DEPTHS = ("low", "mid", "high")
_OTHER_RULE = "alphabeta"  # unlike the rule of any preset
USUAL = "usual"  # the criterion's own
_READING: tuple[Choice, ...] = (
    Choice("start", ("one", "logit", "loss")),
    Choice("start_class", ("true", "predicted")),
    Choice("sign", ("absolute", "signed", "squared")),
    Choice("per", (USUAL, "all", "sample", "position", "element")),
    Choice("place", ("site", "settled")),
)
_RANKING: tuple[Axis, ...] = (
    Choice("reduction", ("sum", "mean", "max")),
    Choice("normalisation", ("measured", "mean", "sum", "max", "l2", "none")),
    Choice("scope", ("global", "isomorphic", "uniform")),
    Range("per_cost", 0.0, 1.0, logarithmic=False, when=("scope", ("global", "isomorphic"))),
)

_HOLDABLE = [axis.field for axis in (*_READING, *_RANKING)]

Probe = Callable[[Recipe], Scores]


@dataclass(frozen=True, slots=True)
class Space:
    """`axes` are named `lrp.low.rule`, `lrp.sign`, `scope`; `criterion` comes first where there are several.

    `aliases` maps a value to the earlier one it can't be told from. With `by_depth`, inner linear layers
    follow their depth group's rule, as there are no inner convolutions. What is `held` stays as `base` has it.
    """

    base: Recipe
    axes: tuple[Axis, ...]
    aliases: Mapping[tuple[str, str], str] = field(default_factory=dict)
    by_depth: bool = False
    held: tuple[str, ...] = ()

    def walk(self, suggest: Callable[[Axis], str | float]) -> dict[str, str | float]:
        """A point, axis by axis; those that do not count where the earlier ones stand are not asked."""
        point: dict[str, str | float] = {}
        for axis in self.axes:
            if axis.when is None or point.get(axis.when[0]) in axis.when[1]:
                point[axis.field] = suggest(axis)
        return point


def require_holdable(held: Sequence[str]) -> None:
    """Raises RecipeError for a name that is no choice outside the composite."""
    for name in held:
        if name not in _HOLDABLE:
            hint = did_you_mean(name, _HOLDABLE)
            raise RecipeError(f"held = {name!r}: what can be held is {', '.join(_HOLDABLE)}.{hint}")


def find_space(
    base: Recipe, families: Sequence[str], groups: Sequence[Group], probe: Probe, held: Sequence[str] = ()
) -> Space:
    """The axes of these criteria that count on this network; `probe` scores a few images by a recipe."""
    axes: list[Axis] = [Choice("criterion", tuple(families))] if len(families) > 1 else []
    aliases: dict[tuple[str, str], str] = {}
    by_depth = False
    for family in families:
        known = _Probed(replace(base, **_unread(base, held), criterion=family, composite=""), probe)
        found: list[Axis] = []
        if family == "lrp":
            by_depth, found = _composite_axes(known, aliases)
        if isinstance(criterion_named(family), AtNodes):
            found += [axis for axis in _distinct(known, aliases, family) if axis.field not in held]
        axes += [_within(family, axis, several=len(families) > 1) for axis in found]
    several_sites = any(len(g.sites) > 1 for g in groups if g.kind in base.units)
    ranking = [axis for axis in _RANKING if axis.field not in held and (axis.field != "reduction" or several_sites)]
    axes += [_asked_by(axis, base, held) for axis in ranking if _counts_beside(axis, base, held)]
    return Space(base, tuple(axes), aliases, by_depth, tuple(held))


def _counts_beside(axis: Axis, base: Recipe, held: Sequence[str]) -> bool:
    """Whether the axis means something beside what is held."""
    return axis.when is None or axis.when[0] not in held or getattr(base, axis.when[0]) in axis.when[1]


def _asked_by(axis: Axis, base: Recipe, held: Sequence[str]) -> Axis:
    return replace(axis, when=None) if axis.when is not None and axis.when[0] in held else axis


@dataclass(slots=True)
class _Probed:
    """Scores of a few images by variants of one recipe, each computed once."""

    base: Recipe
    probe: Probe
    seen: dict[Recipe, Scores | None] = field(default_factory=dict)

    def scores(self, **changed: Any) -> Scores | None:
        recipe = replace(self.base, **changed)
        if recipe not in self.seen:
            try:
                self.seen[recipe] = self.probe(recipe)
            except CompressorError:
                self.seen[recipe] = None  # a value this criterion refuses
        return self.seen[recipe]

    def differ(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        a, b = self.scores(**one), self.scores(**other)
        return a is not None and b is not None and not _same(a, b)

    def composites_differ(self, one: Composite, other: Composite) -> bool:
        return self.differ({"composite": to_text(one)}, {"composite": to_text(other)})


def _same(a: Scores, b: Scores) -> bool:
    return all(_relative(a.values[g] - b.values[g], a.values[g]) <= SAME for g in a.values)


def _relative(difference: Any, values: Any) -> float:
    return float(np.abs(difference).max() / max(float(np.abs(values).mean()), np.finfo(float).tiny))


def _composite_axes(known: _Probed, aliases: dict[tuple[str, str], str]) -> tuple[bool, list[Axis]]:
    """Whether the network's inner layers are all linear, and the axes of the composite that change its scores."""
    base = Composite()
    counts = {layer: _rule_counts(known, base, layer) for layer in (*_DEPTHS, "fc", "linear", "first")}
    deep = at({"linear.rule": BY_DEPTH})
    counts_deep = {layer: _rule_counts(known, deep, layer) for layer in _DEPTHS}
    by_depth = counts["linear"] and not any(counts[layer] for layer in _DEPTHS)
    found: list[Axis] = []
    for axis in sorted(SPACE, key=lambda a: not a.field.startswith("linear")):  # others may depend on it
        layer, _, part = axis.field.partition(".")
        if not part:
            found += _plain_axis(known, axis, aliases)
        elif layer in _DEPTHS and not counts[layer] and counts_deep[layer] and not by_depth:
            found.append(replace(axis, when=("linear.rule", (BY_DEPTH,))) if part == "rule" else axis)
        elif (counts | counts_deep if by_depth else counts)[layer] and not (by_depth and layer == "linear"):
            found.append(axis)
    return by_depth, found


def _rule_counts(known: _Probed, base: Composite, layer: str) -> bool:
    return known.composites_differ(base, at({f"{layer}.rule": _OTHER_RULE}, base))


def _plain_axis(known: _Probed, axis: Axis, aliases: dict[tuple[str, str], str]) -> list[Axis]:
    if isinstance(axis, Range):
        ends = [at({axis.field: value}) for value in (axis.lowest, axis.highest)]
        return [axis] if known.composites_differ(*ends) else []

    def differ(one: str, other: str) -> bool:
        return known.composites_differ(at({axis.field: one}), at({axis.field: other}))

    return _thinned(axis, axis.values, differ, "lrp", aliases)


def _distinct(known: _Probed, aliases: dict[tuple[str, str], str], family: str) -> list[Axis]:
    """The ways of reading scores off the network that differ here; of equal ones the first stands for all."""
    found: list[Axis] = []
    for axis in _READING:
        given = {value: {axis.field: "" if value == USUAL else value} for value in axis.values}
        accepted = tuple(value for value in axis.values if known.scores(**given[value]) is not None)

        def differ(one: str, other: str, given: Mapping[str, Mapping[str, str]] = given) -> bool:
            return known.differ(given[one], given[other])

        found += _thinned(axis, accepted, differ, family, aliases)
    return found


def _thinned(
    axis: Choice,
    values: Sequence[str],
    differ: Callable[[str, str], bool],
    family: str,
    aliases: dict[tuple[str, str], str],
) -> list[Axis]:
    """The axis with one value for all that can't be told apart; none where that leaves no choice."""
    kept: list[str] = []
    for value in values:
        twin = next((other for other in kept if not differ(value, other)), None)
        if twin is None:
            kept.append(value)
        else:
            aliases[f"{family}.{axis.field}", value] = twin
    return [replace(axis, values=tuple(kept))] if len(kept) > 1 else []


def _within(family: str, axis: Axis, *, several: bool) -> Axis:
    when: tuple[str, tuple[str, ...]] | None = ("criterion", (family,)) if several else None
    if axis.when is not None:
        when = (f"{family}.{axis.when[0]}", axis.when[1])
    return replace(axis, field=f"{family}.{axis.field}", when=when)


def recipe_at(space: Space, point: Point) -> Recipe:
    """The recipe a point of the space stands for."""
    criterion = str(point.get("criterion") or _only_family(space))
    own = {n.removeprefix(f"{criterion}."): v for n, v in point.items() if n.startswith(f"{criterion}.")}
    reading = {axis.field for axis in _READING}
    given = {name: "" if value == USUAL else value for name, value in own.items() if name in reading}
    changed: dict[str, Any] = {"composite": "", **_unread(space.base, space.held), **given, "criterion": criterion}
    if criterion == "lrp":
        base = at({"linear.rule": BY_DEPTH}) if space.by_depth else Composite()
        changed["composite"] = to_text(at({n: v for n, v in own.items() if n not in reading}, base))
    changed |= {name: value for name, value in point.items() if name in _ranked()}
    return replace(space.base, **changed)


def _unread(base: Recipe, held: Sequence[str]) -> dict[str, Any]:
    """The criterion as its paper reads it, but for what is held."""
    usual = {"start": "", "start_class": "true", "sign": "", "per": "", "place": ""}
    return {name: getattr(base, name) if name in held else value for name, value in usual.items()}


def _ranked() -> set[str]:
    return {axis.field for axis in _RANKING}


def _only_family(space: Space) -> str:
    named = {axis.field.partition(".")[0] for axis in space.axes if "." in axis.field}
    return named.pop() if named else space.base.criterion


def point_at(space: Space, recipe: Recipe) -> dict[str, str | float]:
    """The point a recipe stands at. Raises RecipeError where the space can't say it."""
    wanted: dict[str, str | float] = {"criterion": recipe.criterion}
    wanted |= {name: getattr(recipe, name) for name in _ranked()}
    wanted |= {f"{recipe.criterion}.{name}": value for name, value in _reading_of(recipe).items()}
    if recipe.criterion == "lrp":
        composite = composite_of(recipe.composite)
        wanted |= {
            f"lrp.{n}": v for n, v in point_of(_follow_depth(composite) if space.by_depth else composite).items()
        }

    def given(axis: Axis) -> str | float:
        value = wanted[axis.field]
        value = space.aliases.get((axis.field, str(value)), value)
        inside = value in axis.values if isinstance(axis, Choice) else axis.lowest <= float(value) <= axis.highest
        if not inside:
            raise RecipeError(
                f"the search's space has no {axis.field} = {value!r}, from which the recipe starts; start from another"
            )
        return value

    return space.walk(given)


def _reading_of(recipe: Recipe) -> dict[str, str]:
    row = criterion_named(recipe.criterion)
    own = row if isinstance(row, AtNodes) else AtNodes(lambda *_: lambda *_: None)
    return {
        "start": recipe.start or own.start or "one",
        "start_class": recipe.start_class,
        "sign": recipe.sign or own.sign,
        "per": recipe.per or own.per or USUAL,
        "place": recipe.place or own.place,
    }


def _follow_depth(composite: Composite) -> Composite:
    """The same rules for a network of linear layers alone, said by depth."""
    rule = composite.linear
    return composite if rule is None else replace(composite, low=rule, mid=rule, high=rule, linear=None)


def presets(space: Space, families: Sequence[str]) -> dict[str, dict[str, str | float]]:
    """What the search has to beat, by name: the recipe as it came, LRP's presets, each criterion as published."""
    plain = replace(space.base, **_unread(space.base, space.held), composite="")
    named = {"recipe": space.base}
    for family in families:
        if family == "lrp":
            named |= {f"lrp {name}": replace(plain, criterion="lrp", composite=name) for name in PRESETS}
        else:
            named[family] = replace(plain, criterion=family)
    found: dict[str, dict[str, str | float]] = {}
    for name, recipe in named.items():
        point = point_at(space, recipe)
        twin = next((other for other, known in found.items() if known == point), None)
        if twin is None:
            found[name] = point
        else:
            found[f"{twin} = {name}"] = found.pop(twin)
    return found
