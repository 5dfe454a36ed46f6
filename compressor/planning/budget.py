"""How far the order of removal goes: the plan that keeps at most what a budget allows, and as much of it as it can.

Costs of hypothetical plans are read off the labels (no network is built); predicted times come with the
meter that is handed in. The longest prefix needed is found by bisection, then chunks are given back, most
important first, while the budget still holds. Of several budgets all must hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from ..budgets import BYTES_PER_PARAMETER, Budget, Kind
from ..errors import BudgetError
from ..graph.cost import formula_of, measure_cost
from ..graph.neighbours import stored_nodes
from ..pruning import Structure
from ..pruning.compaction import compact_shape
from ..pruning.coupling import units_by_row
from ..pruning.labels import Value
from ..pruning.structure import Keep
from ..pruning.surgery import removed_classes
from ..records import Group, Groups, IntArray, LeftAlone, Plan, Scores
from .ranking import Chunk, RankingOptions, bundles_of, channels_per_unit, order_of_removal

Count = Callable[[Keep], int]
Meter = Callable[[Keep], tuple[int, int]]
Cost = Callable[[Keep], float]
Fits = Callable[[Sequence[Chunk]], bool]


def make_meter(graph: fx.GraphModule, structure: Structure) -> Meter:
    """A function from removed classes to (MACs at batch 1, parameters) of the network that would remain."""
    dense = measure_cost(graph)
    counted = [node for node in graph.graph.nodes if node.name in dense.by_node]
    parameters = _parameter_nodes(graph)
    sizes = [int(np.prod(structure.shape(node))) for node in parameters]
    unread = dense.parameters - sum(sizes)  # those no node reads stay whatever goes

    macs = _total([_macs_of(structure, node, dense.by_node[node.name]) for node in counted])
    elements = _total([_elements_of(structure, node) for node in parameters])
    return lambda gone: (macs(gone), elements(gone) + unread)


def _total(counts: Sequence[Count]) -> Count:
    """The sum of several functions."""
    return lambda gone: sum(count(gone) for count in counts)


def _parameter_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    """One node for each parameter that is read, however many read it."""
    named = dict(graph.named_parameters())
    node_of: dict[int, fx.Node] = {}
    for node in stored_nodes(graph):
        if node.target in named:
            node_of[id(named[str(node.target)])] = node
    return list(node_of.values())


def _remembered(structure: Structure, nodes: Iterable[fx.Node], count: Count) -> Count:
    """The same function, asked once for each choice of classes that lie on the nodes."""
    lying = [np.zeros(1, dtype=np.int64)]  # class 0 never goes; with it the key of nodes without classes is not empty
    for node in nodes:
        lying += [classes.reshape(-1) for _, classes in structure.lying(node)]
    relevant = np.unique(np.concatenate(lying))
    counts: dict[bytes, int] = {}

    def remembered(gone: Keep) -> int:
        key = np.packbits(gone[relevant]).tobytes()
        if key not in counts:
            counts[key] = count(gone)
        return counts[key]

    return remembered


def _macs_of(structure: Structure, node: fx.Node, dense: int) -> Count:
    """A function from removed classes to the node's MACs, `dense` before any goes."""
    formula: Callable[[Any], int] | None = formula_of(node)  # reads a node's arguments and shapes, which `_Call` has
    assert formula is not None  # it has MACs
    shadows = {used: _Shadow(used) for used in (node, *node.all_input_nodes)}
    args = fx.map_arg(node.args, lambda used: shadows.get(used, used))  # type: ignore[arg-type,return-value]
    call = _Call(args, shadows[node].meta)

    def count(gone: Keep) -> int:
        for used, shadow in shadows.items():
            shadow.meta["val"] = _shrunk(structure, used, gone)
        # a ratio, as formulas count the batch that was traced and `dense` is of one image
        return dense * formula(call) // max(1, formula(node))

    return _remembered(structure, shadows, count)


def _elements_of(structure: Structure, node: fx.Node) -> Count:
    """A function from removed classes to how many elements of a tensor remain."""
    return _remembered(structure, (node,), lambda gone: int(np.prod(_sizes(structure, node, gone))))


class _Shadow:
    """Stands for a node whose shape is hypothetical."""

    def __init__(self, node: fx.Node) -> None:
        self.meta = dict(node.meta)


@dataclass
class _Call:
    """Stands for a node whose inputs are shadows."""

    args: tuple[object, ...]
    meta: dict[str, object]


