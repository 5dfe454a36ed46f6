"""Every group is tried before it is trusted: random units go, and each operation must still compute the same.

Node by node in float64, the pruned operation on the pruned operands is held against the original operation
on masked operands. What fails is tied more coarsely, then frozen and named. `identity_error` compares whole
networks: the pruned one and the original with removed units zeroed at every consumer's input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import GateError, ModelError
from ..graph import aten, fetch
from ..graph.operators import ALL_CONVOLUTIONS, arguments, weight_shape
from ..placement import CPU, placed
from ..records import IntArray
from .coupling import spared
from .groups import analyse
from .labels import Value, values_in
from .operations import handler_of, pointwise
from .structure import Keep, Structure
from .surgery import RaggedError, compact, compact_shape, remove, removed_classes

# float64 rounding over sums of up to ~1e6 terms; a wrong index shows as O(1)
TOLERANCE = 1e-8
ROUNDS = 12
# a wrong index may be right by chance for one choice of units, hardly for two
SHARES = (1 / 3, 2 / 3)


def find_structure(graph: fx.GraphModule, example: Tensor, seed: int = 0) -> Structure:
    """The graph's groups, each checked; what failed is named in `groups.left_alone`.

    `example` is [N, C, H, W] as the graph was traced with; the graph is not changed. A graph on a GPU is checked
    on the CPU, in a copy for the time of the check: few GPUs are quick in float64.
    """
    graph, example = placed(graph, CPU), example.to(CPU)
    tied: set[str] = set()
    frozen: set[str] = set()
    for _ in range(ROUNDS):
        structure = analyse(graph, tied, frozen)
        choices = [random_units(structure, seed, share) for share in SHARES]
        failed = _failures(graph, structure, example, choices)
        if not failed:
            return structure
        for name in failed:
            # a node that fails with its rows tied to columns fails for another reason
            if name in tied or not _has_rows(structure, name):
                frozen.add(name)
            else:
                tied.add(name)
    raise ModelError(f"the pruning check does not settle at {sorted(failed)[:5]}; please report this model")


def _parameters_late(graph: fx.GraphModule) -> fx.GraphModule:
    """The same parameters, each read just before its first use, so that `_Double` holds few of them at a time."""
    late = copy.deepcopy(graph.graph)
    place = {node: index for index, node in enumerate(late.nodes)}
    read = [node for node in late.nodes if node.op == "get_attr" and node.users]
    for parameter in read:
        first_user = min(parameter.users, key=place.__getitem__)
        first_user.prepend(parameter)
    return fx.GraphModule(graph, late)


class _Double(fx.Interpreter):
    """Runs a graph in float64; a parameter is converted when it is read and freed after its last use."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _doubled(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Tensors that the graph makes itself (zeros, a mask in float32) are converted too."""
        return _doubled(super().call_function(target, args, kwargs))


def _has_rows(structure: Structure, name: str) -> bool:
    """Whether labels of the node's result lie on several axes at once, as those of head dimensions do."""
    for value in values_in(structure.values[name]):
        for facet in value.facets:
            over, _ = structure.classes(facet)
            if len(over) > 1:
                return True
    return False


def random_units(structure: Structure, seed: int, share: float = 1 / 3) -> dict[str, IntArray]:
    """What stays of each group when that share of its units is gone, as many in every row that stays."""
    generator = np.random.default_rng(seed)
    kept: dict[str, IntArray] = {}
    for group in structure.groups.groups:
        rows = group.rows if group.balanced else np.zeros(group.size, dtype=np.int64)
        row_length = len(rows) // len(np.unique(rows))
        goes = max(1, int(row_length * share)) if row_length > 1 else 0  # a row of one unit keeps it

        stays: list[int] = []
        for row in np.unique(rows):
            shuffled = generator.permutation(np.flatnonzero(rows == row))
            stays += sorted(shuffled[goes:].tolist())
        always = spared(group, generator.random(group.size), structure.spans.get(group.name, ()))
        kept[group.name] = np.union1d(stays, always).astype(np.int64)
    return kept


def _failures(
    graph: fx.GraphModule, structure: Structure, example: Tensor, choices: Iterable[Mapping[str, IntArray]]
) -> list[str]:
    """Names of the nodes at which pruned and masked differ for one of the choices of units that stay."""
    trials = []
    for kept in choices:
        gone = removed_classes(structure, kept)
        if not gone.any():
            continue
        try:
            small, _ = remove(graph, structure, gone, share=True)
        except RaggedError as error:
            return _ragged_origins(graph, structure, gone) or [error.node]
        trials.append(_Trial(gone, small))

    lockstep = _Lockstep(graph, structure, trials)
    lockstep.run(example)
    return lockstep.failed


