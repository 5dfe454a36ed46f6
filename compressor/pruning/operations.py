"""What each ATen operation does to labels: operation -> handler.

Movement (reshape, permute, slice, cat, roll ...) is run on the labels themselves; element-wise operations
tie operands; contractions tie the two sides of the summed axis. An operation not in the table freezes
every label that reaches it: never "assume identity". Knows no layer, no architecture, no plan.
"""

from __future__ import annotations

import torch
from torch import fx

from ..graph import aten
from . import contractions, movements, reductions
from .handlers import Call, Handler, unknown
from .labels import Ledger, Value
from .relations import broadcast, merge

TABLE: dict[object, Handler] = {**contractions.TABLE, **reductions.TABLE, **movements.TABLE}

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
    aten.copy.default,
    aten.square.default,
    aten.div.Tensor_mode,
    aten.maximum.default,
    aten.minimum.default,
    aten.polar.default,
    aten.complex.default,
)


def pointwise(ledger: Ledger, call: Call) -> Value:
    """Element by element, operands broadcast: labels that meet at one element are one."""
    operands = [broadcast(value, call.shape) for value in call.passed if isinstance(value, Value)]
    return merge(ledger, operands, call.shape, call.name)


def handler_of(node: fx.Node) -> Handler:
    """The operation's handler; `unknown` where there is none."""
    if node.target in TABLE:
        return TABLE[node.target]
    if node.target in UNTAGGED or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return pointwise
    return unknown
