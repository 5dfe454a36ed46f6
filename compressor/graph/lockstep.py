"""Two graphs with the same nodes, but for branches that one lost, advanced together over all batches.

Each node is run once per batch.

Between two stops only values still needed are held; past a byte limit they wait in files. Values that the
pruned graph cannot have changed are computed once and shared. Knows nothing of what is done at a stop.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..placement import device_of, to_device
from ..tensors import Inputs, as_tuple
from .interface import nodes_by_name
from .neighbours import computed_operands
from .tracing import fetch

Values = dict[fx.Node, Any]  # tensors, sizes, tuples of them: what each node gave
Batch = Tensor | Sequence[Any]  # inputs [N, ...] alone, or (inputs, targets)

_LEAST_FILE_BYTES = 4096  # what is smaller than a page stays in memory whatever the limit is


def images_of(batch: Batch) -> Inputs:
    """The inputs [N, ...] of a batch that is either one tensor or (inputs, targets)."""
    if isinstance(batch, Tensor):
        return batch
    inputs: Inputs = batch[0]
    return inputs


def at_inputs(nodes: Iterable[fx.Node], inputs: Inputs, device: torch.device) -> Values:
    """The inputs by the placeholders among the nodes, on that device."""
    placeholders = [node for node in nodes if node.op == "placeholder"]
    return {node: to_device(tensor, device) for node, tensor in zip(placeholders, as_tuple(inputs), strict=True)}


def run_node(graph: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """One node's value; parameters and buffers are read as they are now."""

    def value_of(source: fx.Node) -> Any:
        return attribute(graph, source) if source.op == "get_attr" else values[source]

    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return graph.get_submodule(str(node.target))(*args, **kwargs)


def last_uses(
    order: Sequence[fx.Node], extra_uses: Mapping[fx.Node, Sequence[fx.Node]] = MappingProxyType({})
) -> dict[fx.Node, int]:
    """The place in `order` of the last node that needs each value; `extra_uses` are needed besides a node's inputs."""
    last_use: dict[fx.Node, int] = {}
    for place, node in enumerate(order):
        last_use |= dict.fromkeys((*node.all_input_nodes, *extra_uses.get(node, ())), place)
    return last_use


def drop_spent(values: Values, nodes: Iterable[fx.Node], last_use: Mapping[fx.Node, int], place: int) -> None:
    """Drops those of the nodes' values that no node behind a place of the order needs."""
    for node in nodes:
        if last_use.get(node, -1) <= place:
            values.pop(node, None)


@dataclass(frozen=True, slots=True)
class Reread:
    """The inputs of batches, made anew whenever they are gone through: they are never all in memory."""

    batches: Iterable[Batch]

    def __iter__(self) -> Iterator[Inputs]:
        return map(images_of, self.batches)


def inputs_of(batches: Iterable[Batch]) -> Iterable[Inputs]:
    """The inputs alone, as often as they are gone through; held where the batches come only once."""
    return list(map(images_of, batches)) if isinstance(batches, Iterator) else Reread(batches)


