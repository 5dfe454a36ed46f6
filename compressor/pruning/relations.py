"""How the labels of operands relate: merged where they meet, tied where they are summed, frozen where neither is sound.

Facets of operands go in, facets of the result come out; what was tied, related and frozen is in the ledger.
Knows no operation: those are in `contractions.py`, `reductions.py` and `movements.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .labels import Ledger, Value, along, axes, facets_in, reduce_to, varying


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


@dataclass(frozen=True, slots=True)
class _Side:
    """One facet of an operand, as it meets those of the others."""

    facet: Tensor
    operand: Operand

    def extends_along(self, over: Iterable[int]) -> bool:
        """Whether the operand has an extent on any of the axes that none of its other facets labels.

        Beside labels on its heads, a table [heads, d] that has labels on d, too, does not extend along d.
        """
        labelled: set[int] = set()
        for facet in self.operand.facets:
            if facet is not self.facet:
                labelled.update(axes(facet))
        return any(self.operand.sizes[axis] > 1 for axis in set(over) - labelled)


def merge(ledger: Ledger, operands: Sequence[Operand], shape: Sequence[int], node: str) -> Value:
    """The result, of that shape, of an element-wise operation on the operands.

    [N, C, H, W] with labels on C times a gate [N, C, 1, 1] with labels on C: those are tied, one facet remains.
    """
    merged: list[_Side] = []
    for side in _sides(operands):
        if _goes_on(ledger, side, operands, node):
            merged = _joined(ledger, merged, side, node)
    return Value(tuple(shape), tuple(side.facet for side in merged))


def _sides(operands: Sequence[Operand]) -> list[_Side]:
    """All facets with labels that vary; rows that speak for two operands stand with the first."""
    sides: dict[int, _Side] = {}
    for operand in operands:
        for facet in operand.facets:
            if axes(facet):
                sides.setdefault(id(facet), _Side(facet, operand))
    return list(sides.values())


def _goes_on(ledger: Ledger, side: _Side, operands: Sequence[Operand], node: str) -> bool:
    """Whether a facet is one of the result's; it is pinned where another operand has unlabelled extent along it."""
    over = axes(side.facet)
    for operand in operands:
        # [N, C, H, W] plus a table [H, W]: labels on C go on, labels on H that the table lacks can't
        has_labels = any(_lies_along(facet, over) for facet in operand.facets)  # the facet's own operand has
        fixed = [axis for axis in over if operand.sizes[axis] > 1]
        if fixed and not has_labels:
            return ledger.pin(side.facet, fixed, node, "meets a tensor of fixed size") is not None
    return True


def _joined(ledger: Ledger, merged: list[_Side], newcomer: _Side, node: str) -> list[_Side]:
    """The facets merged so far and a new one, without those that another operand's facet speaks for.

    [N, heads, tokens, d] with labels on (heads, d), then a gate with labels on heads: the first speaks for the gate,
    whose heads have become its rows, so one facet remains.
    """
    remaining = merged
    is_spoken_for = False
    for met in merged:
        if met.operand is newcomer.operand or _are_apart(newcomer, met):
            continue
        speaker = _relate(ledger, newcomer, met, node)
        if speaker is met:
            is_spoken_for = True
        elif speaker is newcomer:
            remaining = [side for side in remaining if side is not met]
    return remaining if is_spoken_for else [*remaining, newcomer]


def _are_apart(one: _Side, met: _Side) -> bool:
    """Whether both operands part those axes in the same several ways, and these two facets are of different ways.

    A weight and a bias that hold kernels, [out * in * taps], have labels of outputs and of inputs on that axis. Outputs
    meet outputs and inputs meet inputs; if all four met, the whole kernel would be one unit.
    """
    over = axes(one.facet)
    ways = [facet for facet in one.operand.facets if axes(facet) == over]
    if len(ways) < 2 or axes(met.facet) != over:
        return False
    met_ways = [facet for facet in met.operand.facets if axes(facet) == over]
    if len(ways) != len(met_ways):
        return False
    if any(_parting(way) != _parting(met_way) for way, met_way in zip(ways, met_ways, strict=True)):
        return False
    return [way is one.facet for way in ways] != [way is met.facet for way in met_ways]


