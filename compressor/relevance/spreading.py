"""What a rule is given and gives back: one operation's call on the way back, and the gradients rules are made of.

A rule takes a `Call` and returns relevance per input. Knows no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from .canonical import Canonical
from .composite import Composite
from .rules import stabilised_

Contribution = tuple[fx.Node, Tensor | None]
Need = Literal["shapes", "inputs", "both", "unless passed"]

# operations by which values only change place
MOVES = (
    "permute transpose unsqueeze squeeze expand select slice roll pad constant_pad_nd flip stack split chunk unbind "
    "split_with_sizes tensor_split repeat repeat_interleave unfold im2col pixel_shuffle pixel_unshuffle "
    "channel_shuffle movedim t narrow clone to _to_copy contiguous alias detach reflection_pad1d reflection_pad2d "
    "replication_pad2d diagonal tile unflatten rot90 swapaxes narrow_copy broadcast_to expand_as type_as "
    "lift_fresh_copy slice_scatter select_scatter"
).split()


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor that was not kept."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class Call:
    """`values` holds tensors, or a `Spec` where the rule needs the shape only. `relevance` is the node's,
    a list with None for unread parts where the node returns several tensors, `saved` what the rule's own `run`
    kept."""

    node: fx.Node
    relevance: Any
    values: Mapping[fx.Node, Any]
    known: Canonical
    composite: Composite
    saved: Any = None


@dataclass(frozen=True, slots=True)
class OperationRule:
    """`run`, where given, takes the operation's place on the way forward: (output, what to save) from its arguments."""

    need: Need
    spread: Callable[[Call], Sequence[Contribution]]
    run: Callable[..., tuple[Tensor, Any]] | None = None


def signals(node: fx.Node, known: Canonical) -> list[fx.Node]:
    """The inputs that come from the image, each once, in order."""
    return [n for n in node.all_input_nodes if n in known.data]


def evaluate(call: Call, replaced: Mapping[fx.Node, Tensor]) -> Any:
    arguments = fx.map_arg((call.node.args, call.node.kwargs), lambda n: replaced.get(n, call.values.get(n)))
    with torch.enable_grad():
        return call.node.target(*arguments[0], **arguments[1])  # type: ignore[operator]


def leaf_of(value: Any) -> Tensor:
    if isinstance(value, Spec):
        return torch.empty(value.shape, dtype=value.dtype, device=value.device, requires_grad=True)
    leaf: Tensor = value.detach()
    return leaf.requires_grad_() if leaf.is_floating_point() or leaf.is_complex() else leaf


def back(call: Call, leaves: Mapping[fx.Node, Tensor], out: Any, relevance: Any) -> list[Contribution]:
    """Gradients of the outputs to the leaves, weighted by relevance."""
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    given = relevance if isinstance(relevance, list) else [relevance]
    pairs = [(o, r) for o, r in zip(outs, given, strict=False) if r is not None and o.requires_grad]
    if not pairs:
        return [(n, None) for n in leaves]
    grads = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [r for _, r in pairs], allow_unused=True)
    return list(zip(leaves, grads, strict=True))


def numbers(call: Call) -> list[fx.Node]:
    nodes = signals(call.node, call.known)
    kinds = {n: getattr(call.values[n], "dtype", torch.bool) for n in nodes}
    return [n for n, kind in kinds.items() if kind.is_floating_point or kind.is_complex]


def ratio(relevance: Tensor, out: Tensor, call: Call) -> Tensor:
    """Relevance over output, stabilised; for a complex output z it is R z / |z|^2, so that Re(z conj(share)) is R."""
    if out.is_complex():
        return relevance * out / (out.abs().square() + call.composite.epsilon)
    return torch.div(relevance, stabilised_(out.clone(), call.composite.epsilon))


def is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def carries_numbers(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex()
