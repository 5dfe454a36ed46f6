"""Layer-wise relevance propagation on a traced graph: images and targets in, relevance at named nodes out.

One forward pass without a tape, one pass back along the graph, in which each operation hands its relevance to
what it read. Knows no units and no scores. Relevance at a layer merged with a BatchNorm is that of the
merged output.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ..errors import InputError, ModelError
from .canonical import Canonical, Weighted, canonical, operation
from .composite import PRESETS, Composite
from .operations import by_taylor, rule_of
from .products import receivers
from .rules import fast, forward, plain
from .spreading import Call, OperationRule, Spec, signals

Observe = Callable[[fx.Node, Any, Mapping[fx.Node, Any]], None]


class UncoveredError(InputError):
    """The network holds operations that no LRP rule covers."""


@dataclass(frozen=True, slots=True)
class LrpOptions:
    """`start`: relevance 1 or the logit at the target; `target` `true` falls back to the predicted class where the
    label is negative. Operations that no rule covers are passed by input x gradient; with `strict` they raise, but
    for those that `accept` names (`aten.cumprod`). `fast` False takes zennit's own rule for every weighted layer."""

    composite: Composite = PRESETS["epsilon-plus-flat"]
    start: Literal["one", "logit"] = "one"
    target: Literal["true", "predicted"] = "true"
    accept: tuple[str, ...] = ()
    fast: bool = True
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """What one set of watched nodes asks for: the nodes to go back through and the values to keep for it."""

    watched: frozenset[str]
    through: frozenset[fx.Node]
    kept: frozenset[fx.Node]
    dropped: Mapping[fx.Node, tuple[fx.Node, ...]]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A graph made ready for LRP once; call it per batch."""

    graph: fx.GraphModule
    options: LrpOptions
    known: Canonical
    rules: Mapping[fx.Node, OperationRule]
    routes: dict[frozenset[str], Route] = field(default_factory=dict)

    def __call__(
        self,
        images: Tensor,
        targets: Tensor,
        nodes: Iterable[str],
        *,
        take: Callable[[str, Tensor], Tensor] | None = None,
        observe: Observe | None = None,
    ) -> dict[str, Tensor]:
        """Relevance at each named node, shaped as its output; `take` may reduce it as soon as it is there,
        which keeps memory small. A node that no relevance reaches has zeros."""
        route = self._route(frozenset(nodes))
        with torch.no_grad():
            values, saved = _forward(self, route, images)
            start = _start(values[self.known.output], targets, self.options)
            return _back(self, route, values, saved, start, take=take or _whole, observe=observe)

    def _route(self, watched: frozenset[str]) -> Route:
        if watched not in self.routes:
            self.routes[watched] = _plan_route(self, watched)
        return self.routes[watched]


def _whole(name: str, relevance: Tensor) -> Tensor:
    return relevance


def prepare(graph: fx.GraphModule, options: LrpOptions | None = None) -> Prepared:
    """Merges layers and finds every operation's rule. Raises UncoveredError where one has none, if `strict`."""
    options = options or LrpOptions()
    known = canonical(graph, options.composite)
    missing = [name for name in _uncovered(known, options.composite) if not _accepted(name, options)]
    if missing and options.strict:
        raise UncoveredError(
            f"no LRP rule covers {', '.join(missing)}; leave --strict out or accept them by name to pass them by input "
            f"x gradient (accept = {sorted({name.split(' ')[0] for name in missing})}), or choose another criterion"
        )
    taylor = OperationRule("inputs", by_taylor)
    inner = [n for n in known.data if n not in known.weighted and n.op == "call_function"]
    return Prepared(graph, options, known, {n: rule_of(n, known) or taylor for n in inner})


def node_relevance(
    graph: fx.GraphModule, images: Tensor, targets: Tensor, nodes: Iterable[str], options: LrpOptions | None = None
) -> dict[str, Tensor]:
    """One batch: images [N, C, H, W] and class indices [N] in, relevance at the named nodes out."""
    return prepare(graph, options)(images, targets, nodes)