@dataclass
class _Trial:
    """What goes, and the graph without it."""

    gone: Keep
    small: fx.GraphModule

    def __post_init__(self) -> None:
        self.nodes = {node.name: node for node in self.small.graph.nodes}


def _ragged_origins(graph: fx.GraphModule, structure: Structure, gone: Keep) -> list[str]:
    """Nodes whose result would not be a box although their operands' are."""
    nodes = list(graph.graph.nodes)
    ragged = {node.name for node in nodes if _is_ragged(structure, node, gone)}
    origins = []
    for node in nodes:
        handed_on = any(source.name in ragged for source in node.all_input_nodes)
        if node.name in ragged and not handed_on:
            origins.append(node.name)
    return origins


def _is_ragged(structure: Structure, node: fx.Node, gone: Keep) -> bool:
    try:
        for value in values_in(structure.values.get(node.name)):
            compact_shape(value.shape, [structure.classes(facet) for facet in value.facets], gone)
    except RaggedError:
        return True
    return False


class _Lockstep(fx.Interpreter):
    """Runs the original; at every node, both it and the pruned operation in float64, on what came in, masked."""

    def __init__(self, graph: fx.GraphModule, structure: Structure, trials: Sequence[_Trial]) -> None:
        super().__init__(graph)
        self.structure, self.trials = structure, trials
        self.nodes = {node.name: node for node in graph.graph.nodes}
        self.inexact = _inexact_nodes(structure)
        self.failed: list[str] = []

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n.op == "call_function" and _tensors(out) and any(self._differs(n, trial) for trial in self.trials):
            self.failed.append(n.name)
        return out

    def _differs(self, n: fx.Node, trial: _Trial) -> bool:
        """Whether the pruned operation gives something else than the original without what is gone."""
        lengths = _excerpt(n, self.structure, trial.gone)
        # parameters of a layer are needed whole, whatever excerpt is taken of its input, the first operand
        excerpted = n.all_input_nodes if _is_pointwise(n) else n.all_input_nodes[:1]
        operands: dict[fx.Node, Any] = {}
        for source in n.all_input_nodes:
            operand = _narrowed(self.env[source], lengths if source in excerpted else {})
            if not _is_weight(source):
                operand = mask(operand, self.structure.values.get(source.name), self.structure, trial.gone)
            operands[source] = operand

        def compacted(small_source: fx.Node) -> Any:
            source = self.nodes[small_source.name]
            if small_source.op == "get_attr" and source not in excerpted:
                return fetch(trial.small, str(small_source.target))
            return self._compact(source, operands[source], trial.gone)

        try:
            pruned = _tensors(_computed(trial.nodes[n.name], compacted))
            expected = _tensors(self._compact(n, _computed(n, operands.__getitem__), trial.gone))
        except (RuntimeError, RaggedError, IndexError, ValueError, TypeError):  # sizes that don't fit: it differs
            return True

        exact = n.name not in self.inexact
        for a, b in zip(pruned, expected, strict=True):
            if a.shape != b.shape:
                return True
            if exact and a.is_floating_point() and not _near(a, b):
                return True
        return False

    def _compact(self, node: fx.Node, result: Any, gone: Keep) -> Any:
        """The node's result, or each of several, without the coordinates that are gone."""
        labels = self.structure.values.get(node.name)
        if isinstance(result, Tensor) and isinstance(labels, Value):
            return compact(result, self.structure.lying(node), gone)
        if not (isinstance(result, (tuple, list)) and isinstance(labels, (tuple, list))):
            return result

        pieces = []
        for piece, value in zip(result, labels, strict=True):
            if isinstance(value, Value):
                lying = [self.structure.classes(facet) for facet in value.facets]
                pieces.append(compact(piece, lying, gone))
            else:
                pieces.append(piece)
        return pieces


def _inexact_nodes(structure: Structure) -> set[str]:
    """Nodes whose results depend on what goes beyond zeroing it: the masked original gives something else there."""
    return {name for names in structure.classes.inexact.values() for name in names}


