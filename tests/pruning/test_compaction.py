"""What remains of a tensor, worked by hand: whole coordinates, rows of different ones, and back in place as zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from compressor.graph import aten
from compressor.pruning.classes import resolve
from compressor.pruning.compaction import RaggedError, compact, compact_shape, is_cut, kept_of_axes
from compressor.pruning.coupling import _smallest, _with_joined, spared
from compressor.pruning.excerpts import excerpt, narrowed
from compressor.pruning.identity import _difference
from compressor.pruning.labelling import label
from compressor.pruning.labels import Value
from compressor.pruning.masking import mask, scatter
from compressor.pruning.rewrites import REWRITES, Remaining
from compressor.pruning.structure import Keep, Lying, Structure
from compressor.records import Group, Groups

from .written import Written

# 3 heads of 4 dimensions on axes (1, 3) of [2, 3, 5, 4]: head h is class 1 + h, its dimension d class 4 + 4 h + d
HEADS: Lying = ((1,), np.array([1, 2, 3]))
DIMENSIONS: Lying = ((1, 3), 4 + np.arange(12).reshape(3, 4))
SHAPE = (2, 3, 5, 4)


def going(*classes: int) -> Keep:
    gone = np.zeros(20, dtype=bool)
    gone[list(classes)] = True
    return gone


def numbered() -> torch.Tensor:
    return torch.arange(120.0).reshape(SHAPE) + 1


def test_a_head_goes_whole_and_the_others_lose_a_dimension_each() -> None:
    gone = going(4, 2, *range(8, 12), 14)  # dimension 0 of head 0, head 1, dimension 2 of head 2
    x, lying = numbered(), [HEADS, DIMENSIONS]
    expected = torch.stack([x[:, 0][..., [1, 2, 3]], x[:, 2][..., [0, 1, 3]]], 1)
    assert torch.equal(compact(x, lying, gone), expected)
    assert compact_shape(SHAPE, lying, gone) == (2, 2, 5, 3)
    assert compact_shape(SHAPE, [DIMENSIONS], gone) == (2, 2, 5, 3), "a row without a dimension is no row"


def test_a_dimension_that_all_heads_lose_is_a_whole_coordinate() -> None:
    gone = going(5, 9, 13)
    assert torch.equal(compact(numbered(), [DIMENSIONS], gone), numbered()[..., [0, 2, 3]])


@pytest.mark.parametrize(
    ("lying", "gone", "words"),
    [
        ([DIMENSIONS], (4, 5, 8), "rows would keep 2 to 4 units; they must keep equal counts"),
        ([DIMENSIONS, ((3,), np.array([16, 17, 18, 19]))], (4, 9, 14, 19), "thinned row by row and also as a whole"),
    ],
)
def test_what_is_no_box_is_ragged(lying: list[Lying], gone: tuple[int, ...], words: str) -> None:
    for attempt in (
        lambda: compact(numbered(), lying, going(*gone)),
        lambda: compact_shape(SHAPE, lying, going(*gone)),
    ):
        with pytest.raises(RaggedError, match=words):
            attempt()


def test_what_stays_is_told_for_whole_axes_alone() -> None:
    gone = going(2, 4, 8, 12)
    kept = kept_of_axes(SHAPE, [HEADS, DIMENSIONS], gone)
    assert [places.tolist() for places in kept] == [[0, 1], [0, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3]]
    assert is_cut([HEADS], gone)
    assert not is_cut([HEADS], going(4, 5))


def structure(written: Written) -> Structure:
    """Without groups: classes and what is known of every node."""
    ledger, results = label(written.graph(), (), ())
    return Structure(Groups(()), resolve(ledger), results, np.zeros(0, int), np.zeros(0, int), {})


def going_of(analysed: Structure, node: Any, axis: int, *places: int) -> Keep:
    """The classes of those coordinates of a node's result."""
    gone = np.zeros(len(analysed.classes.parent), dtype=bool)
    (classes,) = [classes for over, classes in analysed.lying(node) if over == (axis,)]
    gone[classes[list(places)]] = True
    return gone


