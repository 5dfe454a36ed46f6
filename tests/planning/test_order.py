"""From scores to an order at its edges: ties, multiples, the least that stays, costs, families, prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from compressor.planning.budget import _fill, _half, _prefix, kept_after
from compressor.planning.ranking import (
    NORMALISATIONS,
    REDUCTIONS,
    Chunk,
    RankingOptions,
    bundles_of,
    importance,
    order_of_removal,
    step_of,
)
from compressor.records import Group, Groups, Scores, Site, UnitKind

ONE = RankingOptions(multiple=1, least=0.0, normalisation="none", per_cost=0.0)


def group(name: str, size: int, *, kind: UnitKind = "channel", sites: int = 1, rows: int = 1) -> Group:
    shown = tuple(Site(f"{name}{i}", name, (1,), np.arange(size)) for i in range(sites))
    return Group(name, kind, size, shown, np.repeat(np.arange(rows), size // rows), rows > 1)


def scores(**values: Sequence[float]) -> Scores:
    return Scores("given", {name: np.array([row], dtype=np.float64) for name, row in values.items()}, 1)


def order(chunks: Sequence[Chunk]) -> list[tuple[str, list[int]]]:
    return [(chunk.group, chunk.units.tolist()) for chunk in chunks]


def kept_counts(width: int, options: RankingOptions, kind: UnitKind = "channel") -> list[int]:
    """How many units stay after each chunk of a group so wide."""
    chunks = order_of_removal([group("a", width, kind=kind)], scores(a=range(width)), options)
    return (width - np.cumsum([len(chunk.units) for chunk in chunks])).tolist()


@pytest.mark.parametrize(
    ("width", "multiple", "least", "kind", "expected"),
    [
        (20, 8, 0.1, "channel", [16, 8]),
        (20, 8, 0.41, "channel", [16]),  # 9 at least, of which the next multiple is 16
        (16, 8, 0.5, "channel", [8]),  # exactly met
        (16, 8, 0.51, "channel", []),
        (8, 8, 0.0, "channel", []),  # no wider than the multiple
        (6, 8, 0.0, "neuron", []),
        (9, 8, 0.0, "neuron", [8]),
        (4, 1, 0.0, "channel", [3, 2, 1]),  # one always stays
        (1, 1, 0.0, "channel", []),
        (12, 8, 0.5, "head", [11, 10, 9, 8, 7, 6]),  # heads are not rounded
        (4, 8, 0.0, "conv_group", [3, 2, 1]),
        (100, 5, 0.55, "channel", [95, 90, 85, 80, 75, 70, 65, 60, 55]),  # 0.55 * 100 is 55.00000000000001
        (10, 1, 1.0, "channel", []),
    ],
)
def test_counts_that_may_stay(width: int, multiple: int, least: float, kind: UnitKind, expected: list[int]) -> None:
    options = replace(ONE, multiple=multiple, least=least, kinds=(kind,))
    assert kept_counts(width, options, kind) == expected


@pytest.mark.parametrize(
    ("width", "multiple", "largest", "step"),
    [(16, 8, 0.125, 2), (32, 8, 0.125, 4), (64, 8, 0.125, 8), (512, 8, 0.125, 8), (63, 8, 0.125, 4), (4, 8, 0.125, 1),
     (16, 8, 1.0, 8), (64, 6, 0.5, 6)],
)  # fmt: skip
def test_a_step_is_a_power_of_two_within_its_share_of_the_width(
    width: int, multiple: int, largest: float, step: int
) -> None:
    assert step_of(width, replace(ONE, multiple=multiple, largest_step=largest)) == step


def test_a_step_goes_by_what_one_row_holds_and_by_what_is_named() -> None:
    """Four rows of 16 among 64 units lose two each at a time; the group that is named four."""
    options = replace(ONE, multiple=8, largest_step=0.125, steps={"b": 4})
    groups = [group("a", 64, rows=4), group("b", 64)]
    chunks = order_of_removal(groups, scores(a=np.arange(64), b=np.arange(64)), options)
    assert {chunk.group: len(chunk.units) for chunk in chunks} == {"a": 8, "b": 4}


def test_of_coupled_groups_the_largest_multiple_holds_for_all() -> None:
    groups = [group("a", 16), group("b", 16)]
    options = replace(ONE, steps={"a": 2, "b": 8})
    (chunk,) = order_of_removal(groups, scores(a=np.arange(16), b=np.arange(16)), options, coupled=[{"a", "b"}])
    assert (len(chunk.units), [len(units) for _, units in chunk.also]) == (8, [8])
    assert chunk.key == pytest.approx(3.5)


def test_ties_are_broken_by_place_alone() -> None:
    """Of equal units the first goes, of equal groups the earlier one's: the same on every machine."""
    groups = [group("b", 3), group("a", 3)]
    chunks = order_of_removal(groups, scores(a=[1, 1, 1], b=[1, 1, 1]), ONE)
    assert order(chunks) == [("b", [0]), ("b", [1]), ("a", [0]), ("a", [1])]


