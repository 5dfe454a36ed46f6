"""What single operations do to labels: where each channel goes, which axes stay removable, what is tied and frozen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

from compressor.graph import aten
from compressor.graph.neighbours import calls_of
from compressor.pruning.classes import Classes, resolve
from compressor.pruning.contractions import written_out
from compressor.pruning.labelling import label
from compressor.pruning.labels import Result, Value, axes, values_in
from compressor.records import IntArray

from .written import Written

Table = dict[str, tuple[Any, ...]]


def labelled(written: Written) -> tuple[Classes, dict[str, Result]]:
    """The classes and what is known of every node; every facet has the shape of the tensor that it lies on."""
    graph = written.graph()
    ledger, results = label(graph, (), ())
    for node in calls_of(graph):
        metas = node.meta["val"] if isinstance(node.meta["val"], tuple) else (node.meta["val"],)
        shapes = [tuple(meta.shape) for meta in metas]
        values = list(values_in(results[node.name]))
        assert [value.shape for value in values] == shapes
        assert all(tuple(facet.shape) == value.shape for value in values for facet in value.facets)
    return resolve(ledger), results


def along(classes: Classes, result: Result, axis: int) -> IntArray:
    """The classes of the one facet that lies on that axis alone."""
    assert isinstance(result, Value)
    (found,) = [classes(facet)[1] for facet in result.facets if axes(facet) == (axis,)]
    return found


# of 12 channels, the operation with its arguments behind the tensor, and for each channel behind it: which it was
# (the first of those it is tied to), or None for one that nobody produced
MOVES: Table = {
    "flip": (aten.flip.default, ([1],), [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
    "repeat": (aten.repeat.default, ([1, 2, 1, 1],), [*range(12), *range(12)]),
    "every one twice": (aten.repeat_interleave.self_int, (2, 1), [i // 2 for i in range(24)]),
    "shuffle of three groups": (aten.channel_shuffle.default, (3,), [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]),
    "slice": (aten.slice.Tensor, (1, 2, 5), [2, 3, 4]),
    "slice from behind": (aten.slice.Tensor, (1, -3), [9, 10, 11]),
    "every second, from the second": (aten.slice.Tensor, (1, 1, 12, 2), [0, 2, 4, 6, 8, 10]),
    "every third": (aten.slice.Tensor, (1, 0, 12, 3), [0, 3, 6, 9]),
    "narrow": (aten.narrow.default, (1, 8, 3), [8, 9, 10]),
    "halves multiplied": (aten.glu.default, (1,), [0, 1, 2, 3, 4, 5]),
    "zeros on both sides": (aten.pad.default, ([0, 0, 0, 0, 1, 2],), [None, *range(12), None, None]),
    "padded image": (aten.pad.default, ([1, 2, 3, 4],), [*range(12)]),
    "patches of two by two": (aten.im2col.default, ([2, 2], [1, 1], [0, 0], [1, 1]), [i // 4 for i in range(48)]),
    "dropout": (aten.dropout.default, (0.5, False), [*range(12)]),
}


@pytest.mark.parametrize("name", MOVES)
def test_channels_are_followed_to_their_new_places(name: str) -> None:
    target, arguments, expected = MOVES[name]
    written = Written()
    source = written.parameter("p", 1, 12, 4, 4)
    moved = written.call(target, source, *arguments)
    classes, results = labelled(written)
    before, after = along(classes, results[source.name], 1), along(classes, results[moved.name], 1)
    places: dict[int, int] = {}
    for place, member in enumerate(before.tolist()):
        places.setdefault(member, place)
    assert 0 not in places
    assert [places.get(member) for member in after.tolist()] == expected


def test_what_is_taken_out_alone_stays_and_the_others_go() -> None:
    written = Written()
    source = written.parameter("p", 1, 6, 4)
    written.call(aten.select.int, source, 1, 4)
    classes, results = labelled(written)
    assert np.flatnonzero(along(classes, results[source.name], 1) == 0).tolist() == [4]


def test_strides_that_do_not_divide_an_axis_freeze_it() -> None:
    written = Written()
    source = written.parameter("p", 1, 7, 4)
    cut = written.call(aten.slice.Tensor, source, 1, 0, 7, 2)
    classes, results = labelled(written)
    channels = results[source.name]
    assert not along(classes, channels, 1).any()
    assert isinstance(channels, Value)
    assert set(classes.reasons.values()) == {(cut.name, "is taken in strides that do not divide it")}


def test_joined_tensors_lie_one_behind_another_and_meet_on_other_axes() -> None:
    written = Written()
    a, b = written.parameter("a", 1, 3, 4), written.parameter("b", 1, 5, 4)
    joined = written.call(aten.cat.default, [a, b], 1)
    stacked = written.call(aten.stack.default, [a, a], 1)
    classes, results = labelled(written)
    both = np.concatenate([along(classes, results[node.name], 1) for node in (a, b)])
    assert along(classes, results[joined.name], 1).tolist() == both.tolist()
    assert len(set(both.tolist())) == 8
    assert along(classes, results[a.name], 2).tolist() == along(classes, results[b.name], 2).tolist()
    assert along(classes, results[stacked.name], 2).tolist() == both[:3].tolist()


def test_an_index_moves_labels_only_where_it_is_known() -> None:
    written = Written()
    source, order = written.parameter("p", 1, 6, 4), written.constant("order", [5, 0, 0, 2])
    chosen = written.call(aten.index_select.default, source, 1, order)
    images = written.input(2, 6)
    places = written.call(aten.argmax.default, images, 1)  # which depends on the images
    other = written.parameter("q", 6, 4)
    unforeseen = written.call(aten.index_select.default, other, 0, places)
    classes, results = labelled(written)
    before = along(classes, results[source.name], 1)
    assert along(classes, results[chosen.name], 1).tolist() == before[[5, 0, 0, 2]].tolist()
    assert not along(classes, results[other.name], 0).any()
    assert results[unforeseen.name] == Value((2, 4))


# of [1, 6, 4, 8] with labels on axes 1, 2 and 3: axes of the result that can lose something, those of the operand that
# can't any more, those of which it says that what remains gives something else
MIXTURES: Table = {
    "mean of the image": (aten.mean.dim, ([2, 3],), {1}, set(), {2, 3}),
    "mean of the channels, kept": (aten.mean.dim, ([1], True), {2, 3}, set(), {1}),
    "sum of the channels": (aten.sum.dim_IntList, ([1],), {1, 2}, set(), set()),
    "norm of the channels": (aten.linalg_vector_norm.default, (2, [-3], True), {2, 3}, set(), set()),
    "deviation": (aten.std.correction, ([3],), {1, 2}, set(), {3}),
    "largest channel": (aten.amax.default, ([1],), {1, 2}, {1}, set()),
    "largest and its place": (aten.max.dim, (2,), {1, 2}, {2}, set()),
    "product": (aten.prod.dim_int, (3,), {1, 2}, {3}, set()),
    "logarithm of sums": (aten.logsumexp.default, ([1, 2],), {1}, {1, 2}, set()),
    "place of the largest of all": (aten.argmax.default, (), set(), {1, 2, 3}, set()),
    "softmax": (aten.softmax.int, (-2,), {1, 3}, {2}, set()),
    "the two largest": (aten.topk.default, (2, 1), {2, 3}, {1}, set()),
    "sorted": (aten.sort.default, (-1,), {1, 2}, {3}, set()),
    "running sum": (aten.cumsum.default, (1,), {2, 3}, {1}, set()),
    "pooling": (aten.max_pool2d.default, ([2, 2],), {1}, {2, 3}, set()),
    "pooling with places": (aten.max_pool2d_with_indices.default, ([2, 2],), {1}, {2, 3}, set()),
    "pooling to one": (aten.adaptive_avg_pool2d.default, ([1, 1],), {1}, {2, 3}, set()),
    "resampling": (aten.upsample_nearest2d.vec, (None, [2.0, 2.0]), {1}, {2, 3}, set()),
    "layer normalisation": (aten.layer_norm.default, ([4, 8],), {1, 2, 3}, set(), {2, 3}),
    "normalisation of all channels": (aten.group_norm.default, (1,), {1, 2, 3}, set(), {1}),
    "of each channel": (aten.group_norm.default, (6,), {1, 2, 3}, set(), set()),
    "statistics of the batch": (
        *(aten.batch_norm.default, (*(None,) * 4, True, 0.1, 1e-5, False)),
        *({1, 2, 3}, set(), {2, 3}),
    ),
    "frequencies of the last axis": (aten.fft_fft.default, (), {1, 2}, {3}, set()),
    "frequencies of the image": (aten.fft_rfft2.default, (), {1}, {2, 3}, set()),
    "frequencies of the axes with sizes": (aten.fft_fftn.default, ([4, 8],), {1}, {2, 3}, set()),
    "frequencies of all axes": (aten.fft_fftn.default, (), set(), {1, 2, 3}, set()),
    "no rule": (aten.renorm.default, (2, 1, 5.0), set(), {1, 2, 3}, set()),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
def test_what_an_operation_mixes_is_pinned_or_said_to_be_inexact(name: str) -> None:
    target, arguments, left, frozen, inexact = MIXTURES[name]
    written = Written()
    source = written.parameter("p", 1, 6, 4, 8)
    mixed = written.call(target, source, *arguments)
    classes, results = labelled(written)
    lying = {axis: along(classes, results[source.name], axis) for axis in (1, 2, 3)}
    assert {axis for axis, members in lying.items() if not members.any()} == frozen
    assert {axis for axis, members in lying.items() if classes.inexact.get(int(members[1])) == (mixed.name,)} == inexact
    value = next(values_in(results[mixed.name]))
    removable = [over for over, members in map(classes, value.facets) if members.any()]
    assert {axis for over in removable for axis in over} == left
    if frozen:
        assert {node for node, _ in classes.reasons.values()} == {mixed.name}


def test_groups_of_a_normalisation_lose_equally_many_and_never_go() -> None:
    written = Written()
    source = written.parameter("p", 1, 12, 4)
    norm = written.call(aten.group_norm.default, source, 3)
    classes, results = labelled(written)
    channels = along(classes, results[source.name], 1)
    assert len(set(channels.tolist())) == 12
    assert classes.row[channels].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert not classes.parent[channels].any()  # class 0: a group that never goes
    assert classes.inexact[int(channels[0])] == (norm.name,)


def convolved(target: Any, weight: tuple[int, ...], groups: int, *between: Any) -> tuple[Classes, list[Result]]:
    """12 channels through a convolution with a bias: what is known of input, weight, bias and result."""
    written = Written()
    x, w = written.parameter("p", 1, 12, 6, 6), written.parameter("w", *weight)
    outputs = weight[0] if target is aten.conv2d.default else weight[1] * groups
    bias = written.parameter("b", outputs)
    y = written.call(target, x, w, bias, [1, 1], *between, groups)
    classes, results = labelled(written)
    return classes, [results[node.name] for node in (x, w, bias, y)]


PLAIN, TRANSPOSED = (aten.conv2d.default, [0, 0], [2, 2]), (aten.conv_transpose2d.input, [0, 0], [0, 0])


@pytest.mark.parametrize(("how", "weight", "axis"), [(PLAIN, (8, 12, 3, 3), 1), (TRANSPOSED, (12, 8, 3, 3), 0)])
def test_a_convolution_ties_its_inputs_and_hands_on_its_outputs(how: tuple[Any, ...], weight: Any, axis: int) -> None:
    target, *between = how
    classes, (x, w, bias, y) = convolved(target, weight, 1, *between)
    assert along(classes, x, 1).tolist() == along(classes, w, axis).tolist()
    outputs = along(classes, y, 1).tolist()
    assert outputs == along(classes, w, 1 - axis).tolist() == along(classes, bias, 0).tolist()
    assert len(set(outputs)) == 8
    assert 0 not in outputs
    assert isinstance(y, Value)
    assert [axes(facet) for facet in y.facets] == [(1,)], "places of the image are no result's labels"


def test_a_depthwise_convolution_hands_channels_on() -> None:
    classes, (x, w, _, y) = convolved(aten.conv2d.default, (12, 1, 3, 3), 12, [0, 0], [1, 1])
    assert along(classes, x, 1).tolist() == along(classes, w, 0).tolist() == along(classes, y, 1).tolist()


def test_two_outputs_for_each_channel_go_with_it() -> None:
    """12 channels, 24 outputs, a group each: outputs 2 c and 2 c + 1 read channel c alone, and are its row."""
    classes, (x, _, _, y) = convolved(aten.conv2d.default, (24, 1, 3, 3), 12, [0, 0], [1, 1])
    outputs = along(classes, y, 1)
    assert len(set(outputs.tolist())) == 24
    assert classes.parent[outputs].tolist() == np.repeat(along(classes, x, 1), 2).tolist()
    assert classes.row[outputs].tolist() == np.repeat(np.arange(12), 2).tolist()


def test_groups_are_rows_on_both_sides() -> None:
    """12 channels in 4 groups to 8: each group's 3 inputs and 2 outputs lie in one row."""
    classes, (x, _, _, y) = convolved(aten.conv2d.default, (8, 3, 3, 3), 4, [0, 0], [2, 2])
    inputs, outputs = along(classes, x, 1), along(classes, y, 1)
    assert classes.row[inputs].tolist() == np.repeat(np.arange(4), 3).tolist()
    assert classes.row[outputs].tolist() == np.repeat(np.arange(4), 2).tolist()
    assert classes.parent[inputs[::3]].tolist() == classes.parent[outputs[::2]].tolist()
    assert (classes.parent[inputs] > 0).all()


