"""A traced graph in, its MACs, parameters and activations at batch 1 out: one formula per operation.

1 MAC = one multiply-accumulate of a contraction (convolution, product, attention). Elementwise arithmetic,
normalisation, pooling, resampling and movement of data count as zero on purpose, as in published tables;
an operation in neither table goes to `Cost.uncounted`. Reads only shapes (`node.meta["val"]`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import ModelError
from ..records import Cost
from .interface import input_nodes

Shape = Sequence[int]
Formula = Callable[[fx.Node], int]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Stands for a tensor in a node's metadata where its sizes are no whole numbers: sums of gates."""

    sizes: tuple[Any, ...]


def formula_of(node: fx.Node) -> Formula | None:
    """MACs of a node from its arguments' and its own shapes, over the traced batch; None where nothing is counted."""
    return FORMULAS.get(_name(node))


def measure_cost(graph: fx.GraphModule) -> Cost:
    """What one image costs. Tied parameters count once; activations are the outputs of counted operations.

    Raises ModelError when a node carries no shapes (the graph was not traced, or was changed since).
    """
    batch = _batch(graph)
    of_the_image = _nodes_of_the_image(graph)
    by_node: dict[str, int] = {}
    uncounted: set[str] = set()
    activations = 0
    for node in graph.graph.nodes:
        formula = formula_of(node)
        if formula is None:
            if _may_multiply(node):
                uncounted.add(str(node.target))
            continue

        images = batch if node in of_the_image else 1
        macs, size = formula(node), prod(_shape(node))
        if macs % images:
            uncounted.add(f"{node.target} (not proportional to the batch)")
        by_node[node.name] = macs // images
        activations += size // images

    parameters = sum(parameter.numel() for parameter in graph.parameters())
    return Cost(sum(by_node.values()), parameters, activations, by_node, tuple(sorted(uncounted)))


def macs_by_layer(graph: fx.GraphModule, cost: Cost) -> dict[str, int]:
    """The cost's MACs summed over the nodes each layer issued, in order of execution."""
    layers: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.name in cost.by_node:
            layer = node.meta.get("layer", "")
            layers[layer] = layers.get(layer, 0) + cost.by_node[node.name]
    return layers


def _batch(graph: fx.GraphModule) -> int:
    inputs = input_nodes(graph)
    if not inputs:
        raise ModelError("the graph has no input; give a graph made by compressor.graph.trace")
    return _shape(inputs[0])[0]


