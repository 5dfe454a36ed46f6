"""Every group is tried before it is trusted: random units go, and each operation must still compute the same.

Node by node in float64, the pruned operation on the pruned operands is held against the original operation
on masked operands. What fails is tied more coarsely, then frozen and named. `identity_error` compares whole
networks: the pruned one and the original with removed units zeroed at every consumer's input.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import ModelError
from ..graph import aten
from ..records import Groups, IntArray
from .groups import CONVOLUTIONS, Structure, analyse
from .labels import Value
from .ranking import spared
from .surgery import Keep, RaggedError, compact, compact_shape, remove, removed_classes

# float64 rounding over sums of up to ~1e6 terms; a wrong index shows as O(1)
TOLERANCE = 1e-8
ROUNDS = 12
# a wrong index may be right by chance for one choice of units, hardly for two
SHARES = (1 / 3, 2 / 3)


def find_structure(graph: fx.GraphModule, example: Tensor, seed: int = 0) -> Structure:
    """The graph's groups, each checked; what failed is named in `groups.left_alone`.

    `example` is [N, C, H, W] as the graph was traced with; the graph is not changed.
    """
    tied: set[str] = set()
    frozen: set[str] = set()
    late = _parameters_late(graph)
    for _ in range(ROUNDS):
        structure = analyse(graph, tied, frozen)
        for share in SHARES:
            failed = _failures(late, structure, example.double(), random_units(structure, seed, share))
            if failed:
                break
        else:
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
        value = super().get_attr(target, args, kwargs)
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


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


def _failures(graph: fx.GraphModule, structure: Structure, example: Tensor, kept: Mapping[str, IntArray]) -> list[str]:
    """Names of the nodes at which pruned and masked differ; the walk goes on from the masked values."""
    gone = removed_classes(structure, kept)
    if not gone.any():
        return []
    failed: list[str] = []
    try:
        small, _ = remove(graph, structure, gone)
    except RaggedError as error:
        return _ragged_origins(graph, structure, gone) or [error.node]
    _Lockstep(graph, small, structure, gone, failed).run(example)
    return failed


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


class _Lockstep(_Double):
    """Runs the original on masked values and, at every node, the pruned operation on the compacted ones."""

    def __init__(
        self, graph: fx.GraphModule, small: fx.GraphModule, structure: Structure, gone: Keep, failed: list[str]
    ) -> None:
        super().__init__(graph)
        self.structure, self.gone, self.failed = structure, gone, failed
        self.small_nodes = {n.name: n for n in small.graph.nodes}
        self.large_nodes = {n.name: n for n in graph.graph.nodes}
        self.inexact = {n for nodes in structure.classes.inexact.values() for n in nodes}

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n.op == "call_function" and _tensors(out):
            problem = self._differs(n, out)
            if problem:
                self.failed.append(n.name)
        return self._masked(n, out)

    def _differs(self, n: fx.Node, out: Any) -> bool:
        node = self.small_nodes[n.name]
        try:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._compacted)
            got = _tensors(node.target(*args, **kwargs))
            expected = _tensors(self._compact_value(n, out))
        except (RuntimeError, RaggedError, IndexError, ValueError, TypeError):
            return True
        for a, b in zip(got, expected, strict=True):
            if a.shape != b.shape:
                return True
            if n.name not in self.inexact and a.is_floating_point() and not _near(a, b):
                return True
        return False

    def _compacted(self, node: fx.Node) -> Any:
        original = self.large_nodes[node.name]
        return self._compact_value(original, self.env[original])

    def _compact_value(self, node: fx.Node, value: Any) -> Any:
        known = self.structure.values.get(node.name)
        if isinstance(value, Tensor) and isinstance(known, Value):
            return compact(value, self.structure.lying(node), self.gone)
        if isinstance(value, (tuple, list)) and isinstance(known, (tuple, list)):
            return [
                compact(v, [self.structure.classes(f) for f in k.facets], self.gone) if isinstance(k, Value) else v
                for v, k in zip(value, known, strict=True)
            ]
        return value

    def _masked(self, node: fx.Node, out: Any) -> Any:
        if _is_weight(node):
            return out
        return mask(out, self.structure.values.get(node.name), self.structure, self.gone)


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
    such a node on the compacted operands and puts the result back in place.
    """
    gone = removed_classes(structure, kept)
    inexact = {n for nodes in structure.classes.inexact.values() for n in nodes}
    small = {n.name: n for n in pruned.graph.nodes}
    masked = _MaskedRun(_parameters_late(dense), structure, gone, inexact, small)
    exact = _Double(_parameters_late(pruned))
    traced = next(n for n in dense.graph.nodes if n.op == "placeholder").meta["val"].shape[0]
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
