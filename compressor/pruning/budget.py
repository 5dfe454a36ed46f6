"""How far the order of removal goes: the plan that meets a budget, within 2 % from below or refused.

Costs of hypothetical plans are read off the labels (no network is built). The longest prefix needed is
found by bisection, then chunks are given back, most important first, while the budget still holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx

from ..cost import FORMULAS, measure_cost
from ..errors import BudgetError, RecipeError
from ..records import Groups, IntArray, Plan, Scores
from .groups import Structure
from .labels import Value
from .ranking import Chunk, RankingOptions, order_of_removal
from .surgery import Keep, compact_shape, removed_classes

SLACK = 0.02


@dataclass(frozen=True, slots=True)
class Budget:
    """`share` of the dense network's MACs or parameters that may stay, less at most `slack` of it."""

    kind: Literal["macs", "parameters"]
    share: float
    slack: float = SLACK

    def __str__(self) -> str:
        return f"{self.kind} {self.share:g}"


def parse_budget(text: str) -> Budget:
    """`macs 0.5` -> half the MACs stay. Raises RecipeError for anything else."""
    kind, _, share = text.strip().partition(" ")
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if kind not in ("macs", "parameters") or not 0 < value < 1:
        raise RecipeError(
            f"budget '{text}' is not understood; write 'macs S' or 'parameters S' with the share S that stays, "
            "0 < S < 1, such as 'macs 0.5'"
        )
    return Budget(kind, value)  # type: ignore[arg-type]


Meter = Callable[[Keep], tuple[int, int]]


def make_meter(graph: fx.GraphModule, structure: Structure) -> Meter:
    """A function from removed classes to (MACs at batch 1, parameters) of the network that would remain."""
    dense = measure_cost(graph)
    counted = [n for n in graph.graph.nodes if n.name in dense.by_node]
    shadow = {n: _Shadow(n) for node in counted for n in (node, *node.all_input_nodes)}
    parameters = {
        id(p): n for n in graph.graph.nodes if n.op == "get_attr" for p in [_parameter(graph, n)] if p is not None
    }
    fixed = dense.parameters - sum(int(np.prod(structure.values[n.name].shape)) for n in parameters.values())

    def meter(gone: Keep) -> tuple[int, int]:
        for node, stand_in in shadow.items():
            stand_in.meta["val"] = _shrunk(structure, node, gone)
        macs = 0
        for node in counted:
            args = fx.map_arg(node.args, lambda n: shadow.get(n, n))  # type: ignore[arg-type,return-value]
            formula: Callable[[Any], int] = FORMULAS[_schema(node)]
            view = _Call(args, shadow[node].meta)
            macs += dense.by_node[node.name] * formula(view) // max(1, formula(node))
        left = sum(int(np.prod(_sizes(structure, n, gone))) for n in parameters.values())
        return macs, left + fixed

    return meter


class _Shadow:
    """Stands for a node whose shape is hypothetical."""

    def __init__(self, node: fx.Node) -> None:
        self.meta = dict(node.meta)


@dataclass
class _Call:
    args: tuple[object, ...]
    meta: dict[str, object]


def _schema(node: fx.Node) -> str:
    return str(node.target._schema.name)  # type: ignore[union-attr]


def _parameter(graph: fx.GraphModule, node: fx.Node) -> Tensor | None:
    return dict(graph.named_parameters()).get(str(node.target))


def _sizes(structure: Structure, node: fx.Node, gone: Keep) -> tuple[int, ...]:
    return compact_shape(structure.values[node.name].shape, structure.lying(node), gone)


def _shrunk(structure: Structure, node: fx.Node, gone: Keep) -> object:
    value = structure.values[node.name]
    if not isinstance(value, Value):
        return node.meta["val"]
    return torch.empty(_sizes(structure, node, gone), device="meta")


