"""What passes between stages, `Scores`, `Plan`, `Group`, ...: frozen records of arrays, numbers and strings.

Keys are qualified names: of layers (`layer1.0.conv1`), of parameters (`layer1.0.conv1.weight`)
or of nodes of the traced graph (`conv2d_3`). Nothing here knows torch, files or formats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One sample of an input of a network: its shape without the batch's axis, and its numbers' type by name.

    `values` are a real sample's numbers, flat, where made-up ones could mean something else: indices and masks. Empty
    elsewhere.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    values: tuple[int, ...] = ()


_ROUNDING = 1e-9  # the interval of no right answer begins at 1e-18

UnitKind = Literal["channel", "neuron", "stream", "head", "head_dim", "conv_group"]


@dataclass(frozen=True, slots=True)
class Site:
    """One place where a group's units can be seen: axes of one node's output.

    `units` has the sizes of `axes` (in that order); entry = unit index in the group, -1 = no unit
    of this group. A convolution's site has axes (1,), a head's (1,) of [B, H, N, D], a head
    dimension's (1, 3).
    """

    node: str
    layer: str
    axes: tuple[int, ...]
    units: IntArray


@dataclass(frozen=True, slots=True)
class Group:
    """Units the network ties together: unit u goes from every site, parameter and consumer at once.

    `rows[u]` is the row unit u lies in. Where `balanced`, every row must keep the same count
    (dimensions of a head, channels of a grouped convolution); otherwise there is one row.
    `parent` names the group whose unit r removes the whole of row r, or is empty.
    `inexact` names operations whose result depends on the removed units beyond zeroing them
    (a normalisation over the pruned axis).
    """

    name: str
    kind: UnitKind
    size: int
    sites: tuple[Site, ...]
    rows: IntArray
    balanced: bool = False
    parent: str = ""
    inexact: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """A layer whose units are not prunable, and the operation that stands in the way."""

    layer: str
    operation: str
    reason: str


@dataclass(frozen=True, slots=True)
class Groups:
    """A network's units in groups, and the layers that can't lose any; `groups[name]` raises KeyError."""

    groups: tuple[Group, ...]
    left_alone: tuple[LeftAlone, ...] = ()

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class Scores:
    """Relevance of every unit at every site of its group; higher is kept longer.

    `values[group]` is [sites, units]; `unscored` names groups the criterion could not score,
    `uncovered` operations that no rule covered and input x gradient passed.
    """

    criterion: str
    values: Mapping[str, FloatArray]
    samples: int
    unscored: tuple[str, ...] = ()
    uncovered: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Which units of each group stay, ascending; a group not named keeps all.

    `branches` are the residual branches that went before, whole; the groups are those of the network without them.
    """

    kept: Mapping[str, IntArray]
    macs_dense: int
    macs_kept: int
    budget: str = ""
    branches: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dropped:
    """A residual branch that may go, named by the sum it enters; `layer` is the module its first layer lies in.

    `macs` is its share of the network's, `loss` the error of the outputs once it and those before it are gone, nothing
    repaired, relative to the outputs.
    """

    name: str
    layer: str
    macs: float
    loss: float


@dataclass(frozen=True, slots=True)
class Depth:
    """Residual branches in the order they may go, and how many of them do.

    `tried` are the numbers of branches that were tried, `errors` those of the outputs then, at the budget and repaired,
    on images that served neither; `UNMET` where no plan meets the budget.
    """

    order: tuple[Dropped, ...] = ()
    tried: tuple[int, ...] = (0,)
    errors: tuple[float, ...] = (0.0,)
    taken: int = 0

    @property
    def gone(self) -> tuple[Dropped, ...]:
        """Those that go."""
        return self.order[: self.taken]

    @property
    def names(self) -> tuple[str, ...]:
        """Of those that go."""
        return tuple(branch.name for branch in self.gone)


NO_DEPTH = Depth()
UNMET = 1e6  # stands for the error of a network that no plan gives


@dataclass(frozen=True, slots=True)
class Slices:
    """What a plan means for tensors: for each parameter or buffer, the kept indices of each axis."""

    kept: Mapping[str, tuple[IntArray, ...]]


@dataclass(frozen=True, slots=True)
class LayerRepair:
    """One refitted layer; errors are squared errors relative to the target's variance, over all rows used.

    In front of a clamp, errors that it cuts off are not counted.
    """

    layer: str
    weight: str
    ridge: float
    error_before: float
    error_after: float
    rows: int


