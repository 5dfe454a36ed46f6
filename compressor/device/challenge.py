"""Inputs of somebody else's in, every model's answers out: whoever ships a bundle compares them where he trusts.

`python -m compressor.device.challenge BUNDLE INPUTS.npz OUTPUTS.npz MODEL...`. Inputs are called `SET.K`, the k-th
input of a set of samples; outputs `MODEL.SET.K`, all counted from 0. What ran is a JSON object on stdout.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..errors import InputError
from .arrays import read_npz, write_npz
from .bundle import Manifest, ModelFile, choose_runtime, read_bundle, verify_files
from .commands import guarded
from .feeds import Array, Arrays, as_tuple, unwrapped
from .fields import shown
from .isolation import leave_current_folder
from .runtimes import open_model

MOST_BYTES = 1 << 29


def pack(sets: Sequence[Arrays], prefix: str = "") -> dict[str, Array]:
    """Sets of samples as an archive's arrays, by the names above."""
    packed: dict[str, Array] = {}
    for index, arrays in enumerate(sets):
        for k, array in enumerate(as_tuple(arrays)):
            packed[f"{prefix}{index}.{k}"] = array
    return packed


def unpack(arrays: dict[str, Array], prefix: str = "") -> list[Arrays]:
    """The inverse; raises InputError where a set or an array of one is missing."""
    pattern = re.compile(rf"{re.escape(prefix)}([0-9]+)\.([0-9]+)")
    sets: dict[int, dict[int, Array]] = defaultdict(dict)
    for match in filter(None, map(pattern.fullmatch, arrays)):
        sets[int(match[1])][int(match[2])] = arrays[match[0]]
    return [_complete(sets[index], index) for index in range(1 + max(sets, default=-1))]


def _complete(by_place: dict[int, Array], index: int) -> Arrays:
    """The arrays of one set in their order; InputError where one is missing."""
    places = range(len(by_place))
    if not by_place or by_place.keys() != set(places):
        raise InputError(f"the archive lacks an array of set {index}")
    return unwrapped(tuple(by_place[k] for k in places))


def answer_all(folder: Path, models: Sequence[ModelFile], sets: Sequence[Arrays]) -> dict[int, list[Arrays]]:
    """Of each model that runs here, by its place among `models`, the answers to every set."""
    answers: dict[int, list[Arrays]] = {}
    for index, model in enumerate(models):
        runtime, reason = choose_runtime(model, "")
        if not reason:
            session = open_model(folder / model.path, runtime=runtime, fused=not model.made_for)
            answers[index] = list(map(session.run, sets))
    return answers


def _challenge(words: Sequence[str]) -> int:
    if len(words) < 4:
        raise InputError("expected BUNDLE INPUTS.npz OUTPUTS.npz MODEL...")
    folder, inputs, outputs = map(Path, words[:3])
    manifest = read_bundle(folder)
    verify_files(folder, manifest)
    models = [_model(manifest, name) for name in words[3:]]
    with inputs.open("rb") as file:
        sets = unpack(read_npz(file, lambda names: names, most_bytes=MOST_BYTES))

    answers = answer_all(folder, models, sets)
    arrays: dict[str, Array] = {}
    for index, sets_answered in answers.items():
        arrays |= pack(sets_answered, f"{index}.")
    write_npz(outputs, arrays)
    print(json.dumps({"ran": [models[index].path for index in answers]}))
    return 0


def _model(manifest: Manifest, path: str) -> ModelFile:
    model = manifest.model_at(path)
    if model is None:
        raise InputError(f"the bundle has no model {shown(path)}")
    return model


if __name__ == "__main__":
    leave_current_folder()
    sys.exit(guarded(partial(_challenge, sys.argv[1:])))
