"""The exported files of a run by name: what each is for, and which a recipe asks for.

Names only; who writes, checks and times the files are the modules beside this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import GateError

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


@dataclass(frozen=True, slots=True)
class Measure:
    """What answers are judged by. A loss is counted in points of a share, else in per cent."""

    metric: str = "top-1"
    is_share: bool = True

    @property
    def unit(self) -> str:
        """What a loss is counted in."""
        return "points" if self.is_share else "%"


class FileRefused(GateError):
    """A file that can't be made, or not be measured at all, with the reason, and what it was judged by."""

    def __init__(self, artifact: Artifact, reason: str, measure: Measure | None = None) -> None:
        super().__init__(reason)
        self.artifact, self.measure = artifact, measure or Measure()


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