def _parting(facet: Tensor) -> list[int]:
    """Which entries go together, whatever their labels: 7 7 3 and 5 5 9 are both 0 0 1."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in facet.flatten().tolist()]


def _relate(ledger: Ledger, a: _Side, b: _Side, node: str) -> _Side | None:
    """Ties two operands' facets where they overlap; the one that says everything is returned, None for both."""
    small, big = _by_extent(a, b)
    axes_small, axes_big = set(axes(small.facet)), set(axes(big.facet))
    if axes_small.isdisjoint(axes_big):
        return None
    if axes_small == axes_big:
        ledger.tie(a.facet, b.facet)
        return b
    if axes_small < axes_big:
        _relate_nested(ledger, small, big, node)
        return big
    _relate_crossing(ledger, a.facet, b.facet, node)
    return None


def _by_extent(a: _Side, b: _Side) -> list[_Side]:
    """Both, the one that lies on fewer axes first."""
    return sorted((a, b), key=lambda side: len(axes(side.facet)))


def _relate_nested(ledger: Ledger, small: _Side, big: _Side, node: str) -> None:
    """Relates two facets of which the big one lies on further axes, too: the small one's are its rows, columns or tied.

    [heads, 1] meets [heads, d]: a head is a row of the big one, if the small one is stretched over it. [d] meets
    [heads, d]: a dimension is a column.
    """
    over = axes(small.facet)
    further = [axis for axis in axes(big.facet) if axis not in over]
    if small.extends_along(further):
        ledger.tie(small.facet, big.facet)
    elif max(over) < min(further):
        ledger.relate(small.facet, big.facet, node)
    elif max(further) < min(over):
        ledger.relate_columns(small.facet, big.facet, further)
    else:
        ledger.tie(small.facet, big.facet)


def _relate_crossing(ledger: Ledger, a: Tensor, b: Tensor, node: str) -> None:
    """Facets that share some axes and have others of their own: both lie in new rows over what they share."""
    axes_a, axes_b = set(axes(a)), set(axes(b))
    shared = axes_a & axes_b  # that of heads, of [heads, n, 1] and [heads, 1, d]
    if max(shared) < min(axes_a ^ axes_b):  # rows come first
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
    sizes = _sizes(space, (letters_a, a.shape), (letters_b, b.shape))
    rank = len(letters_out)
    summed = range(rank, len(space))

    lifted_a = _lifted(a, letters_a, space, sizes)
    lifted_b = _lifted(b, letters_b, space, sizes)
    for axis in summed:
        _relate_summed(ledger, lifted_a, lifted_b, axis, node)

    shared = _axes_of(letters_out, set(letters_a) & set(letters_b))  # heads, convolution groups
    own_a = _axes_of(letters_out, set(letters_a) - set(letters_b)) if own else []
    own_b = _axes_of(letters_out, set(letters_b) - set(letters_a)) if own else []
    kept_a, rows_a = parents(ledger, lifted_a.facets, summed, [shared, own_a], node)
    facets_b = lifted_b.facets
    if any(_lies_along(row, shared) for row in rows_a):
        # both sides of a sum are related by now, so one of them speaks for the rows of both
        facets_b = [facet for facet in facets_b if not _is_in_rows(facet, shared, summed)]
    kept_b, rows_b = parents(ledger, facets_b, summed, [shared, own_b], node)

    # rows speak for both operands: they are the same tensors in both, by which `merge` knows them again
    rows = _on_result([*rows_a, *rows_b], rank)
    operands = [
        Operand([*_on_result(kept_a, rank), *rows], lifted_a.sizes[:rank]),
        Operand([*_on_result(kept_b, rank), *rows], lifted_b.sizes[:rank]),
    ]
    return merge(ledger, operands, sizes[:rank], node)