def _nodes_of_the_image(graph: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose size grows with the batch; the rest (a table of positions, a standardised weight) runs once."""
    of_the_image: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or not of_the_image.isdisjoint(node.all_input_nodes):
            of_the_image.add(node)
    return of_the_image


def _name(node: fx.Node) -> str:
    """`aten::conv2d` for every overload of it, "" for what is not an operator."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name)


def _shape(node: Any) -> Shape:  # or what stands for a node and has its `meta`
    """Of its result, of the first where it has several."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    match value:
        case Tensor():
            return tuple(value.shape)
        case Sizes():
            return value.sizes
    raise ModelError(
        f"node '{node.name}' of the graph carries no shape but {type(value).__name__}; trace the model again "
        "(compressor.graph.trace) before counting"
    )


def _may_multiply(node: fx.Node) -> bool:
    """True for a floating result of an operation that neither table knows."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    is_view = bool(getattr(node.target, "is_view", False))
    if is_pointwise or is_view or _name(node) in ZERO_MACS:
        return False
    return _holds_floats(node.meta.get("val"))


def _holds_floats(value: object) -> bool:
    """Whether a result is a tensor of real or complex numbers, or one of several results is."""
    match value:
        case Tensor():
            return value.is_floating_point() or value.is_complex()
        case tuple() | list():
            return any(map(_holds_floats, value))
        case _:
            return False


def _convolution(node: fx.Node) -> int:
    """Every output value reads [inputs of its group, kernel]: weight is [out, in / groups, ...].

    3 x 3 from 64 to 128 channels in 2 groups, on 7 x 7 outputs: 128 * 49 * (32 * 9) MACs an image.
    """
    return prod(_shape(node)) * prod(_shape(node.args[1])[1:])


def _transposed_convolution(node: fx.Node) -> int:
    """Every input value is spread over [outputs of its group, kernel]: weight is [in, out / groups, ...]."""
    return prod(_shape(node.args[0])) * prod(_shape(node.args[1])[1:])


def _general_convolution(node: fx.Node) -> int:
    is_transposed = node.args[6]
    return _transposed_convolution(node) if is_transposed else _convolution(node)


def _product_of(left: int) -> Formula:
    """Output size times the contracted length, which is the last axis of argument `left`."""
    return lambda node: prod(_shape(node)) * _shape(node.args[left])[-1]


def _summed_products(node: fx.Node) -> int:
    """addbmm: the batch [B, N, K] @ [B, K, M] is summed away."""
    return prod(_shape(node.args[1])) * _shape(node.args[2])[-1]


def _attention(node: fx.Node) -> int:
    """q k^T and its product with v; the output [..., L, Ev] has every head also where k and v share theirs."""
    query, keys = _shape(node.args[0]), _shape(node.args[1])[-2]  # q is [..., L, E], k is [..., S, E]
    *leading, length, value_dims = _shape(node)
    return prod(leading) * length * keys * (query[-1] + value_dims)


def _bilinear(node: fx.Node) -> int:
    """x1 W x2 with W [out, in1, in2]: first x1 W, then its product with x2."""
    _, in1, in2 = _shape(node.args[2])
    return prod(_shape(node)) * (in1 * in2 + in2)


def _recurrent(node: fx.Node) -> int:
    """Every step of every sample meets each weight matrix once: those of the inputs and of the state, of all layers."""
    steps = prod(_shape(node.args[0])[:2])  # [steps, N, in] or [N, steps, in]
    parameters = node.args[2]
    assert isinstance(parameters, (list, tuple))
    shapes = [_shape(parameter) for parameter in parameters]
    return steps * sum(prod(shape) for shape in shapes if len(shape) == 2)


def _einsum(node: fx.Node) -> int:
    """Operands are contracted two at a time from the left, as torch does it without opt_einsum's path.

    `bi,io,b->bo` with 2 x 3, 3 x 4: the first product keeps b and o and sums over i, 2 * 3 * 4 MACs; the second one,
    `bo,b->bo`, sums over nothing and counts as zero.
    """
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str)
    assert isinstance(operands, (list, tuple))
    terms, output, sizes = parse_einsum(equation, [_shape(operand) for operand in operands])
    macs, left = 0, set(terms[0])
    for index, right in enumerate(terms[1:], start=1):
        needed = set(output).union(*terms[index + 1 :])  # letters that this product must keep
        shared = left & set(right)
        # an index that occurs nowhere else is summed over before the product
        letters = shared | (left | set(right)) & needed
        if letters - needed:  # without an index to sum over it is an elementwise product
            macs += prod(sizes[letter] for letter in letters)
        left = letters & needed
    return macs


def parse_einsum(equation: str, shapes: Sequence[Shape]) -> tuple[list[str], str, Mapping[str, int]]:
    """Terms, output and index sizes of an equation; the axes under `...` become the letters 0, 1, ...

    `"b...c,cd->b...d"` with [2, 5, 7, 3] and [3, 4] gives terms `b01c`, `cd` and output `b01d`.
    """
    operands, arrow, output = equation.replace(" ", "").partition("->")
    terms = operands.split(",")

    # how many axes each term has beside its letters, which is what its `...` stands for
    spans = [len(shape) - len(term.replace("...", "")) for term, shape in zip(terms, shapes, strict=True)]
    dots = "".join(map(chr, range(ord("0"), ord("0") + max(spans))))
    # shorter ones are aligned at the right, as in broadcasting: of "012" two axes are "12"
    terms = [term.replace("...", dots[len(dots) - span :]) for term, span in zip(terms, spans, strict=True)]

    if not arrow:  # then the output is what occurs once, in alphabetical order
        letters = "".join(terms)
        once = [letter for letter in set(letters) - set(dots) if letters.count(letter) == 1]
        output = "..." + "".join(sorted(once))

    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, size in zip(term, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))  # an axis of one entry is broadcast
    return terms, output.replace("...", dots), sizes