def make_plan(
    graph: fx.GraphModule, structure: Structure, scores: Scores, budget: Budget, options: RankingOptions
) -> Plan:
    """The units that stay under the budget. Raises BudgetError naming the nearest reachable figure."""
    meter = make_meter(graph, structure)
    index = 0 if budget.kind == "macs" else 1
    nothing = np.zeros(len(structure.classes.of), dtype=bool)
    dense = meter(nothing)
    chunks = order_of_removal(
        structure.groups.groups,
        scores,
        options,
        unit_cost=_unit_costs(structure, meter, index) if options.per_cost else None,
        spans=structure.spans,
    )
    limit = budget.share * dense[index]

    def cost(removed: Sequence[Chunk]) -> int:
        return meter(removed_classes(structure, _kept(structure.groups, removed)))[index]

    least = cost(chunks)
    if least > limit:
        raise BudgetError(
            f"budget '{budget}' can't be met: with every removable unit gone {least / dense[index]:.3f} of the "
            f"{budget.kind} remain; ask for at least '{budget.kind} {_up(least / dense[index])}', allow more kinds of "
            "units, or lower the share of each group that always stays"
        )
    removed = _fill(_prefix(chunks, cost, limit), cost, limit)
    reached = cost(removed)
    if reached < (1 - budget.slack) * limit:
        raise BudgetError(
            f"budget '{budget}' can't be met within {budget.slack:.0%}: the nearest plan below it keeps "
            f"{reached / dense[index]:.3f} of the {budget.kind}; ask for '{budget.kind} {_up(reached / dense[index])}' "
            "or round kept counts to a smaller multiple"
        )
    kept = _kept(structure.groups, removed)
    return Plan(kept, dense[0], meter(removed_classes(structure, kept))[0], str(budget))


def least_share(
    graph: fx.GraphModule,
    structure: Structure,
    scores: Scores,
    kind: Literal["macs", "parameters"],
    options: RankingOptions,
) -> float:
    """The share of the dense network that remains when everything goes that may go."""
    meter, index = make_meter(graph, structure), ("macs", "parameters").index(kind)
    everything = order_of_removal(structure.groups.groups, scores, options, spans=structure.spans)
    kept = _kept(structure.groups, everything)
    return meter(removed_classes(structure, kept))[index] / meter(removed_classes(structure, {}))[index]


def _up(share: float) -> str:
    return f"{np.ceil(share * 1000) / 1000:.3f}"


def _unit_costs(structure: Structure, meter: Meter, index: int) -> dict[str, float]:
    """What one channel of each group costs in the dense network, averaged over its group.

    A head counts as its channels: scores are relative to a group's mean, so units made of many would look cheap.
    """
    dense = meter(np.zeros(len(structure.classes.of), dtype=bool))[index]
    costs: dict[str, float] = {}
    for group in structure.groups.groups:
        rows = group.rows if group.balanced else np.zeros(group.size, dtype=np.int64)
        half = np.concatenate(
            [np.flatnonzero(rows == r)[: max(1, int((rows == r).sum()) // 2)] for r in np.unique(rows)]
        )
        saved = dense - meter(removed_classes(structure, {group.name: half}))[index]
        channels = np.mean([np.count_nonzero(site.units >= 0) / len(np.unique(site.units)) for site in group.sites])
        costs[group.name] = float(saved / max(1, group.size - len(half)) / channels / dense)
    return costs


def _prefix(chunks: list[Chunk], cost: Callable[[Sequence[Chunk]], int], limit: float) -> list[Chunk]:
    """The shortest prefix whose removal meets the limit."""
    low, high = 0, len(chunks)
    while low < high:
        middle = (low + high) // 2
        if cost(chunks[:middle]) <= limit:
            high = middle
        else:
            low = middle + 1
    return chunks[:low]


def _fill(removed: list[Chunk], cost: Callable[[Sequence[Chunk]], int], limit: float) -> list[Chunk]:
    """Gives back what still fits: of each group's last removed chunk, the most important first."""
    refused: set[str] = set()
    while True:
        last = {c.group: i for i, c in enumerate(removed)}
        candidates = sorted((i for g, i in last.items() if g not in refused), key=lambda i: -removed[i].key)
        for i in candidates:
            without = removed[:i] + removed[i + 1 :]
            if cost(without) <= limit:
                removed = without
                break
            refused.add(removed[i].group)
        else:
            return removed


def _kept(groups: Groups, removed: Sequence[Chunk]) -> dict[str, IntArray]:
    gone: dict[str, list[IntArray]] = {}
    for chunk in removed:
        gone.setdefault(chunk.group, []).append(chunk.units)
    return {name: np.setdiff1d(np.arange(groups[name].size), np.concatenate(units)) for name, units in gone.items()}


def compose(first: Mapping[str, IntArray], second: Mapping[str, IntArray]) -> dict[str, IntArray]:
    """Two rounds of removal as one: the second's units are counted among those the first kept."""
    result = dict(first)
    for name, units in second.items():
        result[name] = first[name][units] if name in first else units
    return result
