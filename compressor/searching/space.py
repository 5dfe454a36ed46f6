"""What a search walks on one network: axes that change its scores, and points of them as recipes and back.

An axis or a value that changes no score of this network (a softmax rule without a softmax, the rule of a layer that
only the image feeds) is found by trying it on a few images, and left out. Knows no study and no accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np

from ..criteria import AtNodes, Per, Place, Sign, Start
from ..errors import CompressorError, RecipeError, did_you_mean
from ..recipe import Recipe, StartClass
from ..records import FloatArray, Group, Scores
from ..relevance.composite import BY_DEPTH, PRESETS, SPACE, Axis, Choice, Composite, Point, Range, at, point_of
from ..relevance.criteria import criterion_named
from ..relevance.spelling import composite_of, to_text

SAME = 1e-2  # of a mean score: what moves no unit by so much (a stabiliser, the order of sums) decides no plan
_DEPTHS = ("low", "mid", "high")
_OTHER_RULE = "alphabeta"  # unlike the rule of any preset
USUAL = "usual"  # the criterion's own
_READING: tuple[Choice, ...] = (
    Choice("start", get_args(Start)),
    Choice("start_class", get_args(StartClass)),
    Choice("sign", get_args(Sign)),
    Choice("per", (USUAL, *get_args(Per))),
    Choice("place", get_args(Place)),
)
_RANKING: tuple[Axis, ...] = (
    Choice("reduction", ("sum", "mean", "max")),
    Choice("normalisation", ("measured", "mean", "sum", "max", "l2", "none")),
    Choice("scope", ("global", "isomorphic", "uniform")),
    Range("per_cost", 0.0, 1.0, logarithmic=False, when=("scope", ("global", "isomorphic"))),
)

_READING_FIELDS = tuple(axis.field for axis in _READING)
_RANKING_FIELDS = tuple(axis.field for axis in _RANKING)
_HOLDABLE = [*_READING_FIELDS, *_RANKING_FIELDS]

Probe = Callable[[Recipe], Scores]
# a recipe's fields by name, each in its own type
RecipeFields = Mapping[str, Any]
# by axis and value, the earlier value it can't be told from
Aliases = dict[tuple[str, str], str]


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
            if _is_asked(axis, point):
                point[axis.field] = suggest(axis)
        return point


def _is_asked(axis: Axis, point: Point) -> bool:
    if axis.when is None:
        return True
    name, values = axis.when
    return point.get(name) in values


def require_holdable(held: Sequence[str]) -> None:
    """Raises RecipeError for a name that is no choice outside the composite."""
    for name in held:
        if name not in _HOLDABLE:
            hint = did_you_mean(name, _HOLDABLE)
            raise RecipeError(f"held = {name!r}: what can be held is {', '.join(_HOLDABLE)}.{hint}")


def find_space(
    base: Recipe, families: Sequence[str], groups: Sequence[Group], probe: Probe, held: Sequence[str] = ()
) -> Space:
    """The axes of these criteria that count on this network; `probe` scores a few images by a recipe.

    `held` names choices that stay as `base` has them and get no axis.
    """
    several = len(families) > 1
    axes: list[Axis] = [Choice("criterion", tuple(families))] if several else []
    aliases: Aliases = {}
    by_depth = False
    for family in families:
        probed = _Probed(replace(base, **_unread(base, held), criterion=family, composite=""), probe)
        family_axes: list[Axis] = []
        if family == "lrp":
            by_depth, family_axes = _composite_axes(probed, aliases)
        if isinstance(criterion_named(family), AtNodes):
            family_axes += _reading_axes(probed, aliases, family, held)
        axes += [_within(family, axis, several=several) for axis in family_axes]

    axes += _ranking_axes(base, groups, held)
    return Space(base, tuple(axes), aliases, by_depth, tuple(held))


def _ranking_axes(base: Recipe, groups: Sequence[Group], held: Sequence[str]) -> list[Axis]:
    """How scores become an order; how sites are reduced counts only where a group has several."""
    settled = {*held}
    if not any(len(group.sites) > 1 for group in groups if group.kind in base.units):
        settled.add("reduction")
    axes: list[Axis] = []
    for axis in _RANKING:
        if axis.field not in settled:
            axes += _beside(axis, base, held)
    return axes


def _beside(axis: Axis, base: Recipe, held: Sequence[str]) -> list[Axis]:
    """The axis beside choices that are held; none where one of them leaves it without a meaning."""
    if axis.when is None or axis.when[0] not in held:
        return [axis]
    name, values = axis.when
    if getattr(base, name) in values:
        return [replace(axis, when=None)]  # in any case, as no other axis will say what it depends on
    return []


@dataclass(slots=True)
class _Probed:
    """Scores of a few images by variants of one recipe, each computed once; None where the criterion refuses one."""

    base: Recipe
    probe: Probe
    by_recipe: dict[Recipe, Scores | None] = field(default_factory=dict)

    def scores(self, changed: RecipeFields) -> Scores | None:
        recipe = replace(self.base, **changed)
        if recipe not in self.by_recipe:
            try:
                self.by_recipe[recipe] = self.probe(recipe)
            except CompressorError:
                self.by_recipe[recipe] = None  # a value this criterion refuses
        return self.by_recipe[recipe]

    def differ(self, first: RecipeFields, second: RecipeFields) -> bool:
        """Whether two changes of the recipe give other scores; a refused one differs from nothing."""
        first_scores, second_scores = self.scores(first), self.scores(second)
        if first_scores is None or second_scores is None:
            return False
        return not _same(first_scores, second_scores)

    def composites_differ(self, first: Composite, second: Composite) -> bool:
        return self.differ({"composite": to_text(first)}, {"composite": to_text(second)})


def _same(first: Scores, second: Scores) -> bool:
    return all(_relative(scores - second.values[group], scores) <= SAME for group, scores in first.values.items())


def _relative(difference: FloatArray, scores: FloatArray) -> float:
    """The largest difference, in mean scores."""
    return float(np.abs(difference).max() / max(float(np.abs(scores).mean()), np.finfo(float).tiny))


def _composite_axes(probed: _Probed, aliases: Aliases) -> tuple[bool, list[Axis]]:
    """Whether the network's inner layers are all linear, and the axes of the composite that change its scores."""
    base = Composite()
    counts = {layer: _rule_counts(probed, base, layer) for layer in (*_DEPTHS, "fc", "linear", "first")}
    # the same where inner linear layers follow their depth group: then its rule is theirs too
    deep = at({"linear.rule": BY_DEPTH})
    counts_deep = {layer: _rule_counts(probed, deep, layer) for layer in _DEPTHS}
    by_depth = counts["linear"] and not any(map(counts.get, _DEPTHS))
    if by_depth:  # they follow their depth group in every point, so a rule of their own is not asked
        counts |= {**counts_deep, "linear": False}

    axes: list[Axis] = []
    for axis in sorted(SPACE, key=lambda axis: not axis.field.startswith("linear")):  # others may depend on it
        layer, _, parameter = axis.field.partition(".")
        if not parameter:
            axes += _plain_axis(probed, axis, aliases)
        elif counts[layer]:
            axes.append(axis)
        elif counts_deep.get(layer):
            # the depth group holds linear layers alone: its rule is asked where they follow it
            if parameter == "rule":
                axis = replace(axis, when=("linear.rule", (BY_DEPTH,)))
            axes.append(axis)
    return by_depth, axes