FORMULAS: Mapping[str, Formula] = {
    "aten::conv1d": _convolution,
    "aten::conv2d": _convolution,
    "aten::conv3d": _convolution,
    "aten::conv_transpose1d": _transposed_convolution,
    "aten::conv_transpose2d": _transposed_convolution,
    "aten::conv_transpose3d": _transposed_convolution,
    "aten::convolution": _general_convolution,
    "aten::_convolution": _general_convolution,
    "torchvision::deform_conv2d": _convolution,
    "aten::linear": _product_of(0),
    "aten::matmul": _product_of(0),
    "aten::mm": _product_of(0),
    "aten::bmm": _product_of(0),
    "aten::mv": _product_of(0),
    "aten::dot": _product_of(0),
    "aten::vdot": _product_of(0),
    "aten::inner": _product_of(0),
    "aten::addmm": _product_of(1),
    "aten::addmv": _product_of(1),
    "aten::baddbmm": _product_of(1),
    "aten::addbmm": _summed_products,
    "aten::bilinear": _bilinear,
    "aten::einsum": _einsum,
    "aten::scaled_dot_product_attention": _attention,
    "aten::lstm": _recurrent,
    "aten::gru": _recurrent,
    "aten::rnn_tanh": _recurrent,
    "aten::rnn_relu": _recurrent,
}
"""MACs of a node, over the whole example batch, from the shapes of its arguments and its result."""

_NORMALISATIONS = """batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training native_batch_norm
cudnn_batch_norm layer_norm native_layer_norm group_norm native_group_norm instance_norm rms_norm _fused_rms_norm
softmax _softmax log_softmax _log_softmax _safe_softmax linalg_vector_norm norm
dropout native_dropout feature_dropout alpha_dropout rrelu prelu glu"""

_REDUCTIONS = """sum mean prod max min amax amin aminmax argmax argmin std var std_mean var_mean logsumexp nansum
nanmean median mode all any count_nonzero cumsum cumprod cummax cummin logcumsumexp topk sort argsort kthvalue
bincount histc one_hot"""

_POOLINGS = """max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices
max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
adaptive_max_pool3d fractional_max_pool2d max_unpool2d"""

_RESAMPLINGS = """upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d
upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa
upsample_trilinear3d grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator"""

_MOVEMENTS = """cat concat stack hstack vstack dstack pad constant_pad_nd reflection_pad1d reflection_pad2d
replication_pad1d replication_pad2d _pad_circular roll flip fliplr flipud rot90 index index_select gather take
take_along_dim masked_fill masked_select scatter scatter_add scatter_reduce index_add index_copy index_fill
index_put select_scatter slice_scatter repeat repeat_interleave tile reshape flatten contiguous
clone copy _to_copy to detach alias lift_fresh_copy im2col col2im pixel_shuffle pixel_unshuffle channel_shuffle
native_channel_shuffle embedding tril triu diag diag_embed block_diag meshgrid
masked_scatter where split split_with_sizes chunk unbind tensor_split unsafe_split unsafe_chunk outer"""

_CREATIONS = """zeros ones full empty arange linspace logspace eye rand randn randint randperm scalar_tensor tensor
zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty empty_strided
new_empty_strided tril_indices triu_indices"""

ZERO_MACS = frozenset(
    f"aten::{name}"
    for table in (_NORMALISATIONS, _REDUCTIONS, _POOLINGS, _RESAMPLINGS, _MOVEMENTS, _CREATIONS)
    for name in table.split()
)
"""Operations that contract nothing; pointwise operations and views are known by torch's own tags."""
