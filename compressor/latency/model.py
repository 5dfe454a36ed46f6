"""Tables of a network's layers, timed on a target, and the time they predict for a plan that was never built.

time = scale x sum of layers + bytes moved by everything else x a rate; scale and rate are such that the dense
network's prediction is its measured time. Knows no scores: `Meter` is what a plan is bisected on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
from torch import fx

from ..export.layers import Layer
from ..files import Json, content_hash
from ..graph.neighbours import shape_of
from ..pruning import Structure
from ..pruning.compaction import compact_shape
from ..pruning.labels import Value
from ..pruning.structure import Keep
from ..pruning.surgery import removed_classes
from .clocks import Clock, Point
from .staircase import measure_step, probe_widths
from .tables import Kept, Table, levels, smoothed
from .uses import Shapes, Use, Widths, macs_of, moved_bytes, uses_of, widths

Progress = Callable[[str, float], None]
Steps = Mapping[str, tuple[int, int]]
Meter = Callable[[Keep], float]
Entry = TypeVar("Entry", bound=Json)
MODEL = "layers/1"  # changes when what an entry means does


@dataclass(frozen=True, slots=True)
class Measuring:
    """What measures, where what was measured is kept, and `place`, which says what it stands for."""

    clock: Clock
    kept: Kept
    place: tuple[object, ...]
    progress: Progress = lambda what, share: None

    def entry(self, key: str, measure: Callable[[], Entry]) -> Entry:
        """What was measured under that key before, else what `measure` gives now, kept for the next time."""
        entry: Entry | None = self.kept.get(key)
        if entry is None:
            entry = measure()
            self.kept.put(key, entry)
        return entry


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """`tables[node]` of the traced graph's weighted nodes; `steps[family]` of (inputs, outputs).

    `scale` has no unit and multiplies the layers' times; what else moves data takes `per_byte_us` for each byte.
    """

    tables: Mapping[str, Table]
    steps: Steps
    dense_us: float
    scale: float
    per_byte_us: float


def measure_model(
    graph: fx.GraphModule, structure: Structure, *, least: Keep, dense_us: float, measuring: Measuring
) -> LatencyModel:
    """Times every distinct layer between its dense widths and those that `least` leaves.

    `least` [classes] is true where everything is gone that may go; `dense_us` the whole dense network's time.
    """
    uses = uses_of(graph)
    steps = measure_steps(uses, measuring)
    least_shapes = shapes_left(structure, least)
    tables: dict[str, Table] = {}
    for index, use in enumerate(uses):
        measuring.progress("latency tables", index / len(uses))
        least_widths = widths(use.node, use.layer, least_shapes)
        tables[use.node.name] = _table(use, least_widths, steps, measuring)
    measuring.progress("latency tables", 1.0)

    layers_us = sum(tables[use.node.name].at(*use.widths) for use in uses)
    moved = moved_bytes(graph, uses, shape_of)
    rest_us = dense_us - layers_us
    if rest_us > 0 and moved:
        return LatencyModel(tables, steps, dense_us, 1.0, rest_us / moved)
    # the layers alone account for all of it or more, as runtimes fuse what stands between them: they are scaled
    return LatencyModel(tables, steps, dense_us, dense_us / max(layers_us, 1e-9), 0.0)


def measure_steps(uses: Sequence[Use], measuring: Measuring) -> dict[str, tuple[int, int]]:
    """The steps of each family of layers, found on the member that takes longest."""
    largest: dict[str, Use] = {}
    for use in uses:
        family = use.layer.family
        if use.scaled:  # timed at its dense widths alone
            continue
        if family not in largest or _aptness(use) > _aptness(largest[family]):
            largest[family] = use

    steps: dict[str, tuple[int, int]] = {}
    for index, (family, use) in enumerate(sorted(largest.items())):
        measuring.progress("width steps", index / len(largest))
        outputs = _step(use, 1, measuring)
        inputs = outputs if use.layer.kind == "depthwise" else _step(use, 0, measuring)
        steps[family] = (inputs, outputs)
    measuring.progress("width steps", 1.0)
    return steps


def _aptness(use: Use) -> tuple[bool, int]:
    """Widths enough to see a step of 16, weights few enough to stay in a cache; then the longest."""
    return min(use.widths) >= 64 and max(use.widths) <= 512, macs_of(use, shape_of) * use.widths[0]


def _step(use: Use, axis: int, measuring: Measuring) -> int:
    """The step along one axis, 0 for inputs and 1 for outputs; 1 where the layer is too narrow to show any."""
    width = use.widths[axis]
    if not probe_widths(width):
        return 1

    def times(chosen: Sequence[int]) -> list[float]:
        points = [Point(use.layer, *_with(use, axis, probed)) for probed in chosen]
        return measuring.clock(points)

    key = content_hash(MODEL, measuring.place, "step", use.layer, use.widths, axis)
    return int(measuring.entry(key, lambda: measure_step(width, times)))


def _with(use: Use, axis: int, width: int) -> Widths:
    """The use's dense widths but for one; a depthwise layer has only one."""
    if use.layer.kind == "depthwise":
        return width, width
    if axis == 0:
        return width, use.widths[1]
    return use.widths[0], width


