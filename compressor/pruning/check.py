"""Every group is tried before it is trusted: random units go, and each operation must still compute the same.

Node by node in float64, the pruned operation on the pruned operands is held against the original operation
on masked operands. What fails is tied more coarsely, then frozen and named. Whole networks are compared in
`identity.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import ModelError
from ..graph import fetch
from ..graph.double import doubled
from ..graph.interface import nodes_by_name
from ..placement import CPU, placed
from ..records import IntArray
from ..tensors import Inputs, as_tuple, moved
from .compaction import RaggedError, compact, compact_shape
from .coupling import spared, units_by_row
from .excerpts import excerpt, excerpted_operands, narrowed
from .groups import analyse
from .labels import Result, Value, axes, facets_in, map_labelled, values_in
from .masking import inexact_nodes, is_weight, mask, tensors_in
from .structure import Keep, Structure
from .surgery import remove, removed_classes

# float64 rounding over sums of up to ~1e6 terms; a wrong index shows as O(1)
TOLERANCE = 1e-8
ROUNDS = 12
# a wrong index may be right by chance for one choice of units, hardly for two
SHARES = (1 / 3, 2 / 3)


def find_structure(graph: fx.GraphModule, example: Inputs, seed: int = 0) -> Structure:
    """The graph's groups, each checked; what failed is named in `groups.left_alone`.

    `example` is [N, ...], of every input, as the graph was traced with; the graph is not changed. A graph on a GPU is
    checked on the CPU, in a copy for the time of the check: few GPUs are quick in float64.
    """
    graph, example = placed(graph, CPU), moved(example, CPU)
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


def _has_rows(structure: Structure, name: str) -> bool:
    """Whether labels of the node's result lie on several axes at once, as those of head dimensions do."""
    return any(len(axes(facet)) > 1 for facet in facets_in(structure.values[name]))


def random_units(structure: Structure, seed: int, share: float = 1 / 3) -> dict[str, IntArray]:
    """What stays of each group when that share of its units is gone, as many in every row that stays."""
    generator = np.random.default_rng(seed)
    kept: dict[str, IntArray] = {}
    for group in structure.groups.groups:
        rows = units_by_row(group)
        row_length = group.size // len(rows)
        goes = max(1, int(row_length * share)) if row_length > 1 else 0  # a row of one unit keeps it

        stays: list[int] = []
        for units in rows:
            shuffled = generator.permutation(units)
            stays += sorted(shuffled[goes:].tolist())
        always = spared(group, generator.random(group.size), structure.spans.get(group.name, ()))
        kept[group.name] = np.union1d(stays, always).astype(np.int64)
    return kept


def _failures(
    graph: fx.GraphModule, structure: Structure, example: Inputs, choices: Iterable[Mapping[str, IntArray]]
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
        trials.append(_Trial(gone, small, nodes_by_name(small)))

    lockstep = _Lockstep(graph, structure, trials)
    lockstep.run(*as_tuple(example))
    return lockstep.failed


@dataclass(frozen=True)
class _Trial:
    """What goes, the graph without it, and that graph's nodes by name."""

    gone: Keep
    small: fx.GraphModule
    nodes: Mapping[str, fx.Node]


def _ragged_origins(graph: fx.GraphModule, structure: Structure, gone: Keep) -> list[str]:
    """Nodes whose result would not be a box although their operands' are."""
    ragged = [node for node in graph.graph.nodes if _is_ragged(structure.values.get(node.name), structure, gone)]
    spread = set(ragged)
    return [node.name for node in ragged if spread.isdisjoint(node.all_input_nodes)]


def _is_ragged(result: Result, structure: Structure, gone: Keep) -> bool:
    try:
        for value in values_in(result):
            compact_shape(value.shape, structure.lying_of(value), gone)
    except RaggedError:
        return True
    return False


class _Lockstep(fx.Interpreter):
    """Runs the original; at every node, both it and the pruned operation in float64, on what came in, masked."""

    def __init__(self, graph: fx.GraphModule, structure: Structure, trials: Sequence[_Trial]) -> None:
        super().__init__(graph)
        self.structure, self.trials = structure, trials
        self.nodes = nodes_by_name(graph)
        self.inexact = inexact_nodes(structure)
        self.failed: list[str] = []

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> object:
        out: object = super().run_node(n)
        if n.op == "call_function" and tensors_in(out) and any(self._differs(n, trial) for trial in self.trials):
            self.failed.append(n.name)
        return out

    def _differs(self, n: fx.Node, trial: _Trial) -> bool:
        """Whether the pruned operation gives something else than the original without what is gone."""
        operands = self._masked_operands(n, trial.gone)
        excerpted = excerpted_operands(n)

        def compacted(small_source: fx.Node) -> object:
            source = self.nodes[small_source.name]
            if source.op == "get_attr" and source not in excerpted:
                return fetch(trial.small, str(small_source.target))
            return self._compact(source, operands[source], trial.gone)

        try:
            pruned = tensors_in(_computed(trial.nodes[n.name], compacted))
            expected = tensors_in(self._compact(n, _computed(n, operands.__getitem__), trial.gone))
        except (RuntimeError, RaggedError, IndexError, ValueError, TypeError):  # sizes that don't fit: it differs
            return True
        exact = n.name not in self.inexact
        return any(not _agree(a, b, exact=exact) for a, b in zip(pruned, expected, strict=True))

    def _masked_operands(self, n: fx.Node, gone: Keep) -> dict[fx.Node, object]:
        """What the original's node reads, an excerpt of it where that does, with zeros where something is gone."""
        lengths = excerpt(n, self.structure, gone)
        excerpted = excerpted_operands(n)
        operands: dict[fx.Node, object] = {}
        for source in n.all_input_nodes:
            operand = self.env[source]
            if source in excerpted:
                operand = narrowed(operand, lengths)
            if not is_weight(source):
                operand = mask(operand, self.structure.values.get(source.name), self.structure, gone)
            operands[source] = operand
        return operands

    def _compact(self, node: fx.Node, result: object, gone: Keep) -> object:
        """The node's result, or each of several, without the coordinates that are gone."""

        def compacted(tensor: Tensor, value: Value) -> Tensor:
            return compact(tensor, self.structure.lying_of(value), gone)

        return map_labelled(compacted, result, self.structure.values.get(node.name))


def _computed(node: fx.Node, value_of: Callable[[fx.Node], object]) -> object:
    """The node's operation in float64."""

    def operand(source: fx.Node) -> Any:  # no fx argument, which is all that fx's own types foresee
        return doubled(value_of(source))

    args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
    result: object = node.target(*args, **kwargs)  # type: ignore[operator]
    return result


def _agree(a: Tensor, b: Tensor, *, exact: bool) -> bool:
    """Whether pruned and masked give the same; where that isn't `exact`, and of whole numbers, the shape alone."""
    if a.shape != b.shape:
        return False
    is_whole = not (a.is_floating_point() or a.is_complex())
    return not exact or is_whole or _near(a, b)


def _near(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding at the largest value's scale; the usual cases first, for these are many large tensors."""
    if torch.equal(a, b):
        return True
    difference = float(torch.linalg.vector_norm(a - b, torch.inf))
    largest = float(torch.linalg.vector_norm(b, torch.inf))
    if np.isfinite((difference, largest)).all():
        return difference <= TOLERANCE * max(1.0, largest)
    # where both hold the same infinities and NaNs, what is finite decides
    scale = max(1.0, float(b.abs().nan_to_num(0, 0, 0).max()))
    return torch.allclose(a, b, rtol=0, atol=TOLERANCE * scale, equal_nan=True)
