"""The builder's verbose log in, what the network was lowered to out: kernels, types, padding, memory.

The log's text is documented nowhere, so anything unexpected makes the reading `unavailable` instead of wrong.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<tensors>.*)$")
_TENSOR = re.compile(r"Name: (?P<name>[^,]*), Dimensions: \[(?P<dims>[-0-9,]*)\].*?Datatype: (?P<type>\w+)")
_MEMORY = re.compile(r"^Total (Activation|Weights) Memory: (\d+) bytes")
_NO_KERNEL = ("shape_call", "signal", "wait")  # shapes are computed on the CPU, streams wait for each other
# The generated kernel that widens a tensor is named after its two steps, replicate (a zero) and concatenate.
_WIDENING = re.compile("replconc|pad", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TensorUse:
    """A tensor as a kernel reads or writes it; `type` is the log's word, such as `Half`."""

    name: str
    dims: tuple[int, ...]
    type: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """One line of the layer list; `kind` is the log's word for it, such as `kgen`."""

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
    """Reads the logger's `Layers:` and `Total ... Memory` messages; the rest of the log is passed over."""
    lists = [text for text in messages if text.startswith("Layers:")]
    if len(lists) != 1:
        return Lowering(False, f"the build log holds {len(lists)} layer lists, expected 1")

    layer_list = lists[0].split("\n\n")[0]  # behind an empty line the engine's inputs and outputs follow
    kernels = []
    for line in filter(str.strip, layer_list.splitlines()[1:]):
        kernel = _read_kernel(line)
        if kernel is None:
            return Lowering(False, f"a line of the layer list has an unknown form: {line[:80]!r}")
        if kernel.kind not in _NO_KERNEL and not _makes_a_size(kernel):
            kernels.append(kernel)
    if not kernels:
        return Lowering(False, "the layer list is empty")

    memory_bytes = _memory_bytes(messages)
    images = _image_names(lists[0])
    return Lowering(
        available=True,
        kernels=len(kernels),
        kinds=dict(Counter(kernel.kind for kernel in kernels)),
        types=dict(Counter(map(_types, kernels))),
        padded=tuple(filter(None, (_padding(kernel, images) for kernel in kernels))),
        activation_bytes=memory_bytes.get("Activation", -1),
        weights_bytes=memory_bytes.get("Weights", -1),
    )


def _memory_bytes(messages: Sequence[str]) -> dict[str, int]:
    matches = filter(None, map(_MEMORY.match, messages))
    return {match[1]: int(match[2]) for match in matches}


def _read_kernel(line: str) -> Kernel | None:
    """`Name: .., LayerType: .., Inputs: [ {..}], Constants: [..], Outputs: [ {..}], TacticName: ..`, or None."""
    match = _LAYER.match(line)
    if match is None or "Outputs: [" not in match["tensors"]:
        return None
    operands, results = match["tensors"].split("Outputs: [", 1)
    inputs, _, constants = operands.partition("Constants: [")
    outputs = results.split("TacticName:")[0]
    return Kernel(match["name"], match["type"], _tensors(inputs), _tensors(constants), _tensors(outputs))


def _tensors(text: str) -> tuple[TensorUse, ...]:
    return tuple(TensorUse(match["name"], _dims(match["dims"]), match["type"]) for match in _TENSOR.finditer(text))


def _dims(text: str) -> tuple[int, ...]:
    """`1,64,56,56` as numbers; nothing between the brackets is a single number's shape, ()."""
    return tuple(map(int, filter(None, text.split(","))))


def _image_names(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"Name: ([^,]*), IOMode: Input", text))


def _makes_a_size(kernel: Kernel) -> bool:
    """Arithmetic on one whole number, such as the free batch times the heads: nothing of the image."""
    kinds = {(tensor.type, tensor.dims) for tensor in (*kernel.inputs, *kernel.outputs)}
    return kinds <= {("Int64", ()), ("Int64", (1,))}


def _types(kernel: Kernel) -> str:
    """`Half->Half`; the first input is the activation."""
    return f"{_first_type(kernel.inputs)}->{_first_type(kernel.outputs)}"


def _first_type(tensors: Sequence[TensorUse]) -> str:
    return tensors[0].type if tensors else "-"


def _padding(kernel: Kernel, images: frozenset[str]) -> str:
    """`name: 63->64` for a kernel that widens one axis of its only input, else an empty string."""
    if not len(kernel.inputs) == len(kernel.outputs) == 1 or not _WIDENING.search(kernel.name):
        return ""
    before, after = kernel.inputs[0], kernel.outputs[0]
    if before.name in images or len(before.dims) != len(after.dims):
        return ""
    changes = [(old, new) for old, new in zip(before.dims, after.dims, strict=True) if old != new]
    if len(changes) != 1:
        return ""

    width, padded_width = changes[0]
    if not width < padded_width < 2 * width:  # twice as wide or more: channels packed several times over
        return ""
    return f"{kernel.name}: {width}->{padded_width}"
