"""The gate an exported file passes before anything is built from it: its structure and its numbers.

In: an ONNX file, the torch module it came from, real inputs. Out: the parity at each batch size, or GateError
naming what is wrong and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor, fx, nn

from ..device import feeds
from ..device.feeds import Array, Arrays
from ..device.parity import LIMITS, Limits, Parity, compare, failures
from ..device.runtimes import REFERENCE, open_model
from ..errors import GateError, ModelError
from ..graph.double import in_both_widths
from ..graph.interface import answers
from ..graph.program import modes_kept
from ..placement import CPU, placed
from ..tensors import Inputs, from_arrays, named_leaves
from .onnx import check_structure

_REFERENCE_BATCH = 8


def check_export(
    path: Path | str,
    reference: nn.Module,
    images: Arrays,
    *,
    batches: Sequence[int] = (1, 3),
    limits: Limits = LIMITS["fp32"],
    runtime: str = REFERENCE,
) -> dict[int, Parity]:
    """Parity with `reference` by batch size, on the first images [N, ...] of every input that fill each batch.

    Every image is seen at every batch size, so a file that mixes up the batch can't pass. Raises GateError for
    training-mode operations, a fixed batch, NaN weights, other shapes or outputs outside `limits`.
    """
    parities = measure_export(path, reference, images, batches=batches, runtime=runtime)
    for batch, parity in parities.items():
        broken_limits = failures(parity, limits)
        if broken_limits:
            raise GateError(
                f"{path} differs from the model at batch {batch}: {'; '.join(broken_limits)} on {parity.n} images; "
                "export it again from the model it is compared with, in evaluation mode"
            )
    return parities


def measure_export(
    path: Path | str,
    reference: nn.Module,
    images: Arrays,
    *,
    batches: Sequence[int] = (1, 3),
    runtime: str = REFERENCE,
    fused: bool = True,
) -> dict[int, Parity]:
    """The same without limits: raises GateError only for what can't be measured, structure and batch.

    `fused=False` for a file made for another library than the runtime (see `open_model`).
    """
    path = Path(path)
    check_structure(_load_structure(path), str(path))
    expected = _reference_outputs(reference, images)
    session = open_model(path, runtime=runtime, fused=fused)
    names = [port.name for port in session.outputs]

    parities = {}
    total = feeds.count(images)
    for batch in batches:
        usable = feeds.cut(images, 0, max(total // batch, 1) * batch)  # 7 images in threes: the first 6
        if total < batch:
            raise GateError(f"parity at batch {batch} needs as many images, {total} were given")
        try:
            outputs = [session.run(part) for part in feeds.parted(usable, batch)]
        except ModelError as error:
            raise GateError(
                f"{path} does not run at batch {batch}: {error}; export it with a free batch axis"
            ) from error
        parities[batch] = compare(feeds.cut(expected, 0, feeds.count(usable)), feeds.joined(outputs), names)
    return parities


def measure_rounding(graph: fx.GraphModule, images: Inputs) -> Parity:
    """How far PyTorch's own answers in float32 are from those in float64, on images [N, ...]."""
    answered, exact = in_both_widths(graph, images)
    return compare(_arrays(exact, exactly=True), _arrays(answered))


def _load_structure(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:
        raise GateError(f"{path} can't be read as ONNX ({type(error).__name__}); export it again") from error


@torch.no_grad()
def _reference_outputs(reference: nn.Module, images: Arrays) -> Arrays:
    """In evaluation mode, on the CPU; a traced graph has none to switch and is in it already."""
    reference = placed(reference, CPU)
    outputs = []
    with modes_kept(reference):
        for module in reference.modules():
            module.training = False  # not by eval(), which exported graphs refuse
        for part in feeds.parted(images, _REFERENCE_BATCH):
            inputs = from_arrays(part)
            leaves = answers(reference, inputs) if isinstance(reference, fx.GraphModule) else _leaves(reference, inputs)
            outputs.append(_arrays(leaves))
    return feeds.joined(outputs)


def _leaves(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(named_leaves(module(*inputs)).values())


def _arrays(leaves: Sequence[Tensor], *, exactly: bool = False) -> Arrays:
    """One array alone, or a tuple of several: floats in 32 bits, or `exactly` in 64; all else stays what it is."""
    width = torch.float64 if exactly else torch.float32
    return feeds.unwrapped(tuple(_array(leaf, width) for leaf in leaves))


def _array(leaf: Tensor, width: torch.dtype) -> Array:
    leaf = leaf.to(width) if leaf.is_floating_point() else leaf
    array: Array = leaf.numpy()
    return array
