"""How far the order of removal goes: the plan that keeps at most what a budget allows, and as much of it as it can.

Costs of hypothetical plans are read off the labels (no network is built); predicted times come with the
meter that is handed in. The longest prefix needed is found by bisection, then chunks are given back, most
important first, while the budget still holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from ..budgets import Budget, Kind
from ..cost import FORMULAS, measure_cost
from ..errors import BudgetError
from ..records import Group, Groups, IntArray, Plan, Scores
from .groups import Structure
from .labels import Value
from .ranking import Chunk, RankingOptions, bundles_of, channels_per_unit, order_of_removal
from .surgery import Keep, compact_shape, removed_classes

Meter = Callable[[Keep], tuple[int, int]]
Cost = Callable[[Keep], float]


def make_meter(graph: fx.GraphModule, structure: Structure) -> Meter:
    """A function from removed classes to (MACs at batch 1, parameters) of the network that would remain."""
    dense = measure_cost(graph)
    nodes = [n for n in graph.graph.nodes if n.name in dense.by_node]
    named = dict(graph.named_parameters())
    read = [n for n in graph.graph.nodes if n.op == "get_attr" and n.target in named]
    parameters = list({id(named[str(n.target)]): n for n in read}.values())
    fixed = dense.parameters - sum(int(np.prod(structure.values[n.name].shape)) for n in parameters)
    macs = [_macs_of(structure, n, dense.by_node[n.name]) for n in nodes]
    sizes = [_elements_of(structure, n) for n in parameters]

    def meter(gone: Keep) -> tuple[int, int]:
        return sum(count(gone) for count in macs), sum(count(gone) for count in sizes) + fixed

    return meter


def _remembered(structure: Structure, nodes: Iterable[fx.Node], count: Callable[[Keep], int]) -> Callable[[Keep], int]:
    """The same function, asked once for each choice of classes that lie on the nodes."""
    lying = [classes.reshape(-1) for node in nodes for _, classes in structure.lying(node)]
    relevant = np.unique(np.concatenate([np.zeros(1, dtype=np.int64), *lying]))
    known: dict[bytes, int] = {}

    def remembered(gone: Keep) -> int:
        key = np.packbits(gone[relevant]).tobytes()
        if key not in known:
            known[key] = count(gone)
        return known[key]

    return remembered


def _macs_of(structure: Structure, node: fx.Node, dense: int) -> Callable[[Keep], int]:
    formula: Callable[[Any], int] = FORMULAS[_schema(node)]
    shadow = {n: _Shadow(n) for n in (node, *node.all_input_nodes)}
    call = _Call(fx.map_arg(node.args, lambda n: shadow.get(n, n)), shadow[node].meta)  # type: ignore[arg-type,return-value]

    def count(gone: Keep) -> int:
        for n, stand_in in shadow.items():
            stand_in.meta["val"] = _shrunk(structure, n, gone)
        return dense * formula(call) // max(1, formula(node))

    return _remembered(structure, shadow, count)


def _elements_of(structure: Structure, node: fx.Node) -> Callable[[Keep], int]:
    return _remembered(structure, (node,), lambda gone: int(np.prod(_sizes(structure, node, gone))))


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


def _sizes(structure: Structure, node: fx.Node, gone: Keep) -> tuple[int, ...]:
    return compact_shape(structure.values[node.name].shape, structure.lying(node), gone)


def _shrunk(structure: Structure, node: fx.Node, gone: Keep) -> object:
    value = structure.values[node.name]
    if not isinstance(value, Value):
        return node.meta["val"]
    return torch.empty(_sizes(structure, node, gone), device="meta")


def make_plan(
    graph: fx.GraphModule,
    structure: Structure,
    scores: Scores,
    budget: Budget,
    options: RankingOptions,
    *,
    cost: Cost | None = None,
) -> Plan:
    """The units that stay under the budget. Raises BudgetError, naming the least that can be asked for, where none do.

    Where units are coarse much less than the budget may stay: that meets it, and is the caller's to mention.
    `cost` of what stays is what the share is taken of; MACs or parameters, as the budget says, where not given.
    """
    meter = make_meter(graph, structure)
    price = cost or _counted(meter, budget.kind)
    nothing = removed_classes(structure, {})
    dense = price(nothing)
    chunks = order_of_removal(
        structure.groups.groups,
        scores,
        options,
        unit_cost=_unit_costs(structure, price) if options.per_cost else None,
        spans=structure.spans,
        coupled=structure.coupled,
    )
    limit = budget.share * dense

    def spent(removed: Sequence[Chunk]) -> float:
        return price(removed_classes(structure, kept_after(structure.groups, removed)))

    least = spent(chunks)
    if least > limit:
        raise BudgetError(f"budget '{budget}' can't be met: {_out_of_reach(budget, least / dense, structure)}")
    removed = _fill(_prefix(chunks, spent, limit), spent, limit)
    kept = kept_after(structure.groups, removed)
    return Plan(kept, meter(nothing)[0], meter(removed_classes(structure, kept))[0], str(budget))


def _counted(meter: Meter, kind: Kind) -> Cost:
    index = ("macs", "parameters").index(kind)
    return lambda gone: meter(gone)[index]


def least_share(
    graph: fx.GraphModule,
    structure: Structure,
    scores: Scores,
    kind: Kind,
    options: RankingOptions,
    *,
    cost: Cost | None = None,
) -> float:
    """The share of the dense network that remains when everything goes that may go."""
    price = cost or _counted(make_meter(graph, structure), kind)
    kept = everything_gone(structure, scores, options)
    return price(removed_classes(structure, kept)) / price(removed_classes(structure, {}))


def everything_gone(structure: Structure, scores: Scores, options: RankingOptions) -> dict[str, IntArray]:
    """What stays of each group when everything goes that may go."""
    chunks = order_of_removal(
        structure.groups.groups, scores, options, spans=structure.spans, coupled=structure.coupled
    )
    return kept_after(structure.groups, chunks)


def _out_of_reach(budget: Budget, least: float, structure: Structure) -> str:
    """What is left when all has gone, what to ask for instead, and the layers where nothing could go."""
    inner = [layer for layer in structure.groups.left_alone if layer.operation != "output"]
    held = "; ".join(f"{layer.layer} {layer.reason}" for layer in inner[:3])
    more = f" (left alone: {held}{f', and {len(inner) - 3} more layers' if len(inner) > 3 else ''})" if inner else ""
    if not structure.groups.groups:
        return f"no unit of this network can be removed{more}"
    smaller = "allow more kinds of units (--units), smaller multiples (--multiple) or less of each group (--least)"
    asked = np.ceil(least * 1000) / 1000
    if asked >= 1:  # which is no budget
        return f"the units that may go save none of the {budget.kind}{more}; {smaller}"
    return (
        f"with every unit gone that may go {least:.3f} of the {budget.kind} remain{more}; ask for at least "
        f"--budget '{budget.asking(float(asked))}', or {smaller}"
    )


def _unit_costs(structure: Structure, price: Cost) -> dict[str, float]:
    """What one channel of each group costs in the dense network, averaged over its group and those coupled with it.

    A head counts as its channels: scores are relative to a group's mean, so units made of many would look cheap.
    """
    dense = price(removed_classes(structure, {}))
    costs: dict[str, float] = {}
    for bundle in bundles_of(structure.groups.groups, structure.coupled):
        halves = {group.name: _half(group) for group in bundle}
        saved = dense - price(removed_classes(structure, halves))
        channels = sum(max(1, g.size - len(halves[g.name])) * channels_per_unit(g) for g in bundle)
        costs |= dict.fromkeys(halves, float(saved / channels / dense))
    return costs


def _half(group: Group) -> IntArray:
    """The first half of each row."""
    rows = group.rows if group.balanced else np.zeros(group.size, dtype=np.int64)
    members = [np.flatnonzero(rows == r) for r in np.unique(rows)]
    return np.concatenate([units[: max(1, len(units) // 2)] for units in members])


def _prefix(chunks: list[Chunk], cost: Callable[[Sequence[Chunk]], float], limit: float) -> list[Chunk]:
    """The shortest prefix whose removal meets the limit."""
    low, high = 0, len(chunks)
    while low < high:
        middle = (low + high) // 2
        if cost(chunks[:middle]) <= limit:
            high = middle
        else:
            low = middle + 1
    return chunks[:low]


def _fill(removed: list[Chunk], cost: Callable[[Sequence[Chunk]], float], limit: float) -> list[Chunk]:
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


def kept_after(groups: Groups, removed: Sequence[Chunk]) -> dict[str, IntArray]:
    """What stays of each group that loses any."""
    stays: dict[str, Keep] = {}
    for chunk in removed:
        for name, units in ((chunk.group, chunk.units), *chunk.also):
            if name not in stays:
                stays[name] = np.ones(groups[name].size, dtype=bool)
            stays[name][units] = False
    return {name: np.flatnonzero(keep) for name, keep in stays.items()}


def compose(first: Mapping[str, IntArray], second: Mapping[str, IntArray]) -> dict[str, IntArray]:
    """Two rounds of removal as one: the second's units are counted among those the first kept."""
    result = dict(first)
    for name, units in second.items():
        result[name] = first[name][units] if name in first else units
    return result
