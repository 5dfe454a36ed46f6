"""What each ATen operation does to labels: one table, operation -> handler.

Movement (reshape, permute, slice, cat, roll ...) is run on the labels themselves; element-wise operations
tie operands; contractions tie the two sides of the summed axis. An operation not in the table freezes
every label that reaches it: never "assume identity". Knows no layer, no architecture, no plan.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import aten
from .labels import Ledger, Value, along, axes, compress, reduce_to

Handler = Callable[[Ledger, fx.Node, list[Any], dict[str, Any]], Any]
Operand = tuple[Sequence[Tensor], Sequence[int]]

TABLE: dict[Any, Handler] = {}


def handles(*targets: Any) -> Callable[[Handler], Handler]:
    def enter(handler: Handler) -> Handler:
        for target in targets:
            TABLE[target] = handler
        return handler

    return enter


def shape_of(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


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


def pointwise(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    shape = shape_of(node)
    tensors = [a for a in [*args, *kwargs.values()] if isinstance(a, Value)]
    return Value(shape, merge(ledger, [broadcast(t, shape) for t in tensors], shape, node.name))


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
    kept_a, rows = _parents(ledger, fa, summed, shared, node)
    kept_b, more = _parents(ledger, fb, summed, [] if rows else shared, node)
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


def _parents(
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


def blank(meta: Any) -> Any:
    """Values without labels in the shape of a node's result."""
    if isinstance(meta, Tensor):
        return Value(tuple(meta.shape))
    if isinstance(meta, (tuple, list)):
        return tuple(blank(m) for m in meta)
    return meta


