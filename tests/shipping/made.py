"""Bundles to ship: of one small model, whole, changed and broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compressor.device.bundle import Manifest, ModelFile, write_bundle
from tests.device.conftest import PREPROCESSING, SIZE, small_model, small_outputs

IMAGES = np.random.default_rng(1).standard_normal((6, 3, SIZE, SIZE)).astype(np.float32)


def make_bundle(folder: Path, *, seed: int = 0, broken: bool = False, channels: int = 8) -> Path:
    """A bundle whose hashes are right; where it is `broken`, its golden outputs are another network's."""
    model = small_model(channels, seed)
    file = folder.with_name(f"{folder.name}.onnx")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(model.SerializeToString())
    outputs = small_outputs(model, IMAGES).astype(np.float32) + np.float32(broken)
    manifest = Manifest("small", (ModelFile("models/small net.onnx"),), PREPROCESSING, licences=("for a test",))
    files = {"models/small net.onnx": file}
    return write_bundle(folder, files, manifest=manifest, golden_inputs=IMAGES, golden_outputs=outputs)
