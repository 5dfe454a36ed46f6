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
from ..graph import arguments, aten, fetch
from ..placement import CPU, placed
from ..records import Groups, IntArray
from .groups import CONVOLUTIONS, Structure, analyse, weight_shape
from .labels import Value
from .operations import handler_of, pointwise
from .ranking import spared
from .surgery import Keep, RaggedError, compact, compact_shape, remove, removed_classes

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
        failed = _failures(graph, structure, example, [random_units(structure, seed, share) for share in SHARES])
        if not failed:
            return structure
        for name in failed:
            (frozen if name in tied or not _has_rows(structure, name) else tied).add(name)
    raise ModelError(f"the pruning check does not settle at {sorted(failed)[:5]}; please report this model")


def _parameters_late(graph: fx.GraphModule) -> fx.GraphModule:
    """The same parameters, each read just before its first use, so that `_Double` holds few of them at a time."""
    nodes = copy.deepcopy(graph.graph)
    place = {node: index for index, node in enumerate(nodes.nodes)}
    for node in [n for n in nodes.nodes if n.op == "get_attr" and n.users]:
        min(node.users, key=place.__getitem__).prepend(node)
    return fx.GraphModule(graph, nodes)


class _Double(fx.Interpreter):
    """Runs a graph in float64; a parameter is converted when it is read and freed after its last use."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _doubled(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Tensors that the graph makes itself (zeros, a mask in float32) are converted too."""
        return _doubled(super().call_function(target, args, kwargs))


def find_groups(graph: fx.GraphModule, example: Tensor, seed: int = 0) -> Groups:
    return find_structure(graph, example, seed).groups


def _has_rows(structure: Structure, name: str) -> bool:
    value = structure.values[name]
    parts = value if isinstance(value, tuple) else (value,)
    return any(len(structure.classes(f)[0]) > 1 for v in parts if isinstance(v, Value) for f in v.facets)


def random_units(structure: Structure, seed: int, share: float = 1 / 3) -> dict[str, IntArray]:
    """That share of each group's units gone, as many in every row that stays."""
    generator = np.random.default_rng(seed)
    kept: dict[str, IntArray] = {}
    for group in structure.groups.groups:
        rows = group.rows if group.balanced else np.zeros(group.size, dtype=np.int64)
        stays: list[int] = []
        n = len(rows) // len(np.unique(rows))
        goes = max(1, int(n * share)) if n > 1 else 0
        for row in np.unique(rows):
            stays += sorted(generator.permutation(np.flatnonzero(rows == row))[goes:].tolist())
        always = spared(group, generator.random(group.size), structure.spans.get(group.name, ()))
        kept[group.name] = np.union1d(stays, always).astype(np.int64)
    return kept


def _failures(
    graph: fx.GraphModule, structure: Structure, example: Tensor, choices: Iterable[Mapping[str, IntArray]]
) -> list[str]:
    """Names of the nodes at which pruned and masked differ for one of the choices of units that stay."""
    trials = []
    for gone in (removed_classes(structure, kept) for kept in choices):
        if not gone.any():
            continue
        try:
            trials.append(_Trial(gone, remove(graph, structure, gone, share=True)[0]))
        except RaggedError as error:
            return _ragged_origins(graph, structure, gone) or [error.node]
    lockstep = _Lockstep(graph, structure, trials)
    lockstep.run(example)
    return lockstep.failed


@dataclass
class _Trial:
    """What goes, and the graph without it."""

    gone: Keep
    small: fx.GraphModule

    def __post_init__(self) -> None:
        self.nodes = {n.name: n for n in self.small.graph.nodes}


def _ragged_origins(graph: fx.GraphModule, structure: Structure, gone: Keep) -> list[str]:
    """Nodes whose result would not be a box although their operands' are."""
    ragged = {n.name for n in graph.graph.nodes if _is_ragged(structure, structure.values.get(n.name), gone)}
    return [
        n.name for n in graph.graph.nodes if n.name in ragged and not any(i.name in ragged for i in n.all_input_nodes)
    ]


def _is_ragged(structure: Structure, known: Any, gone: Keep) -> bool:
    try:
        for value in _parts(known):
            compact_shape(value.shape, [structure.classes(f) for f in value.facets], gone)
    except RaggedError:
        return True
    return False


def _parts(value: Any) -> list[Value]:
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return [v for v in parts if isinstance(v, Value)]