def _rule_counts(probed: _Probed, base: Composite, layer: str) -> bool:
    """Whether another rule for that layer changes the scores."""
    return probed.composites_differ(base, at({f"{layer}.rule": _OTHER_RULE}, base))


def _plain_axis(probed: _Probed, axis: Axis, aliases: Aliases) -> list[Axis]:
    """An axis of no layer (`softmax`, `epsilon`), where it counts; of a range, its ends are tried."""
    if isinstance(axis, Range):
        lowest, highest = at({axis.field: axis.lowest}), at({axis.field: axis.highest})
        if not probed.composites_differ(lowest, highest):
            return []
        return [axis]

    def differ(first: str, second: str) -> bool:
        return probed.composites_differ(at({axis.field: first}), at({axis.field: second}))

    return _thinned(axis, axis.values, differ, "lrp", aliases)


def _reading_axes(probed: _Probed, aliases: Aliases, family: str, held: Sequence[str]) -> list[Axis]:
    """The ways of reading scores off the network that differ here, but for those that are held."""
    axes: list[Axis] = []
    for axis in _READING:
        if axis.field not in held:
            axes += _reading_axis(probed, axis, aliases, family)
    return axes


def _reading_axis(probed: _Probed, axis: Choice, aliases: Aliases, family: str) -> list[Axis]:
    """Of values that read the same scores the first stands for all; none that the criterion refuses."""
    changes = {value: {axis.field: _recipe_value(value)} for value in axis.values}
    accepted = [value for value in axis.values if probed.scores(changes[value]) is not None]

    def differ(first: str, second: str) -> bool:
        return probed.differ(changes[first], changes[second])

    return _thinned(axis, accepted, differ, family, aliases)


def _recipe_value(value: str | float) -> str | float:
    """A recipe says `usual` by saying nothing."""
    return "" if value == USUAL else value


def _thinned(
    axis: Choice,
    values: Sequence[str],
    differ: Callable[[str, str], bool],
    family: str,
    aliases: Aliases,
) -> list[Axis]:
    """The axis with one value for all that can't be told apart; none where that leaves no choice."""
    kept: list[str] = []
    for value in values:
        twin = next((earlier for earlier in kept if not differ(value, earlier)), None)
        if twin is None:
            kept.append(value)
        else:
            aliases[f"{family}.{axis.field}", value] = twin
    if len(kept) < 2:
        return []
    return [replace(axis, values=tuple(kept))]