def _sizes(structure: Structure, node: fx.Node, gone: Keep) -> tuple[int, ...]:
    return compact_shape(structure.shape(node), structure.lying(node), gone)


def _shrunk(structure: Structure, node: fx.Node, gone: Keep) -> object:
    value = structure.values[node.name]
    if not isinstance(value, Value):
        return node.meta["val"]
    return torch.empty(_sizes(structure, node, gone), device="meta")  # a shape and no memory


def make_plan(
    graph: fx.GraphModule,
    structure: Structure,
    scores: Scores,
    budget: Budget,
    options: RankingOptions,
    *,
    cost: Cost | None = None,
    also: Sequence[Budget] = (),
) -> Plan:
    """The units that stay under the budget. Raises BudgetError, naming the least that can be asked for, where none do.

    Where units are coarse much less than the budget may stay: that meets it, and is the caller's to mention.
    `cost` of what stays is what the share is taken of; MACs or parameters, as the budget says, where not given. It also
    says what a unit saves, which the order goes by. `also` are counted budgets that must hold too.
    """
    meter = make_meter(graph, structure)
    price = cost or _counted(meter, budget.kind)
    whole = removed_classes(structure, {})  # of the network of which nothing went
    unit_cost = _unit_costs(structure, price) if options.per_cost else {}
    chunks = _order(structure, scores, options, unit_cost)
    budgets = (budget, *also)
    prices = (price, *(_counted(meter, other.kind) for other in also))
    shares = [_share_of(counted, counted(whole)) for counted in prices]

    def fits(removed: Sequence[Chunk]) -> bool:
        gone = _gone_after(structure, removed)
        return all(share(gone) <= asked.share for share, asked in zip(shares, budgets, strict=True))

    everything = _gone_after(structure, chunks)  # that may go
    for index, share in enumerate(shares):
        least = share(everything)
        if least > budgets[index].share:
            raise BudgetError(out_of_reach(budgets, index, least, structure))
    kept = kept_after(structure.groups, _fill(_prefix(chunks, fits), fits))
    dense_macs, _ = meter(whole)
    macs, _ = meter(removed_classes(structure, kept))
    return Plan(kept, dense_macs, macs, ", ".join(map(str, budgets)))


def _gone_after(structure: Structure, removed: Sequence[Chunk]) -> Keep:
    """[classes] what goes with the chunks."""
    return removed_classes(structure, kept_after(structure.groups, removed))


def _share_of(price: Cost, whole: float) -> Cost:
    """What stays as a share of the whole; 0 where that costs nothing.

    A quotient, for 29 of 100 are the share 0.29 exactly, while 0.29 * 100 is less than 29 in floating point.
    """
    return lambda gone: price(gone) / whole if whole else 0.0


def _counted(meter: Meter, kind: Kind) -> Cost:
    """MACs, parameters or bytes alone."""
    index, unit = _COUNTED[kind]
    return lambda gone: unit * meter(gone)[index]


# of what a meter gives, the place and what one counts
_COUNTED: Mapping[Kind, tuple[int, int]] = {"macs": (0, 1), "parameters": (1, 1), "size": (1, BYTES_PER_PARAMETER)}


def least_share(
    graph: fx.GraphModule,
    structure: Structure,
    scores: Scores,
    kind: Kind,
    options: RankingOptions,
    *,
    cost: Cost | None = None,
) -> float:
    """The share of the dense network's cost that remains when everything goes that may go; 1 where nothing may."""
    price = cost or _counted(make_meter(graph, structure), kind)
    kept = everything_gone(structure, scores, options)
    return price(removed_classes(structure, kept)) / price(removed_classes(structure, {}))


def everything_gone(structure: Structure, scores: Scores, options: RankingOptions) -> dict[str, IntArray]:
    """What stays of each group when everything goes that may go: indices of units, ascending."""
    return kept_after(structure.groups, _order(structure, scores, options))


def _order(
    structure: Structure, scores: Scores, options: RankingOptions, unit_cost: Mapping[str, float] | None = None
) -> list[Chunk]:
    """All chunks that may go, the first to go first; `unit_cost` is what a channel of each group costs."""
    return order_of_removal(
        structure.groups.groups,
        scores,
        options,
        unit_cost=unit_cost,
        spans=structure.spans,
        coupled=structure.coupled,
    )


