"""Scores to an order of removal: which units, in chunks of what the target likes, go first.

Sites are reduced to one score a unit, scores made comparable across groups, and units of a group cut into
chunks (heads one by one, channels eight by eight) so that every prefix of the order is a usable network.
Knows no cost but the one handed in; `budget.py` decides how long a prefix goes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import numpy as np

from ..pruning.coupling import spared, units_by_row
from ..records import FloatArray, Group, IntArray, Scores, UnitKind

Reduction = Literal["sum", "mean", "max"]
Normalisation = Literal["mean", "sum", "max", "l2", "none"]
Scope = Literal["global", "isomorphic", "uniform"]

REDUCTIONS: Mapping[str, Callable[[FloatArray], FloatArray]] = {
    "sum": lambda scores: scores.sum(axis=0),
    "mean": lambda scores: scores.mean(axis=0),
    "max": lambda scores: scores.max(axis=0),
}
"""[sites, units] to [units]."""

NORMALISATIONS: Mapping[str, Callable[[FloatArray], float]] = {
    "mean": lambda scores: float(np.abs(scores).mean()),
    "sum": lambda scores: float(np.abs(scores).sum()),
    "max": lambda scores: float(np.abs(scores).max()),
    "l2": lambda scores: float(np.sqrt((scores**2).sum())),
    "none": lambda scores: 1.0,
}
"""[units] to what the scores of a site are divided by."""


@dataclass(frozen=True, slots=True)
class RankingOptions:
    """How scores become an order.

    `least` is the share of each group that always stays; `multiple` what kept counts are rounded to (heads
    and convolution groups are never rounded), or the largest power of two within the share `largest_step` of the
    group's width, where that is less; `steps` the same for the groups named there; `per_cost` the power of what a unit
    costs that a score is divided by.
    """

    reduction: Reduction = "sum"
    normalisation: Normalisation = "mean"
    scope: Scope = "global"
    per_cost: float = 0.5
    kinds: tuple[UnitKind, ...] = ("channel", "neuron", "stream", "head", "conv_group")
    least: float = 0.1
    multiple: int = 8
    largest_step: float = 1.0
    steps: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next units of a group to go, and of those it is coupled with; `key` orders all chunks, lowest first."""

    group: str
    units: IntArray
    key: float
    also: tuple[tuple[str, IntArray], ...] = ()


def importance(group: Group, scores: Scores, options: RankingOptions) -> FloatArray:
    """[units] one score for each unit, comparable across groups: each site by itself, then all of them."""
    scale = NORMALISATIONS[options.normalisation]
    sites: list[FloatArray] = []
    for site_scores in scores.values[group.name]:
        divisor = scale(site_scores) or 1.0  # scores that are all zero stay so
        sites.append(site_scores / divisor)
    return REDUCTIONS[options.reduction](np.stack(sites))


def channels_per_unit(group: Group) -> float:
    """How many channels go with a unit (a head's dimensions, for instance), as a mean over the group's sites."""
    own = [site.units[site.units >= 0] for site in group.sites]  # -1 is a channel of another group
    return float(np.mean([len(units) / len(np.unique(units)) for units in own]))


def bundles_of(groups: Sequence[Group], coupled: Sequence[Collection[str]]) -> list[list[Group]]:
    """Groups that lose equally many together, every other one by itself."""
    first_of: dict[str, str] = {}
    for members in coupled:
        first_of |= dict.fromkeys(members, min(members))

    bundles: dict[str, list[Group]] = {}
    for group in groups:
        bundles.setdefault(first_of.get(group.name, group.name), []).append(group)
    return list(bundles.values())


def order_of_removal(
    groups: Sequence[Group],
    scores: Scores,
    options: RankingOptions,
    *,
    unit_cost: Mapping[str, float] | None = None,
    spans: Mapping[str, Sequence[IntArray]] = MappingProxyType({}),
    coupled: Sequence[Collection[str]] = (),
) -> list[Chunk]:
    """Chunks of every group that may be pruned and was scored, first to go first; each group's in order.

    `unit_cost` is what a channel of each group costs, `spans` are a structure's sets of units of which one must stay,
    `coupled` its groups that lose equally many.
    """
    multiple_of = _multiples(groups, options, coupled)
    chunks: dict[str, list[Chunk]] = {}
    for group in groups:
        is_scored = group.name in scores.values
        if not is_scored or group.kind not in options.kinds:
            continue
        values = importance(group, scores, options)
        if options.per_cost and unit_cost:  # of two units that are worth the same the costlier goes first
            values = values / max(unit_cost[group.name], 1e-12) ** options.per_cost
        group_options = replace(options, multiple=multiple_of[group.name])
        never = spared(group, values, spans.get(group.name, ()))
        chunks[group.name] = _chunks(group, values, group_options, never)

    for members in coupled:
        _couple(chunks, members)
    if options.scope != "global":
        chunks = _ranked_within(groups, chunks, options.scope)
    unsorted = itertools.chain.from_iterable(chunks.values())
    return sorted(unsorted, key=lambda chunk: chunk.key)  # stable: of equal keys the earlier group's first


