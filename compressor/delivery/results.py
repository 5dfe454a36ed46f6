"""What delivery is given, and what its stages come to: frozen records, each with the checks it stood.

`Delivery` joins them; report and summary are read from it. What a failed gate left undone stays empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import fx

from ..device.parity import Parity
from ..device.timing import Timing
from ..pruning import Structure
from ..records import Figure, Plan, Quality
from ..recovery import Recovery
from ..repair.better_of_two import Choice
from ..report import PictureRow
from ..run.checks import Checks
from ..run.tasking import NetworkTask
from .artifacts import Artifact


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """The network that is to ship and what is known of it.

    `plan` is in units of the dense network; `accuracy` is of the networks in PyTorch by the task's measure, `dense` and
    `shipped` among them, `fidelity` how near the smaller ones' answers are to the dense one's. Of a network that ships
    as it is, structure and plan are None, `accuracy` is the dense one's alone and there is no fidelity. `shipped` names
    the network, `choice` says why it ships and `recovery` how it was taught, where there was one; `budget` is what was
    asked for, in words.
    """

    structure: Structure | None
    plan: Plan | None
    network: fx.GraphModule
    accuracy: Mapping[str, Figure]
    fidelity: Mapping[str, Figure]
    task: NetworkTask
    choice: Choice | None = None
    checks: Checks = field(default_factory=Checks)
    budget: str = ""
    shipped: str = "repaired"
    recovery: Recovery | None = None

    @property
    def is_dense(self) -> bool:
        """Whether dense and shipped are one network."""
        return self.shipped == "dense"


def stands_for(keys: Mapping[str, str]) -> list[str]:
    """What dense and shipped network stand for in stages' keys: the keys of the stages that made them."""
    return [keys[name] for name in ("network", "groups", "finetune", "trained") if name in keys]


@dataclass(frozen=True, slots=True)
class Lowered:
    """How a file of a lower precision came about; `layers` stayed in a higher one.

    Of an int8 file, `method` found the ranges and its weights have `bits`; `islands` are the operations in fp32 where
    what is not int8 is fp16, and None where that is fp32.
    """

    layers: tuple[str, ...] = ()
    method: str = ""
    bits: int = 0
    islands: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Files:
    """Exported files, in the order they were made; `lowered` says of those of a lower precision how."""

    paths: Mapping[Artifact, Path] = field(default_factory=dict)
    lowered: Mapping[Artifact, Lowered] = field(default_factory=dict)
    checks: Checks = field(default_factory=Checks)

    def __add__(self, other: Files) -> Files:
        return Files(
            {**self.paths, **other.paths},
            {**self.lowered, **other.lowered},
            self.checks + other.checks,
        )

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """All of them, those for an engine's parser too."""
        return tuple(self.paths)

    @property
    def shipped(self) -> tuple[Artifact, ...]:
        """Those of the network that ships."""
        return tuple(artifact for artifact in self.paths if artifact.variant == "shipped")

    @property
    def runnable(self) -> dict[Artifact, Path]:
        """Those that are themselves run and timed; a form for an engine's parser is not."""
        return {artifact: path for artifact, path in self.paths.items() if not artifact.made_for}


@dataclass(frozen=True, slots=True)
class Parities:
    """`by_file[name][batch size]`: every file against its network in PyTorch."""

    by_file: Mapping[str, Mapping[int, Parity]] = field(default_factory=dict)
    checks: Checks = field(default_factory=Checks)

    def worst(self, artifact: Artifact) -> Parity:
        """At the batch size where the largest difference is largest. Raises KeyError where none was measured."""
        return max(self.by_file[artifact.name].values(), key=lambda parity: parity.max_abs)


@dataclass(frozen=True, slots=True)
class FileAccuracies:
    """Accuracy of every file on the evaluation images, by name."""

    by_file: Mapping[str, Figure] = field(default_factory=dict)
    checks: Checks = field(default_factory=Checks)


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that was asked for. `path`, in the run's folder, is empty where none was built; `status` says why.

    `model` is the file it was built from; `kernels` is None where the builder's log does not tell.
    """

    target: str
    precision: str
    model: str
    status: str
    path: str = ""
    library: str = ""
    library_version: str = ""
    size_bytes: int = 0
    build_s: float = 0.0
    kernels: int | None = None


@dataclass(frozen=True, slots=True)
class Engines:
    """One for each file and target that was asked for, and the recipes to build them elsewhere."""

    asked: tuple[Engine, ...] = ()
    recipes: tuple[Mapping[str, object], ...] = ()
    checks: Checks = field(default_factory=Checks)

    @property
    def built(self) -> tuple[Engine, ...]:
        """Those that are there."""
        return tuple(engine for engine in self.asked if engine.path)


@dataclass(frozen=True, slots=True)
class Latency:
    """Raw samples; `busy` says how crowded the machine was when they were taken, and is empty where it was not."""

    timings: tuple[Timing, ...] = ()
    busy: str = ""
    checks: Checks = field(default_factory=Checks)


@dataclass(frozen=True, slots=True)
class Pictures:
    """`images` are PNGs by the names of the rows, which say what they are of; `looked_at` images were compared."""

    rows: tuple[PictureRow, ...] = ()
    images: Mapping[str, bytes] = field(default_factory=dict)
    looked_at: int = 0
    checks: Checks = field(default_factory=Checks)


@dataclass(frozen=True, slots=True)
class Survival:
    """How well the explanation survived; None where that was not measured, and then `checks` say why.

    `masks` is the overlap of the selector's masks of both networks, where one was learned.
    """

    figure: Quality | None = None
    masks: Quality | None = None
    checks: Checks = field(default_factory=Checks)


@dataclass(frozen=True, slots=True)
class Delivery:
    """All that was made and measured. `network` is what was checked of the network itself before any file was made.

    `layer_ms[variant][layer]` are milliseconds at batch 1.
    """

    network: Checks = field(default_factory=Checks)
    files: Files = field(default_factory=Files)
    parity: Parities = field(default_factory=Parities)
    accuracy: FileAccuracies = field(default_factory=FileAccuracies)
    engines: Engines = field(default_factory=Engines)
    latency: Latency = field(default_factory=Latency)
    layer_ms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    pictures: Pictures = field(default_factory=Pictures)
    survival: Survival = field(default_factory=Survival)

    @property
    def checks(self) -> Checks:
        """Of all stages, in their order."""
        total = self.network
        for result in (
            self.files,
            self.parity,
            self.accuracy,
            self.engines,
            self.latency,
            self.pictures,
            self.survival,
        ):
            total += result.checks
        return total