def test_a_chunk_counts_by_its_mean_and_none_passes_the_one_before() -> None:
    """Kept 4 of 5, then 2: units 0, then 1 and 2 (mean 2.5), between which that of b at 2 goes."""
    options = replace(ONE, multiple=2)
    chunks = order_of_removal([group("a", 5), group("b", 4)], scores(a=[1, 2, 3, 9, 9], b=[2, 2, 8, 8]), options)
    assert order(chunks) == [("a", [0]), ("b", [0, 1]), ("a", [1, 2])]
    never = order_of_removal([group("a", 3)], scores(a=[5, 1, 2]), ONE, spans={"a": (np.array([1, 2]),)})
    assert order(never) == [("a", [1]), ("a", [0])]
    assert [chunk.key for chunk in never] == [1.0, 5.0]


def test_keys_of_a_group_never_fall() -> None:
    """A unit that must stay ranks last whatever it is worth."""
    spans = {"a": (np.array([0]), np.array([1]))}
    chunks = order_of_removal([group("a", 4)], scores(a=[0, 0, 7, 3]), replace(ONE, multiple=1), spans=spans)
    keys = [chunk.key for chunk in chunks]
    assert order(chunks) == [("a", [3]), ("a", [2])]
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    ("normalisation", "divisor"), [("mean", 2.0), ("sum", 8.0), ("max", 4.0), ("l2", 24**0.5), ("none", 1.0)]
)
def test_scores_of_a_site_are_divided_by_their_size(normalisation: Any, divisor: float) -> None:
    row = np.array([-4.0, 2.0, 0.0, 2.0])
    assert NORMALISATIONS[normalisation](row) == pytest.approx(divisor)
    options = replace(ONE, normalisation=normalisation)
    assert importance(group("a", 4), scores(a=row), options).tolist() == pytest.approx(row / divisor)
    assert importance(group("a", 4), scores(a=[0.0] * 4), options).tolist() == [0.0] * 4


@pytest.mark.parametrize(("reduction", "expected"), [("sum", [4.0, 6.0]), ("mean", [2.0, 3.0]), ("max", [3.0, 5.0])])
def test_sites_are_normalised_before_they_are_joined(reduction: Any, expected: list[float]) -> None:
    rows = np.array([[1.0, 5.0], [3.0, 1.0]])
    assert REDUCTIONS[reduction](rows).tolist() == expected
    options = replace(ONE, reduction="sum", normalisation="max")
    joined = importance(group("a", 2, sites=2), Scores("given", {"a": rows}, 1), options)
    assert joined.tolist() == pytest.approx([1 / 5 + 1, 1 + 1 / 3])


@pytest.mark.parametrize(("power", "first"), [(0.0, "a"), (0.5, "a"), (1.0, "b")])
def test_of_units_worth_little_more_the_costly_go_first(power: float, first: str) -> None:
    """b is worth twice as much and costs three times as much: sqrt(3) < 2 < 3."""
    options, costs = replace(ONE, per_cost=power), {"a": 0.1, "b": 0.3}
    chunks = order_of_removal([group("a", 2), group("b", 2)], scores(a=[1, 9], b=[2, 9]), options, unit_cost=costs)
    assert chunks[0].group == first


