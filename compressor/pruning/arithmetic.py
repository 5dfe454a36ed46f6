"""Operations that compute: contractions tie both sides of the summed axis, norms and reductions pin what they mix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from ..graph import arguments, aten
from .handlers import Table, blank, shape_of, unknown
from .labels import Ledger, Value, along, axes, compress, reduce_to
from .relations import Operand, aligned, broadcast, contract, freeze_all, merge, parents, reduce_summed

TABLE = Table()


@TABLE.handles(aten.linear.default)
def linear(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    x, weight = args[0], args[1]
    front = "abcdefgh"[: len(x.shape) - 1]
    out = contract(ledger, x, weight, f"{front}i,oi->{front}o", node.name)
    return _add_bias(ledger, out, args[2] if len(args) > 2 else None, len(out.shape) - 1, node.name)


def _add_bias(ledger: Ledger, out: Value, bias: Value | None, axis: int, node: str) -> Value:
    if bias is None:
        return out
    return Value(out.shape, merge(ledger, [(out.facets, out.shape), aligned(bias, axis, out.shape)], out.shape, node))


@TABLE.handles(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding)
def convolution(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return _convolve(ledger, node, args, transposed=False)


@TABLE.handles(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def transposed_convolution(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return _convolve(ledger, node, args, transposed=True)


def _convolve(ledger: Ledger, node: fx.Node, args: list[Any], *, transposed: bool) -> Any:
    groups = args[6] if len(args) > 6 else 1
    if len(node.args) > 6 and not isinstance(node.args[6], int):
        freeze_all(ledger, node, args, "has as many groups as the batch has images")
        return blank(node.meta["val"])
    x = _channels_only(ledger, args[0], node)
    weight = Value(args[1].shape[:2], tuple(reduce_summed(f, 2) for f in args[1].facets))
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
            ledger.freeze(facet, node.name, "is read along its channels by a convolution")
            continue
        if over - {0, 1}:
            ledger.tie(facet, first.reshape(*first.shape, *[1] * (facet.ndim - 2)).expand(facet.shape))
        facets.append(first.expand(*x.shape[:2]))
    return Value(tuple(x.shape[:2]), tuple(compress(f) for f in facets if axes(f)))


def _split_rows(facet: Tensor, groups: int) -> Tensor:
    return compress(facet.reshape(groups, facet.shape[0] // groups, facet.shape[1]))


@TABLE.handles(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    a, b = args[0], args[1]
    if min(len(a.shape), len(b.shape)) < 2:
        return unknown(ledger, node, args, kwargs)
    batch = "abcdefg"
    n = max(len(a.shape), len(b.shape)) - 2
    fa, fb = batch[n - len(a.shape) + 2 : n], batch[n - len(b.shape) + 2 : n]
    out = contract(ledger, a, b, f"{fa}xk,{fb}ky->{batch[:n]}xy", node.name)
    return Value(shape_of(node), out.facets)


@TABLE.handles(aten.addmm.default, aten.baddbmm.default)
def added_matmul(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    product = matmul(ledger, node, args[1:3], {})
    shape = product.shape
    return Value(shape, merge(ledger, [broadcast(args[0], shape), (product.facets, shape)], shape, node.name))


@TABLE.handles(aten.einsum.default)
def einsum(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    letters, operands = args[0].replace(" ", ""), args[1]
    if len(operands) != 2 or "." in letters or "->" not in letters or _repeats(letters):
        return unknown(ledger, node, args, kwargs)
    return contract(ledger, operands[0], operands[1], letters, node.name)


def _repeats(letters: str) -> bool:
    left, out = letters.split("->")
    return any(len(set(part)) < len(part) for part in [*left.split(","), out])


@TABLE.handles(aten.scaled_dot_product_attention.default)
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


@TABLE.handles(aten.batch_norm.default)
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


@TABLE.handles(aten._native_batch_norm_legit.no_stats)
def batch_statistics(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    x, weight, bias = args[:3]
    out = batch_norm(ledger, node, [x, weight, bias, None, None, True], kwargs)
    statistics = Value(out.shape[1:2], tuple(reduce_to(f, (1,)) for f in out.facets if axes(f) == (1,)))
    return (out, *(statistics if tuple(m.shape) == statistics.shape else blank(m) for m in node.meta["val"][1:]))


@TABLE.handles(aten.instance_norm.default)
def instance_norm(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return _affine(ledger, node, args[0], args[1:5], 1)


@TABLE.handles(aten.prelu.default)
def prelu(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    if args[1].shape == (1,):
        return Value(args[0].shape, args[0].facets)
    return _affine(ledger, node, args[0], args[1:2], 1)


@TABLE.handles(aten.layer_norm.default, aten.rms_norm.default)
def layer_norm(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    x, normalised = args[0], list(args[1])
    over = range(len(x.shape) - len(normalised), len(x.shape))
    for facet in x.facets:
        if set(axes(facet)) & set(over):
            ledger.mark_inexact(facet, node.name)
    parameters = [p for p in args[2:4] if isinstance(p, Value)]
    operands: list[Operand] = [(x.facets, x.shape)] + [broadcast(p, x.shape) for p in parameters]
    return Value(x.shape, merge(ledger, operands, x.shape, node.name))


@TABLE.handles(aten.group_norm.default)
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


@TABLE.handles(aten.softmax.int, aten.log_softmax.int, aten._softmax.default)
def softmax(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    x = args[0]
    return _pin_along(ledger, node, x, [args[1] % len(x.shape)], "is normalised by softmax")


@TABLE.handles(aten.sum.dim_IntList, aten.linalg_vector_norm.default)
def exact_reduction(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    norm = node.target is aten.linalg_vector_norm.default
    dims = args[2 if norm else 1] if len(args) > (2 if norm else 1) else None
    return _reduce(ledger, node, args[0], dims, exact=True)


@TABLE.handles(aten.mean.dim)
def mean(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return _reduce(ledger, node, args[0], args[1], exact=False)


@TABLE.handles(aten.var.correction, aten.std.correction, aten.var.dim, aten.std.dim)
def variance(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return _reduce(ledger, node, args[0], args[1] if len(args) > 1 else kwargs.get("dim"), exact=False)


@TABLE.handles(
    aten.amax.default,
    aten.amin.default,
    aten.max.dim,
    aten.min.dim,
    aten.median.dim,
    aten.mode.default,
    aten.kthvalue.default,
    aten.argmax.default,
    aten.argmin.default,
    aten.logsumexp.default,
    aten.prod.dim_int,
    aten.any.dim,
    aten.all.dim,
)
def extremum(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """One value of several, which the others decide; with it, its place among them."""
    meta, over = node.meta["val"], _axes_of(arguments(node)["dim"], args[0])
    x = _pin_along(ledger, node, args[0], over, f"is reduced by {named_operation(node)}")
    first = meta if isinstance(meta, Tensor) else meta[0]
    out = Value(tuple(first.shape), _drop(x, over, first.shape))
    return out if isinstance(meta, Tensor) else tuple(out for _ in meta)


@TABLE.handles(
    aten.topk.default,
    aten.sort.default,
    aten.sort.stable,
    aten.argsort.default,
    aten.cumsum.default,
    aten.cumprod.default,
    aten.logcumsumexp.default,
    aten.cummax.default,
    aten.cummin.default,
)
def along_one_axis(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """What is chosen, ordered or summed up along one axis; with it, the places."""
    meta, axis = node.meta["val"], arguments(node)["dim"] % len(args[0].shape)
    x = _pin_along(ledger, node, args[0], [axis], f"lies along the axis of {named_operation(node)}")
    first = meta if isinstance(meta, Tensor) else meta[0]
    index = tuple(slice(0, 1) if a == axis else slice(None) for a in range(len(x.shape)))
    out = Value(tuple(first.shape), tuple(f[index].expand(*first.shape) for f in x.facets))
    return out if isinstance(meta, Tensor) else tuple(out for _ in meta)


def named_operation(node: fx.Node) -> str:
    """`topk` of aten.topk.default."""
    return str(getattr(node.target, "overloadpacket", node.target)).split(".")[-1]


@TABLE.handles(aten.im2col.default)
def patches(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    """[N, C, H, W] to [N, C * kernel, positions]: a channel's entries lie one behind another."""
    x, shape = _channels_only(ledger, args[0], node), shape_of(node)
    entries = shape[1] // x.shape[1]
    facets = (f.repeat_interleave(entries, 1)[..., None].expand(*shape) for f in x.facets)
    return Value(shape, tuple(compress(f) for f in facets))


