"""What a rule is given and gives back: one operation's call on the way back, and the gradients rules are made of.

A rule takes a `Call` and returns relevance per input. Knows no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, fx

from ..graph.operators import arguments
from .canonical import Canonical
from .composite import Composite
from .rules import stabilised_

# what an operation returned, run once more: one tensor or several
Output = Tensor | Sequence[Tensor]
# a node's relevance; of one with several outputs a list, None for those that nobody read
Relevance = Tensor | list[Tensor | None]
# what a node hands to one of its inputs; None where nothing goes there
Contribution = tuple[fx.Node, Relevance | None]
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


# a node's value on the way back: a tensor or, where it was not kept, its `Spec`; several; a size or another number
Value: TypeAlias = "Tensor | Spec | int | float | Sequence[Value]"


@dataclass(frozen=True, slots=True)
class Call:
    """One operation on the way back.

    `values` holds tensors, or a `Spec` where the rule needs the shape only. `arriving` is what reached the node,
    `saved` what the rule's own `run` kept.
    """

    node: fx.Node
    arriving: Relevance
    values: Mapping[fx.Node, Value]
    canon: Canonical
    composite: Composite
    saved: Tensor | None = None

    @property
    def relevance(self) -> Tensor:
        """Of an operation with one output, shaped as that."""
        assert isinstance(self.arriving, Tensor)
        return self.arriving

    def tensor(self, node: fx.Node) -> Tensor:
        """The value that was kept for the rule: of an input, or of the operation itself."""
        value = self.values[node]
        assert isinstance(value, Tensor), f"the value of {node.name} was not kept: the rule's `need` leaves it out"
        return value

    def spec(self, node: fx.Node) -> Tensor | Spec:
        """Shape, kind and device of a value, kept or not."""
        value = self.values[node]
        assert isinstance(value, (Tensor, Spec))
        return value

    def shape(self, node: fx.Node) -> torch.Size:
        """Of a value, kept or not."""
        return self.spec(node).shape


@dataclass(frozen=True, slots=True)
class OperationRule:
    """`run`, where given, takes the operation's place on the way forward: (output, what to save) from its arguments."""

    need: Need
    spread: Callable[[Call], Sequence[Contribution]]
    run: Callable[..., tuple[Tensor, Tensor]] | None = None


def signals(node: fx.Node, canon: Canonical) -> list[fx.Node]:
    """The inputs that come from the image, each once, in order."""
    return [source for source in node.all_input_nodes if source in canon.data]


def number_named(node: fx.Node, name: str) -> int:
    """An operation's argument that is a whole number (`dim`), by its name in the schema, the default filled in."""
    number = arguments(node)[name]
    assert isinstance(number, int)
    return number


def called_with(
    node: fx.Node, value_of: Callable[[fx.Node], Value | None]
) -> tuple[tuple[fx.node.Argument, ...], dict[str, fx.node.Argument]]:
    """The arguments of a node's operation, by position and by name, with values in place of the nodes among them."""
    return fx.map_arg((node.args, node.kwargs), value_of)  # type: ignore[arg-type]  # torch doesn't know `Spec`


def evaluate(call: Call, replaced: Mapping[fx.Node, Tensor]) -> Output:
    """The call's operation once more, with a tape, on its kept values or on what takes their place."""

    def value_of(source: fx.Node) -> Value | None:
        return replaced.get(source, call.values.get(source))

    args, kwargs = called_with(call.node, value_of)
    with torch.enable_grad():
        output: Output = call.node.target(*args, **kwargs)  # type: ignore[operator]
    return output


def evaluate_one(call: Call, replaced: Mapping[fx.Node, Tensor]) -> Tensor:
    """As `evaluate`, of an operation with one output."""
    output = evaluate(call, replaced)
    assert isinstance(output, Tensor)
    return output


def leaf_of(value: Tensor | Spec) -> Tensor:
    """The value off any tape, to differentiate by where it holds numbers; a `Spec` gets arbitrary numbers."""
    if isinstance(value, Spec):
        return torch.empty(value.shape, dtype=value.dtype, device=value.device, requires_grad=True)
    return value.detach().requires_grad_(_holds_numbers(value))


def back(call: Call, leaves: Mapping[fx.Node, Tensor], output: Output, relevance: Relevance) -> list[Contribution]:
    """Gradients of the outputs to the leaves, weighted by relevance; None where nothing leads to a leaf."""
    outputs = [output] if isinstance(output, Tensor) else output
    relevances = relevance if isinstance(relevance, list) else [relevance]
    roots: list[Tensor] = []
    weights: list[Tensor] = []
    for root, weight in zip(outputs, relevances, strict=False):
        if weight is not None and root.requires_grad:
            roots.append(root)
            weights.append(weight)
    if not roots:
        return [(source, None) for source in leaves]
    gradients = torch.autograd.grad(roots, list(leaves.values()), weights, allow_unused=True)
    return list(zip(leaves, gradients, strict=True))


def numbers(call: Call) -> list[fx.Node]:
    """The call's signals that hold numbers, not masks or indices; one of several tensors is none."""
    with_numbers: list[fx.Node] = []
    for source in signals(call.node, call.canon):
        value = call.values[source]
        if isinstance(value, (Tensor, Spec)) and _holds_numbers(value):
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
    return not isinstance(value, Tensor) or _holds_numbers(value)


def _holds_numbers(value: Tensor | Spec) -> bool:
    """Not a mask and not indices."""
    return value.dtype.is_floating_point or value.dtype.is_complex
