"""How the labels of operands relate: merged where they meet, tied where they are summed, frozen where neither is sound.

Facets of operands go in, facets of the result come out; what was tied, related and frozen is in the ledger.
Knows no operation: those are in `contractions.py`, `reductions.py` and `movements.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from .labels import Ledger, Value, along, axes, compress, facets_in, reduce_to


@dataclass(frozen=True, slots=True)
class Operand:
    """One tensor of several that meet: its facets in the result's shape, its own size on each axis, 1 where broadcast.

    A bias [C] added to [N, C, H, W] has facets of that shape and sizes (1, C, 1, 1).
    """

    facets: Sequence[Tensor]
    sizes: Sequence[int]


def facets_along(labelled: Value | Operand, axis: int) -> list[Tensor]:
    """The facets whose labels change along the axis."""
    return [facet for facet in labelled.facets if axis in axes(facet)]


Numbered = tuple[int, Tensor]  # the operand's number and one of its facets


def merge(ledger: Ledger, operands: Sequence[Operand], shape: Sequence[int], node: str) -> Value:
    """The result, of that shape, of an element-wise operation on the operands.

    [N, C, H, W] with labels on C times a gate [N, C, 1, 1] with labels on C: those are tied, one facet remains.
    """
    merged: list[Numbered] = []
    for numbered in _each_once(operands):
        number, _ = numbered
        free = _unless_fixed(ledger, numbered, operands, node)
        if free is not None and axes(free):
            merged = _joined(ledger, merged, (number, free), operands, node)
    return Value(tuple(shape), tuple(facet for _, facet in merged))


def _each_once(operands: Sequence[Operand]) -> list[Numbered]:
    """All facets with their operands' numbers; rows that speak for two operands stand with the first."""
    numbered: dict[int, Numbered] = {}
    for number, operand in enumerate(operands):
        for facet in operand.facets:
            numbered.setdefault(id(facet), (number, facet))
    return list(numbered.values())


def _joined(
    ledger: Ledger, merged: list[Numbered], newcomer: Numbered, operands: Sequence[Operand], node: str
) -> list[Numbered]:
    """The facets merged so far and a new one, without those that another operand's facet speaks for.

    [N, heads, tokens, d] with labels on (heads, d), then a gate with labels on heads: the first speaks for the gate,
    whose heads have become its rows, so one facet remains.
    """
    number, facet = newcomer
    sizes = _fixed_beside(operands[number], facet)
    remaining = merged
    spoken_for = False
    for entry in merged:
        met_number, met_facet = entry
        if met_number == number or _are_apart(facet, operands[number], met_facet, operands[met_number]):
            continue
        met_sizes = _fixed_beside(operands[met_number], met_facet)
        speaker = _relate(ledger, facet, met_facet, sizes, met_sizes, node)
        if speaker is met_facet:
            spoken_for = True
        if speaker is facet:
            remaining = [kept for kept in remaining if kept is not entry]
    return remaining if spoken_for else [*remaining, newcomer]


def _are_apart(facet: Tensor, operand: Operand, met_facet: Tensor, met: Operand) -> bool:
    """Whether both operands part those axes in the same several ways, and these two facets are of different ways.

    A weight and a bias that hold kernels, [out * in * taps], have labels of outputs and of inputs on that axis. Outputs
    meet outputs and inputs meet inputs; if all four met, the whole kernel would be one unit.
    """
    over = axes(facet)
    ways = [other for other in operand.facets if axes(other) == over]
    met_ways = [other for other in met.facets if axes(other) == over]
    if len(ways) < 2 or len(ways) != len(met_ways) or axes(met_facet) != over:
        return False
    if any(_parting(one) != _parting(other) for one, other in zip(ways, met_ways, strict=True)):
        return False
    return _place(facet, ways) != _place(met_facet, met_ways)


