"""Which weighted nodes of a graph can be refitted, and what becomes of their outputs: a traced graph in, `Layer`s out.

A layer's outputs may pass a batch normalisation or stored per-channel factors before they are added to a
stream; `schedule` puts what they are added to before the layer, and all inputs of a weight that is used several times
before its first use. Knows neither scores nor plans, and solves nothing.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ..graph import aten
from ..graph.lockstep import attribute, run_node
from ..graph.neighbours import (
    computed_operands,
    is_stored,
    only_user,
    other_operands,
    shape_of,
    stored_nodes,
    stored_operands,
)
from ..graph.operators import (
    CONVOLUTIONS,
    LAYERS,
    PRODUCTS,
    RECURRENT,
    TRANSPOSED_CONVOLUTIONS,
    Convolution,
    arguments,
    paddings_of,
)
from ..graph.windows import Window
from ..records import LeftAlone
from .clamped import Bounds

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
_UNBOUNDED = Bounds(-math.inf, math.inf)
# -20 to 20 by hundredths, and a value far out on either side
_TRIED = torch.cat([torch.tensor([-1e4]), torch.arange(-2000, 2001).double() / 100, torch.tensor([1e4])])


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or linear node with parameters of its own.

    `chain` is the batch normalisation right behind it, if there is one, and the stored factors that follow; `partner`
    is the other operand of the sum the outputs then enter. `bounds` are where what alone takes the chain's end or that
    sum is flat, as ReLU is below zero. `again` are the further nodes that read the same weight (twin towers, a head on
    several maps), with the same bias and the same chain.
    """

    node: fx.Node
    weight: str
    bias: str
    chain: tuple[fx.Node, ...]
    partner: fx.Node | None
    bounds: Bounds | None = None
    again: tuple[Layer, ...] = ()

    @property
    def norm(self) -> fx.Node | None:
        """The batch normalisation of the chain."""
        return next((node for node in self.chain if node.target is aten.batch_norm.default), None)

    @property
    def uses(self) -> tuple[Layer, ...]:
        """The layer itself, then `again`."""
        return (self, *self.again)

    @property
    def partners(self) -> tuple[fx.Node, ...]:
        """Those of all its uses."""
        return tuple(use.partner for use in self.uses if use.partner is not None)

    @property
    def name(self) -> str:
        """The module's qualified name; the node's where the root issued it."""
        return _name_of(self.node)

    @property
    def channel_axis(self) -> int:
        """Of inputs and outputs alike."""
        return -1 if self.node.target is aten.linear.default else 1


def find_layers(
    graph: fx.GraphModule, changed: Collection[fx.Node], *, left: Collection[str] | None = None
) -> tuple[dict[fx.Node, Layer], tuple[LeftAlone, ...]]:
    """The layers whose inputs changed, by node; and those that can't be refitted, with the reason.

    `left` are the names of nodes that are still there in the network to repair; all of them where it is not given.
    """
    uses = _uses(graph)
    present = [node for node in graph.graph.nodes if left is None or node.name in left]
    layers: dict[fx.Node, Layer] = {}
    reasons: dict[fx.Node, str] = {}
    together: dict[fx.Node, tuple[fx.Node, ...]] = {}  # of each node, all that are refitted with it
    for nodes in _by_weight(graph, present):
        inputs = {arguments(node)["input"] for node in nodes}
        if inputs.isdisjoint(changed):
            continue
        reason = _obstacle(graph, nodes, uses) or _circle(nodes, together)
        if reason:
            reasons[nodes[0]] = reason
        else:
            layers[nodes[0]] = _layer_of(graph, nodes, uses, changed)
            together |= dict.fromkeys(nodes, nodes)

    left_alone: list[LeftAlone] = []
    for node in present:
        reason = reasons.get(node) or _other_obstacle(graph, node, changed)
        if reason:
            left_alone.append(LeftAlone(_name_of(node), str(node.target), reason))
    return layers, tuple(left_alone)


def _uses(graph: fx.GraphModule) -> Counter[int]:
    """How many nodes read each tensor, by its identity: several get_attr nodes may name one."""
    uses: Counter[int] = Counter()
    for node in stored_nodes(graph):
        uses[id(attribute(graph, node))] += len(node.users)
    return uses