@dataclass(frozen=True, slots=True)
class Compensation:
    """What closed-form repair refitted, and the layers that lost inputs and kept their own weights."""

    repaired: tuple[LayerRepair, ...] = ()
    left_alone: tuple[LeftAlone, ...] = ()


@dataclass(frozen=True, slots=True)
class Cost:
    """1 MAC = 2 FLOPs. `by_node` counts MACs at batch 1; `uncounted` names operations without a formula."""

    macs: int
    parameters: int
    activations: int
    by_node: Mapping[str, int] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """A multiplication and an addition each."""
        return 2 * self.macs


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Correct answers of `n`; the interval is Wilson's at 95 %, in shares of one.

    `chance` is what the same answers would get if they were dealt out to the images at random (the agreement that
    Cohen's kappa starts from): 1/10 for ten classes alike, everything for one and the same answer. -1: not counted.
    """

    correct: int
    n: int
    correct_top5: int = -1
    chance: float = field(default=-1.0, compare=False)
    metric: str = "top-1"

    @property
    def top1(self) -> float:
        """Share of one."""
        return self.correct / self.n

    @property
    def is_above_chance(self) -> bool:
        """Whether the whole interval is; true where chance was not counted."""
        return self.chance < 0 or self.interval[0] > self.chance + _ROUNDING

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval at 95 %, in shares of one."""
        return wilson(self.correct / self.n, self.n)

    @property
    def value(self) -> float:
        """Share of one."""
        return self.top1

    @property
    def low(self) -> float:
        """Where the interval begins."""
        return self.interval[0]

    @property
    def high(self) -> float:
        """Where the interval ends."""
        return self.interval[1]

    @property
    def is_share(self) -> bool:
        """Whether differences are told in points."""
        return True

    def lost(self, other: Measured) -> float:
        """Points that `other` falls short of this one."""
        return lost(self, other)


@dataclass(frozen=True, slots=True)
class Quality:
    """How good a network's answers for `n` samples are, in one number of which more is better, and its 95 % interval.

    `chance` is what answers that know nothing would get, NaN where nobody counted it. Where `is_share`, 1 is the best
    there is (accuracy, mean IoU, R^2) and differences are points; else the value has a unit of its own (PSNR, in dB).
    An interval nobody could give is `low` = `high` = `value`.
    """

    metric: str
    value: float
    n: int
    low: float
    high: float
    chance: float = field(default=math.nan, compare=False)  # NaN equals nothing, not even itself
    is_share: bool = True

    @property
    def is_above_chance(self) -> bool:
        """Whether the whole interval is; true where chance was not counted."""
        return math.isnan(self.chance) or self.low > self.chance + _ROUNDING

    def lost(self, other: Measured) -> float:
        """What `other` falls short of this one: points where it is a share, else per cent of this value."""
        return lost(self, other)


Figure: TypeAlias = "Accuracy | Quality"
"""How good a network's answers are, whatever its task."""


def figure_fields(figure: Figure) -> dict[str, object]:
    """A figure's fields as JSON holds them, in which NaN is null."""
    entries = {field.name: getattr(figure, field.name) for field in fields(figure)}
    return {name: None if entry != entry else entry for name, entry in entries.items()}  # NaN equals nothing


def figure_of(entries: Mapping[str, Any]) -> Figure:
    """The inverse of `figure_fields`. Raises TypeError for fields of neither kind."""
    numbers: dict[str, Any] = {name: math.nan if entry is None else entry for name, entry in entries.items()}
    return Accuracy(**numbers) if "correct" in numbers else Quality(**numbers)


class Measured(Protocol):
    """What an `Accuracy` and any other `Quality` have in common."""

    @property
    def metric(self) -> str: ...
    @property
    def value(self) -> float: ...
    @property
    def n(self) -> int: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def chance(self) -> float: ...
    @property
    def is_share(self) -> bool: ...


def lost(dense: Measured, other: Measured) -> float:
    """What `other` falls short of `dense`: points where that is a share, else per cent of the dense value."""
    difference = dense.value - other.value
    if dense.is_share:
        return 100 * difference
    if dense.value == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return 100 * difference / abs(dense.value)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's score interval at 95 % (Wilson 1927), in shares of one: 90 of 100 is 0.826 to 0.945."""
    z, p = 1.959963984540054, share  # z: the normal distribution's 97.5 % quantile
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)
