"""The gate an exported file passes before anything is built from it: its structure and its numbers.

In: an ONNX file, the torch module it came from, real inputs. Out: the parity at each batch size, or GateError
naming what is wrong and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from ..device.parity import LIMITS, Limits, Parity, compare, failures
from ..device.runtimes import REFERENCE, open_model
from ..errors import GateError, ModelError
from ..placement import CPU, placed
from .onnx import check_structure

_REFERENCE_BATCH = 8


def check_export(
    path: Path | str,
    reference: nn.Module,
    images: NDArray[np.float32],
    *,
    batches: Sequence[int] = (1, 3),
    limits: Limits = LIMITS["fp32"],
    runtime: str = REFERENCE,
) -> dict[int, Parity]:
    """Parity with `reference` by batch size, on the first images [N, C, H, W] that fill each batch.

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
    images: NDArray[np.float32],
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

    parities = {}
    for batch in batches:
        usable = images[: max(len(images) // batch, 1) * batch]  # 7 images in threes: the first 6
        if len(usable) < batch:
            raise GateError(f"parity at batch {batch} needs as many images, {len(images)} were given")
        try:
            outputs = [session.run(usable[i : i + batch]) for i in range(0, len(usable), batch)]
        except ModelError as error:
            raise GateError(
                f"{path} does not run at batch {batch}: {error}; export it with a free batch axis"
            ) from error
        parities[batch] = compare(expected[: len(usable)], np.concatenate(outputs))
    return parities


def _load_structure(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:
        raise GateError(f"{path} can't be read as ONNX ({type(error).__name__}); export it again") from error


@torch.no_grad()
def _reference_outputs(reference: nn.Module, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """In evaluation mode, on the CPU; a traced graph has none to switch and is in it already."""
    reference = placed(reference, CPU)
    modes = {module: module.training for module in reference.modules()}
    outputs = []
    try:
        for module in modes:
            module.training = False  # not by eval(), which exported graphs refuse
        for i in range(0, len(images), _REFERENCE_BATCH):
            batch = torch.from_numpy(images[i : i + _REFERENCE_BATCH])
            outputs.append(_first_output(reference(batch)))
    finally:
        for module, training in modes.items():
            module.training = training
    return np.concatenate(outputs)


def _first_output(output: object) -> NDArray[np.float32]:
    while isinstance(output, (tuple, list)):
        output = output[0]
    assert isinstance(output, torch.Tensor)
    return output.float().numpy()
