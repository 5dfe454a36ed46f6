"""Seeded mutations of every file that the host reads: a result or an error of the tree, never anything else.

A short form; the seeds are fixed, so that what fails here fails again.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from compressor.benchmarking.records import Measured, Options, SubjectRow, read_measured, write_measured
from compressor.device.environment import Environment
from compressor.errors import CompressorError
from compressor.files import read_json, read_record, signed, write_json, write_record, write_text
from compressor.graph import trace
from compressor.inputs.calls import parse_call
from compressor.inputs.checkpoints import fill
from compressor.inputs.entries import Signature
from compressor.inputs.images import Preprocessing, require_decodable
from compressor.inputs.sources import load_images, load_source, require_labels
from compressor.latency.tables import Kept
from compressor.pruning import find_structure
from compressor.pruning.check import random_units
from compressor.recipe import Recipe, read_recipe, to_toml
from compressor.records import Accuracy, Group, Groups, InputSpec, Plan, Scores, Site
from compressor.relevance.spelling import composite_of
from compressor.run.saved import (
    Network,
    example_of,
    load_saved,
    read_network,
    read_weights,
    rebuild,
    save,
    write_weights,
)
from compressor.run.stages import open_run, recorded_files

MUTATIONS = int(os.environ.get("COMPRESSOR_FUZZ", "40"))  # of each reader
JUNK = ("[", "{", '"', "-1", "1e999", "NaN", "null", "true", "9" * 400, "[[[[", "\0", "é", "../x", "\\u0000")


def mutated(data: bytes, dice: random.Random) -> bytes:
    """One to three changes: bits, cuts, doubled or missing stretches, other numbers, junk in between."""
    for _ in range(dice.randint(1, 3)):
        data = dice.choice((_bit, _cut, _without, _doubled, _junk, _number))(data, dice)
    return data


def _bit(data: bytes, dice: random.Random) -> bytes:
    if not data:
        return b"\xff"
    place = dice.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :]


def _cut(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data) + 1)]


def _stretch(data: bytes, dice: random.Random) -> tuple[int, int]:
    start = dice.randrange(len(data) + 1)
    return start, min(len(data), start + dice.randint(1, 40))


def _without(data: bytes, dice: random.Random) -> bytes:
    start, end = _stretch(data, dice)
    return data[:start] + data[end:]


def _doubled(data: bytes, dice: random.Random) -> bytes:
    start, end = _stretch(data, dice)
    return data[:end] + data[start:end] * dice.randint(1, 3) + data[end:]


def _junk(data: bytes, dice: random.Random) -> bytes:
    start, end = _stretch(data, dice)
    return data[:start] + dice.choice(JUNK).encode() + data[dice.choice((start, end)) :]


def _number(data: bytes, dice: random.Random) -> bytes:
    places = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    if not places:
        return data
    place = dice.choice(places)
    return data[:place] + dice.choice((b"-7", b"1e30", b"0", b"99999999999", b"0.5", b'"a"')) + data[place + 1 :]


@dataclass(frozen=True)
class Reader:
    """`path` is what is mutated, `read` what is tried on it then; `resigned`: with a digest that fits."""

    path: Path
    read: Callable[[], object]
    resigned: bool = False


Make = Callable[[Path], Reader]


def _record(folder: Path) -> Reader:
    site = Site("conv", "layer", (1,), np.array([0, 1, 2]))
    groups = Groups((Group("a", "channel", 3, (site,), np.zeros(3, np.int64)),), ())
    write_record(folder / "groups.json", groups)
    return Reader(folder / "groups.json", lambda: read_record(folder / "groups.json", Groups))


def _arrays(folder: Path) -> Reader:
    write_record(folder / "s.json", Scores("lrp", {"a": np.ones((2, 3))}, 32))
    path = next(folder.glob("*.safetensors"))
    return Reader(path, lambda: read_record(folder / "s.json", Scores))


def _plan(folder: Path) -> Reader:
    write_record(folder / "plan.json", Plan({"a": np.array([0, 2])}, 9, 7))
    return Reader(folder / "plan.json", lambda: read_record(folder / "plan.json", Plan))


def _marker(folder: Path) -> Reader:
    run = folder / "run"

    def stage() -> object:
        stages = open_run(run, {}, lambda stage, share: None)
        recorded_files(run)
        stages.holds("scores", [1])
        return stages.do("scores", [1], lambda: write_text(run / "scores", "x"), (run / "scores").read_text)

    with open_run(run, {}, lambda stage, share: None).begun():
        pass
    stage()
    return Reader(run / "stages" / "scores.json", stage)


def _marker_resigned(folder: Path) -> Reader:
    reader = _marker(folder)
    return Reader(reader.path, reader.read, resigned=True)


def _network(folder: Path) -> Reader:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    graph = trace(model, example_of((3, 8, 8)))
    structure = find_structure(graph, example_of((3, 8, 8)))
    kept = random_units(structure, 0)
    save(
        folder,
        Network("", (InputSpec((3, 8, 8)),), structure.tied, structure.frozen, kept),
        rebuild(graph, structure, kept),
    )

    def read() -> object:
        network = read_network(folder)
        numbers = sum(math.prod(spec.shape) for spec in network.inputs)
        return load_saved(folder, model) if numbers <= 3 * 64 * 64 else network

    return Reader(folder / "network.json", read)


def _network_resigned(folder: Path) -> Reader:
    reader = _network(folder)
    return Reader(reader.path, reader.read, resigned=True)


def _weights(folder: Path) -> Reader:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    write_weights(folder / "w.safetensors", module)
    return Reader(folder / "w.safetensors", lambda: read_weights(folder / "w.safetensors", module))


def _checkpoint(folder: Path) -> Reader:
    module = nn.Linear(3, 2)
    torch.save({"state_dict": module.state_dict()}, folder / "x.pt")
    return Reader(folder / "x.pt", lambda: fill(module, folder / "x.pt"))


def _recipe(folder: Path) -> Reader:
    write_text(folder / "recipe.toml", to_toml(Recipe(composite='{"low": {"name": "gamma", "gamma": 0.3}}')))
    return Reader(folder / "recipe.toml", lambda: composite_of(read_recipe(folder / "recipe.toml").composite))


def _composite(folder: Path) -> Reader:
    table = {
        "low": {"name": "gamma", "gamma": 0.3, "bias": False},
        "first": {"name": "zbox", "box": [[0, 0, 0], [1, 1, 1]]},
        "fc": "epsilon",
        "linear": "depth",
        "softmax": "cp",
        "boundaries": [0.2, 0.8],
    }
    write_text(folder / "rules.json", json.dumps(table))
    return Reader(
        folder / "rules.json", lambda: composite_of(read_recipe(None, composite=str(folder / "rules.json")).composite)
    )


def _labels(folder: Path) -> Reader:
    for i in range(4):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / f"{i}.png")
    text = io.StringIO()
    csv.writer(text).writerows([["filename", "label"], *([f"{i}.png", i % 2] for i in range(4))])
    write_text(folder / "labels.csv", text.getvalue())
    return Reader(folder / "labels.csv", lambda: require_labels(load_images(str(folder)), 2))


def _npz(folder: Path) -> Reader:
    pixels = np.arange(4 * 48, dtype=np.uint8).reshape(4, 4, 4, 3)
    np.savez(folder / "x.npz", images=pixels, labels=np.arange(4) % 2, class_names=np.array(["a", "b"]))
    return Reader(folder / "x.npz", lambda: require_decodable(load_images(str(folder / "x.npz"))))


def _npz_packed(folder: Path) -> Reader:
    pixels = np.arange(4 * 48, dtype=np.uint8).reshape(4, 4, 4, 3)
    np.savez_compressed(folder / "x.npz", images=pixels, labels=np.arange(4) % 2)
    return Reader(folder / "x.npz", lambda: require_decodable(load_images(str(folder / "x.npz"))))


def _decoded(source: Path) -> Callable[[], object]:
    how = Preprocessing((4, 4), (4,), "bilinear", (0.5,) * 3, (0.5,) * 3)
    return lambda: require_decodable(load_source(str(source)).prepared(how))


def _npz_masks(folder: Path) -> Reader:
    pixels = np.arange(2 * 48, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.savez(folder / "x.npz", images=pixels, masks=np.arange(32, dtype=np.uint8).reshape(2, 4, 4))
    return Reader(folder / "x.npz", _decoded(folder / "x.npz"))


def _npz_inputs(folder: Path) -> Reader:
    np.savez(folder / "x.npz", **{"input.a": np.ones((2, 3)), "input.b": np.ones((2, 4)), "targets": np.arange(2)})
    return Reader(folder / "x.npz", lambda: require_decodable(load_source(str(folder / "x.npz"), Signature(2))))


def _mask(folder: Path) -> Reader:
    for name in ("images", "masks"):
        (folder / name).mkdir()
    noise = np.random.default_rng(0).integers(0, 200, (9, 7), np.uint8)
    Image.fromarray(noise).convert("RGB").save(folder / "images" / "a.png")
    Image.fromarray(noise).save(folder / "masks" / "a.png")
    return Reader(folder / "masks" / "a.png", _decoded(folder))


def _boxes(folder: Path) -> Reader:
    Image.new("RGB", (9, 7)).save(folder / "a.png")
    table = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "categories": [{"id": 2, "name": "dog"}],
        "annotations": [{"image_id": 1, "category_id": 2, "bbox": [1, 2, 3.5, 4]}] * 2,
    }
    write_text(folder / "annotations.json", json.dumps(table))
    return Reader(folder / "annotations.json", _decoded(folder))


def _image(kind: str) -> Make:
    def make(folder: Path) -> Reader:
        noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"x.{kind}")
        return Reader(folder / f"x.{kind}", lambda: require_decodable(load_images(str(folder))))

    make.__name__ = f"_{kind}"
    return make


def _benchmark(folder: Path) -> Reader:
    environment = Environment({"cpu": "c"}, {"numpy": "2"}, {}, "f")
    subjects = (SubjectRow("dense", "p", "dense", "fp32", "dense.onnx", 9, accuracy=Accuracy(1, 2)),)
    write_measured(Measured("t", environment, Options(), subjects, (), (), ("x",)), folder / "benchmark.json")
    return Reader(folder / "benchmark.json", lambda: read_measured(folder / "benchmark.json"))


def _tables(folder: Path) -> Reader:
    Kept(folder / "t.json").put("key", [1.0, 2.0])
    return Reader(folder / "t.json", lambda: Kept(folder / "t.json").get("key"))


def _tables_resigned(folder: Path) -> Reader:
    reader = _tables(folder)
    return Reader(reader.path, reader.read, resigned=True)


def _json(folder: Path) -> Reader:
    write_json(folder / "x.json", {"schema": "x/1", "value": [1, {"a": "b"}]})
    return Reader(folder / "x.json", lambda: read_json(folder / "x.json", "x/1"))


def _call(folder: Path) -> Reader:
    write_text(folder / "call", "resnet18(num_classes=2, sizes=[1, (2, 3)], name='x')")
    return Reader(folder / "call", lambda: parse_call((folder / "call").read_bytes().decode(errors="replace")))


MAKERS: tuple[Make, ...] = (
    *(_record, _arrays, _plan, _marker, _marker_resigned, _network, _network_resigned, _weights, _checkpoint),
    *(
        _recipe,
        _composite,
        _labels,
        _npz,
        _npz_packed,
        _npz_masks,
        _npz_inputs,
        _mask,
        _boxes,
        _benchmark,
        _tables,
        _tables_resigned,
        _json,
        _call,
    ),
    *(_image(kind) for kind in ("png", "bmp", "gif", "tiff", "jpg")),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__[1:])
def test_a_mutated_file_gives_a_result_or_an_error_of_the_tree(make: Make, tmp_path: Path) -> None:
    reader, dice = make(tmp_path), random.Random(make.__name__)
    whole = reader.path.read_bytes()
    reader.read()
    for number in range(MUTATIONS):
        data = mutated(whole, dice)
        reader.path.write_bytes(_resigned(data) if reader.resigned else data)
        error = _error_of(reader.read)
        kind = f"{type(error).__name__}: {error}"
        known = error is None or (isinstance(error, CompressorError) and "\n" not in kind)
        assert known, f"mutation {number} of {reader.path.name} raised {kind}; it begins {data[:300]!r}"


def _error_of(read: Callable[[], object]) -> Exception | None:
    try:
        read()
    except Exception as error:
        return error
    return None


def _resigned(data: bytes) -> bytes:
    """As by somebody who can make a right digest, where it is still an object."""
    try:
        value: Any = json.loads(data)
        value.pop("digest", None)
        return json.dumps(signed(value)).encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
        return data