class _Lockstep(fx.Interpreter):
    """Runs the original; at every node, both it and the pruned operation in float64, on what came in, masked."""

    def __init__(self, graph: fx.GraphModule, structure: Structure, trials: Sequence[_Trial]) -> None:
        super().__init__(graph)
        self.structure, self.trials = structure, trials
        self.nodes = {n.name: n for n in graph.graph.nodes}
        self.inexact = {n for nodes in structure.classes.inexact.values() for n in nodes}
        self.failed: list[str] = []

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n.op == "call_function" and _tensors(out) and any(self._differs(n, trial) for trial in self.trials):
            self.failed.append(n.name)
        return out

    def _differs(self, n: fx.Node, trial: _Trial) -> bool:
        exact = n.name not in self.inexact
        lengths = _excerpt(n, self.structure, trial.gone)
        excerpted = n.all_input_nodes if _is_pointwise(n) else n.all_input_nodes[:1]
        read: dict[fx.Node, Any] = {}
        for node in n.all_input_nodes:
            value = _narrowed(self.env[node], lengths if node in excerpted else {})
            known = self.structure.values.get(node.name)
            read[node] = value if _is_weight(node) else mask(value, known, self.structure, trial.gone)

        def compacted(node: fx.Node) -> Any:
            original = self.nodes[node.name]
            if node.op == "get_attr" and original not in excerpted:
                return fetch(trial.small, str(node.target))
            return self._compact(original, read[original], trial.gone)

        try:
            got = _tensors(_computed(trial.nodes[n.name], compacted))
            expected = _tensors(self._compact(n, _computed(n, read.__getitem__), trial.gone))
        except (RuntimeError, RaggedError, IndexError, ValueError, TypeError):
            return True
        for a, b in zip(got, expected, strict=True):
            if a.shape != b.shape or (exact and a.is_floating_point() and not _near(a, b)):
                return True
        return False

    def _compact(self, node: fx.Node, value: Any, gone: Keep) -> Any:
        known = self.structure.values.get(node.name)
        if isinstance(value, Tensor) and isinstance(known, Value):
            return compact(value, self.structure.lying(node), gone)
        if isinstance(value, (tuple, list)) and isinstance(known, (tuple, list)):
            return [
                compact(v, [self.structure.classes(f) for f in k.facets], gone) if isinstance(k, Value) else v
                for v, k in zip(value, known, strict=True)
            ]
        return value


