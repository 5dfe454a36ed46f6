"""Closed-form repair of what pruning leaves: each consumer is refitted to the dense network's outputs.

In: the dense graph, the pruned one (same names, smaller tensors), their slices and calibration images.
Out: new weights in the pruned graph and a record of what was repaired and what was not. Layers are solved
in graph order on the already repaired network's inputs (ThiNet, arXiv 1707.06342; He et al., arXiv 1707.06168).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ..graph import aten, fetch, store
from ..records import Slices
from . import gram
from .lockstep import Batch, Lockstep, Values, arguments, changed_nodes, cut_parameters, images_of, run_node


@dataclass(frozen=True, slots=True)
class CompensationOptions:
    """How the repair is done.

    """

    scope: Literal["cut", "perturbed"] = "perturbed"
    toward: Literal["original", "zero"] = "original"
    stream: bool = True
    norms: bool = True
    intercept: bool = True
    propagate: bool = True
    ridges: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    rows_per_feature: float = 16.0
    min_rows: int = 8192
    limit_bytes: int = 4 << 30
    seed: int = 0


@dataclass(frozen=True, slots=True)
class LayerRepair:
    """One refitted layer; errors are mean squared errors relative to the target's variance, on all images used."""

    layer: str
    weight: str
    ridge: float
    error_before: float
    error_after: float
    rows: int


@dataclass(frozen=True, slots=True)
class Compensation:
    repaired: tuple[LayerRepair, ...]
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class _Layer:
    """A weighted node: `norm` is the batch normalisation right behind it, `partner` the sum's other operand."""

    node: fx.Node
    weight: str
    bias: str
    norm: fx.Node | None
    chain: tuple[fx.Node, ...]
    partner: fx.Node | None


_WINDOWED = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
}
_TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}


