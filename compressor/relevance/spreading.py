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
# which values a rule reads on the way back: none, its inputs', its output's too; the last: its inputs' where the
# composite doesn't pass activations
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
    """One operation on the way back.

    `values` holds tensors, or a `Spec` where the rule needs the shape only. `relevance` is the node's, a list with
    None for unread parts where the node returns several tensors, `saved` what the rule's own `run` kept.
    """

    node: fx.Node
    relevance: Any
    values: Mapping[fx.Node, Any]
    canon: Canonical
    composite: Composite
    saved: Any = None


@dataclass(frozen=True, slots=True)
class OperationRule:
    """`run`, where given, takes the operation's place on the way forward: (output, what to save) from its arguments."""

    need: Need
    spread: Callable[[Call], Sequence[Contribution]]
    run: Callable[..., tuple[Tensor, Any]] | None = None


def signals(node: fx.Node, canon: Canonical) -> list[fx.Node]:
    """The inputs that come from the image, each once, in order."""
    return [source for source in node.all_input_nodes if source in canon.data]


def evaluate(call: Call, replaced: Mapping[fx.Node, Tensor]) -> Any:
    """The call's operation once more, with a tape, on its kept values or on what takes their place."""
    args, kwargs = fx.map_arg(
        (call.node.args, call.node.kwargs), lambda source: replaced.get(source, call.values.get(source))
    )
    with torch.enable_grad():
        return call.node.target(*args, **kwargs)  # type: ignore[operator]


def leaf_of(value: Tensor | Spec) -> Tensor:
    """The value off any tape, to differentiate by where it holds numbers; a `Spec` gets arbitrary numbers."""
    if isinstance(value, Spec):
        return torch.empty(value.shape, dtype=value.dtype, device=value.device, requires_grad=True)
    leaf = value.detach()
    return leaf.requires_grad_() if leaf.is_floating_point() or leaf.is_complex() else leaf


def back(call: Call, leaves: Mapping[fx.Node, Tensor], out: Any, relevance: Any) -> list[Contribution]:
    """Gradients of the outputs to the leaves, weighted by relevance; None where nothing leads to a leaf."""
    outputs = list(out) if isinstance(out, (tuple, list)) else [out]
    relevances = relevance if isinstance(relevance, list) else [relevance]
    roots: list[Tensor] = []
    weights: list[Tensor] = []
    for output, output_relevance in zip(outputs, relevances, strict=False):
        if output_relevance is not None and output.requires_grad:
            roots.append(output)
            weights.append(output_relevance)
    if not roots:
        return [(source, None) for source in leaves]
    gradients = torch.autograd.grad(roots, list(leaves.values()), weights, allow_unused=True)
    return list(zip(leaves, gradients, strict=True))


def numbers(call: Call) -> list[fx.Node]:
    """The call's signals that hold numbers, not masks or indices."""
    with_numbers = []
    for source in signals(call.node, call.canon):
        dtype = getattr(call.values[source], "dtype", torch.bool)  # several tensors at once have none
        if dtype.is_floating_point or dtype.is_complex:
            with_numbers.append(source)
    return with_numbers


def ratio(relevance: Tensor, out: Tensor, call: Call) -> Tensor:
    """Relevance over output, stabilised; for a complex output z it is R z / |z|^2, so that Re(z conj(share)) is R."""
    if out.is_complex():
        return relevance * out / (out.abs().square() + call.composite.epsilon)
    return torch.div(relevance, stabilised_(out.clone(), call.composite.epsilon))


def is_complex(node: fx.Node) -> bool:
    """True for a node that returns one tensor of complex numbers."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def carries_numbers(node: fx.Node) -> bool:
    """False for a node whose one tensor holds a mask or indices."""
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex()
