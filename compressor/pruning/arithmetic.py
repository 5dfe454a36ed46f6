"""Operations that compute: contractions tie both sides of the summed axis, norms and reductions pin what they mix.

One handler for each family of ATen operations, in `TABLE`. Knows no plan: what is tied here ties for any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from ..graph import aten
from ..graph.operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, arguments
from .handlers import Args, Kwargs, Table, argument_at, blank, shape_of, unknown
from .labels import Ledger, Value, along, axes, compress, first_along, reduce_to
from .relations import Operand, aligned, broadcast, contract, freeze_all, merge, parents, reduce_summed

TABLE = Table()


@TABLE.handles(aten.linear.default)
def linear(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """[..., in] and a weight [out, in] to [..., out]."""
    x, weight = args[0], args[1]
    front = "abcdefgh"[: len(x.shape) - 1]
    out = contract(ledger, x, weight, f"{front}i,oi->{front}o", node.name)
    return _add_bias(ledger, out, argument_at(args, 2), len(out.shape) - 1, node.name)


def _add_bias(ledger: Ledger, out: Value, bias: Value | None, axis: int, node: str) -> Value:
    if bias is None:
        return out
    operands = [(out.facets, out.shape), aligned(bias, axis, out.shape)]
    return Value(out.shape, merge(ledger, operands, out.shape, node))


@TABLE.handles(*CONVOLUTIONS)
def convolution(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """[N, C, ...] and a kernel [out, in / groups, ...] to [N, out, ...]."""
    return _convolve(ledger, node, args, transposed=False)


@TABLE.handles(*TRANSPOSED_CONVOLUTIONS)
def transposed_convolution(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """[N, C, ...] and a kernel [in, out / groups, ...] to [N, out, ...]."""
    return _convolve(ledger, node, args, transposed=True)


def _convolve(ledger: Ledger, node: fx.Node, args: Args, *, transposed: bool) -> Any:
    if len(node.args) > 6 and not isinstance(node.args[6], int):
        freeze_all(ledger, node.name, args, "has as many groups as the batch has images")
        return blank(node.meta["val"])
    groups = argument_at(args, 6, 1)
    x = _channels_only(ledger, args[0], node)  # [N, C]
    kernel = Value(args[1].shape[:2], tuple(reduce_summed(facet, 2) for facet in args[1].facets))
    if groups == 1:
        letters = "bi,io->bo" if transposed else "bi,oi->bo"
        out = contract(ledger, x, kernel, letters, node.name)
    else:
        out = _contract_grouped(ledger, node, x, kernel, groups, transposed=transposed)

    shape = shape_of(node)
    facets = [facet.reshape(*facet.shape, *[1] * (len(shape) - 2)).expand(*shape) for facet in out.facets]
    return _add_bias(ledger, Value(shape, tuple(facets)), argument_at(args, 2), 1, node.name)


def _contract_grouped(
    ledger: Ledger, node: fx.Node, x: Value, kernel: Value, groups: int, *, transposed: bool
) -> Value:
    """[N, C] and [out, in] to [N, out], each group of channels by itself."""
    n, c = x.shape
    split_x = [facet.reshape(n, groups, c // groups) for facet in x.facets]  # [N, groups, C / groups]
    grouped_x = Value((n, groups, c // groups), tuple(split_x))

    # a kernel is [out, in / groups], a transposed one [in, out / groups]: groups part its first axis
    first, second = kernel.shape
    split_kernel = [compress(facet.reshape(groups, first // groups, second)) for facet in kernel.facets]
    grouped_kernel = Value((groups, first // groups, second), tuple(split_kernel))

    letters = "bgi,gio->bgo" if transposed else "bgi,goi->bgo"
    out = contract(ledger, grouped_x, grouped_kernel, letters, node.name)  # [N, groups, out / groups]
    return Value((n, out.shape[1] * out.shape[2]), tuple(compress(facet.reshape(n, -1)) for facet in out.facets))


def _channels_only(ledger: Ledger, x: Value, node: fx.Node) -> Value:
    """[N, C] labels of [N, C, ...]; labels that change over space are tied across it."""
    facets = []
    for facet in x.facets:
        first = reduce_to(facet, (0, 1))  # [N, C], at the first place
        over = set(axes(facet))
        if over and min(over) > 1:
            ledger.freeze(facet, node.name, "is read along its channels by a convolution")
            continue
        if over - {0, 1}:
            everywhere = first.reshape(*first.shape, *[1] * (facet.ndim - 2)).expand(facet.shape)
            ledger.tie(facet, everywhere)
        facets.append(first.expand(*x.shape[:2]))
    return Value(tuple(x.shape[:2]), tuple(compress(facet) for facet in facets if axes(facet)))


@TABLE.handles(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """[..., x, k] and [..., k, y] to [..., x, y]; axes in front are aligned from the right."""
    a, b = args[0], args[1]
    if min(len(a.shape), len(b.shape)) < 2:
        return unknown(ledger, node, args, kwargs)
    n_front = max(len(a.shape), len(b.shape)) - 2
    front = "abcdefg"[:n_front]
    # of `ab`, an operand with one axis in front has `b`
    front_a, front_b = front[n_front - len(a.shape) + 2 :], front[n_front - len(b.shape) + 2 :]
    out = contract(ledger, a, b, f"{front_a}xk,{front_b}ky->{front}xy", node.name)
    return Value(shape_of(node), out.facets)


@TABLE.handles(aten.addmm.default, aten.baddbmm.default)
def added_matmul(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """A tensor plus the product of two matrices."""
    product = matmul(ledger, node, args[1:3], {})
    shape = product.shape
    return Value(shape, merge(ledger, [broadcast(args[0], shape), (product.facets, shape)], shape, node.name))


@TABLE.handles(aten.einsum.default)
def einsum(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """Of two operands whose letters are all written and none of them twice in one operand."""
    letters, operands = args[0].replace(" ", ""), args[1]
    if len(operands) != 2 or "." in letters or "->" not in letters or _repeats(letters):
        return unknown(ledger, node, args, kwargs)
    return contract(ledger, operands[0], operands[1], letters, node.name)


def _repeats(letters: str) -> bool:
    """Whether a letter stands twice in one operand, as in the diagonal `ii->i`."""
    inputs, letters_out = letters.split("->")
    return any(len(set(operand)) < len(operand) for operand in [*inputs.split(","), letters_out])


@TABLE.handles(aten.scaled_dot_product_attention.default)
def attention(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """Queries [..., n, d], keys [..., m, d], values [..., m, e] to [..., n, e]; what lies in front are heads."""
    q, k, v = args[:3]
    ranks = {len(operand.shape) for operand in (q, k, v)}
    if len(ranks) > 1 or kwargs.get("enable_gqa"):
        return unknown(ledger, node, args, kwargs)
    front = "abcdefg"[: len(q.shape) - 2]
    weights = contract(ledger, q, k, f"{front}nd,{front}md->{front}nm", node.name)

    mask = argument_at(args, 3, kwargs.get("attn_mask"))
    if isinstance(mask, Value):
        operands = [(weights.facets, weights.shape), broadcast(mask, weights.shape)]
        weights = Value(weights.shape, merge(ledger, operands, weights.shape, node.name))
    weights = _pin_along(ledger, node, weights, [len(weights.shape) - 1], "is normalised by softmax")
    return contract(ledger, weights, v, f"{front}nm,{front}me->{front}ne", node.name)


def _pin_along(ledger: Ledger, node: fx.Node, x: Value, over: Sequence[int], reason: str) -> Value:
    """The value with nothing to lose along `over`: facets there are pinned, rows across it remain."""
    facets = []
    for facet in x.facets:
        free: Tensor | None = facet
        if set(axes(facet)) & set(over):
            free = ledger.pin(facet, over, node.name, reason)
        if free is not None:
            facets.append(free)
    return Value(x.shape, tuple(facets))


@TABLE.handles(aten.batch_norm.default)
def batch_norm(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """[N, C, ...]: each channel by itself, with statistics stored or taken of this input."""
    x = args[0]
    if args[5]:  # statistics of this very input, as weight standardisation takes them
        for facet in x.facets:
            if set(axes(facet)) - {1}:
                ledger.mark_inexact(facet, node.name)
    return _affine(ledger, node, x, args[1:5], 1)


def _affine(ledger: Ledger, node: fx.Node, x: Value, parameters: Sequence[Any], axis: int) -> Value:
    """Parameters [C] along one axis of x: weight, bias, mean, variance, those that are not there being None."""
    operands: list[Operand] = [(x.facets, x.shape)]
    operands += [aligned(parameter, axis, x.shape) for parameter in parameters if isinstance(parameter, Value)]
    return Value(x.shape, merge(ledger, operands, x.shape, node.name))


@TABLE.handles(aten._native_batch_norm_legit.no_stats)
def batch_statistics(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """As `batch_norm` without stored statistics; what it took itself is given out too, [C] each."""
    x, weight, bias = args[:3]
    out = batch_norm(ledger, node, [x, weight, bias, None, None, True], kwargs)
    channels = [reduce_to(facet, (1,)) for facet in out.facets if axes(facet) == (1,)]
    statistics = Value(out.shape[1:2], tuple(channels))

    results = [out]
    for meta in node.meta["val"][1:]:
        results.append(statistics if tuple(meta.shape) == statistics.shape else blank(meta))
    return tuple(results)


@TABLE.handles(aten.instance_norm.default)
def instance_norm(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """[N, C, ...]: each channel of each image by itself."""
    return _affine(ledger, node, args[0], args[1:5], 1)


@TABLE.handles(aten.prelu.default)
def prelu(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """A slope for each channel, or one for all of them."""
    if args[1].shape == (1,):
        return Value(args[0].shape, args[0].facets)
    return _affine(ledger, node, args[0], args[1:2], 1)


@TABLE.handles(aten.layer_norm.default, aten.rms_norm.default)
def layer_norm(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """Over the last axes, of which units may go: what remains has other statistics, so it is not exact."""
    x, normalised_shape = args[0], list(args[1])
    normalised = set(range(len(x.shape) - len(normalised_shape), len(x.shape)))
    for facet in x.facets:
        if set(axes(facet)) & normalised:
            ledger.mark_inexact(facet, node.name)
    operands: list[Operand] = [(x.facets, x.shape)]
    operands += [broadcast(parameter, x.shape) for parameter in args[2:4] if isinstance(parameter, Value)]
    return Value(x.shape, merge(ledger, operands, x.shape, node.name))


@TABLE.handles(aten.group_norm.default)
def group_norm(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """[N, C, ...]: groups of neighbouring channels stay, with equally many channels each."""
    x, groups = args[0], int(args[1])
    c = x.shape[1]
    for facet in x.facets:
        if axes(facet) != (1,) or groups == c:
            continue
        ledger.mark_inexact(facet, node.name)
        if groups > 1:
            channels = reduce_to(facet, (1,)).reshape(groups, c // groups)
            group_labels = ledger.fresh(groups, 1).expand(channels.shape)
            ledger.relate(group_labels, channels, node.name)
            ledger.freeze(group_labels, node.name, "is a group of a group normalisation")
    return _affine(ledger, node, x, args[2:4], 1)


@TABLE.handles(aten.softmax.int, aten.log_softmax.int, aten._softmax.default)
def softmax(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """Shares of one axis: without one of them the others would be larger."""
    x = args[0]
    return _pin_along(ledger, node, x, [args[1] % len(x.shape)], "is normalised by softmax")


@TABLE.handles(aten.sum.dim_IntList, aten.linalg_vector_norm.default)
def exact_reduction(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """Zeros add nothing to a sum, nor to a norm."""
    position = 2 if node.target is aten.linalg_vector_norm.default else 1  # a norm's order stands before its axes
    return _reduce(ledger, node, args[0], argument_at(args, position), exact=True)


@TABLE.handles(aten.mean.dim)
def mean(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """Not exact over an axis that is pruned: the number it divides by changes."""
    return _reduce(ledger, node, args[0], args[1], exact=False)


@TABLE.handles(aten.var.correction, aten.std.correction, aten.var.dim, aten.std.dim)
def variance(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """Not exact over an axis that is pruned, like the mean it is taken around."""
    return _reduce(ledger, node, args[0], argument_at(args, 1, kwargs.get("dim")), exact=False)


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
def extremum(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """One value of several, which the others decide; with it, its place among them."""
    meta = node.meta["val"]
    over = _axes_of(arguments(node)["dim"], args[0])
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
def along_one_axis(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """What is chosen, ordered or summed up along one axis; with it, the places."""
    meta = node.meta["val"]
    axis = arguments(node)["dim"] % len(args[0].shape)
    x = _pin_along(ledger, node, args[0], [axis], f"lies along the axis of {named_operation(node)}")
    first = meta if isinstance(meta, Tensor) else meta[0]
    # topk shortens the axis, along which nothing changes by now
    facets = [first_along(facet, [axis]).expand(*first.shape) for facet in x.facets]
    out = Value(tuple(first.shape), tuple(facets))
    return out if isinstance(meta, Tensor) else tuple(out for _ in meta)


def named_operation(node: fx.Node) -> str:
    """`topk` of aten.topk.default."""
    return str(getattr(node.target, "overloadpacket", node.target)).split(".")[-1]


@TABLE.handles(aten.im2col.default)
def patches(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """[N, C, H, W] to [N, C * kernel, positions]: a channel's entries lie one behind another."""
    x = _channels_only(ledger, args[0], node)  # [N, C]
    shape = shape_of(node)
    kernel_size = shape[1] // x.shape[1]
    # 2 channels under 2 x 2 kernels: 0 0 0 0 1 1 1 1
    facets = [facet.repeat_interleave(kernel_size, 1)[..., None].expand(*shape) for facet in x.facets]
    return Value(shape, tuple(compress(facet) for facet in facets))