def _multiples(groups: Sequence[Group], options: RankingOptions, coupled: Sequence[Collection[str]]) -> dict[str, int]:
    """What kept counts are rounded to, by group: of coupled groups the largest."""
    multiple_of = {group.name: options.steps.get(group.name) or step_of(_width(group), options) for group in groups}
    for members in coupled:
        largest = max(multiple_of.get(member, 1) for member in members)
        multiple_of |= dict.fromkeys(members, largest)
    return multiple_of


def _width(group: Group) -> int:
    """How many units a row has that may go by themselves."""
    rows = len(np.unique(group.rows)) if group.balanced else 1
    return group.size // rows


def step_of(width: int, options: RankingOptions) -> int:
    """What the kept count of a group so wide is rounded to: with steps of an eighth, 2 of 16, 4 of 32, 8 of 64."""
    if options.largest_step >= 1:
        return options.multiple
    most = max(1, int(options.largest_step * width))
    return min(options.multiple, 1 << (most.bit_length() - 1))


def _couple(chunks: dict[str, list[Chunk]], members: Collection[str]) -> None:
    """Makes one list of chunks of the members' lists; where one of them may lose nothing, none may."""
    lists = [chunks.pop(name, []) for name in sorted(members)]
    joint = list(map(_joint, *lists))  # as many as the shortest list has
    if joint:
        chunks[joint[0].group] = joint


def _joint(first: Chunk, *others: Chunk) -> Chunk:
    """One chunk of several groups', which go together."""
    key = float(np.mean([chunk.key for chunk in (first, *others)]))
    also = tuple((chunk.group, chunk.units) for chunk in others)
    return Chunk(first.group, first.units, key, also)


def _chunks(group: Group, values: FloatArray, options: RankingOptions, never: IntArray) -> list[Chunk]:
    """The group's units in the order in which they go, all rows alike; `never` ones are ranked last and stay."""
    order_by = values.copy()
    order_by[never] = np.inf
    ranked_rows = [units[np.argsort(order_by[units], kind="stable")] for units in units_by_row(group)]
    width = len(ranked_rows[0])
    table = np.stack([units[:width] for units in ranked_rows])  # [rows, width], least important first

    chunks: list[Chunk] = []
    gone, floor = 0, -np.inf
    for stop in _stops(width, group.kind, options, len(never)):
        units = np.sort(table[:, gone:stop].reshape(-1))
        gone = stop
        floor = max(floor, float(values[units].mean()))  # a group's chunks keep their order in any sorting
        chunks.append(Chunk(group.name, units, floor))
    return chunks


def _stops(width: int, kind: UnitKind, options: RankingOptions, spared_count: int) -> list[int]:
    """How many of `width` units are gone after each chunk.

    width 20, multiple 8, least 0.1: 16 stay, then 8 (0.1 asks for 2, a multiple of 8 for 8): [4, 12].
    """
    multiple = 1 if kind in ("head", "conv_group") else min(options.multiple, width)
    # a group no wider than the multiple loses nothing: its whole width is the least
    share = round(options.least * width, 6)  # 0.55 of 100 is 55.00000000000001 in floating point, and means 55
    least = max(1, multiple, spared_count, int(np.ceil(share)))
    staying = [count for count in range(width - 1, least - 1, -1) if count % multiple == 0]
    return [width - count for count in staying]


def _ranked_within(groups: Sequence[Group], chunks: Mapping[str, list[Chunk]], scope: Scope) -> dict[str, list[Chunk]]:
    """Keys become the rank in the group's own family, so that every family loses the same share.

    With "uniform" each group is a family, else all groups of one kind that are seen at equally many sites.
    """
    family_of = {group.name: f"{group.kind}/{len(group.sites)}" for group in groups}
    families: dict[str, list[Chunk]] = {}
    for name, members in chunks.items():
        families.setdefault(name if scope == "uniform" else family_of[name], []).extend(members)

    ranked: dict[str, list[Chunk]] = {name: [] for name in chunks}
    for family in families.values():
        family.sort(key=lambda chunk: chunk.key)
        for i, chunk in enumerate(family):
            ranked[chunk.group].append(replace(chunk, key=(i + 1) / len(family)))
    return ranked
