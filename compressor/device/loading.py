"""A bundle in, what answers to images out: `load(bundle)(images)`, in Python and with numpy and one runtime only.

from compressor import device

model = device.load("small.bundle")
print(model.choice)  # which file runs on which runtime, and what was measured
(answer,) = model("cat.png")
print(answer.classes[0]["label"])
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

import numpy as np

from ..errors import CompressorError, DataError, GateError
from . import fields
from .answering import read_samples, require_answer
from .answers import Answer, answers_of
from .archive import as_folder
from .bundle import open_bundle, read_bundle, require_listed, unused_engines
from .fastest import Pair, Ranking, rank
from .feeds import Array, Arrays, count, unwrapped
from .golden import distance, read_golden
from .images import Preprocessing, array_picture, normalised, picture_inputs, require_finite
from .leaves import names_of
from .manifest import BUILT, Manifest
from .parity import failures
from .runtimes import Session

if TYPE_CHECKING:
    import PIL.Image

One: TypeAlias = "str | os.PathLike[str] | PIL.Image.Image | Array | tuple[Array, ...] | Mapping[str, Array]"
"""A file, a picture, an array, or of several inputs a tuple in their order or a mapping by their names."""
Given: TypeAlias = "One | list[One]"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A bundle's model, ready to answer. `choice` says in words which file runs on which runtime, and why that one.

    `unused` are engines that were left out before that, since they are of another GPU or library, each with why.
    """

    manifest: Manifest
    session: Session
    choice: str
    unused: tuple[str, ...] = ()

    def __call__(self, inputs: Given, *, top: int = 5) -> tuple[Answer, ...]:
        """An answer for each sample, in order; `top` classes each of a classifier.

        Images: a file's path, Pillow's image, uint8 pixels [H, W, 3] or [H, W] of any size, uint8 [N, H, W, C] of the
        model's size, or float32 [N, C, H, W] ready for the model. Other inputs: arrays [N, ...] as the manifest
        declares them, of several a tuple in their order or a mapping by their names. A list holds any of these.
        Raises DataError for what is none, GateError for answers that are not what the bundle declares.
        """
        answers: list[Answer] = []
        for outputs in self.raw(inputs):
            answers += answers_of(self.manifest, outputs, top=top)
        return tuple(answers)

    def raw(self, inputs: Given) -> list[Arrays]:
        """The model's own outputs [N, ...], a tuple of several, for each entry of a list and for anything else once."""
        entries = inputs if isinstance(inputs, list) else [inputs]
        return [self._answer(entry, f"input {index}") for index, entry in enumerate(entries)]

    def _answer(self, entry: One, where: str) -> Arrays:
        samples = prepared(entry, self.manifest, where)
        return require_answer(self.session.run(samples), samples, self.manifest, where)


def load(bundle: str | os.PathLike[str], *, runtime: str = "", model: str = "", threads: int = 0) -> Loaded:
    """The bundle's model that is fastest here, as it was measured; its hashes are checked before anything runs.

    An archive that `pack` wrote is unpacked, compared with its hashes and removed again once the model is in memory.
    `runtime` and `model` (a file of the bundle, or a precision such as "int8") leave out the others. What was measured
    is kept for the next time, in the user's folder of caches; one that does not give the golden outputs is not taken.
    Raises GateError for a bundle that is not whole, MissingPackageError or EngineError where nothing runs here.
    """
    with as_folder(Path(bundle)) as folder:
        return _load(folder, runtime, model, threads)


def _load(folder: Path, runtime: str, model: str, threads: int) -> Loaded:
    manifest = read_bundle(folder)
    require_listed(folder, manifest)
    ranking = rank(folder, manifest, runtime=runtime, model=model, threads=threads)
    *pairs, last = ranking.pairs
    refused: list[str] = []
    for pair in pairs:
        try:
            return _loaded(folder, manifest, pair, threads, ranking, refused)
        except CompressorError as error:
            passed_before = _is_built(pair) or not ranking.is_new
            if isinstance(error, GateError) and passed_before:  # something was changed
                raise
            refused.append(f"{pair} is not taken: {error}")
    return _loaded(folder, manifest, last, threads, ranking, refused)


def _loaded(
    folder: Path, manifest: Manifest, pair: Pair, threads: int, ranking: Ranking, refused: Sequence[str]
) -> Loaded:
    """Its model, which is held to the golden outputs where it was chosen now."""
    session = open_bundle(folder, runtime=pair.runtime, threads=threads, model=pair.model.path)[1]
    # an engine that was built here was held to them as it was opened; what a builder is to read is computed otherwise
    is_held = _is_built(pair) or pair.model.made_for
    if ranking.is_new and not is_held:
        broken = failures(distance(session, read_golden(folder, manifest)), pair.model.limits)
        if broken:
            raise GateError(f"{pair} differs from the golden outputs: {'; '.join(broken)}")
    choice = fields.printable("; ".join([f"{pair}: {ranking.reason}", *refused]))
    return Loaded(manifest, session, choice, tuple(map(fields.printable, unused_engines(folder, manifest))))


def _is_built(pair: Pair) -> bool:
    return pair.model.path.startswith(f"{BUILT}/")


def prepared(given: One, manifest: Manifest, where: str) -> Arrays:
    """The inputs [N, ...] as the model takes them; `where` names them in errors."""
    if isinstance(given, (str, os.PathLike)):
        return read_samples(Path(given), manifest)
    if manifest.preprocessing is not None:
        return _images(given, manifest.preprocessing, where)
    return _arrays(given, manifest, where)


def _images(given: One, preprocessing: Preprocessing, where: str) -> Array:
    if _is_picture(given):
        return picture_inputs(given, preprocessing, where)
    if not isinstance(given, np.ndarray):
        raise DataError(f"{where} is a {type(given).__name__}, expected a path, a picture or an array of pixels")
    if given.dtype == np.uint8 and given.ndim in (2, 3):
        return picture_inputs(array_picture(given, where), preprocessing, where)
    return normalised(given, preprocessing, where)


def _is_picture(given: object) -> TypeGuard[PIL.Image.Image]:
    """Whether it is Pillow's, which who has one has imported."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(given, pillow.Image)


def _arrays(given: One, manifest: Manifest, where: str) -> Arrays:
    names = names_of(manifest.inputs)
    arrays = _in_order(given, names, where)
    if len(arrays) != len(names):
        raise DataError(f"{where} holds {len(arrays)} arrays, the model takes {len(names)}: {', '.join(names)}")

    for array, leaf in zip(arrays, manifest.inputs, strict=True):
        is_declared = isinstance(array, np.ndarray) and leaf.is_of(array)
        if not is_declared or not len(array) == count(arrays) > 0:
            kind = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
            raise DataError(f"{where} has {kind} for {leaf.name!r}, expected {leaf}, equally many samples of each")
        require_finite(array, where)
    return unwrapped(arrays)


def _in_order(given: One, names: Sequence[str], where: str) -> tuple[Array, ...]:
    """The arrays by the inputs' `names`; none of what holds no arrays."""
    match given:
        case np.ndarray():
            return (given,)
        case tuple():
            return given
        case Mapping():
            for name in names:
                if name not in given:
                    raise DataError(f"{where} has no {name!r}; the model takes {', '.join(names)}")
            return tuple(given[name] for name in names)
    return ()
