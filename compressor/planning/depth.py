"""Which residual branches the network misses least: a graph and images in, branches in the order they may go out.

One branch after the other goes, each time the one whose loss costs least for what it saves: the distance of the
network's answers on the images is measured with each branch gone, what came before it computed once. Nothing is
repaired here, so a loss is an upper bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import fx

from ..graph.cost import measure_cost
from ..graph.interface import output_names
from ..graph.lockstep import Values, at_inputs, drop_spent, last_uses, run_node
from ..graph.neighbours import is_stored
from ..placement import device_of
from ..pruning.branches import Branch, find_branches
from ..records import Dropped
from ..tasks import Task
from ..tensors import Inputs
from .likeness import Likeness

LARGEST = 0.4  # of the network's MACs; what holds more is no block but most of the network
LEAST_LOSS = 1e-6  # a branch that costs nothing is judged by what it saves

Progress = Callable[[float], None]


def order_of_branches(
    graph: fx.GraphModule,
    images: Sequence[Inputs],
    *,
    most: float,
    task: Task | None = None,
    progress: Progress = lambda share: None,
) -> tuple[Dropped, ...]:
    """Branches in the order they go, until `most` of the MACs went with them; batches are inputs [N, ...]."""
    cost = measure_cost(graph)

    def share_of(nodes: Iterable[fx.Node]) -> float:
        return sum(cost.by_node.get(node.name, 0) for node in nodes) / cost.macs

    branches = [branch for branch in find_branches(graph) if 0 < share_of(branch.nodes) <= LARGEST]
    trial = _Trial(graph, branches, images, task)
    order: list[Dropped] = []
    without: set[fx.Node] = set()
    loss = 0.0  # with all in `order` gone
    while share_of(without) < most:
        losses = trial.losses({dropped.name for dropped in order})
        # what lies in a branch that went is gone as well, and what holds one that went saves only the rest
        saved = {branch: share_of(set(branch.nodes) - without) for branch in branches}
        left = [branch for branch in branches if branch.name in losses and saved[branch] > 0]
        if not left:
            break
        best = min(left, key=lambda branch: max(losses[branch.name] - loss, LEAST_LOSS) / saved[branch])
        loss = losses[best.name]
        order.append(Dropped(best.name, _layer_of(best), saved[best], loss))
        without.update(best.nodes)
        progress(min(1.0, share_of(without) / most))
    return tuple(order)


def _layer_of(branch: Branch) -> str:
    """The module that holds the branch's first layer with a name."""
    return next((str(node.meta["layer"]) for node in branch.nodes if node.meta.get("layer")), branch.name)


def _nodes_of(branches: Iterable[Branch]) -> set[fx.Node]:
    """All that the branches need and nothing else does."""
    return set(itertools.chain.from_iterable(branch.nodes for branch in branches))


class _Trial:
    """The network's answers with some branches gone, beside those of the whole one."""

    def __init__(
        self, graph: fx.GraphModule, branches: Sequence[Branch], images: Sequence[Inputs], task: Task | None
    ) -> None:
        self.graph, self.branches, self.images = graph, branches, images
        self.nodes = [node for node in graph.graph.nodes if not is_stored(node)]
        self.last_use = last_uses(self.nodes)
        self.place = {node: place for place, node in enumerate(self.nodes)}
        whole = [self._finish(self._start(batch), 0, ()) for batch in images]
        self.likeness = Likeness.to(whole, output_names(graph), task)

    def losses(self, gone: Collection[str]) -> dict[str, float]:
        """The error with each branch gone that is still there, beside those in `gone`."""
        without = _nodes_of(self._named(gone))
        left = [branch for branch in self.branches if branch.name not in gone and branch.total not in without]
        answers: dict[str, list[Inputs]] = {branch.name: [] for branch in left}
        in_order = sorted(left, key=lambda branch: self.place[branch.nodes[0]])
        for batch in self.images:
            values, place = self._start(batch), 0
            for branch in in_order:  # what comes before a branch is computed once for all behind it
                begin = self.place[branch.nodes[0]]
                self._run(values, place, begin, gone)
                place = begin
                answers[branch.name].append(self._finish(dict(values), begin, {*gone, branch.name}))
        return {name: self.likeness.error(batches) for name, batches in answers.items()}

    def _named(self, names: Collection[str]) -> list[Branch]:
        return [branch for branch in self.branches if branch.name in names]

    def _start(self, images: Inputs) -> Values:
        return at_inputs(self.nodes, images, device_of(self.graph))

    def _finish(self, values: Values, begin: int, gone: Collection[str]) -> Inputs:
        self._run(values, begin, len(self.nodes) - 1, gone)
        answer: Inputs = fx.map_arg(self.nodes[-1].args[0], values.__getitem__)
        return answer

    @torch.no_grad()
    def _run(self, values: Values, begin: int, end: int, gone: Collection[str]) -> None:
        """Runs the nodes from place `begin` to before `end`; where a branch is gone, its sum is the stream."""
        lost = self._named(gone)
        streams = {branch.total: branch.stream for branch in lost}
        without = _nodes_of(lost)
        for place in range(begin, end):
            node = self.nodes[place]
            if node in streams:
                values[node] = values[streams[node]]
            elif node.op != "placeholder" and node not in without:
                values[node] = run_node(self.graph, node, values)
            drop_spent(values, (*node.all_input_nodes, node), self.last_use, place)
