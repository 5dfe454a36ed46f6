"""Which weighted nodes of a graph can be refitted, and what becomes of their outputs: a traced graph in, `Layer`s out.

A layer's outputs may pass a batch normalisation or stored per-channel factors before they are added to a
stream; `schedule` puts what they are added to before the layer. Knows nothing of plans' scores or of solving.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import arguments, aten
from ..lockstep import attribute, run_node
from ..records import LeftAlone
from ..windows import Window
from .clamped import Bounds

_WINDOWED = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
_POINTWISE = (  # of one value, or with a stored bound; what they make of a large value tells where they are flat
    *(aten.relu.default, aten.relu_.default, aten.relu6.default, aten.hardtanh.default, aten.hardtanh_.default),
    *(aten.clamp.default, aten.clamp_.default, aten.clamp_min.default, aten.clamp_min_.default),
    *(aten.clamp_max.default, aten.clamp_max_.default, aten.maximum.default, aten.minimum.default),
    *(aten.hardswish.default, aten.hardswish_.default, aten.hardsigmoid.default, aten.hardsigmoid_.default),
    *(aten.gelu.default, aten.gelu_.default, aten.silu.default, aten.silu_.default, aten.mish.default),
    *(aten.sigmoid.default, aten.sigmoid_.default, aten.tanh.default, aten.tanh_.default, aten.elu.default),
)
FLAT = 0.02  # GELU and its like never are; where they rise by less than this they count as flat
KINK = 0.2  # ReLU and its like leave a plane at once, and then exactly there
_TRIED = torch.cat([torch.tensor([-1e4]), torch.arange(-2000, 2001).double() / 100, torch.tensor([1e4])])
_PRODUCTS = (aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.einsum.default)


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or linear node with parameters of its own.

    `norm` is the batch normalisation right behind it, `chain` that and the stored factors that follow, and
    `partner` the other operand of the sum the outputs then enter. `bounds` are where what alone takes the
    chain's end or that sum is flat, as ReLU is below zero.
    """

    node: fx.Node
    weight: str
    bias: str
    norm: fx.Node | None
    chain: tuple[fx.Node, ...]
    partner: fx.Node | None
    bounds: Bounds | None = None

    @property
    def name(self) -> str:
        return str(self.node.meta.get("layer") or self.node.name)

    @property
    def channel_axis(self) -> int:
        return -1 if self.node.target is aten.linear.default else 1


def find_layers(
    graph: fx.GraphModule, changed: Collection[fx.Node]
) -> tuple[dict[fx.Node, Layer], tuple[LeftAlone, ...]]:
    """The layers whose inputs changed, by node; and those that can't be refitted, with the reason."""
    uses = Counter(id(attribute(graph, n)) for n in graph.graph.nodes if n.op == "get_attr" for _ in n.users)
    layers: dict[fx.Node, Layer] = {}
    left: list[LeftAlone] = []
    for node in graph.graph.nodes:
        reason = ""
        if node.target is aten.linear.default or node.target in _WINDOWED:
            if arguments(node)["input"] not in changed:
                continue
            reason = _obstacle(graph, node, uses)
            if not reason:
                layers[node] = _layer(graph, node, uses, changed)
        elif node in changed and node.target in _TRANSPOSED:
            reason = "a transposed convolution's outputs share no common row of inputs"
        elif node in changed and node.target in _PRODUCTS and _has_parameter(graph, node):
            reason = "a product with a parameter outside linear and convolution"
        if reason:
            left.append(LeftAlone(str(node.meta.get("layer") or node.name), str(node.target), reason))
    return layers, tuple(left)


def _has_parameter(graph: fx.GraphModule, node: fx.Node) -> bool:
    return any(n.op == "get_attr" and isinstance(attribute(graph, n), torch.nn.Parameter) for n in node.all_input_nodes)


def _obstacle(graph: fx.GraphModule, node: fx.Node, uses: Mapping[int, int]) -> str:
    args = arguments(node)
    for name in ("weight", "bias"):
        source = args[name]
        if source is None:
            continue
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            return f"its {name} is computed, not a plain parameter"
        if uses[id(attribute(graph, source))] > 1:
            return f"its {name} is shared with another node"
    return ""


def _layer(graph: fx.GraphModule, node: fx.Node, uses: Mapping[int, int], changed: Collection[fx.Node]) -> Layer:
    args = arguments(node)
    chain: list[fx.Node] = []
    at, norm = node, None
    while len(at.users) == 1:
        (user,) = at.users
        if not chain and user.target is aten.batch_norm.default and _has_own_mean(graph, user, uses):
            norm = user
        elif user.target is not aten.mul.Tensor or factor_of(user, at) is None:
            break
        chain.append(user)
        at = user
    bias = "" if args["bias"] is None else str(args["bias"].target)
    partner = _partner(at, changed)
    bounds = _bounds(graph, at, partner, like=attribute(graph, args["weight"]))
    return Layer(node, str(args["weight"].target), bias, norm, tuple(chain), partner, bounds)


def _has_own_mean(graph: fx.GraphModule, norm: fx.Node, uses: Mapping[int, int]) -> bool:
    mean = arguments(norm)["running_mean"]
    return isinstance(mean, fx.Node) and mean.op == "get_attr" and uses[id(attribute(graph, mean))] == 1