def _parting(facet: Tensor) -> list[int]:
    """Which entries go together, whatever their labels: 7 7 3 and 5 5 9 are both 0 0 1."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in facet.flatten().tolist()]


def _place(facet: Tensor, facets: Sequence[Tensor]) -> int:
    return next(place for place, other in enumerate(facets) if other is facet)


def _fixed_beside(operand: Operand, facet: Tensor) -> list[int]:
    """The operand's sizes, 1 also where its other facets lie: a table [heads, d] fixes nothing beside heads."""
    sizes = list(operand.sizes)
    for other in operand.facets:
        if other is not facet:
            for axis in axes(other):
                sizes[axis] = 1
    return sizes


def _unless_fixed(ledger: Ledger, numbered: Numbered, operands: Sequence[Operand], node: str) -> Tensor | None:
    """Pins a facet where another operand has unlabelled extent along its axes."""
    number, facet = numbered
    over = axes(facet)
    for met in [*operands[:number], *operands[number + 1 :]]:
        has_labels = any(_lies_along(met_facet, over) for met_facet in met.facets)
        fixed = [axis for axis in over if met.sizes[axis] > 1]
        if fixed and not has_labels:
            row = ledger.pin(facet, fixed, node, "meets a tensor of fixed size")
            return None if row is None else facet
    return facet


def _relate(
    ledger: Ledger, a: Tensor, b: Tensor, sizes_a: Sequence[int], sizes_b: Sequence[int], node: str
) -> Tensor | None:
    """Ties two operands' facets where they overlap; the one that says everything is returned, None for both."""
    axes_a, axes_b = set(axes(a)), set(axes(b))
    if axes_a.isdisjoint(axes_b):
        return None
    if axes_a == axes_b:
        ledger.tie(a, b)
        return b
    if not (axes_a < axes_b or axes_b < axes_a):
        _relate_crossing(ledger, a, b, node)
        return None

    small, big, small_sizes = (a, b, sizes_a) if axes_a < axes_b else (b, a, sizes_b)
    _relate_nested(ledger, small, big, small_sizes, node)
    return big


def _relate_nested(ledger: Ledger, small: Tensor, big: Tensor, small_sizes: Sequence[int], node: str) -> None:
    """Relates two facets of which the big one lies on further axes, too: `small` are its rows, its columns or tied.

    [heads, 1] meets [heads, d]: a head is a row of the big one, if the small one is stretched over it. [d] meets
    [heads, d]: a dimension is a column.
    """
    over = axes(small)
    further = [axis for axis in axes(big) if axis not in over]
    stretched = all(small_sizes[axis] == 1 for axis in further)
    if stretched and min(further) > max(over):
        ledger.relate(small, big, node)
    elif stretched and max(further) < min(over):
        ledger.relate_columns(small, big, further)
    else:
        ledger.tie(small, big)


def _relate_crossing(ledger: Ledger, a: Tensor, b: Tensor, node: str) -> None:
    """Facets that share some axes and have others of their own: both lie in new rows over what they share."""
    axes_a, axes_b = set(axes(a)), set(axes(b))
    shared = axes_a & axes_b
    if max(shared) < min(axes_a ^ axes_b):  # rows come first: [heads, n, 1] and [heads, 1, d]
        row_labels = ledger.fresh_rows(a, shared)
        ledger.relate(row_labels, a, node)
        ledger.relate(row_labels, b, node)
        return
    ledger.freeze(a, node, "two ways of grouping its channels meet")
    ledger.freeze(b, node, "two ways of grouping its channels meet")


def broadcast(value: Value, shape: Sequence[int]) -> Operand:
    """The value in a result of that shape, axes aligned from the right."""
    leading = (1,) * (len(shape) - len(value.shape))
    return Operand([facet.expand(*shape) for facet in value.facets], leading + value.shape)


def aligned(value: Value, axis: int, shape: Sequence[int]) -> Operand:
    """A one-dimensional parameter laid along `axis` of `shape`."""
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    facets = [along(facet, axis, shape) for facet in value.facets if axes(facet)]
    return Operand(facets, sizes)