def window_of(node: fx.Node, weight: Tensor) -> gram.Window:
    """How a convolution or linear node reads its input."""
    if node.target is aten.linear.default:
        return gram.Window()
    args, axes = arguments(node), weight.dim() - 2
    spread = [list(args[name]) * (axes if len(args[name]) == 1 else 1) for name in ("stride", "dilation")]
    kernel = tuple(weight.shape[2:])
    if isinstance(args["padding"], str):
        totals = [gap * (size - 1) if args["padding"] == "same" else 0 for gap, size in zip(spread[1], kernel, strict=True)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    else:
        sides = list(args["padding"]) * (axes if len(args["padding"]) == 1 else 1)
        padding = tuple((side, side) for side in sides)
    return gram.Window(kernel, tuple(spread[0]), padding, tuple(spread[1]), int(args["groups"]))


def compensate(
    dense: fx.GraphModule,
    pruned: fx.GraphModule,
    slices: Slices,
    batches: Iterable[Batch],
    *,
    options: CompensationOptions = CompensationOptions(),
) -> Compensation:
    """Refits the pruned graph's layers, in place, to reproduce the dense graph's outputs on `batches` ([N, C, H, W])."""
    images = [images_of(batch) for batch in batches]
    changed = changed_nodes(dense, cut_parameters(dense, slices))
    layers, skipped = _layers(dense, changed, options, slices)
    order = _schedule(dense, layers)
    uses = {layer.node: [layer.partner] for layer in layers.values() if layer.partner is not None}
    repaired: list[LayerRepair] = []
    with Lockstep(dense, pruned, order, images, changed, uses, options.limit_bytes) as lockstep:
        for stop, node in enumerate(order):
            if node in layers:
                repaired.append(_repair(lockstep, stop, layers[node], slices, options))
            elif options.norms and node.target is aten.batch_norm.default and node in changed:
                _match_norm(lockstep, stop, slices)
    return Compensation(tuple(repaired), tuple(skipped))


def _layers(
    dense: fx.GraphModule, changed: set[fx.Node], options: CompensationOptions, slices: Slices
) -> tuple[dict[fx.Node, _Layer], list[tuple[str, str]]]:
    uses = Counter(id(fetch_any(dense, n)) for n in dense.graph.nodes if n.op == "get_attr" for _ in n.users)
    layers: dict[fx.Node, _Layer] = {}
    skipped: list[tuple[str, str]] = []
    for node in dense.graph.nodes:
        if node.target in _TRANSPOSED and node in changed:
            skipped.append((node.meta["layer"], "transposed convolution"))
        if node.target is not aten.linear.default and node.target not in _WINDOWED:
            continue
        args = arguments(node)
        if args["input"] not in changed:
            continue
        reason = _obstacle(dense, args, uses)
        if reason:
            skipped.append((node.meta["layer"], reason))
        elif options.scope == "perturbed" or _loses_inputs(dense, slices, args["weight"].target):
            layers[node] = _layer(dense, node, args, changed, options)
    return layers, skipped


def fetch_any(graph: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _loses_inputs(dense: fx.GraphModule, slices: Slices, weight: str) -> bool:
    kept = slices.kept.get(weight)
    return kept is not None and len(kept[1]) < fetch(dense, weight).shape[1]


def _obstacle(dense: fx.GraphModule, args: dict[str, Any], uses: Counter[int]) -> str:
    for name in ("weight", "bias"):
        source = args[name]
        if source is None and name == "bias":
            continue
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            return f"its {name} is computed, not a plain parameter"
        if uses[id(fetch_any(dense, source))] > 1:
            return f"its {name} is shared"
    return ""


def _layer(
    dense: fx.GraphModule, node: fx.Node, args: dict[str, Any], changed: set[fx.Node], options: CompensationOptions
) -> _Layer:
    chain: list[fx.Node] = []
    partner, norm, at = None, None, node
    while len(at.users) == 1:
        (user,) = at.users
        if user.target is aten.batch_norm.default and user.args[0] is at and not chain:
            norm = user
        elif user.target is aten.mul.Tensor and _vector(user, at) is not None:
            pass
        else:
            if user.target is aten.add.Tensor and user.kwargs.get("alpha", 1) == 1 and user.args[0] is not user.args[1]:
                other = user.args[1] if user.args[0] is at else user.args[0]
                if isinstance(other, fx.Node) and other in changed and other.op != "get_attr" and options.stream:
                    partner = other
            break
        chain.append(user)
        at = user
    bias = args["bias"].target if args["bias"] is not None else ""
    return _Layer(node, args["weight"].target, bias, norm, tuple(chain), partner)


def _vector(product: fx.Node, at: fx.Node) -> fx.Node | None:
    """The stored factor of a product, as layer scale has it."""
    other = product.args[1] if product.args[0] is at else product.args[0]
    if not isinstance(other, fx.Node) or other.op != "get_attr":
        return None
    axis = 1 if at.meta["val"].dim() != 3 else -1
    shape = other.meta["val"].shape
    width = at.meta["val"].shape[axis]
    return other if math.prod(shape) == width and width in shape else None


def _schedule(dense: fx.GraphModule, layers: dict[fx.Node, _Layer]) -> list[fx.Node]:
    """The graph's nodes in an order in which the operand a layer's output is added to comes before the layer."""
    order: list[fx.Node] = []
    done: set[fx.Node] = set()
    open_: set[fx.Node] = set()
    after = {node: _descendants(node) for node, layer in layers.items() if layer.partner is not None}

    def emit(root: fx.Node) -> None:
        stack = [(root, False)]
        while stack:
            node, ready = stack.pop()
            if ready:
                if node not in done:
                    done.add(node)
                    order.append(node)
                open_.discard(node)
                continue
            if node in done or node in open_:
                continue
            open_.add(node)
            stack.append((node, True))
            stack.extend((n, False) for n in reversed(node.all_input_nodes))
            layer = layers.get(node)
            if layer is not None and layer.partner is not None:
                if layer.partner not in after[node] and not (open_ & _ancestors(layer.partner) - {node}):
                    stack.append((layer.partner, False))

    for node in dense.graph.nodes:
        emit(node)
    return order


def _descendants(node: fx.Node) -> set[fx.Node]:
    found, stack = set(), list(node.users)
    while stack:
        at = stack.pop()
        if at not in found:
            found.add(at)
            stack.extend(at.users)
    return found


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, stack = {node}, list(node.all_input_nodes)
    while stack:
        at = stack.pop()
        if at not in found:
            found.add(at)
            stack.extend(at.all_input_nodes)
    return found


def _repair(lockstep: Lockstep, stop: int, layer: _Layer, slices: Slices, options: CompensationOptions) -> LayerRepair:
    twin, pruned = lockstep.twin(layer.node), lockstep.pruned
    weight = fetch(pruned, layer.weight).detach()
    window = window_of(twin, weight)
    kept = _kept_outputs(lockstep.dense, slices, layer.weight).to(weight.device)
    scale = _scale(pruned, lockstep, layer, len(kept))
    groups = window.groups
    start = weight.double().reshape(groups, weight.shape[0] // groups, -1)
    folds = [gram.Moments.empty(groups, start.shape[2], start.shape[1], weight.device) for _ in range(2)]
    source = arguments(layer.node)["input"]
    total_images = sum(len(batch) for batch in lockstep.batches)  # type: ignore[arg-type]
    batches: Sequence[Tensor] = lockstep.batches  # type: ignore[assignment]

    def visit(index: int, dense_values: Values, pruned_values: Values) -> None:
        dense_values[layer.node] = y = run_node(lockstep.dense, layer.node, dense_values)
        x = pruned_values[source]
        axis = -1 if window.linear else 1
        if not options.propagate:
            kept_in = slices.kept.get(layer.weight)
            if kept_in is not None and groups == 1:
                x = dense_values[source].index_select(axis, torch.from_numpy(kept_in[1]))
        target = y.index_select(axis, kept) * _along(scale, y.dim(), axis)
        if layer.partner in dense_values and layer.partner in pruned_values:
            target = target + _stream_error(dense_values[layer.partner], pruned_values[layer.partner], kept, axis)
        positions = _positions(gram.position_count(y, window), start.shape[2], total_images, options).to(y.device)
        rows, targets = gram.rows_of(x, window, positions), gram.targets_of(target, window, positions)
        fold = fold_of(batches[index]).to(x.device)
        for number, moments in enumerate(folds):
            chosen = fold == number
            if bool(chosen.any()):
                moments.add(rows[:, chosen].flatten(1, 2), targets[:, chosen].flatten(1, 2))

    lockstep.advance(stop, visit)
    return _fit(pruned, twin, layer, folds, start, scale, options)


def _along(vector: Tensor, dims: int, axis: int) -> Tensor:
    shape = [1] * dims
    shape[axis] = -1
    return vector.view(shape)


def _stream_error(dense: Tensor, pruned: Tensor, kept: Tensor, axis: int) -> Tensor:
    if dense.shape != pruned.shape:
        dense = dense.index_select(axis, kept)
    return dense - pruned


def _kept_outputs(dense: fx.GraphModule, slices: Slices, weight: str) -> Tensor:
    kept = slices.kept.get(weight)
    return torch.arange(fetch(dense, weight).shape[0]) if kept is None else torch.from_numpy(kept[0])


def _scale(pruned: fx.GraphModule, lockstep: Lockstep, layer: _Layer, width: int) -> Tensor:
    """What each output is multiplied by before it is added to the stream."""
    scale = torch.ones(width)
    for node in layer.chain:
        twin = lockstep.twin(node)
        if node.target is aten.batch_norm.default:
            args = arguments(twin)
            gain = fetch_any(pruned, args["weight"]) if args["weight"] is not None else torch.ones(width)
            scale = scale * gain.detach() * (fetch_any(pruned, args["running_var"]) + args["eps"]).rsqrt()
        else:
            other = twin.args[1] if isinstance(twin.args[1], fx.Node) and twin.args[1].op == "get_attr" else twin.args[0]
            scale = scale * fetch_any(pruned, other).detach().flatten()  # type: ignore[arg-type]
    return scale


def fold_of(images: Tensor) -> Tensor:
    """0 or 1 for each image, by its content: the same whichever process holds it."""
    total = images.contiguous().flatten(1).view(torch.uint8).long().sum(1)
    return (total * 2654435761 >> 13) & 1


def _positions(available: int, features: int, images: int, options: CompensationOptions) -> Tensor:
    wanted = max(options.min_rows, int(options.rows_per_feature * features))
    count = min(available, max(1, math.ceil(wanted / images)))
    if count == available:
        return torch.arange(available)
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randperm(available, generator=generator)[:count].sort().values


def _fit(
    pruned: fx.GraphModule,
    twin: fx.Node,
    layer: _Layer,
    folds: list[gram.Moments],
    start: Tensor,
    scale: Tensor,
    options: CompensationOptions,
) -> LayerRepair:
    groups, outputs, _ = start.shape
    scale = scale.double().reshape(groups, outputs)
    old_intercept = (fetch(pruned, layer.bias).double().detach().reshape(groups, outputs) if layer.bias else torch.zeros_like(scale)) * scale
    begin = start * scale.unsqueeze(-1)
    movable = options.intercept and bool(layer.bias or layer.norm)
    total = folds[0] + folds[1]
    if not movable and layer.bias:
        raise AssertionError
    shrink_to = begin if options.toward == "original" else torch.zeros_like(begin)
    ridge = gram.choose_ridge(folds, options.ridges, shrink_to, movable)
    ridge = 1e-2 if ridge is None else ridge
    problem = gram.problem_of(total, movable)
    fitted = gram.solve(problem, ridge, shrink_to)
    fitted = begin if fitted is None else fitted
    intercept = gram.intercept_of(problem, fitted) if movable else torch.zeros_like(scale)
    variance = float((total.yy / total.count - (total.y / total.count).square()).sum())
    before = gram.squared_error(total, begin, old_intercept) / max(variance, 1e-30)
    after = gram.squared_error(total, fitted, intercept) / max(variance, 1e-30)
    alive = scale.abs() > 1e-6 * scale.abs().max()
    safe = torch.where(alive, scale, torch.ones_like(scale))
    weights = torch.where(alive.unsqueeze(-1), fitted / safe.unsqueeze(-1), start)
    shift = torch.where(alive, intercept / safe, torch.zeros_like(scale)).flatten()
    old = fetch(pruned, layer.weight)
    store(pruned, layer.weight, weights.reshape(old.shape).to(old.dtype))
    if movable and layer.bias:
        store(pruned, layer.bias, shift.to(old.dtype))
    elif movable:
        name = str(arguments(layer.norm)["running_mean"].target)  # type: ignore[arg-type]
        store(pruned, name, (fetch(pruned, name).double() - shift).to(old.dtype))
    return LayerRepair(layer.node.meta["layer"], layer.weight, ridge, before, after, int(total.count))


def _match_norm(lockstep: Lockstep, stop: int, slices: Slices) -> None:
    node = lockstep.order[stop]
    args = arguments(lockstep.twin(node))
    source = arguments(node)["input"]
    mean_name, var_name = str(args["running_mean"].target), str(args["running_var"].target)
    mean, var = fetch(lockstep.pruned, mean_name).double(), fetch(lockstep.pruned, var_name).double()
    kept = slices.kept.get(mean_name)
    index = torch.arange(len(mean)) if kept is None else torch.from_numpy(kept[0])
    sums = torch.zeros(2, 3, len(mean), dtype=torch.float64)
    dense_mean, dense_var = (fetch(lockstep.dense, n).double()[index] for n in (mean_name, var_name))

    def visit(_: int, dense_values: Values, pruned_values: Values) -> None:
        for side, value in enumerate((dense_values[source].index_select(1, index), pruned_values[source])):
            flat = value.transpose(0, 1).flatten(1).double()
            sums[side] += torch.stack([torch.full_like(flat[:, 0], flat.shape[1]), flat.sum(1), flat.square().sum(1)])

    lockstep.advance(stop, visit)
    (n, s, q), (n2, s2, q2) = sums
    md, vd = s / n, q / n - (s / n).square()
    mp, vp = s2 / n2, q2 / n2 - (s2 / n2).square()
    eps = args["eps"]
    ratio = torch.where(vd > 1e-12, vp / vd.clamp(min=1e-12), torch.ones_like(vd))
    new_var = (dense_var + eps) * ratio - eps
    new_mean = mp - (md - dense_mean) * ratio.sqrt()
    store(lockstep.pruned, mean_name, new_mean.to(torch.float32))
    store(lockstep.pruned, var_name, new_var.clamp(min=0).to(torch.float32))
