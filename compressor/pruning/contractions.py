"""Operations that sum products: both sides of the summed axis are tied, heads and groups of channels become rows.

One handler for each family of ATen operations, in `TABLE`. Knows no plan: what is tied here ties for any.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

from torch import fx

from ..graph import aten
from ..graph.dynamic import is_part
from ..graph.operators import ALL_CONVOLUTIONS, RECURRENT, TRANSPOSED_CONVOLUTIONS, arguments
from .handlers import Call, Table, blank, left_alone, unknown
from .labels import Ledger, Result, Value, compress, reduce_to, values_in
from .relations import (
    Operand,
    aligned,
    broadcast,
    channels_only,
    contract,
    freeze_all,
    merge,
    pin_along,
    spread_over_space,
)

TABLE = Table()
_FRONT = "abcdefgh"  # letters for the axes in front of those that a product is about


@TABLE.handles(aten.linear.default)
def linear(ledger: Ledger, call: Call) -> Value:
    """[..., in] and a weight [out, in] to [..., out]."""
    x, weight = call.input, call.operand(1)
    front = _FRONT[: len(x.shape) - 1]
    out = contract(ledger, x, weight, f"{front}i,oi->{front}o", call.name, own=False)
    return _with_bias(ledger, call, out, axis=len(front))


def _with_bias(ledger: Ledger, call: Call, out: Value, axis: int) -> Value:
    """The result after its bias [out], where the layer has one, is added along that axis."""
    bias = call.tensor("bias")
    if bias is None:
        return out
    operands = [Operand(out.facets, out.shape), aligned(bias, axis, out.shape)]
    return merge(ledger, operands, out.shape, call.name)


@TABLE.handles(*ALL_CONVOLUTIONS)
def convolution(ledger: Ledger, call: Call) -> Result:
    """[N, C, ...] and a kernel [out, in / groups, ...] or, transposed, [in, out / groups, ...] to [N, out, ...]."""
    groups = arguments(call.node)["groups"]
    if isinstance(groups, fx.Node):
        freeze_all(ledger, call.name, call.args, "has as many groups as the batch has images")
        return blank(call.node.meta["val"])

    x = channels_only(ledger, call.input, call.name)  # [N, C]
    kernel = _without_space(call.operand(1))
    transposed = call.node.target in TRANSPOSED_CONVOLUTIONS
    if groups == 1:
        letters = "bi,io->bo" if transposed else "bi,oi->bo"
        out = contract(ledger, x, kernel, letters, call.name)
    else:
        out = _contract_grouped(ledger, call, x, kernel, groups, transposed=transposed)

    shape = call.shape
    facets = [spread_over_space(facet, shape) for facet in out.facets]
    return _with_bias(ledger, call, Value(shape, tuple(facets)), axis=1)


def _without_space(kernel: Value) -> Value:
    """[out, in] labels of a kernel [out, in, ...]: no label changes over the places of a kernel."""
    return Value(kernel.shape[:2], tuple(reduce_to(facet, (0, 1)) for facet in kernel.facets))


def _contract_grouped(ledger: Ledger, call: Call, x: Value, kernel: Value, groups: int, *, transposed: bool) -> Value:
    """[N, C] and [out, in] to [N, out], each group of channels by itself.

    12 channels to 24 in 4 groups: x is [N, 4, 3], the kernel [24, 3] is [4, 6, 3], the result [N, 4, 6].
    """
    n, c = x.shape
    split_x = [facet.reshape(n, groups, c // groups) for facet in x.facets]  # [N, groups, C / groups]
    grouped_x = Value((n, groups, c // groups), tuple(split_x))

    # a kernel is [out, in / groups], a transposed one [in, out / groups]: groups part its first axis
    first, second = kernel.shape
    split_kernel = [compress(facet.reshape(groups, first // groups, second)) for facet in kernel.facets]
    grouped_kernel = Value((groups, first // groups, second), tuple(split_kernel))

    letters = "bgi,gio->bgo" if transposed else "bgi,goi->bgo"
    out = contract(ledger, grouped_x, grouped_kernel, letters, call.name)  # [N, groups, out / groups]
    channels = [compress(facet.reshape(n, -1)) for facet in out.facets]  # [N, out]
    return Value((n, out.shape[1] * out.shape[2]), tuple(channels))


@TABLE.handles(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(ledger: Ledger, call: Call) -> Result:
    """[..., x, k] and [..., k, y] to [..., x, y]; axes in front are aligned from the right."""
    a, b = call.input, call.operand(1)
    if min(len(a.shape), len(b.shape)) < 2:
        return unknown(ledger, call)
    return Value(call.shape, _product(ledger, call, a, b).facets)


def _product(ledger: Ledger, call: Call, a: Value, b: Value) -> Value:
    rank_a, rank_b = len(a.shape) - 2, len(b.shape) - 2
    front = _FRONT[: max(rank_a, rank_b)]
    # of `ab`, an operand with one axis in front has `b`
    front_a, front_b = front[len(front) - rank_a :], front[len(front) - rank_b :]
    if is_part(call.node.args[0], "kernel"):  # what it is multiplied with comes first, as for a convolution
        return contract(ledger, b, a, f"{front_b}ky,{front_a}xk->{front}xy", call.name)
    return contract(ledger, a, b, f"{front_a}xk,{front_b}ky->{front}xy", call.name)


@TABLE.handles(aten.addmm.default, aten.baddbmm.default)
def added_matmul(ledger: Ledger, call: Call) -> Value:
    """A tensor plus the product of two matrices."""
    shape = call.shape
    product = _product(ledger, call, call.operand(1), call.operand(2))
    operands = [broadcast(call.input, shape), Operand(product.facets, shape)]
    return merge(ledger, operands, shape, call.name)


@TABLE.handles(aten.einsum.default)
def einsum(ledger: Ledger, call: Call) -> Result:
    """Of two operands, with no letter twice in one of them (as in the diagonal `ii->i`)."""
    operands = list(values_in(call.args[1]))
    if len(operands) != 2:
        counted = "one tensor" if len(operands) == 1 else f"{len(operands)} tensors"
        return left_alone(ledger, call, f"reaches {call.node.target} of {counted}; of two it has a rule")
    letters = written_out(str(call.args[0]), [len(operand.shape) for operand in operands])
    if any(len(set(term)) < len(term) for term in letters.split("->")[0].split(",")):
        return left_alone(ledger, call, f"reaches {call.node.target} that takes a diagonal, which has no pruning rule")
    return contract(ledger, operands[0], operands[1], letters, call.name)


def written_out(equation: str, ranks: Sequence[int]) -> str:
    """The same with a letter for every axis, and a result: of ranks 3 and 2 `...i,ij` is `abi,ij->abj`.

    Letters that an equation without a result names once are its result's, in the alphabet's order, as NumPy has it.
    """
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    spare = [letter for letter in string.ascii_letters if letter not in equation]
    widths = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    longest = max((width for term, width in zip(terms, widths, strict=True) if "..." in term), default=0)
    front = "".join(spare[:longest])  # the axes that no operand names, of the one that has most of them

    if not arrow:
        named = inputs.replace(",", "").replace(".", "")
        result = "..." + "".join(sorted(letter for letter in set(named) if named.count(letter) == 1))
    written = [term.replace("...", front[longest - width :]) for term, width in zip(terms, widths, strict=True)]
    return f"{','.join(written)}->{result.replace('...', front)}"


@TABLE.handles(aten.scaled_dot_product_attention.default)
def attention(ledger: Ledger, call: Call) -> Result:
    """Queries [..., n, d], keys [..., m, d], values [..., m, e] to [..., n, e]; what lies in front are heads."""
    q, k, v = (call.operand(position) for position in range(3))
    same_rank = len(q.shape) == len(k.shape) == len(v.shape)
    if not same_rank or call.argument("enable_gqa"):
        return unknown(ledger, call)
    front = _FRONT[: len(q.shape) - 2]
    weights = contract(ledger, q, k, f"{front}nd,{front}md->{front}nm", call.name)  # [..., n, m]

    mask = call.tensor("attn_mask")
    if mask is not None:
        operands = [Operand(weights.facets, weights.shape), broadcast(mask, weights.shape)]
        weights = merge(ledger, operands, weights.shape, call.name)
    weights = pin_along(ledger, weights, [len(front) + 1], call.name, "is normalised by softmax")
    return contract(ledger, weights, v, f"{front}nm,{front}me->{front}ne", call.name)


@TABLE.handles(*RECURRENT)
def recurrent(ledger: Ledger, call: Call) -> Result:
    """[steps, N, in] or [N, steps, in]: its first layer's input weights [gates, in] are products with the features.

    What the features are multiplied with goes with them; everything else of a recurrent layer stays as wide as it is.
    """
    directions = 2 if call.argument("bidirectional") else 1
    parameters = list(values_in(call.argument("params")))
    per_direction = len(parameters) // (directions * call.integer("num_layers"))  # weights, and biases if it has any
    first_weights = slice(0, directions * per_direction, per_direction)  # of the first layer, one a direction
    reason = "is inside a recurrent layer, which keeps its width"
    for weight in parameters[first_weights]:
        gates = contract(ledger, call.input, weight, "abi,oi->abo", call.name)
        freeze_all(ledger, call.name, gates, reason)

    del parameters[first_weights]
    freeze_all(ledger, call.name, [call.argument("hx"), parameters], reason)
    return blank(call.node.meta["val"])