def contract(ledger: Ledger, a: Value, b: Value, letters: str, node: str, *, own: bool = True) -> Value:
    """`letters` as in einsum, `bi,oi->bo`: ties both sides of the summed letters, keeps the rest.

    A linear layer on x [b, i] with weight [o, i]: the space is `boi`, x has the shape [b, 1, i] in it and the weight
    [1, o, i]. Their labels along i become one, what is left of the weight are its labels along o: [b, o].

    Where `own`, labels on (heads, i) leave rows for heads that the other operand lacks. A layer has none: its outputs
    and those rows would share an axis where heads are joined again, and become one unit.
    """
    inputs, letters_out = letters.split("->")
    letters_a, letters_b = inputs.split(",")
    # every letter once, the result's first: an axis each of a common space, `boi` for `bi,oi->bo`
    space = "".join(dict.fromkeys(letters_out + letters_a + letters_b))
    rank = len(letters_out)
    summed = range(rank, len(space))
    everywhere = set(letters_a) & set(letters_b)
    shared = [axis for axis, letter in enumerate(letters_out) if letter in everywhere]  # heads, convolution groups
    sizes = _sizes(space, (letters_a, a.shape), (letters_b, b.shape))

    lifted_a = Operand(_lift(a, letters_a, space, sizes), _own_sizes(space, letters_a, sizes))
    lifted_b = Operand(_lift(b, letters_b, space, sizes), _own_sizes(space, letters_b, sizes))
    for axis in summed:
        _relate_summed(ledger, lifted_a, lifted_b, axis, node)
    own_a = _own_axes(letters_out, letters_a, letters_b) if own else []
    own_b = _own_axes(letters_out, letters_b, letters_a) if own else []
    kept_a, rows_a = parents(ledger, lifted_a.facets, summed, [shared, own_a], node)
    facets_b = lifted_b.facets
    if any(_lies_along(row, shared) for row in rows_a):
        # both sides of a sum are related by now, so one of them speaks for the rows of both
        facets_b = [facet for facet in facets_b if not (_lies_along(facet, shared) and _lies_along(facet, summed))]
    kept_b, rows_b = parents(ledger, facets_b, summed, [shared, own_b], node)
    facets_a, facets_b = [*kept_a, *rows_a, *rows_b], [*kept_b, *rows_a, *rows_b]

    # rows are in both lists: reduced to one tensor, by which `merge` knows them again
    reduced = {id(facet): reduce_summed(facet, rank) for facet in [*facets_a, *facets_b]}
    operands = [
        Operand([reduced[id(facet)] for facet in facets_a], _own_sizes(letters_out, letters_a, sizes)),
        Operand([reduced[id(facet)] for facet in facets_b], _own_sizes(letters_out, letters_b, sizes)),
    ]
    return merge(ledger, operands, sizes[:rank], node)


def _own_sizes(space: str, letters: str, sizes: Sequence[int]) -> list[int]:
    """An operand's sizes on the axes of a space, 1 where it lacks the letter: `bi` of `bo` is (b, 1)."""
    return [size if letter in letters else 1 for letter, size in zip(space, sizes, strict=False)]


def _lies_along(facet: Tensor, over: Collection[int]) -> bool:
    """Whether labels depend on any of those axes."""
    return not set(axes(facet)).isdisjoint(over)


def _own_axes(letters_out: str, letters: str, others: str) -> list[int]:
    """The result's axes that one operand has and the other lacks."""
    return [axis for axis, letter in enumerate(letters_out) if letter in letters and letter not in others]


def _sizes(space: str, *operands: tuple[str, Sequence[int]]) -> list[int]:
    """The length of each axis of the space; where operands disagree, one of them is broadcast from 1."""
    size_of: dict[str, int] = {}
    for letters, shape in operands:
        for letter, n in zip(letters, shape, strict=True):
            size_of[letter] = max(n, size_of.get(letter, 1))
    return [size_of[letter] for letter in space]


