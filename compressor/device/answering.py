"""A file in, what a bundle's model answers to it out: read as the bundle says, run, and held to what it declares.

Where the bundle has a pre-processing, images; else arrays by the inputs' names. Knows nothing of hashes and checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError, GateError
from . import fields
from .feeds import Array, Arrays, as_tuple, count, unwrapped
from .images import (
    ARRAY_FILES,
    checked_outputs,
    load_inputs,
    read_array_file,
    require_file,
    require_finite,
    require_finite_answer,
)
from .leaves import Leaf, names_of
from .manifest import Manifest
from .runtimes import Session


def answers(session: Session, manifest: Manifest, path: Path) -> Arrays:
    """The answer [N, ...] to the samples of one file, a tuple where the model has several outputs.

    Raises DataError for a file the model takes nothing of, GateError when it answers with anything else than declared.
    """
    samples = read_samples(path, manifest)
    return require_answer(session.run(samples), samples, manifest, str(path))


def require_answer(outputs: Arrays, samples: Arrays, manifest: Manifest, where: str) -> Arrays:
    """The outputs; GateError where they are anything else than the bundle declares for these samples."""
    if not manifest.outputs:
        return checked_outputs(as_tuple(outputs)[0], as_tuple(samples)[0], where)
    _require_declared(as_tuple(outputs), manifest.outputs, count(samples), where)
    return outputs


def read_samples(path: Path, manifest: Manifest) -> Arrays:
    """The inputs [N, ...] in a file: an image, an .npy of the only input, or an .npz of arrays named as the inputs.

    An .npz may as well be one that `compress` takes, or a golden file: `input.NAME`, of an only input `inputs`.
    """
    if manifest.preprocessing is not None:
        return load_inputs(path, manifest.preprocessing)
    require_file(path)
    arrays = _read_arrays(path, names_of(manifest.inputs))
    for array, leaf in zip(arrays, manifest.inputs, strict=True):
        if not leaf.is_of(array) or not len(array) == len(arrays[0]) > 0:
            raise DataError(
                f"{path} holds {array.dtype} of shape {list(array.shape)}, expected {leaf} for {leaf.name!r}, "
                "with at least one sample and equally many for each input"
            )
        require_finite(array, str(path))
    return unwrapped(arrays)


def _read_arrays(path: Path, names: Sequence[str]) -> tuple[Array, ...]:
    """One for each name; raises DataError for a file that does not hold them."""
    listed = fields.shown(", ".join(names))
    endings: tuple[str, ...] = (".npz",)
    spellings = [names, [f"input.{name}" for name in names]]
    if len(names) == 1:
        endings = ARRAY_FILES
        spellings.append(["inputs"])
    if path.suffix.lower() not in endings:
        raise DataError(f"{path}: the model takes no images; its input is an .npz with arrays named {listed}")

    def choose(stored: Sequence[str]) -> Sequence[str]:
        if len(names) == len(stored) == 1 and stored[0]:
            return stored
        for spelling in spellings:
            if set(spelling) <= set(stored):
                return spelling
        raise DataError(f"{path} holds {fields.shown(', '.join(stored))}; expected arrays named {listed}")

    return read_array_file(path, choose)


def _require_declared(outputs: Sequence[Array], leaves: Sequence[Leaf], samples: int, where: str) -> None:
    if len(outputs) != len(leaves):
        raise GateError(
            f"the model answers {where} with {len(outputs)} arrays, the bundle declares {len(leaves)} outputs; "
            "it is not this bundle's"
        )
    for array, leaf in zip(outputs, leaves, strict=True):
        if not leaf.is_answered_by(array) or len(array) != samples:
            raise GateError(
                f"the model answers {where} with {array.dtype} of shape {list(array.shape)}, expected {leaf} for "
                f"{leaf.name!r} and {samples} samples; it is not this bundle's"
            )
        require_finite_answer(array, where)