def _computed(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    """The node's operation in float64."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: _doubled(value_of(source)))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _doubled(value: Any) -> Any:
    """Floating-point tensors in float64, complex ones in complex128, all else as it is."""
    if isinstance(value, (tuple, list)):
        return type(value)([_doubled(piece) for piece in value])
    if not isinstance(value, Tensor):
        return value
    if value.is_complex():
        return value.to(torch.complex128)
    return value.double() if value.is_floating_point() else value


def _narrowed(value: Any, lengths: Mapping[int, int]) -> Any:
    """The value's first entries along axes that are counted from the last; one that lacks the axis is left as it is."""
    if not isinstance(value, Tensor):
        return value
    for axis, length in lengths.items():
        if axis + value.ndim >= 0 and value.shape[axis] > length:
            value = value.narrow(axis, 0, length)
    return value


def _excerpt(node: fx.Node, structure: Structure, gone: Keep) -> dict[int, int]:
    """How many entries of which axes, counted from the last, show whether an operation's channels are right.

    Along axes that lose nothing, those of images and positions, layers, normalisations with stored statistics
    and pointwise operations repeat the same arithmetic.
    """
    lengths = _repeated(node)
    if not lengths:
        return {}
    # an axis of which units go is needed whole; of a layer, its result and its input tell
    ends = [node, *node.all_input_nodes]
    labelled = [end for end in ends if isinstance(structure.values.get(end.name), Value)]
    for end in labelled if _is_pointwise(node) else labelled[:2]:
        rank = len(structure.shape(end))
        for over, classes in structure.lying(end):
            if gone[classes].any():
                for axis in over:
                    lengths.pop(axis - rank, None)
    return lengths


def _repeated(node: fx.Node) -> dict[int, int]:
    """Axes along which the node does the same again and again, and how many entries of them show all of it."""
    ndim = node.meta["val"].ndim if isinstance(node.meta["val"], Tensor) else 0
    if node.target is aten.linear.default:
        return dict.fromkeys(range(-ndim, -1), 1)
    if node.target in ALL_CONVOLUTIONS:
        # two places of the kernel: one of 3 at dilation 1 and stride 2 needs (3 - 1) * 1 + 1 + 2 = 5 entries
        settings = arguments(node)
        dilation, stride = np.max(settings["dilation"]), np.max(settings["stride"])
        lengths = {-ndim: 1}
        for axis, kernel_size in enumerate(weight_shape(node)[2:], 2 - ndim):
            lengths[axis] = int((kernel_size - 1) * dilation + 1 + stride)
        return lengths
    if node.target is aten.batch_norm.default:  # all but the channels, axis 1
        return dict.fromkeys([-ndim, *range(2 - ndim, 0)], 1)
    if node.target is aten.layer_norm.default:
        return dict.fromkeys(range(-ndim, -len(arguments(node)["normalized_shape"])), 1)
    if _is_pointwise(node):
        return dict.fromkeys(range(-ndim, 0), 1)
    return {}


def _is_pointwise(node: fx.Node) -> bool:
    return node.op == "call_function" and handler_of(node) is pointwise


def _is_weight(node: fx.Node) -> bool:
    """Only multiplied with inputs that are masked themselves: masking it too changes nothing and costs a copy."""
    return node.op == "get_attr" and all(
        user.target in (*ALL_CONVOLUTIONS, aten.linear.default) and user.args[1] is node and user.args[0] is not node
        for user in node.users
    )


def _near(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding at the largest value's scale; the usual cases first, for these are many large tensors."""
    if torch.equal(a, b):
        return True
    difference = float(torch.linalg.vector_norm(a - b, torch.inf))
    largest = float(torch.linalg.vector_norm(b, torch.inf))
    if np.isfinite(difference) and np.isfinite(largest):
        return difference <= TOLERANCE * max(1.0, largest)
    # where both hold the same infinities and NaNs, what is finite decides
    scale = max(1.0, float(b.abs().nan_to_num(0, 0, 0).max()))
    return torch.allclose(a, b, rtol=0, atol=TOLERANCE * scale, equal_nan=True)


def _tensors(value: Any) -> list[Tensor]:
    results = value if isinstance(value, (tuple, list)) else (value,)
    return [result for result in results if isinstance(result, Tensor)]


def mask(result: Any, labels: object, structure: Structure, gone: Keep) -> Any:
    """A node's result with removed coordinates at zero, in its original shape; `labels` is what is known of it."""
    if isinstance(result, (tuple, list)) and isinstance(labels, (tuple, list)):
        return type(result)(mask(piece, value, structure, gone) for piece, value in zip(result, labels, strict=True))
    if not (isinstance(result, Tensor) and isinstance(labels, Value)) or result.dtype == torch.bool:
        return result
    for facet in labels.facets:
        over, classes = structure.classes(facet)
        if gone[classes].any():
            shape = [1] * result.ndim  # [heads, d] on axes (1, 3): [1, heads, 1, d]
            for position, axis in enumerate(over):
                shape[axis] = classes.shape[position]
            result = result.masked_fill(torch.from_numpy(gone[classes]).reshape(shape), 0)
    return result


@torch.no_grad()
def identity_error(
    dense: fx.GraphModule, pruned: fx.GraphModule, structure: Structure, kept: Mapping[str, IntArray], images: Tensor
) -> float:
    """Largest difference of the outputs on [N, C, H, W] images, relative to the largest output, in float64.

    The masked original normalises over what remains where the pruned axis is a normalised one: it computes
    such a node on the compacted operands and puts the result back in place. Like `find_structure`, on the CPU.
    Raises GateError where there are fewer images than the graph was traced with: nothing would be compared.
    """
    dense, pruned, images = placed(dense, CPU), placed(pruned, CPU), images.to(CPU)
    masked = _MaskedRun(_parameters_late(dense), pruned, structure, removed_classes(structure, kept))
    exact = _Double(_parameters_late(pruned))
    placeholder = next(node for node in dense.graph.nodes if node.op == "placeholder")
    traced = placeholder.meta["val"].shape[0]
    if len(images) < traced:
        raise GateError(
            f"the identity check was given {len(images)} images and compares {traced} at once; give as many"
        )

    worst = 0.0
    for start in range(0, len(images) - traced + 1, traced):  # shapes are known at the traced batch size
        batch = images[start : start + traced].double()
        for a, b in zip(_tensors(exact.run(batch)), _tensors(masked.run(batch)), strict=True):
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))
    return worst


