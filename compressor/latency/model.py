"""Tables of a network's layers, timed on a target, and the time they predict for a plan that was never built.

time = scale x sum of layers + bytes moved by everything else x a rate; scale and rate are such that the dense
network's prediction is its measured time. Knows no scores: `Meter` is what a plan is bisected on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import fx

from ..export.layers import Layer
from ..files import content_hash
from ..pruning.groups import Structure
from ..pruning.labels import Value
from ..pruning.surgery import Keep, compact_shape, removed_classes
from .clocks import Clock, Point
from .staircase import measure_step, probe_widths
from .tables import Kept, Table, levels, smoothed
from .uses import Shapes, Use, Widths, dense_shapes, macs_of, moved_bytes, uses_of, widths

Progress = Callable[[str, float], None]
Steps = Mapping[str, tuple[int, int]]
Meter = Callable[[Keep], float]
MODEL = "layers/1"  # changes when what an entry means does


@dataclass(frozen=True, slots=True)
class Measuring:
    """What measures, where what was measured is kept, and `place`, which says what it stands for."""

    clock: Clock
    kept: Kept
    place: tuple[Any, ...]
    progress: Progress = lambda what, share: None

    def entry(self, key: str, measure: Callable[[], Any]) -> Any:
        found = self.kept.get(key)
        if found is None:
            found = measure()
            self.kept.put(key, found)
        return found


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """`tables[node]` of the traced graph's weighted nodes; `steps[family]` of (inputs, outputs)."""

    tables: Mapping[str, Table]
    steps: Steps
    dense_us: float
    scale: float
    per_byte_us: float


def measure_model(
    graph: fx.GraphModule, structure: Structure, *, least: Keep, dense_us: float, measuring: Measuring
) -> LatencyModel:
    """Times every distinct layer between its dense widths and those that `least` leaves."""
    uses = uses_of(graph)
    steps = measure_steps(uses, measuring)
    smallest = shapes_left(structure, least)
    tables: dict[str, Table] = {}
    for i, use in enumerate(uses):
        measuring.progress("latency tables", i / len(uses))
        tables[use.node.name] = _table(use, widths(use.node, use.layer, smallest), steps, measuring)
    measuring.progress("latency tables", 1.0)
    layers_us = sum(t.at(*u.widths) for t, u in zip(tables.values(), uses, strict=True))
    moved = moved_bytes(graph, uses, dense_shapes)
    rest = dense_us - layers_us
    if rest > 0 and moved:
        return LatencyModel(tables, steps, dense_us, 1.0, rest / moved)
    return LatencyModel(tables, steps, dense_us, dense_us / max(layers_us, 1e-9), 0.0)


def measure_steps(uses: Sequence[Use], measuring: Measuring) -> dict[str, tuple[int, int]]:
    """The steps of each family of layers, found on the member that takes longest."""
    largest: dict[str, Use] = {}
    for use in uses:
        family = use.layer.family
        if not use.scaled and (family not in largest or _work(use) > _work(largest[family])):
            largest[family] = use
    found: dict[str, tuple[int, int]] = {}
    for i, (family, use) in enumerate(sorted(largest.items())):
        measuring.progress("width steps", i / len(largest))
        outputs = _step(use, 1, measuring)
        found[family] = (outputs if use.layer.kind == "depthwise" else _step(use, 0, measuring), outputs)
    measuring.progress("width steps", 1.0)
    return found


def _work(use: Use) -> tuple[bool, int]:
    """Widths enough to see a step of 16, weights few enough to stay in a cache; then the longest."""
    return min(use.widths) >= 64 and max(use.widths) <= 512, macs_of(use, dense_shapes) * use.widths[0]


def _step(use: Use, axis: int, measuring: Measuring) -> int:
    width = use.widths[axis]
    if not probe_widths(width):
        return 1

    def times(chosen: Sequence[int]) -> list[float]:
        return measuring.clock([_point(use.layer, _with(use, axis, w)) for w in chosen])

    key = content_hash(MODEL, measuring.place, "step", use.layer, use.widths, axis)
    return int(measuring.entry(key, lambda: measure_step(width, times)))


