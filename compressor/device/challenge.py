"""Inputs of somebody else's in, every model's answers out: whoever ships a bundle compares them where he trusts.

`python -m compressor.device.challenge BUNDLE INPUTS.npz OUTPUTS.npz MODEL...`. Inputs are called `SET.K`, the k-th
input of a set of samples; outputs `MODEL.SET.K`, all counted from 0. What ran is a JSON object on stdout.
"""

from __future__ import annotations

import json
import sys
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
    return {
        f"{prefix}{index}.{k}": array for index, arrays in enumerate(sets) for k, array in enumerate(as_tuple(arrays))
    }


def unpack(arrays: dict[str, Array], prefix: str = "") -> list[Arrays]:
    """The inverse; raises InputError where a set or an array of one is missing."""
    by_place: dict[tuple[int, int], Array] = {}
    for name, array in arrays.items():
        numbers = name.removeprefix(prefix).split(".")
        if name.startswith(prefix) and len(numbers) == 2 and all(number.isdigit() for number in numbers):
            by_place[int(numbers[0]), int(numbers[1])] = array
    sets = []
    for index in range(1 + max((place[0] for place in by_place), default=-1)):
        places = sorted(place for place in by_place if place[0] == index)
        if not places or [k for _, k in places] != list(range(len(places))):
            raise InputError(f"the archive lacks an array of set {index}")
        sets.append(unwrapped(tuple(by_place[place] for place in places)))
    return sets


def answer_all(folder: Path, models: Sequence[ModelFile], sets: Sequence[Arrays]) -> dict[int, list[Arrays]]:
    """Of each model that runs here, by its place among `models`, the answers to every set."""
    answers: dict[int, list[Arrays]] = {}
    for index, model in enumerate(models):
        runtime, reason = choose_runtime(model, "")
        if not reason:
            session = open_model(folder / model.path, runtime=runtime, fused=not model.made_for)
            answers[index] = [session.run(arrays) for arrays in sets]
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
    ran = [models[index].path for index in answers]
    print(json.dumps({"ran": ran}))
    return 0


def _model(manifest: Manifest, path: str) -> ModelFile:
    for model in manifest.models:
        if model.path == path:
            return model
    raise InputError(f"the bundle has no model {shown(path)}")


if __name__ == "__main__":
    leave_current_folder()
    sys.exit(guarded(partial(_challenge, sys.argv[1:])))