def uncovered(graph: fx.GraphModule, options: LrpOptions | None = None) -> tuple[str, ...]:
    """Operations relevance would have to pass and no rule covers, as `aten.cumprod at layer 'blocks.0'`."""
    composite = (options or LrpOptions()).composite
    return _uncovered(canonical(graph, composite), composite)


def _uncovered(known: Canonical, composite: Composite) -> tuple[str, ...]:
    reached = _reached(known, composite)
    bare = [n for n in reached if n.op == "call_function" and n not in known.weighted and rule_of(n, known) is None]
    return tuple(dict.fromkeys(f"{_name(n)} at layer {n.meta.get('layer', '')!r}" for n in bare))


def _name(node: fx.Node) -> str:
    return f"aten.{operation(node)}"


def _accepted(name: str, options: LrpOptions) -> bool:
    return name in options.accept or name.split(" ")[0] in options.accept


def _reached(known: Canonical, composite: Composite) -> dict[fx.Node, None]:
    """The nodes between image and output that may be handed relevance."""
    reached: dict[fx.Node, None] = {known.output: None}
    for node in reversed(known.data):
        if node in reached:
            reached.update(dict.fromkeys(receivers(node, known, composite)))
    return {node: None for node in known.data if node in reached}


def _plan_route(prepared: Prepared, watched: frozenset[str]) -> Route:
    known = prepared.known
    names = {node.name: node for node in prepared.graph.graph.nodes}
    for name in watched:
        if name not in names:
            raise ModelError(f"the graph has no node {name!r}; name nodes of the graph that is scored")
    wanted: set[fx.Node] = set()
    through: set[fx.Node] = set()
    for node in known.data:
        below = any(n in wanted for n in signals(node, known))
        if below:
            through.add(node)
        if below or node.name in watched:
            wanted.add(node)
    through &= set(_reached(known, prepared.options.composite))
    kept = {known.output}
    for node in through:
        kept.update(_kept_for(prepared, node))
    return Route(watched, frozenset(through), frozenset(kept), _drops(prepared, kept))


def _kept_for(prepared: Prepared, node: fx.Node) -> list[fx.Node]:
    """The signals whose values the node's rule reads on the way back."""
    known = prepared.known
    if node in known.weighted:
        weighted = known.weighted[node]
        reads_output = prepared.options.fast and weighted.rule.name in ("epsilon", "norm", "gamma")
        # a wide output (an MLP's, a joint q, k, v) takes more memory than computing it again takes time
        narrow = node.meta["val"].numel() <= weighted.source.meta["val"].numel()
        return [weighted.source, node] if reads_output and narrow else [weighted.source]
    need = prepared.rules[node].need if node in prepared.rules else "shapes"
    if need == "shapes" or node in known.merged:
        return []
    if need == "unless passed" and prepared.options.composite.activation == "pass":
        return []
    return [*signals(node, known), node] if need == "both" else signals(node, known)