def _on_result(facets: Iterable[Tensor], rank: int) -> list[Tensor]:
    """Facets that lie on no summed axis, on the result's axes alone: of [b, o, i] in a space `boi`, [b, o]."""
    return [reduce_to(facet, range(rank)) for facet in facets]


def _lies_along(facet: Tensor, over: Collection[int]) -> bool:
    """Whether labels depend on any of those axes."""
    return not set(axes(facet)).isdisjoint(over)


def _is_in_rows(facet: Tensor, shared: Collection[int], summed: Collection[int]) -> bool:
    """Whether labels lie on a shared axis and on a summed one, as those of (heads, d) do where d is summed."""
    return _lies_along(facet, shared) and _lies_along(facet, summed)


def _axes_of(letters_out: str, letters: Collection[str]) -> list[int]:
    """The result's axes that those letters stand for."""
    return [axis for axis, letter in enumerate(letters_out) if letter in letters]


def _sizes(space: str, *operands: tuple[str, Sequence[int]]) -> list[int]:
    """The length of each axis of the space; where operands disagree, one of them is broadcast from 1."""
    size_of = dict.fromkeys(space, 1)
    for letters, shape in operands:
        for letter, n in zip(letters, shape, strict=True):
            size_of[letter] = max(n, size_of[letter])
    return list(size_of.values())


def _lifted(value: Value, letters: str, space: str, sizes: Sequence[int]) -> Operand:
    """The value in the common space: `oi` in `boi` gets an axis b, along which nothing changes and its size is 1."""
    order = [letters.index(letter) for letter in space if letter in letters]
    missing = [axis for axis, letter in enumerate(space) if letter not in letters]
    facets = []
    for facet in value.facets:
        facet = facet.permute(order)  # the letters in the space's order
        for axis in missing:
            facet = facet.unsqueeze(axis)
        facets.append(facet.expand(*sizes))

    own_sizes = list(sizes)
    for axis in missing:
        own_sizes[axis] = 1
    return Operand(facets, own_sizes)


def _relate_summed(ledger: Ledger, a: Operand, b: Operand, axis: int, node: str) -> None:
    left, right = facets_along(a, axis), facets_along(b, axis)
    for facet_a, facet_b in itertools.product(left, right):
        small, big = _by_extent(_Side(facet_a, a), _Side(facet_b, b))
        if set(axes(small.facet)) < set(axes(big.facet)):
            _relate_nested(ledger, small, big, node)
        else:
            ledger.tie(facet_a, facet_b)
    if left and right:
        return
    for facet in (*left, *right):  # of which one is empty
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
        row_axes = _row_axes(facet, shared)
        if row_axes:
            row_labels = ledger.fresh_rows(facet, row_axes)
            ledger.relate(row_labels, facet, node)
            rows.append(row_labels)
    return kept, rows


def _row_axes(facet: Tensor, shared: Sequence[Sequence[int]]) -> set[int]:
    """The axes of the first choice that the facet lies on; none where it lies on none."""
    for choice in shared:
        row_axes = set(axes(facet)).intersection(choice)
        if row_axes:
            return row_axes
    return set()


def pin_along(ledger: Ledger, x: Value, over: Sequence[int], node: str, reason: str) -> Value:
    """The value with nothing to lose along `over`: facets there are pinned, rows across it remain."""
    facets: list[Tensor] = []
    for facet in x.facets:
        lasting: Tensor | None = facet
        if _lies_along(facet, over):
            lasting = ledger.pin(facet, over, node, reason)
        if lasting is not None:
            facets.append(lasting)
    return Value(x.shape, tuple(facets))


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
    return Value(x.shape[:2], varying(facets))


def spread_over_space(channels: Tensor, shape: Sequence[int]) -> Tensor:
    """[N, C] labels as [N, C, ...] of that shape, the same at every place."""
    places = [1] * (len(shape) - 2)
    return channels.reshape(*channels.shape, *places).expand(*shape)


def freeze_all(ledger: Ledger, node: str, tree: object, reason: str) -> None:
    """Freezes every label of the Values in nested lists and tuples."""
    for facet in facets_in(tree):
        ledger.freeze(facet, node, reason)