def factor_of(product: fx.Node, at: fx.Node) -> fx.Node | None:
    """The stored per-channel factor `at` is multiplied by, as layer scale has it."""
    other = product.args[1] if product.args[0] is at else product.args[0]
    if not isinstance(other, fx.Node) or other.op != "get_attr":
        return None
    shape, stored = at.meta["val"].shape, other.meta["val"].shape
    aligned = (1,) * (len(shape) - len(stored)) + tuple(stored)
    axis = 1 if _from_convolution(at) else len(shape) - 1
    return other if all(size == (shape[i] if i == axis else 1) for i, size in enumerate(aligned)) else None


def _from_convolution(node: fx.Node) -> bool:
    while node.target in (aten.batch_norm.default, aten.mul.Tensor):
        node = next(n for n in node.all_input_nodes if n.op != "get_attr")
    return node.target in _WINDOWED


def _partner(at: fx.Node, changed: Collection[fx.Node]) -> fx.Node | None:
    """What `at` is added to, where that is a changed value of the same shape."""
    if len(at.users) != 1:
        return None
    (user,) = at.users
    if user.target is not aten.add.Tensor or user.kwargs.get("alpha", 1) != 1 or len(user.all_input_nodes) != 2:
        return None
    (other,) = (n for n in user.all_input_nodes if n is not at)
    alike = isinstance(other.meta.get("val"), Tensor) and other.meta["val"].shape == at.meta["val"].shape
    return other if alike and other in changed and other.op != "get_attr" else None


def _bounds(graph: fx.GraphModule, at: fx.Node, partner: fx.Node | None, *, like: Tensor) -> Bounds | None:
    """Where the pointwise operations that alone take `at`, or its sum with the partner, are flat: found by trying."""
    if partner is not None:
        (at,) = at.users
    made = _TRIED.to(like)
    while len(at.users) == 1:
        (user,) = at.users
        stored = [n for n in user.all_input_nodes if n is not at]
        if user.target not in _POINTWISE or any(n.op != "get_attr" or n.meta["val"].numel() > 1 for n in stored):
            break
        made = run_node(graph, user, {at: made.clone()})
        at = user
    made = made.detach().cpu()
    low, high = _flat_until(made), -_flat_until(made.flip(0))
    return Bounds(low, high) if math.isfinite(low) or math.isfinite(high) else None


def _flat_until(made: Tensor) -> float:
    """The last value tried up to which a function stays where it starts; minus infinity where it rises at once."""
    away = (made - made[0]).abs()
    exactly, about = (int((away <= limit).long().cumprod(0).sum()) - 1 for limit in (0.0, FLAT))
    if about == 0:
        return -math.inf
    return float(_TRIED[exactly if _TRIED[about] - _TRIED[exactly] < KINK else about])


def window_of(node: fx.Node, weight: Tensor) -> Window:
    """How a convolution or linear node with that weight reads its input."""
    if node.target is aten.linear.default:
        return Window()
    args, axes = arguments(node), weight.dim() - 2
    kernel = tuple(weight.shape[2:])
    stride, dilation = _per_axis(args["stride"], axes), _per_axis(args["dilation"], axes)
    if not isinstance(args["padding"], str):
        padding = tuple((side, side) for side in _per_axis(args["padding"], axes))
    elif args["padding"] == "valid":
        padding = ((0, 0),) * axes
    else:  # "same": an odd total puts the extra zero behind
        totals = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    return Window(kernel, stride, padding, dilation, int(args["groups"]))


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    values = tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)
    return values * axes if len(values) == 1 else values


def output_scale(pruned: fx.GraphModule, twins: Mapping[fx.Node, fx.Node], layer: Layer, width: int) -> Tensor:
    """What each output is multiplied by on its way to the stream, float64."""
    device = attribute(pruned, arguments(twins[layer.node])["weight"]).device
    scale = torch.ones(width, dtype=torch.float64, device=device)
    at = layer.node
    for node in layer.chain:
        if node.target is aten.batch_norm.default:
            args = arguments(twins[node])
            scale = scale * (attribute(pruned, args["running_var"]).double() + args["eps"]).rsqrt()
            factor = args["weight"]
        else:
            factor = factor_of(node, at)
        if factor is not None:
            scale = scale * attribute(pruned, factor).detach().double().flatten()
        at = node
    return scale


def schedule(graph: fx.GraphModule, layers: Mapping[fx.Node, Layer]) -> tuple[fx.Node, ...]:
    """All nodes in an order in which, wherever it can, a layer's partner comes before the layer."""
    order: list[fx.Node] = []
    done: set[fx.Node] = set()
    begun: set[fx.Node] = set()
    for root in graph.graph.nodes:
        stack = [root]
        while stack:
            node = stack[-1]
            if node in done:
                stack.pop()
                continue
            before = list(node.all_input_nodes)
            partner = layers[node].partner if node in layers else None
            if partner is not None and not _depends(partner, begun | {node}, done):
                before.append(partner)
            begun.add(node)
            waiting = [n for n in before if n not in done]
            if waiting:
                stack.extend(reversed(waiting))
            else:
                done.add(stack.pop())
                order.append(node)
    return tuple(order)


def _depends(node: fx.Node, on: Collection[fx.Node], done: Collection[fx.Node]) -> bool:
    """Whether a node that is not done needs one of `on` that is not done either."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        at = stack.pop()
        if at in seen or at in done:
            continue
        if at in on:
            return True
        seen.add(at)
        stack.extend(at.all_input_nodes)
    return False