def unknown(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    freeze_all(ledger, node, [*args, *kwargs.values()], f"reaches {node.target}, which has no pruning rule")
    return blank(node.meta["val"])


# element by element, but not tagged so by torch
UNTAGGED = (
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.hardtanh.default,
    aten.relu6.default,
    aten.leaky_relu.default,
    aten.elu.default,
    aten.celu.default,
    aten.selu.default,
    aten.softplus.default,
    aten.mish.default,
    aten.logaddexp.default,
    aten.masked_fill.Scalar,
    aten._to_copy.default,
    aten.to.dtype,
    aten.type_as.default,
    aten.square.default,
    aten.div.Tensor_mode,
    aten.maximum.default,
    aten.minimum.default,
)


def handler_of(node: fx.Node) -> Handler:
    if node.target in TABLE:
        return TABLE[node.target]
    if node.target in UNTAGGED or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return pointwise
    return unknown


# -- contractions


@handles(aten.linear.default)
def linear(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    x, weight = args[0], args[1]
    front = "abcdefgh"[: len(x.shape) - 1]
    out = contract(ledger, x, weight, f"{front}i,oi->{front}o", node.name)
    return _add_bias(ledger, out, args[2] if len(args) > 2 else None, len(out.shape) - 1, node.name)


def _add_bias(ledger: Ledger, out: Value, bias: Value | None, axis: int, node: str) -> Value:
    if bias is None:
        return out
    return Value(out.shape, merge(ledger, [(out.facets, out.shape), aligned(bias, axis, out.shape)], out.shape, node))


@handles(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding)
def convolution(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    groups = args[6] if len(args) > 6 else 1
    return _convolve(ledger, node, args, groups, transposed=False)


@handles(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def transposed_convolution(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    groups = args[6] if len(args) > 6 else 1
    return _convolve(ledger, node, args, groups, transposed=True)


def _convolve(ledger: Ledger, node: fx.Node, args: list[Any], groups: int, *, transposed: bool) -> Value:
    x = _channels_only(ledger, args[0], node)
    weight = Value(args[1].shape[:2], tuple(_kernel_free(f) for f in args[1].facets))
    n, c = x.shape
    o, i = weight.shape
    if groups == 1:
        out = contract(ledger, x, weight, "bi,io->bo" if transposed else "bi,oi->bo", node.name)
    else:
        grouped_x = Value((n, groups, c // groups), tuple(f.reshape(n, groups, c // groups) for f in x.facets))
        grouped_w = Value((groups, o // groups, i), tuple(_split_rows(f, groups) for f in weight.facets))
        out = contract(ledger, grouped_x, grouped_w, "bgi,gio->bgo" if transposed else "bgi,goi->bgo", node.name)
        out = Value((n, out.shape[1] * out.shape[2]), tuple(compress(f.reshape(n, -1)) for f in out.facets))
    shape = shape_of(node)
    facets = tuple(f.reshape(*f.shape, *[1] * (len(shape) - 2)).expand(*shape) for f in out.facets)
    return _add_bias(ledger, Value(shape, facets), args[2] if len(args) > 2 else None, 1, node.name)


def _channels_only(ledger: Ledger, x: Value, node: fx.Node) -> Value:
    """[N, C] labels of [N, C, ...]; labels that change over space are tied across it."""
    facets = []
    for facet in x.facets:
        first = reduce_to(facet, (0, 1))
        over = set(axes(facet))
        if over and min(over) > 1:
            ledger.freeze(facet, node.name, "lies along an image axis")
            continue
        if over - {0, 1}:
            ledger.tie(facet, first.reshape(*first.shape, *[1] * (facet.ndim - 2)).expand(facet.shape))
        facets.append(first.expand(*x.shape[:2]))
    return Value(tuple(x.shape[:2]), tuple(compress(f) for f in facets if axes(f)))


def _kernel_free(facet: Tensor) -> Tensor:
    return reduce_summed(facet, 2)


def _split_rows(facet: Tensor, groups: int) -> Tensor:
    return compress(facet.reshape(groups, facet.shape[0] // groups, facet.shape[1]))


@handles(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    a, b = args[0], args[1]
    if min(len(a.shape), len(b.shape)) < 2:
        return unknown(ledger, node, args, kwargs)
    batch = "abcdefg"
    n = max(len(a.shape), len(b.shape)) - 2
    fa, fb = batch[n - len(a.shape) + 2 : n], batch[n - len(b.shape) + 2 : n]
    out = contract(ledger, a, b, f"{fa}xk,{fb}ky->{batch[:n]}xy", node.name)
    return Value(shape_of(node), out.facets)


@handles(aten.addmm.default, aten.baddbmm.default)
def added_matmul(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    product = matmul(ledger, node, args[1:3], {})
    shape = product.shape
    return Value(shape, merge(ledger, [broadcast(args[0], shape), (product.facets, shape)], shape, node.name))


@handles(aten.einsum.default)
def einsum(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    letters, operands = args[0].replace(" ", ""), args[1]
    if len(operands) != 2 or "." in letters or "->" not in letters or _repeats(letters):
        return unknown(ledger, node, args, kwargs)
    return contract(ledger, operands[0], operands[1], letters, node.name)


def _repeats(letters: str) -> bool:
    left, out = letters.split("->")
    return any(len(set(part)) < len(part) for part in [*left.split(","), out])


@handles(aten.scaled_dot_product_attention.default)
def attention(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    q, k, v = args[:3]
    if len({len(t.shape) for t in (q, k, v)}) > 1 or kwargs.get("enable_gqa"):
        return unknown(ledger, node, args, kwargs)
    b = "abcdefg"[: len(q.shape) - 2]
    weights = contract(ledger, q, k, f"{b}nd,{b}md->{b}nm", node.name)
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    if isinstance(mask, Value):
        operands = [(weights.facets, weights.shape), broadcast(mask, weights.shape)]
        weights = Value(weights.shape, merge(ledger, operands, weights.shape, node.name))
    weights = _pin_along(ledger, node, weights, [len(weights.shape) - 1], "is normalised by softmax")
    return contract(ledger, weights, v, f"{b}nm,{b}me->{b}ne", node.name)


def _pin_along(ledger: Ledger, node: fx.Node, x: Value, over: Sequence[int], reason: str) -> Value:
    kept = []
    for facet in x.facets:
        free = ledger.pin(facet, over, node.name, reason) if set(axes(facet)) & set(over) else facet
        if free is not None:
            kept.append(free)
    return Value(x.shape, tuple(kept))


# -- normalisations and reductions


@handles(aten.batch_norm.default)
def batch_norm(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    x = args[0]
    if args[5]:  # statistics of this very input, as weight standardisation takes them
        for facet in x.facets:
            if set(axes(facet)) - {1}:
                ledger.mark_inexact(facet, node.name)
    return _affine(ledger, node, x, args[1:5], 1)


def _affine(ledger: Ledger, node: fx.Node, x: Value, parameters: Sequence[Any], axis: int) -> Value:
    operands: list[Operand] = [(x.facets, x.shape)]
    operands += [aligned(p, axis, x.shape) for p in parameters if isinstance(p, Value)]
    return Value(x.shape, merge(ledger, operands, x.shape, node.name))


@handles(aten._native_batch_norm_legit.no_stats)
def batch_statistics(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    x, weight, bias = args[:3]
    out = batch_norm(ledger, node, [x, weight, bias, None, None, True], kwargs)
    statistics = Value(out.shape[1:2], tuple(reduce_to(f, (1,)) for f in out.facets if axes(f) == (1,)))
    return (out, *(statistics if tuple(m.shape) == statistics.shape else blank(m) for m in node.meta["val"][1:]))


@handles(aten.instance_norm.default)
def instance_norm(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return _affine(ledger, node, args[0], args[1:5], 1)


@handles(aten.prelu.default)
def prelu(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    if args[1].shape == (1,):
        return Value(args[0].shape, args[0].facets)
    return _affine(ledger, node, args[0], args[1:2], 1)


@handles(aten.layer_norm.default, aten.rms_norm.default)
def layer_norm(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    x, normalised = args[0], list(args[1])
    over = range(len(x.shape) - len(normalised), len(x.shape))
    for facet in x.facets:
        if set(axes(facet)) & set(over):
            ledger.mark_inexact(facet, node.name)
    parameters = [p for p in args[2:4] if isinstance(p, Value)]
    operands: list[Operand] = [(x.facets, x.shape)] + [broadcast(p, x.shape) for p in parameters]
    return Value(x.shape, merge(ledger, operands, x.shape, node.name))


@handles(aten.group_norm.default)
def group_norm(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    x, groups = args[0], int(args[1])
    c = x.shape[1]
    for facet in x.facets:
        if axes(facet) != (1,) or groups == c:
            continue
        ledger.mark_inexact(facet, node.name)
        if groups > 1:
            labels = reduce_to(facet, (1,)).reshape(groups, c // groups)
            parents = ledger.fresh(groups, 1).expand(labels.shape)
            ledger.relate(parents, labels, node.name)
            ledger.freeze(parents, node.name, "is a group of a group normalisation")
    return _affine(ledger, node, x, args[2:4], 1)


@handles(aten.softmax.int, aten.log_softmax.int, aten._softmax.default)
def softmax(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    x = args[0]
    return _pin_along(ledger, node, x, [args[1] % len(x.shape)], "is normalised by softmax")


@handles(aten.sum.dim_IntList, aten.linalg_vector_norm.default)
def exact_reduction(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    norm = node.target is aten.linalg_vector_norm.default
    dims = args[2 if norm else 1] if len(args) > (2 if norm else 1) else None
    return _reduce(ledger, node, args[0], dims, exact=True)


@handles(aten.mean.dim)
def mean(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return _reduce(ledger, node, args[0], args[1], exact=False)


@handles(aten.var.correction, aten.std.correction, aten.var.dim, aten.std.dim)
def variance(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return _reduce(ledger, node, args[0], args[1] if len(args) > 1 else kwargs.get("dim"), exact=False)


@handles(aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim)
def extremum(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    meta = node.meta["val"]
    dims = args[1] if len(args) > 1 else None
    x = _pin_along(ledger, node, args[0], _axes_of(dims, args[0]), "is reduced by a maximum")
    first = meta if isinstance(meta, Tensor) else meta[0]
    out = Value(tuple(first.shape), _drop(x, _axes_of(dims, x), first.shape))
    return out if isinstance(meta, Tensor) else (out, Value(tuple(first.shape)))


def _axes_of(dims: Any, x: Value) -> list[int]:
    if dims is None or dims == []:
        return list(range(len(x.shape)))
    return [d % len(x.shape) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


def _reduce(ledger: Ledger, node: fx.Node, x: Value, dims: Any, *, exact: bool) -> Value:
    over = _axes_of(dims, x)
    facets = list(x.facets)
    for facet in x.facets:
        if set(axes(facet)) & set(over) and not exact:
            ledger.mark_inexact(facet, node.name)
    kept, rows = _parents(ledger, facets, over, [i for i in range(len(x.shape)) if i not in over], node.name)
    shape = shape_of(node)
    return Value(shape, _drop(Value(x.shape, (*kept, *rows)), over, shape))


def _drop(x: Value, over: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Facets after reduction over axes they do not depend on, with or without those axes kept."""
    index = tuple(slice(0, 1) if a in over else slice(None) for a in range(len(x.shape)))
    return tuple(f[index].reshape(tuple(shape)) for f in x.facets)


# -- image operations


@handles(
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.max_pool1d.default,
    aten.avg_pool1d.default,
    aten.adaptive_avg_pool1d.default,
    aten.max_pool3d.default,
    aten.avg_pool3d.default,
    aten.adaptive_avg_pool3d.default,
    aten.max_pool2d_with_indices.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest2d.default,
    aten.upsample_bilinear2d.vec,
    aten.upsample_bilinear2d.default,
    aten.upsample_bicubic2d.vec,
    aten.upsample_bicubic2d.default,
)
def spatial(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    x, meta = args[0], node.meta["val"]
    shape = tuple((meta if isinstance(meta, Tensor) else meta[0]).shape)
    # the kernel's number of image axes is not in every signature: whatever changed size was pooled
    image = [i for i in range(1, len(shape)) if shape[i] != x.shape[i] or i >= 2]
    x = _pin_along(ledger, node, x, image, "lies along a pooled axis")
    index = tuple(slice(0, 1) if a in image else slice(None) for a in range(len(shape)))
    out = Value(shape, tuple(f[index].expand(*shape) for f in x.facets))
    return out if isinstance(meta, Tensor) else (out, *(blank(m) for m in meta[1:]))


# -- movement: the operation itself, on labels


@handles(
    aten.reshape.default,
    aten.view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.expand.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.flip.default,
    aten.roll.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.narrow.default,
    aten.movedim.int,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unfold.default,
    aten.index_select.default,
    aten.index.Tensor,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.channel_shuffle.default,
    aten.rot90.default,
    aten.tril.default,
    aten.triu.default,
)
def movement(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    rest = [_content(a) for a in args[1:]]
    if _has_unknown(rest):
        return unknown(ledger, node, args, kwargs)
    move: Callable[..., Any] = node.target  # type: ignore[assignment]
    meta = node.meta["val"]
    moved = [move(f, *rest, **kwargs) for f in x.facets]
    content = None if x.content is None else move(x.content, *rest, **kwargs)
    if isinstance(meta, Tensor):
        return Value(tuple(meta.shape), _lasting(ledger, node, moved), content)
    return tuple(
        Value(tuple(m.shape), _lasting(ledger, node, [p[i] for p in moved]), None if content is None else content[i])
        for i, m in enumerate(meta)
    )


@handles(aten.slice.Tensor)
def cut(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Every second coordinate stays every second one only when neighbours go together."""
    x, step = args[0], args[4] if len(args) > 4 else 1
    axis = (args[1] if len(args) > 1 else 0) % len(x.shape)
    for facet in x.facets if step > 1 else ():
        if axis not in axes(facet):
            continue
        if facet.shape[axis] % step:
            ledger.freeze(facet, node.name, "is taken in strides that do not divide it")
        else:
            parts = facet.unflatten(axis, (-1, step))
            ledger.tie(parts, parts.narrow(axis + 1, 0, 1))
    return movement(ledger, node, args, kwargs)


_UNKNOWN = object()


def _content(arg: Any) -> Any:
    if isinstance(arg, Value):
        return _UNKNOWN if arg.content is None else arg.content
    if isinstance(arg, (list, tuple)):
        return [_content(a) for a in arg]
    return arg


def _has_unknown(args: Any) -> bool:
    return any(a is _UNKNOWN or (isinstance(a, list) and _has_unknown(a)) for a in args)


def _lasting(ledger: Ledger, node: fx.Node, facets: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Facets that still vary; one that shrank to a single label would empty the tensor with it."""
    found = [compress(f) for f in facets]
    for facet in found:
        if not axes(facet) and facet.numel() and bool(facet.reshape(-1)[0] != 0):
            ledger.freeze(facet, node.name, "is taken out alone")
    return tuple(f for f in found if axes(f))


def _compressed(facets: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(c for c in (compress(f) for f in facets) if axes(c))


@handles(aten.cat.default)
def concatenate(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    shape = shape_of(node)
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(shape)
    parts = [p for p in args[0] if 0 not in p.shape]
    across = [[f for f in p.facets if axis not in axes(f)] for p in parts]
    index = tuple(slice(0, 1) if a == axis else slice(None) for a in range(len(shape)))
    operands = [
        ([f[index].expand(*shape) for f in facets], [1 if a == axis else n for a, n in enumerate(p.shape)])
        for facets, p in zip(across, parts, strict=True)
    ]
    merged = merge(ledger, operands, shape, node.name)
    along_axis = [[f for f in p.facets if axis in axes(f)] for p in parts]
    for facets in along_axis:
        for extra in facets[1:]:
            ledger.freeze(extra, node.name, "is joined in two ways at once")
    pieces = [
        facets[0] if facets else torch.zeros((), dtype=torch.int64).expand(p.shape)
        for facets, p in zip(along_axis, parts, strict=True)
    ]
    joined = compress(torch.cat(pieces, axis))
    return Value(shape, (*merged, joined) if axes(joined) else merged)


@handles(aten.stack.default)
def stack(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    shape = shape_of(node)
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(shape)
    operands = []
    for p in args[0]:
        sizes = [*p.shape[:axis], 1, *p.shape[axis:]]
        operands.append(([f.unsqueeze(axis).expand(*shape) for f in p.facets], sizes))
    return Value(shape, merge(ledger, operands, shape, node.name))


@handles(aten.slice_scatter.default)
def slice_scatter(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    x, src = args[0], args[1]
    rest = list(args[2:])
    axis = (rest[0] if rest else 0) % len(x.shape)
    pairs = [(f, g) for f in x.facets for g in src.facets if axes(f) == axes(g)]
    used = {id(t) for pair in pairs for t in pair}
    freeze_all(ledger, node, Value(x.shape, tuple(f for f in x.facets if id(f) not in used)), "is partly overwritten")
    freeze_all(ledger, node, Value(src.shape, tuple(g for g in src.facets if id(g) not in used)), "overwrites a part")
    facets = []
    for f, g in pairs:
        if axis in axes(f):
            facets.append(aten.slice_scatter.default(f.contiguous(), g.contiguous(), *rest, **kwargs))
        else:
            first = tuple(slice(0, 1) if a == axis else slice(None) for a in range(f.ndim))
            ledger.tie(f[first], g[first])
            facets.append(f)
    return Value(x.shape, _compressed(facets))


@handles(aten.pad.default, aten.constant_pad_nd.default)
def pad(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    """Padded coordinates of a labelled axis are units of their own: zeros that nobody produced."""
    x, amounts = args[0], list(args[1])
    shape = shape_of(node)
    padded = [len(shape) - 1 - i for i in range(len(amounts) // 2) if amounts[2 * i] or amounts[2 * i + 1]]
    constant = node.target is aten.constant_pad_nd.default or (args[2] if len(args) > 2 else "constant") == "constant"
    facets = []
    for facet in x.facets:
        over = axes(facet)
        if not set(over) & set(padded):
            index = tuple(slice(None) if a in over else slice(0, 1) for a in range(facet.ndim))
            facets.append(facet[index].expand(*shape))
        elif len(over) == 1 and constant:
            axis = over[0]
            before = amounts[2 * (len(shape) - 1 - axis)]
            labels = ledger.fresh(shape[axis])
            labels[before : before + x.shape[axis]] = reduce_to(facet, over)
            facets.append(along(labels, axis, shape))
        else:
            ledger.freeze(facet, node.name, "is padded together with another axis")
    return Value(shape, tuple(facets))


@handles(aten.glu.default)
def gated_linear_unit(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    x = args[0]
    axis = (args[1] if len(args) > 1 else -1) % len(x.shape)
    halves = [[compress(f.chunk(2, axis)[i]) for f in x.facets] for i in (0, 1)]
    shape = shape_of(node)
    return Value(shape, merge(ledger, [(halves[0], shape), (halves[1], shape)], shape, node.name))


@handles(aten.embedding.default)
def embedding(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    table, shape = args[0], shape_of(node)
    facets = [along(reduce_to(f, (1,)), len(shape) - 1, shape) for f in table.facets if axes(f) == (1,)]
    freeze_all(ledger, node, Value(table.shape, tuple(f for f in table.facets if axes(f) != (1,))), "is a table's row")
    return Value(shape, tuple(facets))


@handles(operator.getitem)
def item(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return args[0][args[1]]


@handles(aten.dropout.default)
def passing(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return Value(args[0].shape, args[0].facets)