def test_of_a_transposed_convolution_a_groups_outputs_are_the_row() -> None:
    """Its kernel [12, 2, 3, 3] holds output 0 of all groups in one place: single ones can't go, groups can."""
    classes, (x, _, _, y) = convolved(aten.conv_transpose2d.input, (12, 2, 3, 3), 4, [0, 0], [0, 0])
    inputs, outputs = along(classes, x, 1), along(classes, y, 1)
    assert len(set(inputs.tolist())) == 12
    assert outputs[::2].tolist() == outputs[1::2].tolist() == classes.parent[inputs[::3]].tolist()
    assert len(set(outputs.tolist())) == 4


def test_products_tie_what_they_sum() -> None:
    written = Written()
    x, w, bias = written.parameter("p", 5, 6), written.parameter("w", 7, 6), written.parameter("b", 7)
    y = written.call(aten.linear.default, x, w, bias)
    z = written.call(aten.addmm.default, written.parameter("c", 9), y, written.parameter("m", 7, 9))
    equation = written.call(aten.einsum.default, "ij, kj -> ki", [z, written.parameter("e", 4, 9)])
    classes, results = labelled(written)

    def of(node: fx.Node | str, axis: int) -> list[int]:
        return along(classes, results[str(node)], axis).tolist()

    assert of(x, 1) == of("w", 1)
    assert of(y, 1) == of("w", 0) == of("b", 0) == of("m", 0)
    assert of(z, 1) == of("m", 1) == of("c", 0) == of("e", 1)
    assert (of(equation, 0), of(equation, 1)) == (of("e", 0), of("p", 0))
    assert len({*of("p", 0), *of("w", 1), *of("w", 0), *of("m", 1), *of("e", 0)}) == 5 + 6 + 7 + 9 + 4