@TABLE.handles(aten.col2im.default)
def folded_patches(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    """[N, C * kernel, positions] to [N, C, H, W]: the entries of one channel go together."""
    x, shape = args[0], shape_of(node)
    entries = x.shape[1] // shape[1]
    facets = []
    for facet in x.facets:
        if axes(facet) != (1,):
            ledger.freeze(facet, node.name, "is folded together with its positions")
            continue
        parts = reduce_to(facet, (1,)).reshape(-1, entries)  # [C, kernel]
        ledger.tie(parts, parts[:, :1])
        facets.append(along(parts[:, 0], 1, shape))
    return Value(shape, tuple(facets))


@TABLE.handles(
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.empty.memory_format,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
)
def filled(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    """A tensor of one number may lose any coordinate of an axis whose length is written there; of others none."""
    shape = shape_of(node)
    lengths = [n if isinstance(n, int) else 0 for n in arguments(node)["size"]]
    return Value(shape, tuple(along(ledger.fresh(n), axis, shape) for axis, n in enumerate(lengths) if n > 1))


@TABLE.handles(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default)
def filled_alike(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    """As long as what it is made after, whatever that loses."""
    return Value(args[0].shape, args[0].facets)


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
    kept, rows = parents(ledger, facets, over, [i for i in range(len(x.shape)) if i not in over], node.name)
    shape = shape_of(node)
    return Value(shape, _drop(Value(x.shape, (*kept, *rows)), over, shape))


def _drop(x: Value, over: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Facets after reduction over axes they do not depend on, with or without those axes kept."""
    index = tuple(slice(0, 1) if a in over else slice(None) for a in range(len(x.shape)))
    return tuple(f[index].reshape(tuple(shape)) for f in x.facets)


@TABLE.handles(
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool1d.default,
    aten.adaptive_max_pool3d.default,
    aten.max_pool1d_with_indices.default,
    aten.max_pool3d_with_indices.default,
    aten.max_pool1d.default,
    aten.avg_pool1d.default,
    aten.adaptive_avg_pool1d.default,
    aten.max_pool3d.default,
    aten.avg_pool3d.default,
    aten.adaptive_avg_pool3d.default,
    aten.max_pool2d_with_indices.default,
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest3d.vec,
    aten._upsample_nearest_exact1d.vec,
    aten._upsample_nearest_exact2d.vec,
    aten._upsample_nearest_exact2d.default,
    aten._upsample_nearest_exact3d.vec,
    aten._upsample_bilinear2d_aa.vec,
    aten._upsample_bicubic2d_aa.vec,
    aten.upsample_linear1d.vec,
    aten.upsample_trilinear3d.vec,
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
    if isinstance(meta, Tensor):
        return out
    # places of a maximum lie in the image plane, of which nothing goes
    return (out, *(out if m.shape == meta[0].shape else blank(m) for m in meta[1:]))
