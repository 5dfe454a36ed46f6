"""Operations that mix the entries of an axis: norms, sums, extrema and pooling pin what they mix or mark it inexact.

One handler for each family of ATen operations, in `TABLE`. Knows no plan: what is pinned here is pinned for any.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from ..graph import aten
from .handlers import Call, Table, left_alone
from .labels import Ledger, Result, Value, axes, first_along, reduce_to
from .relations import Operand, aligned, broadcast, merge, parents, pin_along

TABLE = Table()
_TRANSFORMS = (
    *(aten.fft_fft.default, aten.fft_ifft.default, aten.fft_rfft.default, aten.fft_irfft.default),
    *(aten.fft_fft2.default, aten.fft_ifft2.default, aten.fft_rfft2.default, aten.fft_irfft2.default),
    *(aten.fft_fftn.default, aten.fft_ifftn.default, aten.fft_rfftn.default, aten.fft_irfftn.default),
    *(aten.fft_hfft.default, aten.fft_ihfft.default),
)
_AFFINE = ("weight", "bias")
_STORED = ("running_mean", "running_var")


@TABLE.handles(aten.batch_norm.default)
def batch_norm(ledger: Ledger, call: Call) -> Value:
    """[N, C, ...]: each channel by itself, with statistics stored or taken of this input."""
    if call.argument("training"):  # statistics of this very input, as weight standardisation takes them
        _mark_beside_channels(ledger, call)
    return _affine(ledger, call, (*_AFFINE, *_STORED))


def _mark_beside_channels(ledger: Ledger, call: Call) -> None:
    """Statistics over all axes but the channels' change when anything goes along one of those."""
    _mark_along(ledger, call, {0, *range(2, len(call.input.shape))})


def _mark_along(ledger: Ledger, call: Call, over: Collection[int]) -> None:
    """The result is not exact where anything of the input goes along one of those axes."""
    for facet in call.input.facets:
        if not set(axes(facet)).isdisjoint(over):
            ledger.mark_inexact(facet, call.name)


def _affine(ledger: Ledger, call: Call, names: Sequence[str]) -> Value:
    """The input [N, C, ...] met by those of the named parameters [C] that are there."""
    x = call.input
    operands = [Operand(x.facets, x.shape)]
    operands += [aligned(parameter, 1, x.shape) for parameter in call.tensors(*names)]
    return merge(ledger, operands, x.shape, call.name)


@TABLE.handles(aten._native_batch_norm_legit.no_stats)
def batch_statistics(ledger: Ledger, call: Call) -> Result:
    """As `batch_norm` without stored statistics; what it took itself is given out too, [C] each."""
    _mark_beside_channels(ledger, call)
    out = _affine(ledger, call, _AFFINE)
    channels = [reduce_to(facet, (1,)) for facet in out.facets if axes(facet) == (1,)]
    statistics = Value(out.shape[1:2], tuple(channels))

    results = [out]
    for shape in call.shapes[1:]:
        results.append(statistics if shape == statistics.shape else Value(shape))
    return tuple(results)


@TABLE.handles(aten.instance_norm.default)
def instance_norm(ledger: Ledger, call: Call) -> Value:
    """[N, C, ...]: each channel of each image by itself."""
    return _affine(ledger, call, (*_AFFINE, *_STORED))


@TABLE.handles(aten.prelu.default)
def prelu(ledger: Ledger, call: Call) -> Value:
    """A slope for each channel, or one for all of them."""
    if call.operand(1).shape == (1,):
        return Value(call.input.shape, call.input.facets)
    return _affine(ledger, call, ("weight",))


@TABLE.handles(aten.layer_norm.default, aten.rms_norm.default)
def layer_norm(ledger: Ledger, call: Call) -> Value:
    """Over the last axes, of which units may go: what remains has other statistics, so it is not exact."""
    x = call.input
    first = len(x.shape) - len(call.integers("normalized_shape"))  # of [N, tokens, C] over (C,), axis 2
    _mark_along(ledger, call, range(first, len(x.shape)))
    operands = [Operand(x.facets, x.shape)]
    operands += [broadcast(parameter, x.shape) for parameter in call.tensors(*_AFFINE)]
    return merge(ledger, operands, x.shape, call.name)