def _by_weight(graph: fx.GraphModule, nodes: Iterable[fx.Node]) -> list[tuple[fx.Node, ...]]:
    """The convolutions and linear layers of the nodes, in their order; those together that read a weight in one way."""
    nodes_of: defaultdict[object, list[fx.Node]] = defaultdict(list)
    for node in nodes:
        if node.target in LAYERS:
            nodes_of[_reading_of_weight(graph, node)].append(node)
    return [tuple(readers) for readers in nodes_of.values()]


def _reading_of_weight(graph: fx.GraphModule, node: fx.Node) -> object:
    """The same for nodes that read one weight in one way; of a computed weight, each node's own."""
    settings = arguments(node)
    if not is_stored(settings["weight"]):
        return node
    return id(attribute(graph, settings["weight"])), node.target, settings.get("groups", 1)


def _circle(nodes: Collection[fx.Node], together: Mapping[fx.Node, tuple[fx.Node, ...]]) -> str:
    """Why nodes of one weight can't be refitted together; empty where they can.

    What one of them reads may need another, be it through others that are refitted together.
    """
    if len(nodes) == 1:
        return ""
    if _depends(_operands(nodes), nodes, (), together):
        return "its weight is used again on what was made with it"
    return ""


def _other_obstacle(graph: fx.GraphModule, node: fx.Node, changed: Collection[fx.Node]) -> str:
    """Why a node with weights that is neither a convolution nor linear keeps them; empty for any other node."""
    if node.target in RECURRENT and arguments(node)["input"] in changed:
        return "a recurrent layer's outputs are no products of its inputs alone"
    if node not in changed:
        return ""
    if node.target in TRANSPOSED_CONVOLUTIONS:
        return "a transposed convolution's outputs share no common row of inputs"
    if node.target in PRODUCTS and _has_parameter(graph, node):
        return "a product with a parameter outside linear and convolution"
    return ""


def _name_of(node: fx.Node) -> str:
    return str(node.meta.get("layer") or node.name)


def _has_parameter(graph: fx.GraphModule, node: fx.Node) -> bool:
    return any(isinstance(attribute(graph, operand), torch.nn.Parameter) for operand in stored_operands(node))


def _obstacle(graph: fx.GraphModule, nodes: Sequence[fx.Node], uses: Mapping[int, int]) -> str:
    """Why a layer, of several nodes where they read one weight, can't be refitted; empty where it can."""
    for name in ("weight", "bias"):
        reason = _parameter_obstacle(graph, name, [arguments(node)[name] for node in nodes], uses)
        if reason:
            return reason
    return ""


def _parameter_obstacle(graph: fx.GraphModule, name: str, sources: Sequence[object], uses: Mapping[int, int]) -> str:
    """Why what the nodes of one layer read as their weight, or bias, is not theirs alone; empty where it is."""
    absent = sources.count(None)
    if absent == len(sources):
        return ""
    if absent:
        return f"its weight is used with and without a {name}"
    stored = list(filter(is_stored, sources))
    if len(stored) < len(sources):
        return f"its {name} is computed, not a plain parameter"
    tensors = {id(attribute(graph, source)) for source in stored}
    reader_count = sum(uses[tensor] for tensor in tensors)
    if len(tensors) > 1 or reader_count > len(sources):
        return f"its {name} is shared with another node"
    return ""


def _layer_of(
    graph: fx.GraphModule, nodes: Sequence[fx.Node], uses: Mapping[int, int], changed: Collection[fx.Node]
) -> Layer:
    """The layer of all nodes that read one weight: what is behind them counts where it is the same behind each."""
    chains = [_chain(graph, node, uses, times=len(nodes)) for node in nodes]
    if len({_stored_behind(graph, chain) for chain in chains}) > 1:
        chains = [()] * len(nodes)
    layers = [_layer(graph, node, chain, changed) for node, chain in zip(nodes, chains, strict=True)]
    if len({layer.bounds for layer in layers}) > 1:
        layers = [replace(layer, bounds=None) for layer in layers]
    return replace(layers[0], again=tuple(layers[1:]))


