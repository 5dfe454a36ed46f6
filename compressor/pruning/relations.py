"""How the labels of operands relate: merged where they meet, tied where they are summed, frozen where neither is sound.

Knows no operation: those are in `arithmetic.py` and `movements.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from .labels import Ledger, Value, along, axes

Operand = tuple[Sequence[Tensor], Sequence[int]]


def merge(ledger: Ledger, operands: Sequence[Operand], shape: Sequence[int], node: str) -> tuple[Tensor, ...]:
    """Facets of an element-wise result; each operand is (facets in the result's shape, own sizes there)."""
    found: list[tuple[int, Tensor]] = []
    seen: set[int] = set()
    for k, (facets, _) in enumerate(operands):
        for facet in facets:
            if id(facet) in seen:  # rows that speak for both operands
                continue
            seen.add(id(facet))
            free = _unless_fixed(ledger, k, facet, operands, node)
            if free is None or not axes(free):
                continue
            shadowed = False
            for entry in [e for e in found if e[0] != k]:
                m, other = entry
                winner = _relate(ledger, free, other, operands[k][1], operands[m][1], node)
                shadowed |= winner is other
                if winner is free:
                    found = [e for e in found if e is not entry]
            if not shadowed:
                found.append((k, free))
    return tuple(f for _, f in found)


def _unless_fixed(ledger: Ledger, k: int, facet: Tensor, operands: Sequence[Operand], node: str) -> Tensor | None:
    """Pins a facet where another operand has unlabelled extent along its axes."""
    over = set(axes(facet))
    for m, (others, sizes) in enumerate(operands):
        if m == k or any(over & set(axes(o)) for o in others):
            continue
        fixed = [a for a in over if sizes[a] > 1]
        if fixed:
            return ledger.pin(facet, fixed, node, "meets a tensor of fixed size")
    return facet


def _relate(
    ledger: Ledger, facet: Tensor, other: Tensor, sizes: Sequence[int], other_sizes: Sequence[int], node: str
) -> Tensor | None:
    """Ties two operands' facets where they overlap; the one that says everything is returned, None for both."""
    a, b = set(axes(facet)), set(axes(other))
    if not a & b:
        return None
    if a == b:
        ledger.tie(facet, other)
        return other
    if not (a < b or b < a) and max(a & b) < min(a ^ b):
        view = [n if i in a & b else 1 for i, n in enumerate(facet.shape)]
        parents = ledger.fresh(*view).expand(facet.shape)
        ledger.relate(parents, facet, node)
        ledger.relate(parents, other, node)
        return None
    if not (a < b or b < a):
        ledger.freeze(facet, node, "two ways of grouping its channels meet")
        ledger.freeze(other, node, "two ways of grouping its channels meet")
        return None
    small, big, small_sizes = (facet, other, sizes) if a < b else (other, facet, other_sizes)
    rest = set(axes(big)) - set(axes(small))
    if min(rest) > max(axes(small)) and all(small_sizes[r] == 1 for r in rest):
        ledger.relate(small, big, node)
    else:
        ledger.tie(small, big)
    return big


def broadcast(value: Value, shape: Sequence[int]) -> Operand:
    """Facets expanded to `shape` (axes aligned from the right) and the value's own size on each axis."""
    sizes = (1,) * (len(shape) - len(value.shape)) + tuple(value.shape)
    return [f.expand(*shape) for f in value.facets], sizes


def aligned(value: Value, axis: int, shape: Sequence[int]) -> Operand:
    """A one-dimensional parameter laid along `axis` of `shape`."""
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    facets = [along(f, axis, shape) for f in value.facets if axes(f)]
    return facets, sizes


def contract(ledger: Ledger, a: Value, b: Value, letters: str, node: str) -> Value:
    """`letters` as in einsum, `bi,oi->bo`: ties both sides of the summed letters, keeps the rest."""
    left, out = letters.split("->")
    la, lb = left.split(",")
    space = "".join(dict.fromkeys(out + la + lb))
    summed = [i for i, x in enumerate(space) if x not in out]
    shared = [i for i, x in enumerate(space) if x in la and x in lb and x in out]
    sizes = _sizes(space, (la, a.shape), (lb, b.shape))
    fa, fb = _lift(a, la, space, sizes), _lift(b, lb, space, sizes)
    for axis in summed:
        _tie_summed(ledger, fa, fb, axis, node)
    # both sides of a sum are tied by now, so one of them speaks for the rows of both
    kept_a, rows = parents(ledger, fa, summed, shared, node)
    kept_b, more = parents(ledger, fb, summed, [] if rows else shared, node)
    fa, fb = [[*kept, *rows, *more] for kept in (kept_a, kept_b)]
    rank = len(out)
    shape = sizes[:rank]
    flat = {id(f): reduce_summed(f, rank) for f in [*fa, *fb]}
    operands = [
        ([flat[id(f)] for f in facets], [n if x in own else 1 for x, n in zip(out, shape, strict=True)])
        for facets, own in ((fa, la), (fb, lb))
    ]
    return Value(tuple(shape), merge(ledger, operands, shape, node))


def _sizes(space: str, *operands: tuple[str, Sequence[int]]) -> list[int]:
    size: dict[str, int] = {}
    for letters, shape in operands:
        for x, n in zip(letters, shape, strict=True):
            size[x] = max(n, size.get(x, 1))
    return [size[x] for x in space]


def _lift(value: Value, letters: str, space: str, sizes: Sequence[int]) -> list[Tensor]:
    lifted = []
    for facet in value.facets:
        facet = facet.permute([letters.index(x) for x in space if x in letters])
        for i, x in enumerate(space):
            if x not in letters:
                facet = facet.unsqueeze(i)
        lifted.append(facet.expand(*sizes))
    return lifted


def _tie_summed(ledger: Ledger, fa: list[Tensor], fb: list[Tensor], axis: int, node: str) -> None:
    left = [f for f in fa if axis in axes(f)]
    right = [f for f in fb if axis in axes(f)]
    for f in left:
        for g in right:
            ledger.tie(f, g)
    for f in (left or right) if not (left and right) else []:
        ledger.pin(f, [axis], node, "is summed against a tensor of fixed size")


def parents(
    ledger: Ledger, facets: list[Tensor], summed: Sequence[int], shared: Sequence[int], node: str
) -> tuple[list[Tensor], list[Tensor]]:
    """The facets on no summed axis, and rows in place of those that also depend on a shared axis (heads)."""
    kept = [f for f in facets if not set(axes(f)) & set(summed)]
    found = []
    for facet in facets:
        over = axes(facet)
        if not set(over) & set(summed):
            continue
        rows = [i for i in over if i in shared]
        if rows:
            view = [facet.shape[i] if i in rows else 1 for i in range(facet.ndim)]
            parents = ledger.fresh(*view).expand(facet.shape)
            ledger.relate(parents, facet, node)
            found.append(parents)
    return kept, found


def reduce_summed(facet: Tensor, rank: int) -> Tensor:
    return facet[tuple(slice(None) if a < rank else 0 for a in range(facet.ndim))]


def freeze_all(ledger: Ledger, node: fx.Node, values: Any, reason: str) -> None:
    def visit(value: Any) -> None:
        if isinstance(value, Value):
            for facet in value.facets:
                ledger.freeze(facet, node.name, reason)
        elif isinstance(value, (list, tuple)):
            for v in value:
                visit(v)

    visit(values)