def out_of_reach(
    budgets: Sequence[Budget], index: int, least: float, structure: Structure, *, spare: float = 0.0
) -> str:
    """What is left when all has gone, what to ask for instead, and the layers where nothing could go.

    `least` is the share of what `budgets[index]` counts; the others may stay as they are. What is named is `spare` of
    it more, where other scores may let less go.
    """
    budget = budgets[index]
    refused = f"budget '{budget}' can't be met:"
    more = _left_alone_text([layer for layer in structure.groups.left_alone if layer.operation != "output"])
    if not structure.groups.groups:
        return f"{refused} no unit of this network can be removed{more}"
    smaller = "allow more kinds of units (--units), smaller multiples (--multiple) or less of each group (--least)"
    if _rounded_up(least) >= 1:  # which is no budget
        return f"{refused} the units that may go save none of the {budget.kind}{more}; {smaller}"
    reachable = [str(other) for other in budgets]
    reachable[index] = budget.asking(min(_rounded_up(least * (1 + spare)), _MOST_SHARE))
    return (
        f"{refused} with every unit gone that may go {least:.3f} of the {budget.kind} remain{more}; ask for at least "
        f"--budget '{', '.join(reachable)}', or {smaller}"
    )


_MOST_SHARE = 0.999  # of a budget's figure, which is written in thousandths


def _rounded_up(share: float) -> float:
    """To thousandths, so that a budget of the figure that is named can be met."""
    return float(np.ceil(share * 1000) / 1000)


def _left_alone_text(layers: Sequence[LeftAlone]) -> str:
    """The first three and how many more; empty for none."""
    if not layers:
        return ""
    text = "; ".join(f"{layer.layer} {layer.reason}" for layer in layers[:3])
    if len(layers) > 3:
        text += f", and {len(layers) - 3} more layers"
    return f" (left alone: {text})"


def _unit_costs(structure: Structure, price: Cost) -> dict[str, float]:
    """What one channel of each group costs in the dense network, averaged over its group and those coupled with it.

    A head counts as its channels: scores are relative to a group's mean, so units made of many would look cheap.
    """
    dense = price(removed_classes(structure, {}))
    costs: dict[str, float] = {}
    for bundle in bundles_of(structure.groups.groups, structure.coupled):
        halves = {group.name: _half(group) for group in bundle}
        saved = dense - price(removed_classes(structure, halves))
        channels = sum(max(1, group.size - len(halves[group.name])) * channels_per_unit(group) for group in bundle)
        costs |= dict.fromkeys(halves, float(saved / channels / dense))
    return costs


def _half(group: Group) -> IntArray:
    """The first half of each row."""
    return np.concatenate([units[: max(1, len(units) // 2)] for units in units_by_row(group)])


def _prefix(chunks: list[Chunk], fits: Fits) -> list[Chunk]:
    """The shortest prefix whose removal meets the budgets; every cost falls with every chunk."""
    low, high = 0, len(chunks)
    while low < high:
        middle = (low + high) // 2
        if fits(chunks[:middle]):
            high = middle
        else:
            low = middle + 1
    return chunks[:low]


def _fill(removed: list[Chunk], fits: Fits) -> list[Chunk]:
    """Gives back what still fits: of each group's last removed chunk, the most important first."""
    refused: set[str] = set()
    while True:
        fewer = _with_one_less(removed, fits, refused)
        if fewer is None:
            return removed
        removed = fewer


def _with_one_less(removed: list[Chunk], fits: Fits, refused: set[str]) -> list[Chunk] | None:
    """Without the most important chunk that still fits; None where none does.

    Groups whose chunk does not fit are added to `refused` and not asked again: to give others back only costs more.
    """
    last = {chunk.group: index for index, chunk in enumerate(removed) if chunk.group not in refused}
    for index in sorted(last.values(), key=lambda index: -removed[index].key):
        fewer = removed[:index] + removed[index + 1 :]
        if fits(fewer):
            return fewer
        refused.add(removed[index].group)
    return None


def kept_after(groups: Groups, removed: Sequence[Chunk]) -> dict[str, IntArray]:
    """What stays of each group that loses any: indices of units, ascending."""
    stays: dict[str, Keep] = {}
    for chunk in removed:
        for name, units in ((chunk.group, chunk.units), *chunk.also):
            if name not in stays:
                stays[name] = np.ones(groups[name].size, dtype=bool)
            stays[name][units] = False
    return {name: np.flatnonzero(keep) for name, keep in stays.items()}


def compose(first: Mapping[str, IntArray], second: Mapping[str, IntArray]) -> dict[str, IntArray]:
    """Two rounds of removal as one: the second's units are counted among those the first kept."""
    composed = {**first, **second}
    for name in first.keys() & second.keys():
        composed[name] = first[name][second[name]]
    return composed