def _chain(graph: fx.GraphModule, node: fx.Node, uses: Mapping[int, int], *, times: int) -> tuple[fx.Node, ...]:
    """The normalisation behind a layer, and the stored factors that its outputs pass one after the other.

    `times` is how often the layer's weight is read.
    """
    chain: list[fx.Node] = []
    end, user = node, only_user(node)
    if user is not None and _is_norm_of_its_own(graph, user, uses, times):
        chain.append(user)
        end, user = user, only_user(user)
    while user is not None and factor_of(user, end) is not None:
        chain.append(user)
        end, user = user, only_user(user)
    return tuple(chain)


def _is_norm_of_its_own(graph: fx.GraphModule, node: fx.Node, uses: Mapping[int, int], times: int) -> bool:
    """Whether a node is a batch normalisation whose mean is read there alone, as often as the layer's weight.

    Only right behind a layer is the mean in the outputs' own units, and can take an offset.
    """
    if node.target is not aten.batch_norm.default:
        return False
    mean = arguments(node)["running_mean"]
    return is_stored(mean) and uses[id(attribute(graph, mean))] == times


def _stored_behind(graph: fx.GraphModule, chain: Sequence[fx.Node]) -> tuple[object, ...]:
    """The operations of a chain, each with the tensors it reads by identity."""
    behind: list[object] = []
    for node in chain:
        behind.append((node.target, *(id(attribute(graph, operand)) for operand in stored_operands(node))))
    return tuple(behind)


def _layer(graph: fx.GraphModule, node: fx.Node, chain: tuple[fx.Node, ...], changed: Collection[fx.Node]) -> Layer:
    """One use of a weight, with the chain behind it."""
    settings = arguments(node)
    bias = "" if settings["bias"] is None else str(settings["bias"].target)
    end = (node, *chain)[-1]
    partner = _partner(end, changed)
    bounds = _bounds(graph, end, partner, like=attribute(graph, settings["weight"]))
    return Layer(node, str(settings["weight"].target), bias, chain, partner, bounds)


def factor_of(product: fx.Node, value: fx.Node) -> fx.Node | None:
    """The stored per-channel factor that `value` is multiplied by, as layer scale has it."""
    factors = stored_operands(product)
    if product.target is not aten.mul.Tensor or not factors:
        return None
    (factor,) = factors  # the other operand is `value`
    shape, factor_shape = shape_of(value), shape_of(factor)
    # as broadcasting aligns them: a factor [8, 1, 1] of a value [N, 8, H, W] is [1, 8, 1, 1]
    aligned = [1] * (len(shape) - len(factor_shape)) + list(factor_shape)
    per_channel = [1] * len(shape)
    channel_axis = 1 if _from_convolution(value) else -1
    per_channel[channel_axis] = shape[channel_axis]
    return factor if aligned == per_channel else None


def _from_convolution(node: fx.Node) -> bool:
    """Whether a chain's value has its channels on axis 1."""
    while node.target in (aten.batch_norm.default, aten.mul.Tensor):
        node = computed_operands(node)[0]
    return node.target in CONVOLUTIONS


def _partner(end: fx.Node, changed: Collection[fx.Node]) -> fx.Node | None:
    """What a chain's end is added to, where that is a changed value of the same shape."""
    user = only_user(end)
    if user is None or user.target is not aten.add.Tensor or user.kwargs.get("alpha", 1) != 1:
        return None
    for partner in other_operands(user, end):
        if partner in changed and not is_stored(partner) and shape_of(partner) == shape_of(end):
            return partner
    return None


def _bounds(graph: fx.GraphModule, end: fx.Node, partner: fx.Node | None, *, like: Tensor) -> Bounds | None:
    """Where the pointwise operations that alone take a chain's end, or its sum with the partner, are flat.

    Found by running them on a grid of values.
    """
    if partner is not None:
        (end,) = end.users
    responses = _TRIED.to(like)
    user = only_user(end)
    while user is not None and _is_function_of(user, end):
        responses = run_node(graph, user, {end: responses.clone()})  # operations in place write to what they get
        end, user = user, only_user(user)

    responses = responses.detach().cpu()
    bounds = Bounds(_flat_until(responses), -_flat_until(responses.flip(0)))  # the grid is symmetric about 0
    return None if bounds == _UNBOUNDED else bounds


def _is_function_of(node: fx.Node, value: fx.Node) -> bool:
    """Whether the node takes every number of `value` by itself, and nothing else but stored numbers."""
    return node.target in _POINTWISE and all(_is_stored_number(operand) for operand in other_operands(node, value))