def _with(use: Use, axis: int, width: int) -> Widths:
    if use.layer.kind == "depthwise":
        return width, width
    return (width, use.widths[1]) if axis == 0 else (use.widths[0], width)


def _point(layer: Layer, wide: Widths) -> Point:
    return Point(layer, *wide)


def _table(use: Use, least: Widths, steps: Steps, measuring: Measuring) -> Table:
    if use.scaled:
        return _timed(use.layer, use.widths[:1], use.widths[1:], (1, 1), measuring)
    step = steps[use.layer.family]
    inputs, outputs = (levels(d, w, s) for d, w, s in zip(use.widths, least, step, strict=True))
    return _timed(use.layer, inputs, outputs, step, measuring)


def _timed(
    layer: Layer, inputs: Sequence[int], outputs: Sequence[int], step: tuple[int, int], measuring: Measuring
) -> Table:
    if layer.kind == "depthwise":  # one width, on the outputs' axis
        inputs, points = inputs[-1:], [Point(layer, w, w) for w in outputs]
    else:
        points = [Point(layer, i, j) for i in inputs for j in outputs]
    key = content_hash(MODEL, measuring.place, "table", layer, tuple(inputs), tuple(outputs))
    us = np.array(measuring.entry(key, lambda: measuring.clock(points)), dtype=np.float64)
    rows = smoothed(us.reshape(len(inputs), len(outputs)))
    return Table(tuple(inputs), tuple(outputs), step, tuple(tuple(map(float, row)) for row in rows))


def shapes_left(structure: Structure, gone: Keep) -> Shapes:
    """Shapes as they would be without the classes that are gone; each node's is worked out once."""
    known: dict[fx.Node, tuple[int, ...]] = {}

    def shapes(node: fx.Node) -> tuple[int, ...]:
        if node not in known:
            value = structure.values.get(node.name)
            if isinstance(value, Value):
                known[node] = compact_shape(value.shape, structure.lying(node), gone)
            else:
                known[node] = tuple(dense_shapes(node))
        return known[node]

    return shapes


def make_latency_meter(graph: fx.GraphModule, structure: Structure, model: LatencyModel) -> Meter:
    """A function from removed classes to predicted microseconds; the graph may be one that was pruned before."""
    uses = uses_of(graph)

    def meter(gone: Keep) -> float:
        shapes = shapes_left(structure, gone)
        layers = sum(_use_us(use, model.tables[use.node.name], shapes) for use in uses)
        return model.scale * layers + model.per_byte_us * moved_bytes(graph, uses, shapes)

    return meter


def _use_us(use: Use, table: Table, shapes: Shapes) -> float:
    if use.scaled:
        return table.us[0][0] * macs_of(use, shapes) / max(1, macs_of(use, dense_shapes))
    return table.at(*widths(use.node, use.layer, shapes))


def group_steps(graph: fx.GraphModule, structure: Structure, steps: Steps) -> dict[str, int]:
    """What each group's kept count is rounded to: the largest step among the layers it feeds and comes from.

    A group of rows (heads) has none; one whose layers were too narrow to tell has none either.
    """
    found: dict[str, int] = {}
    for index, group in enumerate(structure.groups.groups):
        gone = removed_classes(structure, {})
        gone[structure.group_of == index] = True
        shapes = shapes_left(structure, _halved(gone))
        sizes = [
            steps[use.layer.family][axis]
            for use in uses_of(graph)
            if use.layer.family in steps
            for axis, (dense, left) in enumerate(zip(use.widths, widths(use.node, use.layer, shapes), strict=True))
            if left < dense
        ]
        if sizes and group.kind not in ("head", "conv_group") and not group.balanced:
            found[group.name] = max(sizes)
    return found


def _halved(gone: Keep) -> Keep:
    """Every second of the classes that would go: all of them at once may leave a tensor empty."""
    some = gone.copy()
    some[np.flatnonzero(gone)[::2]] = False
    return some


def model_to_json(model: LatencyModel) -> dict[str, Any]:
    """For people: tables by node, and what the dense network's time is made of."""
    body = asdict(model)
    return {**body, "steps": {family: list(step) for family, step in model.steps.items()}}