def _within(family: str, axis: Axis, *, several: bool) -> Axis:
    """The axis as its family's own: `sign` becomes `lrp.sign`, asked where that criterion was chosen among several."""
    when = None
    if axis.when is not None:
        name, values = axis.when
        when = (f"{family}.{name}", values)
    elif several:
        when = ("criterion", (family,))
    return replace(axis, field=f"{family}.{axis.field}", when=when)


def recipe_at(space: Space, point: Point) -> Recipe:
    """The recipe a point of the space stands for; what no axis says is as in the space's `base`."""
    criterion = str(point.get("criterion") or _only_family(space))
    changed = _unread(space.base, space.held)
    rules: dict[str, str | float] = {}
    for name, value in point.items():
        family, _, inner_name = name.partition(".")  # `lrp.low.rule`, but `scope` is of no family
        if name in _RANKING_FIELDS:
            changed[name] = value
        elif family == criterion and inner_name in _READING_FIELDS:
            changed[inner_name] = _recipe_value(value)
        elif family == criterion:
            rules[inner_name] = value

    composite = ""
    if criterion == "lrp":
        base = at({"linear.rule": BY_DEPTH}) if space.by_depth else Composite()
        composite = to_text(at(rules, base))
    return replace(space.base, **changed, criterion=criterion, composite=composite)


def _unread(base: Recipe, held: Sequence[str]) -> dict[str, Any]:
    """The recipe's fields for a criterion as its paper reads it, but for what is held."""
    fields = {"start": "", "start_class": "true", "sign": "", "per": "", "place": ""}
    for name in fields:
        if name in held:
            fields[name] = getattr(base, name)
    return fields


def _only_family(space: Space) -> str:
    """Of a space without a `criterion` axis; one whose criterion has no axis of its own keeps the recipe's."""
    families = {axis.field.partition(".")[0] for axis in space.axes if "." in axis.field}
    return families.pop() if families else space.base.criterion


def point_at(space: Space, recipe: Recipe) -> dict[str, str | float]:
    """The point a recipe stands at, `recipe_at`'s inverse. Raises RecipeError where the space can't say it."""
    # every axis there may be; the space asks for those it has
    values: dict[str, str | float] = {"criterion": recipe.criterion}
    values |= {name: getattr(recipe, name) for name in _RANKING_FIELDS}
    values |= {f"{recipe.criterion}.{name}": value for name, value in _reading_of(recipe).items()}
    if recipe.criterion == "lrp":
        composite = composite_of(recipe.composite)
        if space.by_depth and composite.linear is not None:
            # the same rule for every layer of a network of linear layers alone, said by depth
            rule = composite.linear
            composite = replace(composite, low=rule, mid=rule, high=rule, linear=None)
        values |= {f"lrp.{name}": value for name, value in point_of(composite).items()}

    def value_on(axis: Axis) -> str | float:
        value = values[axis.field]
        value = space.aliases.get((axis.field, str(value)), value)
        if not _is_inside(axis, value):
            raise RecipeError(
                f"the search's space has no {axis.field} = {value!r}, from which the recipe starts; start from another"
            )
        return value

    return space.walk(value_on)


def _is_inside(axis: Axis, value: str | float) -> bool:
    if isinstance(axis, Choice):
        return value in axis.values
    return axis.lowest <= float(value) <= axis.highest


# a criterion that is not read at nodes has no such row: the record's defaults stand for it
_NOT_AT_NODES = AtNodes(summary="", prepare="")


def _reading_of(recipe: Recipe) -> dict[str, str]:
    """How scores are read off the network: as the recipe says, else as the criterion's row does."""
    row = criterion_named(recipe.criterion)
    usual = row if isinstance(row, AtNodes) else _NOT_AT_NODES
    return {
        "start": recipe.start or usual.start or "one",
        "start_class": recipe.start_class,
        "sign": recipe.sign or usual.sign,
        "per": recipe.per or usual.per or USUAL,
        "place": recipe.place or usual.place,
    }


def presets(space: Space, families: Sequence[str]) -> dict[str, dict[str, str | float]]:
    """What the search has to beat, by name: the recipe as it came, LRP's presets, each criterion as published.

    Presets that are one point of the space are one entry, `recipe = lrp yeom2021`. Raises RecipeError where the
    space has no point for one.
    """
    plain = replace(space.base, **_unread(space.base, space.held), composite="")
    named = {"recipe": space.base}
    for family in families:
        if family == "lrp":
            named |= {f"lrp {name}": replace(plain, criterion="lrp", composite=name) for name in PRESETS}
        else:
            named[family] = replace(plain, criterion=family)

    points: dict[str, dict[str, str | float]] = {}
    for name, recipe in named.items():
        point = point_at(space, recipe)
        twin = next((earlier for earlier, taken in points.items() if taken == point), None)
        if twin is None:
            points[name] = point
        else:
            points[f"{twin} = {name}"] = points.pop(twin)
    return points