@TABLE.handles(aten.group_norm.default)
def group_norm(ledger: Ledger, call: Call) -> Value:
    """[N, C, ...]: groups of neighbouring channels stay, with equally many channels each."""
    groups, c = call.integer("num_groups"), call.input.shape[1]
    for facet in call.input.facets:
        if axes(facet) != (1,) or groups == c:
            continue
        ledger.mark_inexact(facet, call.name)
        if groups > 1:  # 12 channels in 3 groups are 3 rows of 4
            channels = reduce_to(facet, (1,)).reshape(groups, c // groups)
            group_labels = ledger.fresh(groups, 1).expand(channels.shape)
            ledger.relate(group_labels, channels, call.name)
            ledger.freeze(group_labels, call.name, "is a group of a group normalisation")
    return _affine(ledger, call, _AFFINE)


@TABLE.handles(aten.softmax.int, aten.log_softmax.int, aten._softmax.default)
def softmax(ledger: Ledger, call: Call) -> Value:
    """Shares of one axis: without one of them the others would be larger."""
    axis = call.integer("dim") % len(call.input.shape)
    return pin_along(ledger, call.input, [axis], call.name, "is normalised by softmax")


@TABLE.handles(aten.sum.dim_IntList, aten.linalg_vector_norm.default)
def exact_reduction(ledger: Ledger, call: Call) -> Value:
    """Zeros add nothing to a sum, nor to a norm."""
    return _reduce(ledger, call)


@TABLE.handles(aten.mean.dim, aten.var.correction, aten.std.correction, aten.var.dim, aten.std.dim)
def counted_reduction(ledger: Ledger, call: Call) -> Value:
    """Not exact over an axis that is pruned: the number it divides by changes."""
    _mark_along(ledger, call, _axes_of(call))
    return _reduce(ledger, call)


def _reduce(ledger: Ledger, call: Call) -> Value:
    """The input without the axes that are summed up, or with size 1 there."""
    x, over = call.input, _axes_of(call)
    # labels on (heads, d), summed over d, leave a row for each head
    remaining = [axis for axis in range(len(x.shape)) if axis not in over]
    kept, rows = parents(ledger, x.facets, over, [remaining], call.name)
    return Value(call.shape, _drop([*kept, *rows], over, call.shape))


def _axes_of(call: Call) -> list[int]:
    """The axes that are reduced, counted from the front; None and an empty list mean all of them."""
    dims, rank = call.argument("dim"), len(call.input.shape)
    if dims in (None, []):
        return list(range(rank))
    if isinstance(dims, int):
        return [dims % rank]
    return [axis % rank for axis in call.integers("dim")]


def _drop(facets: Sequence[Tensor], over: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Facets after reduction over axes they do not depend on, with or without those axes kept."""
    return tuple(first_along(facet, over).reshape(tuple(shape)) for facet in facets)


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
def extremum(ledger: Ledger, call: Call) -> Result:
    """One value of several, which the others decide; with it, its place among them."""
    over = _axes_of(call)
    x = pin_along(ledger, call.input, over, call.name, f"is reduced by {_operation(call)}")
    # whichever entry it is, all results are shaped alike
    out = Value(call.shape, _drop(x.facets, over, call.shape))
    return call.returning([out] * len(call.shapes))


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
def along_one_axis(ledger: Ledger, call: Call) -> Result:
    """What is chosen, ordered or summed up along one axis; with it, the places."""
    axis = call.integer("dim") % len(call.input.shape)
    x = pin_along(ledger, call.input, [axis], call.name, f"lies along the axis of {_operation(call)}")
    # topk shortens the axis, along which nothing changes by now
    facets = [first_along(facet, [axis]).expand(*call.shape) for facet in x.facets]
    out = Value(call.shape, tuple(facets))
    return call.returning([out] * len(call.shapes))


@TABLE.handles(aten.gather.default, aten.take_along_dim.default)
def read_along_one_axis(ledger: Ledger, call: Call) -> Result:
    """Entries of one axis at places that are computed; on the others, what is read and the places go together."""
    x, places = call.input, call.tensors("index", "indices")
    if call.argument("dim") is None:  # of all axes as one
        return left_alone(ledger, call, f"reaches {call.node.target} without an axis, which has no pruning rule")
    axis = call.integer("dim") % len(x.shape)
    operands = []
    for value in (x, *places):
        sizes = tuple(1 if other == axis else size for other, size in enumerate(value.shape))
        if any(size not in (1, of_result) for size, of_result in zip(sizes, call.shape, strict=True)):
            return left_alone(ledger, call, f"reaches {call.node.target} that reads a part of its other axes")
        pinned = pin_along(ledger, value, [axis], call.name, f"is read by {_operation(call)}")
        one_entry = Value(sizes, tuple(first_along(facet, [axis]) for facet in pinned.facets))
        operands.append(broadcast(one_entry, call.shape))
    return merge(ledger, operands, call.shape, call.name)


@TABLE.handles(*_TRANSFORMS)
def transform(ledger: Ledger, call: Call) -> Value:
    """Frequencies in place of samples along some axes: nothing goes there, the others stay as they are."""
    rank = len(call.input.shape)
    dims = call.argument("dim")
    if dims is None:  # as many of the last as there are sizes, or all
        sizes = call.argument("s")
        dims = range(rank) if sizes is None else range(-len(sizes), 0)  # type: ignore[arg-type]
    over = sorted({axis % rank for axis in ([dims] if isinstance(dims, int) else dims)})  # type: ignore[attr-defined]
    x = pin_along(ledger, call.input, over, call.name, f"is transformed by {_operation(call)}")
    return Value(call.shape, tuple(first_along(facet, over).expand(*call.shape) for facet in x.facets))


def _operation(call: Call) -> str:
    """`topk` of aten.topk.default."""
    return str(getattr(call.node.target, "overloadpacket", call.node.target)).split(".")[-1]


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
def spatial(ledger: Ledger, call: Call) -> Result:
    """Pooling and resampling of [N, C, ...]: nothing may go of the image plane, channels go as they came."""
    image_axes = _image_axes(call.input.shape, call.shape)
    x = pin_along(ledger, call.input, image_axes, call.name, "lies along a pooled axis")
    facets = [first_along(facet, image_axes).expand(*call.shape) for facet in x.facets]
    out = Value(call.shape, tuple(facets))

    # places of a maximum lie in the image plane, of which nothing goes
    results = [out if shape == out.shape else Value(shape) for shape in call.shapes]
    return call.returning(results)


def _image_axes(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """The axes of the image plane: all but the first two, and any that changed size.

    How many there are is not in every signature: pooling [C, H, W] alone changes axis 1 too.
    """
    changed = [axis for axis in range(1, len(after)) if after[axis] != before[axis]]
    return sorted({*changed, *range(2, len(after))})