def test_scattering_is_the_inverse_of_compacting() -> None:
    written = Written()
    p = written.parameter("p", 1, 5, 4)
    analysed = structure(written)
    gone = going_of(analysed, p, 1, 0, 3) | going_of(analysed, p, 2, 1)
    x, value = torch.arange(20.0).reshape(1, 5, 4) + 1, analysed.values["p"]
    zeroed = x.clone()
    zeroed[:, [0, 3]] = 0
    zeroed[..., 1] = 0
    assert torch.equal(mask(x, value, analysed, gone), zeroed)
    small = compact(x, analysed.lying(p), gone)
    assert small.shape == (1, 3, 3)
    assert torch.equal(scatter(small, value, analysed, gone), zeroed)
    several = mask((x, x > 3, 7), (value, value, 7), analysed, gone)
    assert isinstance(several, tuple)
    assert torch.equal(several[0], zeroed)
    assert torch.equal(several[1], x > 3), "of truth values none is a zero"


# of [1, 12, 6] without channels 1, 2, 7 and 11: an operation's arguments as they are written, and as they become
SIZES: dict[str, tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = {
    "slice": (aten.slice.Tensor, (1, 2, 8), (1, 1, 5, 1)),  # 2 to 7 become 3 4 5 6, behind 0
    "slice to the end": (aten.slice.Tensor, (1, -4, 1 << 62), (1, 5, 8, 1)),
    "slice of another axis": (aten.slice.Tensor, (2, 1, 5), (2, 1, 5)),
    "all of it": (aten.slice.Tensor, (1, 0, 1 << 62), (1, 0, 1 << 62)),
    "select": (aten.select.int, (1, -2), (1, 7)),  # channel 10, of 0 3 4 5 6 8 9 10
    "split": (aten.split.Tensor, (4, 1), ([2, 3, 3], 1)),
    "uneven split": (aten.split_with_sizes.default, ([3, 9], 1), ([1, 7], 1)),
    "chunks": (aten.chunk.default, (2, 1), ([4, 4], 1)),
    "padding": (aten.pad.default, ([1, 1, 0, 2],), ([1, 1, 0, 2],)),
    "reshape": (aten.reshape.default, ([1, 12, 2, 3],), ([1, 8, 2, 3],)),
    "reshape, one size open": (aten.reshape.default, ([-1, 12, 6],), ([-1, 8, 6],)),
    "view in front": (aten.expand.default, ([3, -1, 6],), ([3, -1, 6],)),
    "layer normalisation": (aten.layer_norm.default, ([12, 6],), ([8, 6],)),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_written_anew_from_what_remains(name: str) -> None:
    target, arguments, expected = SIZES[name]
    written = Written()
    x = written.call(aten.relu.default, written.parameter("p", 1, 12, 6))
    node = written.call(target, x, *arguments)
    analysed = structure(written)
    gone = going_of(analysed, x, 1, 1, 2, 7, 11)
    REWRITES[node.target](node, Remaining(analysed, gone))
    assert node.args[1:] == expected


def test_strides_begin_at_the_same_place_of_what_remains() -> None:
    """Of a to l, 1::3 is b e h k; without d e f it is b h k, of [a b c g h i j k l] again 1::3, now to 9."""
    written = Written()
    p = written.parameter("p", 1, 12, 6)
    node = written.call(aten.slice.Tensor, p, 1, 1, 12, 3)
    analysed = structure(written)
    REWRITES[node.target](node, Remaining(analysed, going_of(analysed, p, 1, 3)))
    assert node.args[1:] == (1, 1, 9, 3)


@pytest.mark.parametrize(("width", "place", "kept"), [(-2, 1, (0, 1)), (-3, 3, (3, 0))])
def test_padded_channels_are_units_of_their_own(width: int, place: int, kept: tuple[int, int]) -> None:
    """3 channels of zeros before 5 and 2 behind: of each side as many as stay."""
    written = Written()
    p = written.parameter("p", 1, 5, 4)
    node = written.call(aten.pad.default, p, [0, 0, 3, 2])
    analysed = structure(written)
    gone = going_of(analysed, node, 1, *((0, 1, 2, 9) if kept == (0, 1) else (8, 9)), 5)
    remaining = Remaining(analysed, gone)
    REWRITES[node.target](node, remaining)
    assert node.args[1] == [0, 0, *kept]
    assert remaining.shape(node) == (1, 4 + sum(kept), 4)


@pytest.mark.parametrize(
    ("target", "settings", "lengths"),
    [
        (aten.conv2d.default, ([2, 1], [0, 0], [1, 2]), {-4: 1, -2: 7, -1: 7}),  # (3 - 1) * 2 + 1 + 2
        (aten.conv2d.default, ([1, 1], [0, 0], [1, 1]), {-4: 1, -2: 4, -1: 4}),
    ],
)
def test_two_places_of_a_kernel_show_whether_its_channels_are_right(
    target: Any, settings: tuple[Any, ...], lengths: dict[int, int]
) -> None:
    written = Written()
    x = written.input(2, 3, 16, 16)
    node = written.call(target, x, written.parameter("w", 4, 3, 3, 3), None, *settings)
    analysed = structure(written)
    assert excerpt(node, analysed, going_of(analysed, node, 1, 0)) == lengths


def test_an_axis_that_loses_something_is_looked_at_whole() -> None:
    written = Written()
    x = written.call(aten.relu.default, written.parameter("p", 1, 6, 4, 8))
    norm = written.call(aten.layer_norm.default, x, [8])
    pooled = written.call(aten.max_pool2d.default, written.parameter("q", 1, 6, 4, 8), [2, 2])
    analysed = structure(written)
    assert excerpt(x, analysed, going_of(analysed, x, 1, 0)) == {-4: 1, -2: 1, -1: 1}
    assert excerpt(norm, analysed, going_of(analysed, x, 1, 0)) == {-4: 1, -2: 1}
    assert excerpt(norm, analysed, going_of(analysed, x, 3, 0)) == {-4: 1, -3: 1, -2: 1}
    assert excerpt(pooled, analysed, going_of(analysed, pooled, 1, 0)) == {}
    assert narrowed(torch.zeros(5, 4, 8), {-4: 1, -2: 1, -1: 3}).shape == (5, 1, 3)  # type: ignore[attr-defined]
    assert narrowed(7, {-1: 1}) == 7


def test_spans_are_the_smallest_sets_and_the_best_of_each_stays() -> None:
    sets = [frozenset(units) for units in ({0, 1}, {0, 1, 2}, {3, 4}, {0, 1, 2, 3, 4})]
    spans = _smallest(sets, 5)
    assert [units.tolist() for units in spans] == [[0, 1], [3, 4]]
    plain = Group("g", "channel", 5, (), np.zeros(5, dtype=np.int64))
    in_rows = Group("g", "head_dim", 5, (), np.zeros(5, dtype=np.int64), balanced=True)
    values = np.array([1.0, 2.0, 9.0, 4.0, 4.0])
    assert spared(plain, values, spans).tolist() == [1, 3]  # of equals the first
    assert spared(in_rows, values, spans).tolist() == []


def test_sets_of_coupled_groups_that_meet_are_one() -> None:
    joined = _with_joined([{"a", "b"}, {"c", "d"}, {"e", "f"}], {"b", "c"})
    assert sorted(map(sorted, joined)) == [["a", "b", "c", "d"], ["e", "f"]]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (torch.tensor([1.0, 4.5]), torch.tensor([1.0, 4.0]), 0.125),
        (torch.tensor([1.0, torch.inf, torch.nan]), torch.tensor([1.0, torch.inf, torch.nan]), 0.0),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]), float("inf")),
        (torch.tensor([1.0]), torch.tensor([1.0, 2.0]), float("inf")),
        (torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5]), 0.25),
    ],
)
def test_a_difference_is_relative_to_the_largest_number(
    one: torch.Tensor, other: torch.Tensor, expected: float
) -> None:
    assert _difference(one.double() if one.is_floating_point() else one, other) == expected


def test_a_value_that_is_no_tensors_has_nothing_on_it() -> None:
    written = Written()
    p = written.parameter("p", 1, 6)
    analysed = structure(written)
    assert analysed.lying_of(Value((3,))) == []
    assert analysed.touched(going_of(analysed, p, 1, 2)) == {"p"}
    assert analysed.touched(np.zeros(len(analysed.classes.parent), dtype=bool)) == set()
