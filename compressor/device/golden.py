"""A bundle's golden inputs and outputs: read with limits from bytes that were hashed, and a model's distance from them.

Both come from one open file, so that what was hashed is what is read, whoever replaces the bundle meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from ..errors import GateError
from .arrays import read_npz
from .builder import sha256_of_open
from .feeds import Array, Arrays, as_tuple, has_rows, joined, parted, unwrapped
from .folders import is_plain_file
from .leaves import Leaf, names_of
from .manifest import GOLDEN, IMAGES_SCHEMA, Manifest
from .parity import Parity, compare
from .runtimes import Session

MOST_BYTES = 1 << 29  # inputs and outputs; eight images of 2048 x 2048 are 400 MB
_MOST_OUTPUT_BYTES = 1 << 26  # where the manifest does not say what outputs are
MOST_SAMPLES = 1024
_MOST_MAGNITUDE = 1e30


@dataclass(frozen=True, slots=True)
class Golden:
    """`inputs` [N, ...] as the model takes them, `outputs` [N, ...] of the fp32 reference; tuples of several.

    `output_names` are what messages call several outputs.
    """

    inputs: Arrays
    outputs: Arrays
    output_names: tuple[str, ...] = ()


def members_of(manifest: Manifest) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What inputs and outputs are called in the golden file."""
    if manifest.schema == IMAGES_SCHEMA:
        return ("inputs",), ("outputs",)
    inputs = tuple(f"input.{name}" for name in names_of(manifest.inputs))
    outputs = tuple(f"output.{name}" for name in names_of(manifest.outputs))
    return inputs, outputs


def read_golden(folder: Path, manifest: Manifest) -> Golden:
    """The arrays of the bundle's golden file; raises GateError unless it is the manifest's and fits its model."""
    path = folder / GOLDEN
    if not is_plain_file(path):
        raise GateError(f"{GOLDEN} is missing; get the bundle again")
    inputs, outputs = members_of(manifest)
    try:
        with path.open("rb") as file:
            if sha256_of_open(file) != manifest.files[GOLDEN]["sha256"]:
                raise GateError(f"{GOLDEN} was changed: its sha256 differs from the manifest's; get the bundle again")
            file.seek(0)
            choose = partial(_require_all, (*inputs, *outputs))
            arrays = read_npz(file, choose, most_bytes=_most_bytes(manifest))
        _require_fit(arrays, manifest)
    except (OSError, ValueError) as error:
        raise GateError(f"{GOLDEN} {error}; get the bundle again") from error
    return Golden(_of_names(arrays, inputs), _of_names(arrays, outputs), tuple(names_of(manifest.outputs)))


def _of_names(arrays: Mapping[str, Array], names: Sequence[str]) -> Arrays:
    return unwrapped(tuple(arrays[name] for name in names))


def _most_bytes(manifest: Manifest) -> int:
    """What samples of the declared shapes can take."""
    sample_bytes = sum(leaf.sample_bytes for leaf in (*manifest.inputs, *manifest.outputs))
    undeclared_bytes = 0 if manifest.outputs else _MOST_OUTPUT_BYTES
    return min(MOST_BYTES, MOST_SAMPLES * sample_bytes + undeclared_bytes)


def _require_all(wanted: Sequence[str], names: Sequence[str]) -> Sequence[str]:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"holds no {' and no '.join(missing[:2])}")
    return wanted


def _require_fit(arrays: Mapping[str, Array], manifest: Manifest) -> None:
    """Raises ValueError unless the arrays are finite and what the manifest declares, equally many samples of each."""
    inputs, outputs = members_of(manifest)
    samples = next(iter(arrays[inputs[0]].shape), 0)  # a single number has none
    leaves = (*manifest.inputs, *manifest.outputs)
    for name, leaf in zip((*inputs, *outputs), leaves, strict=False):  # older manifests declare no output
        _require_declared(name, arrays[name], leaf, samples)
    if not manifest.outputs:
        _require_rows(outputs[0], arrays[outputs[0]], samples)

    for name, array in arrays.items():
        low, high = float(array.min()), float(array.max())
        if not -_MOST_MAGNITUDE <= low <= high <= _MOST_MAGNITUDE:  # NaN lies nowhere
            raise ValueError(f"holds {name} that are not finite, or beyond {_MOST_MAGNITUDE:g}")


def _require_declared(name: str, array: Array, leaf: Leaf, samples: int) -> None:
    if not leaf.is_of(array) or not 1 <= len(array) == samples <= MOST_SAMPLES:
        raise ValueError(
            f"holds {name} {array.dtype} {list(array.shape)}, expected {leaf} of 1 to {MOST_SAMPLES} samples, "
            "equally many of each"
        )


def _require_rows(name: str, array: Array, samples: int) -> None:
    """Of an output that nothing is declared of: floats, a row for each sample."""
    if array.dtype.kind != "f" or not has_rows(array, samples):
        raise ValueError(f"holds {name} {array.dtype} {list(array.shape)}, expected floats [{samples}, classes]")


def distance(session: Session, golden: Golden, at_once: int = MOST_SAMPLES) -> Parity:
    """How far the session's outputs lie from the golden ones, computed on at most `at_once` samples at a time.

    Raises GateError for outputs of other numbers and shapes, and what `Session.run` raises.
    """
    outputs = list(map(session.run, parted(golden.inputs, at_once)))
    if not all(array.ndim for array in chain.from_iterable(map(as_tuple, outputs))):
        raise GateError(f"{session.path} answers with a single number, expected a row for each image")
    try:
        answered = joined(outputs)
    except ValueError as error:
        raise GateError(f"{session.path} answers some samples with other shapes than others") from error
    return compare(golden.outputs, answered, golden.output_names)