def _lift(value: Value, letters: str, space: str, sizes: Sequence[int]) -> list[Tensor]:
    """The value's facets in the common space: `oi` in `boi` gets an axis b, along which nothing changes."""
    order = [letters.index(letter) for letter in space if letter in letters]
    missing = [axis for axis, letter in enumerate(space) if letter not in letters]
    lifted = []
    for facet in value.facets:
        facet = facet.permute(order)  # the letters in the space's order
        for axis in missing:
            facet = facet.unsqueeze(axis)
        lifted.append(facet.expand(*sizes))
    return lifted


def _relate_summed(ledger: Ledger, a: Operand, b: Operand, axis: int, node: str) -> None:
    left, right = facets_along(a, axis), facets_along(b, axis)
    for facet_a, facet_b in itertools.product(left, right):
        axes_a, axes_b = set(axes(facet_a)), set(axes(facet_b))
        if axes_a < axes_b:
            _relate_nested(ledger, facet_a, facet_b, _fixed_beside(a, facet_a), node)
        elif axes_b < axes_a:
            _relate_nested(ledger, facet_b, facet_a, _fixed_beside(b, facet_b), node)
        else:
            ledger.tie(facet_a, facet_b)
    if left and right:
        return
    for facet in left or right:
        ledger.pin(facet, [axis], node, "is summed against a tensor of fixed size")


def parents(
    ledger: Ledger, facets: Sequence[Tensor], summed: Sequence[int], shared: Sequence[Sequence[int]], node: str
) -> tuple[list[Tensor], list[Tensor]]:
    """The facets on no summed axis, and rows in place of those that also depend on other axes (heads).

    `shared` lists axes by which such rows are told apart, of which the first that a facet lies on count. q k^T of
    [heads, n, d] sums over d: labels on (heads, d) are gone from [heads, n, m], one row for each head stays.
    """
    kept: list[Tensor] = []
    rows: list[Tensor] = []
    for facet in facets:
        if not _lies_along(facet, summed):
            kept.append(facet)
            continue
        row_axes = [set(axes(facet)).intersection(choice) for choice in shared if _lies_along(facet, choice)]
        if row_axes:
            row_labels = ledger.fresh_rows(facet, row_axes[0])
            ledger.relate(row_labels, facet, node)
            rows.append(row_labels)
    return kept, rows


def reduce_summed(facet: Tensor, rank: int) -> Tensor:
    """The facet's first `rank` axes, at 0 of those after them: of [b, o, i] in a space `boi`, [b, o]."""
    return reduce_to(facet, range(rank))


def pin_along(ledger: Ledger, x: Value, over: Sequence[int], node: str, reason: str) -> Value:
    """The value with nothing to lose along `over`: facets there are pinned, rows across it remain."""
    pinned = [ledger.pin(facet, over, node, reason) if _lies_along(facet, over) else facet for facet in x.facets]
    return Value(x.shape, tuple(facet for facet in pinned if facet is not None))


def channels_only(ledger: Ledger, x: Value, node: str) -> Value:
    """[N, C] labels of [N, C, ...]; labels that change over space are tied across it."""
    facets = []
    for facet in x.facets:
        first = reduce_to(facet, (0, 1))  # [N, C], at the first place
        over = set(axes(facet))
        if over and min(over) > 1:
            ledger.freeze(facet, node, "is read along its channels by a convolution")
            continue
        if over - {0, 1}:
            everywhere = spread_over_space(first, facet.shape)
            ledger.tie(facet, everywhere)
        facets.append(first.expand(*x.shape[:2]))
    return Value(x.shape[:2], tuple(compress(facet) for facet in facets if axes(facet)))


def spread_over_space(channels: Tensor, shape: Sequence[int]) -> Tensor:
    """[N, C] labels as [N, C, ...] of that shape, the same at every place."""
    places = [1] * (len(shape) - 2)
    return channels.reshape(*channels.shape, *places).expand(*shape)


def freeze_all(ledger: Ledger, node: str, tree: object, reason: str) -> None:
    """Freezes every label of the Values in nested lists and tuples."""
    for facet in facets_in(tree):
        ledger.freeze(facet, node, reason)
