"""Scores to an order of removal: which units, in chunks of what the target likes, go first.

Sites are reduced to one score a unit, scores made comparable across groups, and units of a group cut into
chunks (heads one by one, channels eight by eight) so that every prefix of the order is a usable network.
Knows no cost but the one handed in; `budget.py` decides how long a prefix goes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from ..records import FloatArray, Group, IntArray, Scores, UnitKind

Reduction = Literal["sum", "mean", "max"]
Normalisation = Literal["mean", "sum", "max", "l2", "none"]
Scope = Literal["global", "isomorphic", "uniform"]

REDUCTIONS: Mapping[str, Callable[[FloatArray], FloatArray]] = {
    "sum": lambda v: v.sum(axis=0),
    "mean": lambda v: v.mean(axis=0),
    "max": lambda v: v.max(axis=0),
}
NORMALISATIONS: Mapping[str, Callable[[FloatArray], float]] = {
    "mean": lambda v: float(np.abs(v).mean()),
    "sum": lambda v: float(np.abs(v).sum()),
    "max": lambda v: float(np.abs(v).max()),
    "l2": lambda v: float(np.sqrt((v**2).sum())),
    "none": lambda v: 1.0,
}


@dataclass(frozen=True, slots=True)
class RankingOptions:
    """How scores become an order.

    `least` is the share of each group that always stays; `multiple` what kept counts are rounded to (heads
    and convolution groups are never rounded), `steps` the same for the groups named there; `per_cost` the power
    of what a unit costs that a score is divided by.
    """

    reduction: Reduction = "sum"
    normalisation: Normalisation = "mean"
    scope: Scope = "global"
    per_cost: float = 0.5
    kinds: tuple[UnitKind, ...] = ("channel", "neuron", "stream", "head", "conv_group")
    least: float = 0.1
    multiple: int = 8
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
    sites = [values / (scale(values) or 1.0) for values in scores.values[group.name]]
    return REDUCTIONS[options.reduction](np.stack(sites))


def channels_per_unit(group: Group) -> float:
    """A head's dimensions, for instance; the mean over the group's sites."""
    return float(np.mean([np.count_nonzero(site.units >= 0) / len(np.unique(site.units)) for site in group.sites]))


def bundles_of(groups: Sequence[Group], coupled: Sequence[Collection[str]]) -> list[list[Group]]:
    """Groups that lose equally many together, every other one by itself."""
    of = {name: min(members) for members in coupled for name in members}
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(of.get(group.name, group.name), []).append(group)
    return list(found.values())


def order_of_removal(
    groups: Sequence[Group],
    scores: Scores,
    options: RankingOptions,
    *,
    unit_cost: Mapping[str, float] | None = None,
    spans: Mapping[str, Sequence[IntArray]] | None = None,
    coupled: Sequence[Collection[str]] = (),
) -> list[Chunk]:
    """Chunks of every group that may be pruned and was scored, first to go first; each group's in order.

    `spans` are a structure's sets of units of which one must stay, `coupled` its groups that lose equally many.
    """
    of = {name: max(options.steps.get(n, options.multiple) for n in members) for members in coupled for name in members}
    chunks: dict[str, list[Chunk]] = {}
    for group in groups:
        if group.kind not in options.kinds or group.name not in scores.values:
            continue
        values = importance(group, scores, options)
        if options.per_cost and unit_cost:
            values = values / max(unit_cost[group.name], 1e-12) ** options.per_cost
        own = replace(options, multiple=of.get(group.name, options.steps.get(group.name, options.multiple)))
        chunks[group.name] = _chunks(group, values, own, spared(group, values, (spans or {}).get(group.name, ())))
    for members in coupled:
        _couple(chunks, members)
    if options.scope != "global":
        chunks = _ranked_within(groups, chunks, options.scope)
    return sorted((c for members in chunks.values() for c in members), key=lambda c: c.key)


def _couple(chunks: dict[str, list[Chunk]], members: Collection[str]) -> None:
    """Makes one list of chunks of the members' lists; where one of them may lose nothing, none may."""
    own = [chunks.pop(name, []) for name in sorted(members)]
    together = [
        Chunk(
            first.group,
            first.units,
            float(np.mean([c.key for c in (first, *rest)])),
            tuple((c.group, c.units) for c in rest),
        )
        for first, *rest in zip(*own, strict=False)
    ]
    if together:
        chunks[together[0].group] = together


def spared(group: Group, values: FloatArray, spans: Sequence[IntArray]) -> IntArray:
    """Units that stay so that no tensor is left empty: the best of each span."""
    if group.balanced:  # every row that stays keeps some
        return np.zeros(0, dtype=np.int64)
    return np.unique([units[np.argmax(values[units])] for units in spans]).astype(np.int64)


def _chunks(group: Group, values: FloatArray, options: RankingOptions, never: IntArray) -> list[Chunk]:
    rows = group.rows if group.balanced else np.zeros(group.size, dtype=np.int64)
    ordered = values.copy()
    ordered[never] = np.inf
    ranked = [r[np.argsort(ordered[r], kind="stable")] for r in (np.flatnonzero(rows == i) for i in np.unique(rows))]
    width = len(ranked[0])
    table = np.stack([r[:width] for r in ranked])  # [rows, width], least important first
    found: list[Chunk] = []
    gone, floor = 0, -np.inf
    for stop in _stops(width, group.kind, options, len(never)):
        units = np.sort(table[:, gone:stop].reshape(-1))
        gone = stop
        floor = max(floor, float(values[units].mean()))  # a group's chunks keep their order in any sorting
        found.append(Chunk(group.name, units, floor))
    return found


def _stops(width: int, kind: UnitKind, options: RankingOptions, spared: int = 0) -> list[int]:
    """How many of `width` units are gone after each chunk.

    width 20, multiple 8, least 0.1: 16 stay, then 8 (0.1 asks for 2, a multiple of 8 for 8): [4, 12].
    """
    multiple = 1 if kind in ("head", "conv_group") else min(options.multiple, width)
    least = max(1, multiple, spared, int(np.ceil(options.least * width)))
    stays = [n for n in range(width - 1, least - 1, -1) if n % multiple == 0]
    return [width - n for n in stays]


def _ranked_within(groups: Sequence[Group], chunks: Mapping[str, list[Chunk]], scope: Scope) -> dict[str, list[Chunk]]:
    """Keys become the rank in the group's own family, so that every family loses the same share."""
    families: dict[str, list[Chunk]] = {}
    kinds = {g.name: f"{g.kind}/{len(g.sites)}" for g in groups}
    for name, members in chunks.items():
        families.setdefault(name if scope == "uniform" else kinds[name], []).extend(members)
    ranked: dict[str, list[Chunk]] = {name: [] for name in chunks}
    for family in families.values():
        family.sort(key=lambda c: c.key)
        for i, chunk in enumerate(family):
            ranked[chunk.group].append(replace(chunk, key=(i + 1) / len(family)))
    return ranked