def _table(use: Use, least: Widths, steps: Steps, measuring: Measuring) -> Table:
    if use.scaled:
        return _timed(use.layer, use.widths[:1], use.widths[1:], (1, 1), measuring)
    step = steps[use.layer.family]
    inputs = levels(use.widths[0], least[0], step[0])
    outputs = levels(use.widths[1], least[1], step[1])
    return _timed(use.layer, inputs, outputs, step, measuring)


def _timed(
    layer: Layer, inputs: Sequence[int], outputs: Sequence[int], step: tuple[int, int], measuring: Measuring
) -> Table:
    if layer.kind == "depthwise":  # one width, on the outputs' axis
        inputs = inputs[-1:]
        points = [Point(layer, width, width) for width in outputs]
    else:
        points = [Point(layer, i, j) for i in inputs for j in outputs]

    key = content_hash(MODEL, measuring.place, "table", layer, tuple(inputs), tuple(outputs))
    times_us = np.array(measuring.entry(key, lambda: measuring.clock(points)), dtype=np.float64)
    us = smoothed(times_us.reshape(len(inputs), len(outputs)))  # [inputs, outputs], as the points lie
    return Table(tuple(inputs), tuple(outputs), step, tuple(tuple(row) for row in us.tolist()))


def shapes_left(structure: Structure, gone: Keep) -> Shapes:
    """Shapes as they would be without the classes that are gone; each node's is worked out once."""
    by_node: dict[fx.Node, tuple[int, ...]] = {}

    def shapes(node: fx.Node) -> tuple[int, ...]:
        if node not in by_node:
            value = structure.values.get(node.name)
            if isinstance(value, Value):
                by_node[node] = compact_shape(value.shape, structure.lying(node), gone)
            else:
                by_node[node] = shape_of(node)
        return by_node[node]

    return shapes


def make_latency_meter(graph: fx.GraphModule, structure: Structure, model: LatencyModel) -> Meter:
    """A function from removed classes to predicted microseconds; the graph may be one that was pruned before.

    `structure` is the graph's own; the model's tables are found by the nodes' names.
    """
    uses = uses_of(graph)

    def meter(gone: Keep) -> float:
        shapes = shapes_left(structure, gone)
        layers_us = sum(_use_us(use, model.tables[use.node.name], shapes) for use in uses)
        return model.scale * layers_us + model.per_byte_us * moved_bytes(graph, uses, shapes)

    return meter


def _use_us(use: Use, table: Table, shapes: Shapes) -> float:
    if use.scaled:
        return table.us[0][0] * macs_of(use, shapes) / max(1, macs_of(use, shape_of))
    return table.at(*widths(use.node, use.layer, shapes))


def group_steps(graph: fx.GraphModule, structure: Structure, steps: Steps) -> dict[str, int]:
    """What each group's kept count is rounded to: the largest step among the layers it feeds and comes from.

    A group of rows (heads) has none; one whose layers were too narrow to tell has none either.
    """
    uses = uses_of(graph)
    multiples: dict[str, int] = {}
    for index, group in enumerate(structure.groups.groups):
        gone = removed_classes(structure, {})
        gone[structure.group_of == index] = True
        touched = _touched_steps(uses, shapes_left(structure, _halved(gone)), steps)
        if touched and group.kind not in ("head", "conv_group") and not group.balanced:
            multiples[group.name] = max(touched)
    return multiples


def _touched_steps(uses: Sequence[Use], shapes: Shapes, steps: Steps) -> list[int]:
    """The steps of the axes that are narrower at these shapes than in the dense network."""
    touched: list[int] = []
    for use in uses:
        if use.layer.family not in steps:
            continue
        left = widths(use.node, use.layer, shapes)
        for axis in (0, 1):
            if left[axis] < use.widths[axis]:
                touched.append(steps[use.layer.family][axis])
    return touched


def _halved(gone: Keep) -> Keep:
    """Every second of the classes that would go: all of them at once may leave a tensor empty."""
    halved = gone.copy()
    halved[np.flatnonzero(gone)[::2]] = False
    return halved


def model_to_json(model: LatencyModel) -> dict[str, object]:
    """For people: tables by node, and what the dense network's time is made of."""
    body = asdict(model)
    return {**body, "steps": {family: list(step) for family, step in model.steps.items()}}
