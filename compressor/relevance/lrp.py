"""Layer-wise relevance propagation on a traced graph: images and targets in, relevance at named nodes out.

One forward pass without a tape, one pass back along the graph, in which each operation hands its relevance to
what it read. Knows no units and no scores. Relevance at a layer merged with a BatchNorm is that of the
merged output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, fx

from ..errors import InputError, ModelError
from ..tasks import Targets
from ..tensors import Inputs, as_tuple
from .canonical import Canonical, canonical, operation
from .composite import PRESETS, Composite
from .operations import by_taylor, rule_of
from .products import receivers
from .rules import fast, forward, plain
from .spreading import Call, Contribution, Need, OperationRule, Relevance, Spec, Value, called_with, signals
from .starts import Objective, require_logits, seed

# a node, its relevance and what it hands to each of its inputs
Observe = Callable[[fx.Node, Relevance, Mapping[fx.Node, Relevance | None]], None]
# a watched node's name and relevance in, what is to be returned in its place out
TakeNode = Callable[[str, Tensor], Tensor]


class UncoveredError(InputError):
    """The network holds operations that no LRP rule covers."""


@dataclass(frozen=True, slots=True)
class LrpOptions:
    """Where relevance starts, by which rules it goes back, and what becomes of operations that have none.

    - `composite`: the rule for each layer and operation.
    - `start`: how much relevance the target has, 1 or its logit.
    - `target`: the labelled class or the predicted one; `true` takes the predicted one where the label is negative.
    - `objective`: what relevance starts from where that is no class.
    - `strict`: operations that no rule covers raise UncoveredError; else they are passed by input x gradient.
    - `accept`: operations that pass all the same (`aten.cumprod`).
    - `fast`: False takes zennit's own rule for every weighted layer, slower and the same but for rounding.
    """

    composite: Composite = PRESETS["epsilon-plus-flat"]
    start: Literal["one", "logit"] = "one"
    target: Literal["true", "predicted"] = "true"
    accept: tuple[str, ...] = ()
    fast: bool = True
    strict: bool = False
    objective: Objective = field(default_factory=Objective, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Route:
    """What one set of watched nodes asks of a pass.

    - `watched`: names of the nodes whose relevance is wanted.
    - `through`: the nodes to go back through, all that read a watched one.
    - `kept`: the nodes whose values their rules read on the way back.
    - `dropped`: by node, the inputs of which only the shape is needed once it has run.
    """

    watched: frozenset[str]
    through: frozenset[fx.Node]
    kept: frozenset[fx.Node]
    dropped: Mapping[fx.Node, tuple[fx.Node, ...]]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A graph made ready for LRP once; call it per batch.

    `routes` holds the way back for every set of nodes that was asked for, since batches ask for the same ones.
    """

    graph: fx.GraphModule
    options: LrpOptions
    canon: Canonical
    rules: Mapping[fx.Node, OperationRule]
    routes: dict[frozenset[str], Route] = field(default_factory=dict)

    def __call__(
        self,
        images: Inputs,
        targets: Targets,
        nodes: Iterable[str],
        *,
        take: TakeNode | None = None,
        observe: Observe | None = None,
    ) -> dict[str, Tensor]:
        """Relevance at each named node, of its output's shape; zeros at a node that none reaches.

        `images` are [N, ...] of every input, `targets` class indices [N] or what the objective's task takes.

        `take` may reduce a node's relevance as soon as it is there, which keeps memory small; `observe` is told what
        every node on the way hands on.

        Raises ModelError for a name that is not the graph's, and for an answer that the objective can't start from.
        """
        route = self._route(frozenset(nodes))
        with torch.no_grad():
            values, saved = _forward(self, route, images)
            starts = _starts(self.canon, values, targets, self.options)
            return _back(self, route, values, saved, starts, take=take or _unreduced, observe=observe)

    def _route(self, watched: frozenset[str]) -> Route:
        if watched not in self.routes:
            self.routes[watched] = _plan_route(self, watched)
        return self.routes[watched]


