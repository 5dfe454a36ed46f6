"""What a report is made of: one frozen record of plain values, filled by the pipeline.

In: nothing. Out: `ReportInput` and its rows; numpy and `compressor.records` only. Raw measurements are
given, statistics are derived by the report, except percentiles, whose standing the measurer decides.
Everything but the first seven fields may be left empty: the report then says that it was not done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..budgets import is_none
from ..records import NO_DEPTH, Compensation, Cost, Depth, Figure, FloatArray, IntArray, LeftAlone

Variant = Literal["dense", "removed", "repaired", "tuned", "trained", "shipped"]


@dataclass(frozen=True, slots=True)
class GroupRow:
    """One group as ranked: `scores` [units] is what the ranking compared (NaN = unscored), `kept` the plan's indices.

    `layers` are the qualified names of the layers the group's units lie in, the producing one first.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    size: int
    kept: IntArray
    scores: FloatArray = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer before and after; `width` is its output units (channels, features), `ms` its time where profiled."""

    layer: str
    operation: str
    width_dense: int
    width_shipped: int
    macs_dense: int
    macs_shipped: int
    ms_dense: float | None = None
    ms_shipped: float | None = None


@dataclass(frozen=True, slots=True)
class AccuracyRow:
    """Accuracy of one variant; `precision` and `runtime` say what was run, `images` which split."""

    variant: Variant
    accuracy: Figure
    precision: str = "fp32"
    runtime: str = "pytorch"
    images: str = "evaluation"


@dataclass(frozen=True, slots=True)
class ParityRow:
    """Largest distances between a runtime's outputs and the reference's on the same images."""

    reference: str
    runtime: str
    precision: str
    batch: int
    max_abs: float
    max_rel: float
    limit: float
    variant: str = "shipped"

    @property
    def passed(self) -> bool:
        """By the absolute distance alone: where outputs are near zero the relative one is large for no reason."""
        return self.max_abs <= self.limit


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """Raw samples of one variant on one runtime, in the order they were taken.

    `percentiles` maps "p50", "p90", "p99" to ms, or to None where the samples are too few for it to stand.
    """

    runtime: str
    precision: str
    batch: int
    variant: str
    samples_ms: FloatArray
    percentiles: Mapping[str, float | None]
    threads: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class FileRow:
    """An exported file; `role` says what it is for. `kept` are the layers that stayed in a higher precision,
    `method` how the ranges of an int8 file were found, `bits` what its weights have,
    `rest` the precision of what is not int8."""

    name: str
    role: str
    variant: str
    precision: str
    bytes: int
    kept: tuple[str, ...] = ()
    method: str = ""
    bits: int = 0
    rest: str = ""


@dataclass(frozen=True, slots=True)
class EngineRow:
    """An engine and what was really done with it: `status` is such as 'built, not run: no GPU'."""

    name: str
    runtime: str
    target: str
    precision: str
    bytes: int
    status: str
    kernels: int | None = None
    variant: str = "shipped"
    build_s: float | None = None


@dataclass(frozen=True, slots=True)
class GateRow:
    """A stated limit and what was found; `relation` reads `value relation limit`.

    `doubt` says why a value within the limit shows nothing, as on too few images: then it has not passed either.
    """

    name: str
    limit: float
    value: float
    passed: bool
    relation: Literal["<=", ">=", "<", ">", "=="] = "<="
    unit: str = ""
    remedy: str = ""
    doubt: str = ""

    @property
    def failed(self) -> bool:
        """Beyond its limit; a gate in doubt has neither passed nor failed."""
        return not self.passed and not self.doubt

    @property
    def state(self) -> str:
        """`passed`, `FAILED` or `not shown`: the words that tables print and the page colours."""
        if self.passed:
            return "passed"
        return "FAILED" if self.failed else "not shown"


@dataclass(frozen=True, slots=True)
class RecoveryRow:
    """A recovery's judgement after so many seconds, on held-out images; `kept` is the nearest to the dense network.

    `quality` is what `metric` names: a classifier's agreement with the dense network, else the fidelity again.
    """

    seconds: float
    shown: int
    fidelity: float
    quality: float
    metric: str = "agreement"
    kept: bool = False


@dataclass(frozen=True, slots=True)
class TradePoint:
    """One point of the trade-off: share of the dense MACs kept, and the figure's `value`; `chosen` is what ships.

    `metric` is what the figure is called; where `is_share`, it is a share of one.
    """

    label: str
    macs_share: float
    value: float
    chosen: bool = False
    metric: str = "top-1"
    is_share: bool = True


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """One file as it runs: its median latency and its accuracy, both on `runtime`; `reference` marks the dense
    model."""

    label: str
    ms: float
    accuracy: Figure
    runtime: str = "onnxruntime"
    batch: int = 1
    reference: bool = False


@dataclass(frozen=True, slots=True)
class PictureRow:
    """One evaluation image with both networks' answers; `name` is its PNG's, `image` what the data call it.

    `distance` is the shipped answer's from the dense one, squared: 1 is as far off as the mean answer. `shows` says in
    words what was drawn of the answers.
    """

    name: str
    image: str
    distance: float
    shows: str


@dataclass(frozen=True, slots=True)
class StageRow:
    """What one stage took when it was done; `reused` where that was in an earlier run. An unknown peak is None."""

    name: str
    seconds: float
    peak_bytes: int | None = None
    gpu_peak_bytes: int | None = None
    reused: bool = False


@dataclass(frozen=True, slots=True)
class ReportInput:
    """All a report says. `recipe`, `environment` and `splits` are flat: name to printable value.

    `warnings` stand above everything else. `shipped` is which network ships, `choice` says why.
    `recovered` says how the dense network taught it, `recovery` how near it was meanwhile.
    `busy` says how crowded the machine was when networks were timed, and is empty where it was not. `task` is what the
    answers were taken for, `task_reason` why. `fidelity` has a figure for each smaller network in PyTorch. `pictures`
    are of the images on which the networks differ most, of the `pictured_of` that were looked at.
    `depth` says which residual branches went whole. `explanation` is the rank correlation of the input's relevance in
    both networks, `selector_masks` the overlap of a learned selector's masks.
    """

    model: str
    recipe: Mapping[str, object]
    environment: Mapping[str, object]
    groups: tuple[GroupRow, ...]
    cost_dense: Cost
    cost_shipped: Cost
    accuracy: tuple[AccuracyRow, ...]
    criterion: str = ""
    samples: int = 0
    budget: str = ""
    splits: Mapping[str, object] = field(default_factory=dict)
    left_alone: tuple[LeftAlone, ...] = ()
    repair: Compensation = field(default_factory=Compensation)
    unscored: tuple[str, ...] = ()
    uncovered: tuple[str, ...] = ()
    layers: tuple[LayerRow, ...] = ()
    parity: tuple[ParityRow, ...] = ()
    latency: tuple[LatencyRow, ...] = ()
    files: tuple[FileRow, ...] = ()
    engines: tuple[EngineRow, ...] = ()
    gates: tuple[GateRow, ...] = ()
    trade: tuple[TradePoint, ...] = ()
    pareto: tuple[ParetoPoint, ...] = ()
    not_checked: tuple[str, ...] = ()
    stages: tuple[StageRow, ...] = ()
    warnings: tuple[str, ...] = ()
    shipped: str = ""
    choice: str = ""
    recovered: str = ""
    recovery: tuple[RecoveryRow, ...] = ()
    busy: str = ""
    task: str = ""
    task_reason: str = ""
    fidelity: Mapping[str, Figure] = field(default_factory=dict)
    pictures: tuple[PictureRow, ...] = ()
    pictured_of: int = 0
    depth: Depth = NO_DEPTH
    explanation: Figure | None = None
    selector_masks: Figure | None = None

    @property
    def as_it_is(self) -> bool:
        """Whether nothing was to be removed: dense and shipped are one network."""
        return self.whole and self.shipped != "trained"

    @property
    def whole(self) -> bool:
        """Whether nothing was to be removed, whatever its weights were trained to afterwards."""
        return is_none(self.budget)