@pytest.mark.parametrize(
    ("equation", "ranks", "written"),
    [
        ("ij,jk->ik", (2, 2), "ij,jk->ik"),
        ("ij, jk", (2, 2), "ij,jk->ik"),
        ("kj,ji", (2, 2), "kj,ji->ik"),
        ("...ij,...kj->...ik", (4, 4), "abij,abkj->abik"),
        ("...ij,jk->...ik", (3, 2), "aij,jk->aik"),
        ("...a,...a->...", (3, 2), "bca,ca->bc"),
        ("...i,ij", (3, 2), "abi,ij->abj"),
        ("i...,i->...", (3, 1), "iab,i->ab"),
    ],
)
def test_an_equation_is_written_out(equation: str, ranks: tuple[int, int], written: str) -> None:
    assert written_out(equation, ranks) == written
    sizes = {letter: number for number, letter in enumerate("abcijk", start=2)}
    operands = [torch.randn([sizes[letter] for letter in term]) for term in written.partition("->")[0].split(",")]
    assert torch.equal(torch.einsum(equation, operands), torch.einsum(written, operands))


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("ii,i->i", "that takes a diagonal, which has no pruning rule"),
        ("ij,jk,kl->il", "of 3 tensors; of two it has a rule"),
        ("ij->ji", "of one tensor; of two it has a rule"),
    ],
)
def test_an_equation_without_a_rule_freezes_what_it_reads(equation: str, reason: str) -> None:
    written = Written()
    square = written.parameter("square", 5, 5)
    terms = equation.partition("->")[0].split(",")
    operands = [written.parameter("line", 5) if term == "i" else square for term in terms]
    product = written.call(aten.einsum.default, equation, operands)
    classes, results = labelled(written)
    assert not along(classes, results["square"], 0).any()
    assert set(classes.reasons.values()) == {(product.name, f"reaches aten.einsum.default {reason}")}


def test_attention_has_heads_and_the_dimensions_of_values() -> None:
    """3 heads; queries and keys of 4 dimensions, tied in each head; values of 5."""
    written = Written()
    q, k, v = (written.parameter(name, 1, 1, 3, width) for name, width in (("q", 4), ("k", 4), ("v", 5)))
    heads = [written.call(aten.transpose.int, tensor, 1, 2) for tensor in (q, k, v)]  # [1, heads, 1, d]
    out = written.call(aten.scaled_dot_product_attention.default, *heads)
    classes, results = labelled(written)
    assert along(classes, results["q"], 3).tolist() == along(classes, results["k"], 3).tolist()
    assert along(classes, results[out.name], 3).tolist() == along(classes, results["v"], 3).tolist()
    assert len({tuple(along(classes, results[name], 2)) for name in ("q", "k", "v")}) == 1
    assert along(classes, results[out.name], 1).tolist() == along(classes, results["q"], 2).tolist()