def _unreduced(name: str, relevance: Tensor) -> Tensor:
    return relevance


def prepare(graph: fx.GraphModule, options: LrpOptions | None = None) -> Prepared:
    """Merges layers and finds every operation's rule. Raises UncoveredError where one has none, if `strict`."""
    options = options or LrpOptions()
    canon = canonical(graph, options.composite, classifies=options.objective.classifies)
    if options.strict:
        _require_covered(canon, options)
    taylor = OperationRule("inputs", by_taylor)
    rules = {node: rule_of(node, canon) or taylor for node in _operations(canon, canon.data)}
    return Prepared(graph, options, canon, rules)


def _operations(canon: Canonical, nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """Those of the nodes that are neither the images nor a weighted layer."""
    for node in nodes:
        if node.op == "call_function" and node not in canon.weighted:
            yield node


def _require_covered(canon: Canonical, options: LrpOptions) -> None:
    """Raises UncoveredError naming the operations that have no rule and are not accepted."""
    missing = [name for name in _uncovered(canon, options.composite) if not _is_accepted(name, options)]
    if missing:
        operations = sorted({name.split(" ")[0] for name in missing})
        raise UncoveredError(
            f"no LRP rule covers {', '.join(missing)}; leave --strict out or accept them by name to pass them by input "
            f"x gradient (accept = {operations}), or choose another criterion"
        )


def node_relevance(
    graph: fx.GraphModule, images: Inputs, targets: Targets, nodes: Iterable[str], options: LrpOptions | None = None
) -> dict[str, Tensor]:
    """One batch: inputs [N, ...] and class indices [N] (or a task's targets) in, relevance at the named nodes out."""
    return prepare(graph, options)(images, targets, nodes)


def uncovered(graph: fx.GraphModule, options: LrpOptions | None = None) -> tuple[str, ...]:
    """Operations relevance would have to pass and no rule covers, as `aten.cumprod at layer 'blocks.0'`."""
    options = options or LrpOptions()
    canon = canonical(graph, options.composite, classifies=options.objective.classifies)
    return _uncovered(canon, options.composite)


def _uncovered(canon: Canonical, composite: Composite) -> tuple[str, ...]:
    names: dict[str, None] = {}  # each once, in order
    for node in _operations(canon, _reached(canon, composite)):
        if rule_of(node, canon) is None:
            names[f"{_name(node)} at layer {node.meta.get('layer', '')!r}"] = None
    return tuple(names)


def _name(node: fx.Node) -> str:
    return f"aten.{operation(node)}"


def _is_accepted(name: str, options: LrpOptions) -> bool:
    """True where an operation is accepted, at one layer (`aten.cumprod at layer 'blocks.0'`) or everywhere."""
    return name in options.accept or name.split(" ")[0] in options.accept


def _reached(canon: Canonical, composite: Composite) -> dict[fx.Node, None]:
    """The nodes between image and output that may be handed relevance."""
    reached = set(canon.outputs)
    for node in reversed(canon.data):
        if node in reached:
            reached.update(receivers(node, canon, composite))
    return {node: None for node in canon.data if node in reached}


def _plan_route(prepared: Prepared, watched: frozenset[str]) -> Route:
    canon = prepared.canon
    absent = sorted(watched - {node.name for node in prepared.graph.graph.nodes})
    if absent:
        raise ModelError(f"the graph has no node {absent[0]!r}; name nodes of the graph that is scored")

    through = _behind(watched, canon) & set(_reached(canon, prepared.options.composite))
    kept = set(canon.outputs)
    for node in through:
        kept.update(_kept_for(prepared, node))
    return Route(watched, frozenset(through), frozenset(kept), _drops(prepared, kept))


def _behind(watched: frozenset[str], canon: Canonical) -> set[fx.Node]:
    """The nodes that read a watched one, directly or through others: relevance comes to it through these."""
    on_the_way: set[fx.Node] = set()  # the same and the watched ones themselves
    behind: set[fx.Node] = set()
    for node in canon.data:
        if not on_the_way.isdisjoint(signals(node, canon)):
            behind.add(node)
        if node in behind or node.name in watched:
            on_the_way.add(node)
    return behind


def _kept_for(prepared: Prepared, node: fx.Node) -> list[fx.Node]:
    """The nodes whose values the node's rule reads on the way back."""
    canon = prepared.canon
    if node in canon.weighted:
        return _kept_for_layer(prepared, node)
    if node in canon.merged or node not in prepared.rules:
        return []
    inputs = signals(node, canon)
    is_passed = prepared.options.composite.activation == "pass"
    kept_by_need: dict[Need, list[fx.Node]] = {
        "shapes": [],
        "inputs": inputs,
        "both": [*inputs, node],
        "unless passed": [] if is_passed else inputs,
    }
    return kept_by_need[prepared.rules[node].need]


def _kept_for_layer(prepared: Prepared, node: fx.Node) -> list[fx.Node]:
    weighted = prepared.canon.weighted[node]
    reads_output = prepared.options.fast and weighted.rule.name in ("epsilon", "norm", "gamma")
    # a wide output (an MLP's, a joint q, k, v) takes more memory than computing it again takes time
    is_narrow = node.meta["val"].numel() <= weighted.source.meta["val"].numel()
    if reads_output and is_narrow:
        return [weighted.source, node]
    return [weighted.source]


def _drops(prepared: Prepared, kept: set[fx.Node]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Which values are no longer needed once a node has run."""
    last_reader: dict[fx.Node, fx.Node] = {}
    for node in prepared.graph.graph.nodes:
        for source in node.all_input_nodes:
            last_reader[source] = node

    drops: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for source, reader in last_reader.items():
        if source in prepared.canon.data and source not in kept:
            drops[reader] = (*drops.get(reader, ()), source)
    return drops


def _forward(prepared: Prepared, route: Route, images: Inputs) -> tuple[dict[fx.Node, Value], dict[fx.Node, Tensor]]:
    """The value of every node, and what rules saved of their own passes; merged layers run as one.

    A value that the way back does not read becomes a `Spec` (its shape) as soon as all its readers have run.
    """
    saved: dict[fx.Node, Tensor] = {}
    values: dict[fx.Node, Value] = dict(prepared.canon.constants)
    # rules that run their operation themselves, as they need more of it than its output
    with_own_pass = {node: rule.run for node, rule in prepared.rules.items() if rule.run and node in route.through}
    tensors = iter(as_tuple(images))
    for node in prepared.graph.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(tensors)
        elif node in with_own_pass:
            args, kwargs = called_with(node, values.__getitem__)
            values[node], saved[node] = with_own_pass[node](*args, **kwargs)
        elif node.op == "call_function" and node not in values:
            values[node] = _run(prepared.canon, node, values)
        for source in route.dropped.get(node, ()):
            values[source] = _spec(values[source])
    return values, saved


def _run(canon: Canonical, node: fx.Node, values: Mapping[fx.Node, Value]) -> Value:
    if node in canon.weighted:
        weighted = canon.weighted[node]
        layer = weighted.layer
        return forward(layer, _tensor(values[weighted.source]), layer.weight, layer.bias)
    args, kwargs = called_with(node, values.__getitem__)
    if node in canon.merged:  # the layer next to it has computed the norm too
        return _tensor(args[0])
    output: Value = node.target(*args, **kwargs)  # type: ignore[operator]
    return output


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def _spec(value: Value) -> Value:
    """The value without its numbers: tensors become a `Spec`, several tensors as many, sizes stay."""
    match value:
        case Tensor():
            return Spec(value.shape, value.dtype, value.device)
        case tuple() | list():
            return [_spec(element) for element in value]
        case _:
            return value


def _starts(
    canon: Canonical, values: Mapping[fx.Node, Value], targets: Targets, options: LrpOptions
) -> dict[fx.Node, Relevance]:
    """The relevance that each output starts with, of the output's shape.

    Of class scores [N, classes] it is zero but at each image's class.
    """
    answer = [_tensor(values[node]) for node in canon.outputs]
    if options.objective.classifies:
        logits = require_logits(answer)
        assert isinstance(targets, Tensor)
        return {canon.outputs[0]: seed(logits, _classes(logits, targets, options), options.start)}

    seeds = options.objective.seeds(answer, targets, options.start)
    of_the_image = [(node, start) for node, start in zip(canon.outputs, seeds, strict=True) if node in canon.data]
    starts: dict[fx.Node, Relevance] = {}
    _hand_over(starts, of_the_image)  # an output may be answered with twice
    return starts


def _classes(logits: Tensor, targets: Tensor, options: LrpOptions) -> Tensor:
    """[N] the labelled class where there is a label and it is asked for, else the predicted one."""
    predicted = logits.argmax(1)
    if options.target != "true":
        return predicted
    targets = targets.to(logits.device)
    return torch.where(targets < 0, predicted, targets)


def _back(
    prepared: Prepared,
    route: Route,
    values: dict[fx.Node, Value],
    saved: dict[fx.Node, Tensor],
    starts: Mapping[fx.Node, Relevance],
    *,
    take: TakeNode,
    observe: Observe | None,
) -> dict[str, Tensor]:
    """Relevance at the watched nodes, gone back to from the outputs, and only as far as the route asks.

    A node's turn comes once all that read it have handed theirs over. `values` is emptied on the way.
    """
    canon = prepared.canon
    pending: dict[fx.Node, Relevance] = dict(starts)  # what each node was handed so far
    taken: dict[str, Tensor] = {}
    for node in reversed(canon.data):
        relevance = pending.pop(node, None)
        if node.name in route.watched:
            # not bound to a name: what `take` lets go of must be free before the next node
            taken[node.name] = take(node.name, _or_zeros(relevance, values[node]))
        if relevance is not None and node in route.through:
            composite = prepared.options.composite
            contributions = _spread(prepared, Call(node, relevance, values, canon, composite, saved.pop(node, None)))
            _hand_over(pending, contributions)
            if observe is not None:
                observe(node, relevance, dict(contributions))
        del values[node]  # frees its memory: whoever reads a value lies behind it and is done
    return taken


def _spread(prepared: Prepared, call: Call) -> Sequence[Contribution]:
    """What the node hands to its inputs, as (input, relevance) by its rule."""
    if call.node in prepared.canon.weighted:
        return [_through_layer(prepared, call)]
    return prepared.rules[call.node].spread(call)


def _through_layer(prepared: Prepared, call: Call) -> Contribution:
    weighted = prepared.canon.weighted[call.node]
    layer, rule, source = weighted.layer, weighted.rule, weighted.source
    x, output = call.tensor(source), call.spec(call.node)
    if not prepared.options.fast:
        return source, plain(layer, rule, x, call.relevance)
    kept_output = output if isinstance(output, Tensor) else None
    return source, fast(layer, rule, x, call.relevance, output=kept_output, nonnegative=weighted.nonnegative)


def _hand_over(pending: dict[fx.Node, Relevance], contributions: Sequence[Contribution]) -> None:
    """Adds what a node hands to its inputs to what others have handed them."""
    for source, contribution in contributions:
        if contribution is not None:
            pending[source] = _added(pending[source], contribution) if source in pending else contribution


def _added(before: Relevance, contribution: Relevance) -> Relevance:
    """The sum; of an input with several outputs output by output."""
    if isinstance(before, Tensor):
        return before + _tensor(contribution)
    return [_sum(a, b) for a, b in zip(before, contribution, strict=True)]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None:
        return b
    return a if b is None else a + b


def _or_zeros(relevance: Relevance | None, value: Value) -> Tensor:
    """A node's relevance; zeros shaped as its value where none reached it."""
    if relevance is not None:
        return _tensor(relevance)
    assert isinstance(value, (Tensor, Spec))
    return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
