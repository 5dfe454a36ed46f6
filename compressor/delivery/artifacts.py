"""What delivery makes and finds: the exported files of a run, and everything measured of them so far.

Names only; who writes, checks and times the files are the modules beside this one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..device.parity import Parity
from ..device.timing import Timing
from ..export.calibration import Statistics
from ..records import Accuracy

PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True, slots=True)
class Artifact:
    """An exported file. `made_for` names the library whose form of Q/DQ it has; empty: any runtime takes it."""

    name: str
    variant: Literal["dense", "shipped"]
    precision: str = "fp32"
    made_for: str = ""

    @property
    def subject(self) -> str:
        """What a measurement of it is called: `dense`, `shipped`, `shipped-fp16`."""
        return self.variant if self.precision == "fp32" else f"{self.variant}-{self.precision}"

    @property
    def purpose(self) -> str:
        """Who the file is for, in words of the report."""
        return _PURPOSES[self.made_for or self.precision]


_PURPOSES = {
    "fp32": "the reference of the others; every runtime",
    "fp16": "GPUs; CPUs compute it in fp32 and gain nothing",
    "int8": "CPUs: uint8 activations on both sides of every layer, so that their kernels stay in integers; "
    "x86 without VNNI may saturate, which compressor verify shows",
    "tensorrt": "TensorRT: its parser wants symmetric int8 inputs and float biases, which CPUs run slower than fp32",
}

DENSE = Artifact("dense.onnx", "dense")
SHIPPED = Artifact("model.onnx", "shipped")
FP16 = Artifact("model.fp16.onnx", "shipped", "fp16")
INT8 = Artifact("model.int8.onnx", "shipped", "int8")
INT8_TENSORRT = Artifact("model.int8.tensorrt.onnx", "shipped", "int8", "tensorrt")


@dataclass
class Findings:
    """Filled from stage to stage; what a failed gate left undone stays empty. Keys are artifacts' names.

    `parity[artifact][batch size]`; `layer_ms[variant][layer]`, milliseconds at batch 1; `engines` hold one dictionary
    for each engine asked for, with an empty `path` where none was built; `build` the recipes to build them elsewhere.
    """

    folder: Path
    artifacts: tuple[Artifact, ...] = (DENSE, SHIPPED)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    parity: dict[str, dict[int, Parity]] = field(default_factory=dict)
    accuracy: dict[str, Accuracy] = field(default_factory=dict)
    engines: list[dict[str, Any]] = field(default_factory=list)
    build: list[dict[str, Any]] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    layer_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    statistics: Statistics | None = None

    def path(self, artifact: Artifact) -> Path:
        """Where the file is, or will be once its stage is done."""
        return self.folder / artifact.name

    @property
    def runnable(self) -> tuple[Artifact, ...]:
        """Those that are themselves run and timed; a form for an engine's parser is not."""
        return tuple(artifact for artifact in self.artifacts if not artifact.made_for)

    def worst_parity(self, artifact: Artifact) -> Parity:
        """At the batch size where the largest difference is largest. Raises KeyError before parity was measured."""
        by_batch = self.parity[artifact.name]
        return max(by_batch.values(), key=lambda parity: parity.max_abs)


def wanted_precisions(asked: tuple[str, ...]) -> tuple[str, ...]:
    """fp32 is what the others are made from, and fp16 is a candidate wherever int8 is."""
    wanted = {"fp32", *asked}
    if "int8" in asked:
        wanted.add("fp16")
    return tuple(precision for precision in PRECISIONS if precision in wanted)


def of_subject(subject: str) -> tuple[str, str]:
    """`shipped-fp16` to (`shipped`, `fp16`)."""
    variant, _, precision = subject.partition("-")
    return variant, precision or "fp32"
