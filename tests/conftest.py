"""Fixtures that more than one room's tests need."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers on two cores, each with threads for both, take half as long again
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes that tests start
    torch.set_num_threads(1)

from compressor.inputs.images import Images, Preprocessing
from compressor.inputs.sources import load_images


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and weights, named by COMPRESSOR_DATA."""
    place = os.environ.get("COMPRESSOR_DATA", "")
    if not place:
        pytest.skip("COMPRESSOR_DATA is not set; it names the folder of real images and weights")
    if not Path(place).is_dir():
        pytest.skip(f"COMPRESSOR_DATA names {place!r}, which is no folder here")
    return Path(place)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """60 images of four brightnesses: something there is to be right about."""
    path = tmp_path_factory.mktemp("images") / "images.npz"
    generator, labels = np.random.default_rng(0), np.arange(60) % 4
    pixels = generator.integers(0, 60, (60, 12, 12, 3)) + 60 * labels[:, None, None, None]
    np.savez(path, images=pixels.astype(np.uint8), labels=labels)
    return load_images(str(path)).prepared(Preprocessing((12, 12), (12,), "bilinear", (0.5,) * 3, (0.5,) * 3))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors run faster on one thread, and sums come out the same on any machine's core count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