@TABLE.handles(aten.col2im.default)
def folded_patches(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """[N, C * kernel, positions] to [N, C, H, W]: the entries of one channel go together."""
    x, shape = args[0], shape_of(node)
    kernel_size = x.shape[1] // shape[1]
    facets = []
    for facet in x.facets:
        if axes(facet) != (1,):
            ledger.freeze(facet, node.name, "is folded together with its positions")
            continue
        entries = reduce_to(facet, (1,)).reshape(-1, kernel_size)  # [C, kernel]
        ledger.tie(entries, entries[:, :1])
        facets.append(along(entries[:, 0], 1, shape))
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
def filled(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """A tensor of one number may lose any coordinate of an axis whose length is written there; of others none."""
    shape = shape_of(node)
    facets = []
    for axis, length in enumerate(arguments(node)["size"]):
        if isinstance(length, int) and length > 1:
            facets.append(along(ledger.fresh(length), axis, shape))
    return Value(shape, tuple(facets))


@TABLE.handles(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default)
def filled_alike(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """As long as what it is made after, whatever that loses."""
    return Value(args[0].shape, args[0].facets)


def _axes_of(dims: int | Sequence[int] | None, x: Value) -> list[int]:
    """Axes counted from the front; None and an empty list mean all of them."""
    rank = len(x.shape)
    if dims is None or dims == []:
        return list(range(rank))
    if isinstance(dims, int):
        return [dims % rank]
    return [axis % rank for axis in dims]


def _reduce(ledger: Ledger, node: fx.Node, x: Value, dims: int | Sequence[int] | None, *, exact: bool) -> Value:
    """x without the axes `dims`, or with size 1 there; where it is not `exact`, units along them are marked so."""
    over = _axes_of(dims, x)
    for facet in x.facets:
        if set(axes(facet)) & set(over) and not exact:
            ledger.mark_inexact(facet, node.name)
    remaining = [axis for axis in range(len(x.shape)) if axis not in over]
    kept, rows = parents(ledger, list(x.facets), over, remaining, node.name)
    shape = shape_of(node)
    return Value(shape, _drop(Value(x.shape, (*kept, *rows)), over, shape))


def _drop(x: Value, over: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Facets after reduction over axes they do not depend on, with or without those axes kept."""
    return tuple(first_along(facet, over).reshape(tuple(shape)) for facet in x.facets)


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
def spatial(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """Pooling and resampling of [N, C, ...]: nothing may go of the image plane, channels go as they came."""
    x, meta = args[0], node.meta["val"]
    pooled = meta if isinstance(meta, Tensor) else meta[0]
    shape = tuple(pooled.shape)
    # the kernel's number of image axes is not in every signature: whatever changed size was pooled
    image_axes = [axis for axis in range(1, len(shape)) if shape[axis] != x.shape[axis] or axis >= 2]
    x = _pin_along(ledger, node, x, image_axes, "lies along a pooled axis")
    facets = [first_along(facet, image_axes).expand(*shape) for facet in x.facets]
    out = Value(shape, tuple(facets))
    if isinstance(meta, Tensor):
        return out

    # places of a maximum lie in the image plane, of which nothing goes
    results = [out]
    for extra in meta[1:]:
        results.append(out if extra.shape == pooled.shape else blank(extra))
    return tuple(results)