def _is_stored_number(node: fx.Node) -> bool:
    return is_stored(node) and bool(node.meta["val"].numel() <= 1)


def _flat_until(responses: Tensor) -> float:
    """The last value tried up to which a function stays where it starts; minus infinity where it rises at once.

    `responses` are the function's at each value of the grid, or from its other end.
    """
    away = (responses - responses[0]).abs()
    exactly = _last_within(away, 0.0)
    about = _last_within(away, FLAT)
    if about == 0:
        return -math.inf
    # ReLU stays within FLAT up to 0.02, yet its kink is at 0; GELU is exactly flat only very far out
    has_kink = _TRIED[about] - _TRIED[exactly] < KINK
    return float(_TRIED[exactly if has_kink else about])


def _last_within(away: Tensor, limit: float) -> int:
    """Where the run of distances from the start on that keep to the limit ends; 0 where it is the start alone."""
    return int((away <= limit).long().cumprod(0).sum()) - 1


def window_of(node: fx.Node, weight: Tensor) -> Window:
    """How a convolution or linear node with that weight reads its input."""
    if node.target is aten.linear.default:
        return Window()
    convolution = Convolution.of(node)
    kernel = tuple(weight.shape[2:])  # of [outputs, inputs of a group, *kernel]
    padding = tuple(paddings_of(convolution.padding, kernel, convolution.dilation))
    assert isinstance(convolution.groups, int)
    return Window(kernel, convolution.stride, padding, convolution.dilation, convolution.groups)


def output_scale(pruned: fx.GraphModule, twins: Mapping[fx.Node, fx.Node], layer: Layer, width: int) -> Tensor:
    """[width] what each output is multiplied by on its way to the stream, float64, from the pruned graph's values."""
    device = attribute(pruned, arguments(twins[layer.node])["weight"]).device
    scale = torch.ones(width, dtype=torch.float64, device=device)
    value = layer.node
    for node in layer.chain:
        if node.target is aten.batch_norm.default:
            args = arguments(twins[node])
            scale = scale * (attribute(pruned, args["running_var"]).double() + args["eps"]).rsqrt()
            factor = args["weight"]
        else:
            factor = factor_of(node, value)
        if factor is not None:
            scale = scale * attribute(pruned, factor).detach().double().flatten()
        value = node
    return scale


def schedule(graph: fx.GraphModule, layers: Mapping[fx.Node, Layer]) -> tuple[fx.Node, ...]:
    """All nodes in an order in which, wherever it can, a layer's partner comes before the layer.

    The nodes of a layer that is used several times come one behind the other, the one it stands by in `layers` first.
    """
    together: dict[fx.Node, tuple[fx.Node, ...]] = {}
    partners: dict[fx.Node, fx.Node] = {}
    for layer in layers.values():
        nodes = tuple(use.node for use in layer.uses)
        together |= dict.fromkeys(nodes, nodes)
        partners |= {use.node: use.partner for use in layer.uses if use.partner is not None}

    done: dict[fx.Node, None] = {}  # in the order they are done in
    begun: set[fx.Node] = set()
    for root in graph.graph.nodes:
        stack = [root]
        while stack:
            node = stack[-1]
            if node in done:
                stack.pop()
                continue
            nodes = together.get(node, (node,))
            begun.update(nodes)
            wished = [partners[use] for use in nodes if use in partners]
            # a partner that itself waits for a node that has begun would close a circle
            possible = [partner for partner in wished if not _depends([partner], begun, done, together)]
            waiting = [needed for needed in (*_operands(nodes), *possible) if needed not in done]
            stack.extend(reversed(waiting))
            if not waiting:
                done.update(dict.fromkeys(nodes))
    return tuple(done)


def _operands(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """All that the nodes read."""
    return [operand for node in nodes for operand in node.all_input_nodes]


def _depends(
    nodes: Iterable[fx.Node],
    targets: Collection[fx.Node],
    done: Collection[fx.Node],
    together: Mapping[fx.Node, tuple[fx.Node, ...]],
) -> bool:
    """Whether any of the nodes that is not done needs one of the targets that is not done either."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in seen or node in done:
            continue
        if node in targets:
            return True
        seen.add(node)
        stack.extend(_operands(together.get(node, (node,))))
    return False