def attribute(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """The parameter or buffer that a get_attr node names, as it is now."""
    return fetch(graph, str(node.target))


def changed_nodes(dense: fx.GraphModule, pruned: fx.GraphModule) -> set[fx.Node]:
    """The dense graph's nodes whose values may differ in the pruned one: gone, cut, rewritten, fed by such a node."""
    twins = nodes_by_name(pruned)
    changed: set[fx.Node] = set()
    for node in dense.graph.nodes:
        twin = twins.get(node.name)
        if twin is None or _differs(dense, node, pruned, twin) or not changed.isdisjoint(node.all_input_nodes):
            changed.add(node)
    return changed


def _differs(dense: fx.GraphModule, node: fx.Node, pruned: fx.GraphModule, twin: fx.Node) -> bool:
    """Whether a node reads another tensor's shape, runs another operation or is given other arguments than its twin."""
    if node.op == "get_attr":
        return attribute(dense, node).shape != attribute(pruned, twin).shape
    return node.target is not twin.target or not _same((node.args, node.kwargs), (twin.args, twin.kwargs))


def _same(ours: object, theirs: object) -> bool:
    """Whether two trees of arguments say the same: nodes by their names, numbers and the like by value and kind."""
    match ours, theirs:
        case fx.Node(), fx.Node():
            return ours.name == theirs.name
        case ((tuple() | list()), (tuple() | list())):
            return len(ours) == len(theirs) and all(map(_same, ours, theirs))
        case Mapping(), Mapping():
            return ours.keys() == theirs.keys() and all(_same(ours[key], theirs[key]) for key in ours)
    both_nan = ours != ours and theirs != theirs  # the same number, which Python takes for another
    return type(ours) is type(theirs) and bool(ours == theirs or both_nan)


@dataclass(slots=True)
class _File:
    """A tensor that waits on disk."""

    path: Path
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device
    _tensor: Tensor | None = None  # once it is read

    def read(self) -> Tensor:
        """The tensor, back on the device it came from, the same one each time; its file is gone afterwards."""
        if self._tensor is None:
            raw = torch.from_numpy(np.fromfile(self.path, dtype=np.uint8))
            self.path.unlink()
            self._tensor = raw.view(self.dtype).reshape(self.shape).to(self.device)
        return self._tensor


@dataclass(slots=True)
class Lockstep:
    """Where both graphs stand: `position` in `order`, and for each batch the live values of both.

    `order` and `changed` hold nodes of the dense graph, and so do the keys of all values. `extra_uses` says
    which values a node needs besides its inputs. To be used in `with`, which takes the files away at the end.
    """

    dense: fx.GraphModule
    pruned: fx.GraphModule
    order: Sequence[fx.Node]
    batches: Iterable[Inputs]
    changed: set[fx.Node]
    extra_uses: Mapping[fx.Node, Sequence[fx.Node]] = field(default_factory=dict)
    limit_bytes: int = 2 << 30
    position: int = 0
    twins: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _waiting: list[tuple[Values, Values]] = field(default_factory=list)  # (dense, pruned) of each batch
    _bytes_in_memory: int = 0
    _files_written: int = 0
    _folder: tempfile.TemporaryDirectory[str] | None = None
    _last_use: dict[fx.Node, int] = field(default_factory=dict)
    _dense_nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)  # the dense node of each twin

    def __post_init__(self) -> None:
        pruned_nodes = nodes_by_name(self.pruned)
        self.twins = {node: pruned_nodes[node.name] for node in self.dense.graph.nodes if node.name in pruned_nodes}
        self._dense_nodes = {twin: node for node, twin in self.twins.items()}
        self._last_use = last_uses(self.order, self.extra_uses)

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def twin(self, node: fx.Node) -> fx.Node:
        """The pruned graph's node of the same name."""
        return self.twins[node]

    @torch.no_grad()
    def advance(self, stop: int, visit: Callable[[int, Values, Values], None]) -> None:
        """Runs every batch up to, not into, `order[stop]`, and shows both graphs' live values, keyed by dense node."""
        waiting = self._waiting
        self._waiting, self._bytes_in_memory = [], 0
        is_at_start = not waiting and self.position == 0
        batches = self._fresh() if is_at_start else self._read(waiting)
        for batch, (dense, pruned) in enumerate(batches):
            for index in range(self.position, stop):
                self._step(index, dense, pruned)
            visit(batch, dense, pruned)
            self._put_aside(dense, pruned)
        self.position = stop

    def _fresh(self) -> Iterable[tuple[Values, Values]]:
        """Every batch with its inputs as the only values of either graph."""
        device = device_of(self.dense)
        for batch in self.batches:
            values = at_inputs(self.dense.graph.nodes, batch, device)
            yield values, dict(values)

    def _read(self, waiting: list[tuple[Values, Values]]) -> Iterable[tuple[Values, Values]]:
        """The batches one by one, what waits in files read; a value both graphs share stays one tensor."""
        while waiting:
            dense, pruned = waiting.pop(0)  # not kept in the list: its memory goes when the batch is done
            for side in (dense, pruned):
                for node, value in side.items():
                    if isinstance(value, _File):
                        side[node] = value.read()
            yield dense, pruned

    def _step(self, index: int, dense: Values, pruned: Values) -> None:
        """Runs one node in both graphs and drops the values that nothing behind it uses."""
        node = self.order[index]
        if node.op in ("placeholder", "get_attr", "output"):
            return
        if node not in dense:
            dense[node] = run_node(self.dense, node, dense)
        if node not in self.changed:
            pruned[node] = dense[node]
        elif node in self.twins:  # else it went with its branch
            pruned[node] = self._run_twin(node, pruned)

        uses = (*node.all_input_nodes, *self.extra_uses.get(node, ()), node)
        drop_spent(dense, uses, self._last_use, index)
        drop_spent(pruned, uses, self._last_use, index)

    def _run_twin(self, node: fx.Node, pruned: Values) -> object:
        """The value of the pruned graph's node of that name; `pruned` is keyed by dense nodes, its inputs are not."""
        twin = self.twins[node]
        inputs = {source: pruned[self._dense_nodes[source]] for source in computed_operands(twin)}
        return run_node(self.pruned, twin, inputs)

    def _put_aside(self, dense: Values, pruned: Values) -> None:
        """Keeps a batch's live values for the next stop, those that both graphs share once."""
        stored: dict[int, object] = {}
        sides: tuple[Values, Values] = ({}, {})
        for side, values in zip(sides, (dense, pruned), strict=True):
            for node, value in values.items():
                if id(value) not in stored:
                    stored[id(value)] = self._stored(value)
                side[node] = stored[id(value)]
        self._waiting.append(sides)

    def _stored(self, value: object) -> object:
        """The value itself while there is room, else its file; views are copied so that they keep no base alive."""
        if not isinstance(value, Tensor):
            return value
        size = value.numel() * value.element_size()
        if value.untyped_storage().nbytes() > size:
            value = value.clone(memory_format=torch.contiguous_format)
        if self._bytes_in_memory + size <= self.limit_bytes or size < _LEAST_FILE_BYTES:
            self._bytes_in_memory += size
            return value

        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="compressor-")
        path = Path(self._folder.name) / str(self._files_written)
        self._files_written += 1
        # as bytes, for numpy knows no bfloat16
        value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tofile(path)
        return _File(path, value.dtype, value.shape, value.device)