def _drops(prepared: Prepared, kept: set[fx.Node]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Which values are no longer needed once a node has run."""
    last: dict[fx.Node, fx.Node] = {}
    for node in prepared.graph.graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    drops: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for source, node in last.items():
        if source in prepared.known.data and source not in kept:
            drops[node] = (*drops.get(node, ()), source)
    return drops


def _forward(prepared: Prepared, route: Route, images: Tensor) -> tuple[dict[fx.Node, Any], dict[fx.Node, Any]]:
    """Runs the graph, merged layers as one; a value not kept becomes its shape. Also what rules saved themselves."""
    known = prepared.known
    saved: dict[fx.Node, Any] = {}
    values: dict[fx.Node, Any] = dict(known.constants)
    for node in prepared.graph.graph.nodes:
        if node.op == "placeholder":
            values[node] = images
        elif node.op == "call_function" and node not in values:
            own = prepared.rules[node].run if node in route.through and node in prepared.rules else None
            values[node] = _run(known, node, values) if own is None else None
            if own is not None:
                args, kwargs = _arguments(node, values)
                values[node], saved[node] = own(*args, **kwargs)
        for source in route.dropped.get(node, ()):
            values[source] = _spec(values[source])
    return values, saved


def _run(known: Canonical, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    if node in known.weighted:
        weighted = known.weighted[node]
        layer = weighted.layer
        return forward(layer, values[weighted.source], layer.weight, layer.bias)
    if node in known.merged:
        return values[node.args[0]]  # type: ignore[index]
    args, kwargs = _arguments(node, values)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _arguments(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    return fx.map_arg((node.args, node.kwargs), values.__getitem__)


def _spec(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Spec(value.shape, value.dtype, value.device)
    return type(value)(_spec(v) for v in value) if isinstance(value, (tuple, list)) else value


def _start(logits: Tensor, targets: Tensor, options: LrpOptions) -> Tensor:
    if logits.dim() != 2:
        raise ModelError(
            f"relevance starts at class scores [N, classes], the model returns {list(logits.shape)}; "
            "give a classifier or wrap the model so that it returns its scores"
        )
    predicted = logits.argmax(1)
    targets = targets.to(logits.device)
    chosen = predicted if options.target == "predicted" else torch.where(targets < 0, predicted, targets)
    start = torch.zeros_like(logits).scatter_(1, chosen[:, None], 1.0)
    return start * logits if options.start == "logit" else start


def _back(
    prepared: Prepared,
    route: Route,
    values: dict[fx.Node, Any],
    saved: dict[fx.Node, Any],
    start: Tensor,
    *,
    take: Callable[[str, Tensor], Tensor],
    observe: Observe | None,
) -> dict[str, Tensor]:
    known = prepared.known
    pending: dict[fx.Node, Any] = {known.output: start}
    taken: dict[str, Tensor] = {}
    for node in reversed(known.data):
        relevance = pending.pop(node, None)
        if node.name in route.watched:
            taken[node.name] = take(node.name, _zeros(values[node]) if relevance is None else relevance)
        if relevance is not None and node in route.through:
            given = _spread(prepared, node, relevance, values, saved.pop(node, None))
            for source, part in given:
                _add(pending, node, source, part)
            if observe is not None:
                observe(node, relevance, dict(given))
        values[node] = None
    return taken


def _spread(prepared: Prepared, node: fx.Node, relevance: Any, values: Mapping[fx.Node, Any], saved: Any) -> Any:
    known = prepared.known
    if node in known.weighted:
        weighted = known.weighted[node]
        return [(weighted.source, _through_layer(prepared, weighted, relevance, values[weighted.source], values[node]))]
    if node.target is operator.getitem:
        source, index = node.args
        whole: list[Any] = [None] * len(values[source])  # type: ignore[index]
        whole[index] = relevance  # type: ignore[index]
        return [(source, whole)]
    return prepared.rules[node].spread(Call(node, relevance, values, known, prepared.options.composite, saved))


def _through_layer(prepared: Prepared, weighted: Weighted, relevance: Tensor, x: Tensor, output: Any) -> Tensor:
    if not prepared.options.fast:
        return plain(weighted.layer, weighted.rule, x, relevance)
    known = output if isinstance(output, Tensor) else None
    return fast(weighted.layer, weighted.rule, x, relevance, output=known, nonnegative=weighted.nonnegative)


def _add(pending: dict[fx.Node, Any], node: fx.Node, source: fx.Node, part: Any) -> None:
    if part is None:
        return
    before = pending.get(source)
    if isinstance(part, list):
        pending[source] = part if before is None else [_sum(a, b) for a, b in zip(before, part, strict=True)]
    else:
        pending[source] = _sum(before, part)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _zeros(value: Any) -> Tensor:
    return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
