"""The order of removal: lowest first, rows in balance, counts in multiples, no tensor left empty."""

from __future__ import annotations

import numpy as np

from compressor.planning.ranking import RankingOptions, channels_per_unit, order_of_removal
from compressor.records import Group, Scores, Site


def group(name: str, size: int, *, rows: int = 1) -> Group:
    site = Site(name, name, (1,), np.arange(size))
    return Group(name, "channel", size, (site,), np.repeat(np.arange(rows), size // rows), rows > 1)


def scores(**values: list[float]) -> Scores:
    return Scores("given", {n: np.array([v]) for n, v in values.items()}, 1)


def test_a_units_channels_are_counted_without_those_of_other_groups() -> None:
    heads = np.repeat(np.arange(3), 4)  # three heads of four dimensions
    beside = np.concatenate([heads, np.full(4, -1)])  # and four channels of somebody else
    sites = (Site("a", "a", (1,), heads), Site("b", "b", (1,), beside))
    assert channels_per_unit(Group("g", "head", 3, sites, np.zeros(3, dtype=np.int64))) == 4.0


def test_lowest_scores_go_first() -> None:
    chunks = order_of_removal([group("a", 4)], scores(a=[3, 1, 4, 2]), RankingOptions(multiple=1, least=0.0))
    assert [c.units.tolist() for c in chunks] == [[1], [3], [0]]


def test_groups_are_compared_by_score() -> None:
    options = RankingOptions(multiple=1, least=0.5, normalisation="none")
    chunks = order_of_removal([group("a", 2), group("b", 2)], scores(a=[5, 6], b=[1, 9]), options)
    assert [c.group for c in chunks] == ["b", "a"]


def test_every_prefix_keeps_rows_in_balance() -> None:
    options = RankingOptions(multiple=1, least=0.0)
    chunks = order_of_removal([group("a", 6, rows=2)], scores(a=[1, 2, 3, 9, 8, 7]), options)
    assert [c.units.tolist() for c in chunks] == [[0, 5], [1, 4]]


def test_a_span_keeps_its_best_and_counts_stay_multiples() -> None:
    options, spans = RankingOptions(multiple=2, least=0.0), {"a": (np.array([0, 1]), np.array([2, 3, 4, 5, 6, 7]))}
    chunks = order_of_removal([group("a", 8)], scores(a=[1, 2, 3, 4, 5, 6, 7, 8]), options, spans=spans)
    gone = np.concatenate([c.units for c in chunks])
    assert sorted(gone.tolist()) == [0, 2, 3, 4, 5, 6]
    assert all(len(c.units) % 2 == 0 for c in chunks)


def test_kinds_that_are_not_asked_for_stay() -> None:
    assert order_of_removal([group("a", 4)], scores(a=[3, 1, 4, 2]), RankingOptions(kinds=("head",))) == []


def test_coupled_groups_lose_equally_many_or_none() -> None:
    groups = [group("q", 6, rows=2), group("v", 6, rows=2), group("x", 3)]
    options = RankingOptions(multiple=1, least=0.0)
    values = scores(q=[1, 2, 3, 9, 8, 7], v=[6, 5, 4, 3, 2, 1], x=[1, 2, 3])
    chunks = order_of_removal(groups, values, options, coupled=[{"q", "v"}])
    joint = [c for c in chunks if c.group == "q"]
    assert [(c.units.tolist(), c.also[0][0], c.also[0][1].tolist()) for c in joint] == [
        ([0, 5], "v", [2, 5]),
        ([1, 4], "v", [1, 4]),
    ]
    assert {c.group for c in order_of_removal(groups, values, options, coupled=[{"q", "absent"}])} == {"v", "x"}
