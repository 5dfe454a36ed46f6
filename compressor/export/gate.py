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
from ..device.runtimes import open_model
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
) -> dict[int, Parity]:
    """Parity with `reference` by batch size, on the first images [N, ...] of every input that fill each batch.

    Every image is seen at every batch size, so a file that mixes up the batch can't pass. Raises GateError for
    training-mode operations, a fixed batch, NaN weights, other shapes or outputs outside `limits`.
    """
    parities = measure_export(path, reference, images, batches=batches)
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
    fused: bool = True,
) -> dict[int, Parity]:
    """The same without limits: raises GateError only for what can't be measured, structure and batch.

    `fused=False` for a file made for another library than ONNX Runtime (see `open_model`).
    """
    path = Path(path)
    check_structure(_load_structure(path), str(path))
    expected = _reference_outputs(reference, images)
    session = open_model(path, fused=fused)
    names = [port.name for port in session.outputs]

    parities = {}
    total = feeds.count(images)
    for batch in batches:
        if total < batch:
            raise GateError(f"parity at batch {batch} needs as many images, {total} were given")
        usable = total // batch * batch  # 7 images in threes: the first 6
        try:
            outputs = [session.run(inputs) for inputs in feeds.parted(feeds.cut(images, 0, usable), batch)]
        except ModelError as error:
            raise GateError(
                f"{path} does not run at batch {batch}: {error}; export it with a free batch axis"
            ) from error
        parities[batch] = compare(feeds.cut(expected, 0, usable), feeds.joined(outputs), names)
    return parities


def measure_rounding(graph: fx.GraphModule, images: Inputs) -> Parity:
    """How far PyTorch's own answers in float32 are from those in float64, on images [N, ...]."""
    answered, exact = in_both_widths(graph, images)
    return compare(_arrays(exact, torch.float64), _arrays(answered, torch.float32))


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
        for inputs in feeds.parted(images, _REFERENCE_BATCH):
            outputs.append(_arrays(_leaves(reference, from_arrays(inputs)), torch.float32))
    return feeds.joined(outputs)


def _leaves(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if isinstance(network, fx.GraphModule):
        return answers(network, inputs)
    return tuple(named_leaves(network(*inputs)).values())


def _arrays(leaves: Sequence[Tensor], width: torch.dtype) -> Arrays:
    """One array alone, or a tuple of several: floats in that width; all else stays what it is."""
    return feeds.unwrapped(tuple(_array(leaf, width) for leaf in leaves))


def _array(leaf: Tensor, width: torch.dtype) -> Array:
    if leaf.is_floating_point():
        leaf = leaf.to(width)
    array: Array = leaf.numpy()
    return array