def test_a_unit_that_costs_nothing_goes_last() -> None:
    options, costs = replace(ONE, per_cost=1.0), {"a": 0.0, "b": 1e-3}
    chunks = order_of_removal([group("a", 2), group("b", 2)], scores(a=[1, 2], b=[90, 91]), options, unit_cost=costs)
    assert [chunk.group for chunk in chunks] == ["b", "a"]


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("global", ["small", "small", "large", "large", "other", "other"]),
        ("isomorphic", ["small", "small", "other", "large", "large", "other"]),  # by halves and quarters of a family
        ("uniform", ["small", "large", "other", "small", "large", "other"]),
    ],
)
def test_a_scope_says_which_groups_are_compared(scope: Any, expected: list[str]) -> None:
    groups = [group("small", 3), group("large", 3), group("other", 3, kind="neuron")]
    values = scores(small=[1, 2, 3], large=[10, 20, 30], other=[100, 200, 300])
    chunks = order_of_removal(groups, values, replace(ONE, scope=scope))
    assert [chunk.group for chunk in chunks] == expected


def test_groups_at_more_sites_are_another_family() -> None:
    groups = [group("a", 3), group("b", 3, sites=2)]
    values = Scores("given", {"a": np.array([[1.0, 2, 3]]), "b": np.array([[10.0, 20, 30]] * 2)}, 1)
    chunks = order_of_removal(groups, values, replace(ONE, scope="isomorphic"))
    assert [(chunk.group, chunk.key) for chunk in chunks] == [("a", 0.5), ("b", 0.5), ("a", 1.0), ("b", 1.0)]


def test_groups_without_scores_stay() -> None:
    assert order(order_of_removal([group("a", 2), group("b", 2)], scores(b=[1, 2]), ONE)) == [("b", [0])]


def test_bundles_are_coupled_groups_in_order() -> None:
    groups = [group(name, 2) for name in "abcd"]
    bundles = [[member.name for member in bundle] for bundle in bundles_of(groups, [{"d", "b"}])]
    assert bundles == [["a"], ["b", "d"], ["c"]]


# prefixes of an order


def chunk(name: str, unit: int, key: float, *also: str) -> Chunk:
    return Chunk(name, np.array([unit]), key, tuple((other, np.array([unit])) for other in also))


CHUNKS = [chunk("a", 0, 1.0), chunk("b", 0, 2.0), chunk("a", 1, 3.0), chunk("c", 0, 4.0)]
SAVED = {("a", 0): 1, ("b", 0): 4, ("a", 1): 1, ("c", 0): 10}


def saving(least: int) -> Any:
    return lambda removed: sum(SAVED[chunk.group, int(chunk.units[0])] for chunk in removed) >= least


@pytest.mark.parametrize(("least", "length"), [(0, 0), (1, 1), (2, 2), (5, 2), (6, 3), (7, 4), (16, 4)])
def test_the_shortest_prefix_that_saves_enough(least: int, length: int) -> None:
    assert len(_prefix(CHUNKS, saving(least))) == length


@pytest.mark.parametrize(
    ("least", "gone"),
    [
        (16, [("a", [0]), ("b", [0]), ("a", [1]), ("c", [0])]),
        (15, [("a", [0]), ("b", [0]), ("c", [0])]),
        (14, [("b", [0]), ("c", [0])]),
        (11, [("a", [0]), ("c", [0])]),
        (10, [("c", [0])]),
        (6, [("a", [0]), ("b", [0]), ("a", [1])]),
        (0, []),
    ],
)
def test_the_most_important_is_given_back_first_and_of_a_group_the_last(
    least: int, gone: list[tuple[str, list[int]]]
) -> None:
    assert order(_fill(CHUNKS, saving(least))) == gone


def test_what_stays_counts_coupled_groups_too() -> None:
    groups = Groups((group("a", 3), group("b", 3), group("c", 3)))
    kept = kept_after(groups, [chunk("a", 2, 1.0, "b"), chunk("a", 0, 2.0, "b")])
    assert {name: units.tolist() for name, units in kept.items()} == {"a": [1], "b": [1]}


def test_a_half_is_half_of_each_row_and_at_least_one() -> None:
    assert _half(group("a", 5)).tolist() == [0, 1]
    assert _half(group("a", 6, rows=2)).tolist() == [0, 3]
    assert _half(group("a", 3, rows=3)).tolist() == [0, 1, 2]
