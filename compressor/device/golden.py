"""A bundle's golden inputs and outputs: read with limits from bytes that were hashed, and a model's distance from them.

Both come from one open file, so that what was hashed is what is read, whoever replaces the bundle meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import GateError
from .arrays import read_npz
from .builder import sha256_of_open
from .feeds import as_tuple, joined, parted
from .manifest import GOLDEN, Manifest
from .parity import Parity, compare
from .runtimes import Session

_MOST_BYTES = 1 << 29  # inputs and outputs; eight images of 2048 x 2048 are 400 MB
_MOST_OUTPUT_BYTES = 1 << 26
_MOST_IMAGES = 1024
_MOST_MAGNITUDE = 1e30


@dataclass(frozen=True, slots=True)
class Golden:
    """`inputs` float32 [N, C, H, W] as the model takes them, `outputs` [N, ...] of the fp32 reference."""

    inputs: NDArray[np.float32]
    outputs: NDArray[np.floating]


def read_golden(folder: Path, manifest: Manifest) -> Golden:
    """The arrays of the bundle's golden file; raises GateError unless it is the manifest's and fits its model."""
    path = folder / GOLDEN
    if path.is_symlink() or not path.is_file():
        raise GateError(f"{GOLDEN} is missing; get the bundle again")
    try:
        with path.open("rb") as file:
            if sha256_of_open(file) != manifest.files[GOLDEN]["sha256"]:
                raise GateError(f"{GOLDEN} was changed: its sha256 differs from the manifest's; get the bundle again")
            file.seek(0)
            arrays = read_npz(file, _inputs_and_outputs, most_bytes=_most_bytes(manifest))
        golden = Golden(arrays["inputs"], arrays["outputs"])
        _require_fit(golden, manifest)
    except (OSError, ValueError) as error:
        raise GateError(f"{GOLDEN} {error}; get the bundle again") from error
    return golden


def _most_bytes(manifest: Manifest) -> int:
    """What inputs of the model's size and a row of outputs for each can take."""
    preprocessing = manifest.preprocessing
    height, width = preprocessing.size
    image_bytes = 4 * len(preprocessing.mean) * height * width  # float32
    return min(_MOST_BYTES, _MOST_IMAGES * image_bytes + _MOST_OUTPUT_BYTES)


def _inputs_and_outputs(names: Sequence[str]) -> Sequence[str]:
    wanted = ("inputs", "outputs")
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"holds no {' and no '.join(missing)}")
    return wanted


def _require_fit(golden: Golden, manifest: Manifest) -> None:
    """Raises ValueError unless the arrays are images as the model takes them, and a row of finite floats for each."""
    inputs, outputs = golden.inputs, golden.outputs
    image_shape = (len(manifest.preprocessing.mean), *manifest.preprocessing.size)  # [C, H, W]
    if inputs.dtype != np.float32 or inputs.shape[1:] != image_shape or not 1 <= len(inputs) <= _MOST_IMAGES:
        expected = ", ".join(map(str, image_shape))
        raise ValueError(
            f"holds inputs {inputs.dtype} {list(inputs.shape)}, expected float32 [N, {expected}] of "
            f"1 to {_MOST_IMAGES} images"
        )
    if outputs.dtype.kind != "f" or outputs.ndim < 2 or len(outputs) != len(inputs) or outputs.size == 0:
        raise ValueError(
            f"holds outputs {outputs.dtype} {list(outputs.shape)}, expected floats [{len(inputs)}, classes]"
        )
    for name, array in (("inputs", inputs), ("outputs", outputs)):
        if not -_MOST_MAGNITUDE <= array.min() <= array.max() <= _MOST_MAGNITUDE:  # NaN lies nowhere
            raise ValueError(f"holds {name} that are not finite, or beyond {_MOST_MAGNITUDE:g}")


def distance(session: Session, golden: Golden, at_once: int = _MOST_IMAGES) -> Parity:
    """How far the session's outputs lie from the golden ones, computed on at most `at_once` images at a time.

    Raises GateError for outputs of another shape, and what `Session.run` raises.
    """
    outputs = [session.run(part) for part in parted(golden.inputs, at_once)]
    if any(output.ndim == 0 for output in outputs for output in as_tuple(output)):
        raise GateError(f"{session.path} answers with a single number, expected a row for each image")
    return compare(golden.outputs, joined(outputs))
