"""Every reader of the device on damaged files: bits flipped, bytes cut, doubled and replaced, values exchanged.

Seeded, a few hundred files; whatever a reader can't take is an error of the tree, soon and in little memory.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from compressor.device.answering import read_samples
from compressor.device.builder import read_sidecar, sidecar_of
from compressor.device.built import built_engines
from compressor.device.bundle import read_bundle, verify_bundle, verify_files
from compressor.device.environment import resident_bytes
from compressor.device.golden import read_golden
from compressor.device.images import load_inputs
from compressor.errors import CompressorError

from .conftest import PREPROCESSING, SIZE
from .tampering import INPUT, OUTPUT, archive, replace_file, signed
from .test_attacks import plant

MUTATIONS = int(os.environ.get("COMPRESSOR_FUZZ", "60"))  # of each reader
MOST_SECONDS = 20.0  # of one reader's mutations on a busy machine; a hang is minutes
MOST_BYTES = 200 << 20  # of Python's and numpy's; the largest of these files unpacks to 1 MB
MOST_GROWTH_BYTES = 1 << 30  # of the process; a picture of the most pixels that Pillow opens takes 540 MB
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 10**30, 0.5, -1e300, float("nan"), float("inf")),
    *("", "x", "n" * 5000, "../x", "\ud800", "json", [], [[]], [0], ["a"], {}, {"a": {}}),
)

Read = Callable[[], object]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to eight changes of the bytes, of which the first ones, a format's head, get their share."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        place = draw.randrange(max(1, len(changed)))
        if draw.random() < 0.5:
            place = min(place, draw.randrange(128))
        length = draw.choice((1, 2, 4, 16, 100))
        kind = draw.randrange(6)
        if kind == 0 and changed:
            changed[place % len(changed)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place : place + length] = draw.randbytes(length)
        elif kind == 2:
            changed[place : place + length] = b"\xff" * length
        elif kind == 3:
            del changed[place : place + length]
        elif kind == 4:
            changed[place:place] = changed[place : place + length]
        else:
            del changed[draw.randrange(len(changed) + 1) :]
    return bytes(changed)


def exchanged(content: Any, draw: random.Random) -> Any:
    """The JSON value with one of its inner values, anywhere, taken away or exchanged for an odd one."""
    content = copy.deepcopy(content)
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.choice(keys)
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or draw.random() < 0.2:
            break
        place = inner
    if draw.random() < 0.15:
        del place[key]
    else:
        place[key] = draw.choice(ODD_VALUES)
    return content


def assert_held(change: Callable[[random.Random], None], read: Read, mutations: int = MUTATIONS) -> None:
    """Reads after every change; any error but the tree's is the test's failure."""
    start, peak_before = time.monotonic(), resident_bytes()
    tracemalloc.start()
    refused = 0
    try:
        for seed in range(mutations):
            change(random.Random(seed))
            try:
                read()
            except CompressorError as error:
                refused += 1
                assert len(str(error)) < 2000  # noqa: PT017
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused > mutations // 4  # the changes do reach what is read
    assert time.monotonic() - start < MOST_SECONDS
    assert peak < MOST_BYTES
    assert resident_bytes() - peak_before < MOST_GROWTH_BYTES


def test_manifests_of_damaged_bytes(bundle: Path) -> None:
    path = bundle / "manifest.json"
    whole = path.read_bytes()
    assert_held(lambda draw: _write(path, mutated(whole, draw)), lambda: verify_bundle(bundle))


def test_manifests_of_exchanged_values_signed_again(bundle: Path, tmp_path: Path) -> None:
    path, picture = bundle / "manifest.json", tmp_path / "x.png"
    whole = json.loads(path.read_text())
    Image.new("RGB", (30, 20)).save(picture)

    def read() -> None:
        manifest = read_bundle(bundle)
        read_samples(picture, manifest)
        verify_files(bundle, manifest)
        read_golden(bundle, manifest)

    def change(draw: random.Random) -> None:
        path.write_text(signed(exchanged({k: v for k, v in whole.items() if k not in ("schema", "digest")}, draw)))

    assert_held(change, read, 4 * MUTATIONS)


def test_manifests_of_several_inputs_of_exchanged_values(
    pair_bundle: Path, tmp_path: Path, pair_inputs: tuple[NDArray[Any], ...]
) -> None:
    path, arrays = pair_bundle / "manifest.json", tmp_path / "x.npz"
    whole = json.loads(path.read_text())
    np.savez(arrays, image=pair_inputs[0], tokens=pair_inputs[1], mask=pair_inputs[2])

    def read() -> None:
        manifest = read_bundle(pair_bundle)
        read_samples(arrays, manifest)
        verify_files(pair_bundle, manifest)
        read_golden(pair_bundle, manifest)

    def change(draw: random.Random) -> None:
        path.write_text(signed(exchanged({key: whole[key] for key in whole if key not in ("schema", "digest")}, draw)))

    assert_held(change, read, 4 * MUTATIONS)


def test_golden_files_of_several_inputs_of_damaged_bytes(pair_bundle: Path) -> None:
    whole = (pair_bundle / "golden.npz").read_bytes()

    def change(draw: random.Random) -> None:
        replace_file(pair_bundle, "golden.npz", _cut_late(whole, draw))

    assert_held(change, lambda: read_golden(pair_bundle, read_bundle(pair_bundle)))


def test_arrays_by_name_of_damaged_bytes(
    pair_bundle: Path, tmp_path: Path, pair_inputs: tuple[NDArray[Any], ...]
) -> None:
    path, manifest = tmp_path / "x.npz", read_bundle(pair_bundle)
    whole = archive(image=pair_inputs[0], tokens=pair_inputs[1], mask=pair_inputs[2])
    assert_held(lambda draw: _write(path, _cut_late(whole, draw)), lambda: read_samples(path, manifest))


@pytest.mark.parametrize("compressed", [False, True])
def test_golden_files_of_damaged_bytes_signed_again(
    bundle: Path, images: NDArray[np.float32], compressed: bool
) -> None:
    whole = (bundle / "golden.npz").read_bytes()
    if compressed:
        file = io.BytesIO()
        outputs = np.zeros((len(images), 5), np.float32)
        np.savez_compressed(file, **{INPUT: images, OUTPUT: outputs})
        whole = file.getvalue()

    def change(draw: random.Random) -> None:
        replace_file(bundle, "golden.npz", _cut_late(whole, draw))

    assert_held(change, lambda: read_golden(bundle, read_bundle(bundle)))


def _cut_late(whole: bytes, draw: random.Random) -> bytes:
    """An archive damaged in its directory at the end as often as elsewhere."""
    if draw.random() < 0.5:
        return mutated(whole, draw)
    return whole[:-200] + mutated(whole[-200:], draw)


def test_sidecars_of_damaged_bytes(bundle: Path) -> None:
    engine = plant(bundle)
    whole = sidecar_of(engine).read_bytes()
    assert_held(lambda draw: _write(sidecar_of(engine), mutated(whole, draw)), lambda: read_sidecar(engine))


def test_sidecars_of_exchanged_values(bundle: Path) -> None:
    engine = plant(bundle)
    whole = json.loads(sidecar_of(engine).read_text())

    def change(draw: random.Random) -> None:
        sidecar_of(engine).write_text(json.dumps(exchanged(whole, draw)))

    assert_held(change, lambda: built_engines(bundle, read_bundle(bundle)), 2 * MUTATIONS)


def _array_files(images: NDArray[np.float32]) -> dict[str, bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    files = {"float.npz": archive(images=images), "pixels.npz": archive(images=pixels, labels=np.zeros(2))}
    for name, array in (("float.npy", images), ("pixels.npy", pixels)):
        file = io.BytesIO()
        np.save(file, array)
        files[name] = file.getvalue()
    file = io.BytesIO()
    np.savez_compressed(file, images=pixels)
    return {**files, "compressed.npz": file.getvalue()}


@pytest.mark.parametrize("name", ["float.npy", "pixels.npy", "float.npz", "pixels.npz", "compressed.npz"])
def test_arrays_of_damaged_bytes(tmp_path: Path, images: NDArray[np.float32], name: str) -> None:
    path, whole = tmp_path / name, _array_files(images)[name]

    def change(draw: random.Random) -> None:
        path.write_bytes(_cut_late(whole, draw))

    assert_held(change, lambda: load_inputs(path, PREPROCESSING))


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.gif", "x.bmp", "x.webp", "x.tif", "x.ppm"])
def test_images_of_damaged_bytes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    assert_held(lambda draw: _write(path, mutated(whole, draw)), lambda: load_inputs(path, PREPROCESSING))


def test_a_length_that_a_picture_only_declares_is_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("RGB", (30, 20)).save(path)
    data = path.read_bytes()
    place = data.index(b"IDAT") - 4
    path.write_bytes(data[:place] + b"\x7f\xff\xff\xff" + data[place + 4 :])
    tracemalloc.start()
    load_inputs(path, PREPROCESSING)  # the picture is whole, only its part's length is not
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MOST_BYTES


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
