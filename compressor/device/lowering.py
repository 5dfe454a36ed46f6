"""The builder's verbose log in, what the network was lowered to out: kernels, types, padding, memory.

The log's text is documented nowhere, so anything unexpected makes the reading `unavailable` instead of wrong.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<rest>.*)$")
_TENSOR = re.compile(r"Name: (?P<name>[^,]*), Dimensions: \[(?P<dims>[-0-9,]*)\].*?Datatype: (?P<type>\w+)")
_MEMORY = re.compile(r"^Total (Activation|Weights) Memory: (\d+) bytes")
_NO_KERNEL = ("shape_call", "signal", "wait")  # shapes are computed on the CPU, streams wait for each other
# The generated kernel that widens a tensor is named after its two steps, replicate (a zero) and concatenate.
_WIDENING = ("replconc", "pad")


@dataclass(frozen=True, slots=True)
class TensorUse:
    name: str
    dims: tuple[int, ...]
    type: str


@dataclass(frozen=True, slots=True)
class Kernel:
    name: str
    kind: str
    inputs: tuple[TensorUse, ...]
    constants: tuple[TensorUse, ...]
    outputs: tuple[TensorUse, ...]


@dataclass(frozen=True, slots=True)
class Lowering:
    """A dry run: what would be launched, read from the build log; `reason` says why it is unavailable.

    `types` counts kernels by `input->output` type. `padded` names the kernels that widen a tensor to the next
    multiple, such as `conv_3: 63->64`; the image's own three channels don't count as such, nor does packing a
    depthwise convolution's channels several times over, nor a kernel that also splits or joins tensors.
    """

    available: bool
    reason: str = ""
    kernels: int = 0
    kinds: Mapping[str, int] = field(default_factory=dict)
    types: Mapping[str, int] = field(default_factory=dict)
    padded: tuple[str, ...] = ()
    activation_bytes: int = -1
    weights_bytes: int = -1


def read_lowering(messages: Sequence[str]) -> Lowering:
    """Reads the logger's `Layers:` and `Total ... Memory` messages."""
    memory = {m.group(1): int(m.group(2)) for text in messages if (m := _MEMORY.match(text))}
    lists = [text for text in messages if text.startswith("Layers:")]
    if len(lists) != 1:
        return Lowering(False, f"the build log holds {len(lists)} layer lists, expected 1")
    lines = [line for line in lists[0].split("\n\n")[0].splitlines()[1:] if line.strip()]
    kernels = []
    for line in lines:
        kernel = _read_kernel(line)
        if kernel is None:
            return Lowering(False, f"a line of the layer list has an unknown form: {line[:80]!r}")
        if kernel.kind not in _NO_KERNEL and not _makes_a_size(kernel):
            kernels.append(kernel)
    if not kernels:
        return Lowering(False, "the layer list is empty")
    image = _image_names(lists[0])
    return Lowering(
        available=True,
        kernels=len(kernels),
        kinds=dict(Counter(k.kind for k in kernels)),
        types=dict(Counter(_types(k) for k in kernels)),
        padded=tuple(text for k in kernels if (text := _padding(k, image))),
        activation_bytes=memory.get("Activation", -1),
        weights_bytes=memory.get("Weights", -1),
    )


def _read_kernel(line: str) -> Kernel | None:
    match = _LAYER.match(line)
    if match is None or "Outputs: [" not in match["rest"]:
        return None
    inputs, rest = match["rest"].split("Outputs: [", 1)
    inputs, _, constants = inputs.partition("Constants: [")
    outputs = rest.split("TacticName:")[0]
    return Kernel(match["name"], match["type"], _tensors(inputs), _tensors(constants), _tensors(outputs))


def _tensors(text: str) -> tuple[TensorUse, ...]:
    return tuple(
        TensorUse(m["name"], tuple(int(d) for d in m["dims"].split(",") if d), m["type"])
        for m in _TENSOR.finditer(text)
    )


def _image_names(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"Name: ([^,]*), IOMode: Input", text))


def _makes_a_size(kernel: Kernel) -> bool:
    """Arithmetic on one whole number, such as the free batch times the heads: nothing of the image."""
    tensors = (*kernel.inputs, *kernel.outputs)
    return all(t.type == "Int64" and t.dims in ((), (1,)) for t in tensors)


def _types(kernel: Kernel) -> str:
    """`Half->Half`; the first input is the activation."""
    first = kernel.inputs[0].type if kernel.inputs else "-"
    return f"{first}->{kernel.outputs[0].type if kernel.outputs else '-'}"


def _padding(kernel: Kernel, image: frozenset[str]) -> str:
    """`name: 63->64` for a kernel that widens one axis of its only input, else an empty string."""
    if len(kernel.inputs) != 1 or len(kernel.outputs) != 1 or kernel.inputs[0].name in image:
        return ""
    before, after = kernel.inputs[0].dims, kernel.outputs[0].dims
    wider = [(b, a) for b, a in zip(before, after, strict=False) if a != b]
    if len(before) != len(after) or len(wider) != 1 or not wider[0][0] < wider[0][1] < 2 * wider[0][0]:
        return ""
    if not any(word in kernel.name.lower() for word in _WIDENING):
        return ""
    return f"{kernel.name}: {wider[0][0]}->{wider[0][1]}"
