"""Bundles changed as somebody else would change them: manifests signed again, golden files and arrays by hand."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from .conftest import CLASSES, SIZE

Content = dict[str, Any]
INPUT, OUTPUT = "input.input", "output.output"  # of the golden file, where there is one of each


def signed(content: Content) -> str:
    """The manifest's text with the digest a forger computes: it takes no secret."""
    inside = {key: value for key, value in content.items() if key not in ("schema", "digest")}
    digest = hashlib.sha256(json.dumps(inside, sort_keys=True).encode()).hexdigest()
    return json.dumps({"schema": content.get("schema", "compressor.bundle/2"), "digest": digest, **inside})


def resign(bundle: Path, change: Callable[[Content], None]) -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(signed(content))


def put(bundle: Path, where: str, value: Any) -> None:
    """Sets one field, named like `models|0|limits|cosine`; `...` takes it away."""

    def change(content: Content) -> None:
        place: Any = content
        *parts, last = where.split("|")
        for part in parts:
            place = place[int(part)] if isinstance(place, list) else place[part]
        if value is ...:
            del place[int(last) if isinstance(place, list) else last]
        elif isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value

    resign(bundle, change)


def replace_file(bundle: Path, name: str, data: bytes) -> None:
    """The file's bytes with the manifest's entry for them, so that every hash is right."""
    (bundle / name).write_bytes(data)
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    resign(bundle, lambda content: content["files"].update({name: entry}))


def aged(bundle: Path) -> Path:
    """The bundle as the first schema had it: nothing is said of inputs and outputs, and golden arrays have one name."""
    with np.load(bundle / "golden.npz") as golden:
        arrays = {"inputs": golden[INPUT], "outputs": golden[OUTPUT]}

    def change(content: Content) -> None:
        for name in ("inputs", "outputs", "task", "decode", "metrics", "not_checked"):
            del content[name]
        content["schema"] = "compressor.bundle/1"

    resign(bundle, change)
    replace_file(bundle, "golden.npz", archive(**arrays))
    return bundle


def archive(**arrays: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def archive_of(members: dict[str, bytes]) -> bytes:
    """An .npz of members written by hand, compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as opened:
        for name, data in members.items():
            opened.writestr(f"{name}.npy", data)
    return file.getvalue()


def npy(shape: str, *, descr: str = "'<f4'", data: bytes = b"", version: int = 1) -> bytes:
    """An .npy whose header says what is given, whatever follows."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header declares that size and that holds one row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    row = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


def odd_model(kind: str) -> bytes:
    """A model that takes the images and answers with a `scalar`, with no `classes`, or with `nan`."""
    tensors = {"classes": np.zeros((3 * SIZE * SIZE, 0)), "nan": np.full((3 * SIZE * SIZE, CLASSES), np.nan)}
    flat = helper.make_node("Flatten", ["input"], ["f"])
    last = (
        helper.make_node("ReduceMean", ["f"], ["output"], keepdims=0)
        if kind == "scalar"
        else helper.make_node("MatMul", ["f", "w"], ["output"])
    )
    weights = [] if kind == "scalar" else [numpy_helper.from_array(tensors[kind].astype(np.float32), "w")]
    graph = helper.make_graph(
        [flat, last],
        "odd",
        [helper.make_tensor_value_info("input", 1, ["batch", 3, SIZE, SIZE])],
        [onnx.ValueInfoProto(name="output")],
        weights,
    )
    graph.output[0].type.tensor_type.elem_type = 1
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())