class _MaskedRun(_Double):
    """The original on masked values; where that can't be exact, the pruned operation on the compacted ones."""

    def __init__(self, graph: fx.GraphModule, pruned: fx.GraphModule, structure: Structure, gone: Keep) -> None:
        super().__init__(graph)
        self.structure, self.gone = structure, gone
        self.inexact = _inexact_nodes(structure)
        self.small_nodes = {node.name: node for node in pruned.graph.nodes}

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.inexact:
            return self._run_compacted(n)
        out = super().run_node(n)
        if n.op == "output" or _is_weight(n):
            return out
        return mask(out, self.structure.values.get(n.name), self.structure, self.gone)

    def _run_compacted(self, n: fx.Node) -> Any:
        """The pruned node's arguments (sizes are rewritten there) on what remains of the operands."""
        small = self.small_nodes[n.name]
        sources = {source.name: source for source in n.all_input_nodes}

        def compacted(small_source: fx.Node) -> Any:
            source = sources[small_source.name]
            value = self.env[source]
            return compact(value, self.structure.lying(source), self.gone) if isinstance(value, Tensor) else value

        args, kwargs = fx.map_arg((small.args, small.kwargs), compacted)
        out = n.target(*args, **kwargs)  # type: ignore[operator]
        return scatter(out, self.structure.values[n.name], self.structure, self.gone)


def scatter(result: Any, labels: Any, structure: Structure, gone: Keep) -> Any:
    """The inverse of `compact`: removed coordinates come back as zeros."""
    if isinstance(result, (tuple, list)):
        return type(result)(scatter(piece, value, structure, gone) for piece, value in zip(result, labels, strict=True))
    ones = torch.ones((), dtype=torch.float64).expand(labels.shape)
    stays = mask(ones.clone(), labels, structure, gone) > 0

    # axes with labels last, the others in front: [N, heads, tokens, d] becomes [N, tokens, heads, d]
    labelled = sorted({axis for facet in labels.facets for axis in structure.classes(facet)[0]})
    order = [*(axis for axis in range(len(labels.shape)) if axis not in labelled), *labelled]
    full = torch.zeros(labels.shape, dtype=result.dtype).permute(order).contiguous()
    full[stays.permute(order)] = result.permute(order).reshape(-1)
    return full.permute([order.index(axis) for axis in range(len(order))])