def _computed(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    """The node's operation in float64."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _doubled(value_of(n)))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _doubled(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)([_doubled(part) for part in value])
    if not isinstance(value, Tensor):
        return value
    if value.is_complex():
        return value.to(torch.complex128)
    return value.double() if value.is_floating_point() else value


def _narrowed(value: Any, lengths: Mapping[int, int]) -> Any:
    for axis, length in lengths.items() if isinstance(value, Tensor) else ():
        if axis + value.ndim >= 0 and value.shape[axis] > length:
            value = value.narrow(axis, 0, length)
    return value


def _excerpt(node: fx.Node, structure: Structure, gone: Keep) -> dict[int, int]:
    """How many entries of which axes, counted from the last, show whether an operation's channels are right.

    Along axes that lose nothing, those of images and positions, layers, normalisations with stored statistics
    and pointwise operations repeat the same arithmetic.
    """
    sources = [n for n in (node, *node.all_input_nodes) if isinstance(structure.values.get(n.name), Value)]
    ndim = node.meta["val"].ndim if isinstance(node.meta["val"], Tensor) else 0
    if node.target is aten.linear.default:
        lengths = dict.fromkeys(range(-ndim, -1), 1)
    elif node.target in CONVOLUTIONS:  # two places of the kernel, its dilation and stride included
        named = arguments(node)
        kernel = enumerate(weight_shape(node)[2:], 2 - ndim)
        reach, step = np.max(named["dilation"]), np.max(named["stride"])
        lengths = {-ndim: 1} | {axis: int((k - 1) * reach + 1 + step) for axis, k in kernel}
    elif node.target is aten.batch_norm.default:
        lengths = dict.fromkeys([-ndim, *range(2 - ndim, 0)], 1)
    elif node.target is aten.layer_norm.default:
        lengths = dict.fromkeys(range(-ndim, -len(arguments(node)["normalized_shape"])), 1)
    elif _is_pointwise(node):
        lengths = dict.fromkeys(range(-ndim, 0), 1)
    else:
        return {}
    if not _is_pointwise(node):
        sources = sources[:2]
    for source in sources:
        rank = len(structure.values[source.name].shape)
        for over, classes in structure.lying(source):
            for axis in over if gone[classes].any() else ():
                lengths.pop(axis - rank, None)
    return lengths


def _is_pointwise(node: fx.Node) -> bool:
    return node.op == "call_function" and handler_of(node) is pointwise


def _is_weight(node: fx.Node) -> bool:
    """Only multiplied with inputs that are masked themselves: masking it too changes nothing and costs a copy."""
    return node.op == "get_attr" and all(
        user.target in (*CONVOLUTIONS, aten.linear.default) and user.args[1] is node and user.args[0] is not node
        for user in node.users
    )


def _near(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding at the largest value's scale; the usual cases first, for these are many large tensors."""
    if torch.equal(a, b):
        return True
    off, most = (float(torch.linalg.vector_norm(x, torch.inf)) for x in (a - b, b))
    if np.isfinite(off) and np.isfinite(most):
        return off <= TOLERANCE * max(1.0, most)
    scale = max(1.0, float(b.abs().nan_to_num(0, 0, 0).max()))
    return torch.allclose(a, b, rtol=0, atol=TOLERANCE * scale, equal_nan=True)


def _tensors(value: Any) -> list[Tensor]:
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return [v for v in parts if isinstance(v, Tensor)]


def mask(value: Any, known: Any, structure: Structure, gone: Keep) -> Any:
    """The value with removed coordinates at zero, in its original shape."""
    if isinstance(value, (tuple, list)) and isinstance(known, (tuple, list)):
        return type(value)(mask(v, k, structure, gone) for v, k in zip(value, known, strict=True))
    if not (isinstance(value, Tensor) and isinstance(known, Value)) or value.dtype == torch.bool:
        return value
    for facet in known.facets:
        over, classes = structure.classes(facet)
        if gone[classes].any():
            shape = [1] * value.ndim
            for position, axis in enumerate(over):
                shape[axis] = classes.shape[position]
            value = value.masked_fill(torch.from_numpy(gone[classes]).reshape(shape), 0)
    return value


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
    gone = removed_classes(structure, kept)
    inexact = {n for nodes in structure.classes.inexact.values() for n in nodes}
    small = {n.name: n for n in pruned.graph.nodes}
    masked = _MaskedRun(_parameters_late(dense), structure, gone, inexact, small)
    exact = _Double(_parameters_late(pruned))
    traced = next(n for n in dense.graph.nodes if n.op == "placeholder").meta["val"].shape[0]
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

    def __init__(self, graph: fx.GraphModule, structure: Structure, gone: Keep, inexact: set[str], small: Any) -> None:
        super().__init__(graph)
        self.structure, self.gone, self.inexact, self.small = structure, gone, inexact, small

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self.inexact:
            out = super().run_node(n)
            plain = n.op == "output" or _is_weight(n)
            return out if plain else mask(out, self.structure.values.get(n.name), self.structure, self.gone)
        values = self.structure.values
        lying = {a: self.structure.lying(a) for a in n.all_input_nodes}
        args, kwargs = fx.map_arg(
            (self.small[n.name].args, self.small[n.name].kwargs), lambda a: self._compacted(a, lying)
        )
        out = n.target(*args, **kwargs)  # type: ignore[operator]
        return scatter(out, values[n.name], self.structure, self.gone)

    def _compacted(self, node: fx.Node, lying: Mapping[fx.Node, Any]) -> Any:
        original = next(a for a in lying if a.name == node.name)
        value = self.env[original]
        return compact(value, lying[original], self.gone) if isinstance(value, Tensor) else value


def scatter(value: Any, known: Any, structure: Structure, gone: Keep) -> Any:
    """The inverse of `compact`: removed coordinates come back as zeros."""
    if isinstance(value, (tuple, list)):
        return type(value)(scatter(v, k, structure, gone) for v, k in zip(value, known, strict=True))
    stays = torch.ones((), dtype=torch.float64).expand(known.shape)
    stays = mask(stays.clone(), known, structure, gone) > 0
    moved = _row_major(known, structure)
    full = torch.zeros(known.shape, dtype=value.dtype)
    order = [*[a for a in range(len(known.shape)) if a not in moved], *moved]
    flat = full.permute(order).contiguous()
    flat[stays.permute(order)] = value.permute(order).reshape(-1)
    return flat.permute([order.index(a) for a in range(len(order))])


def _row_major(known: Value, structure: Structure) -> list[int]:
    return sorted({a for f in known.facets for a in structure.classes(f)[0]})
