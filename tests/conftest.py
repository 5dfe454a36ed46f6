"""Fixtures that more than one room's tests need."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and weights, named by COMPRESSOR_DATA."""
    place = os.environ.get("COMPRESSOR_DATA", "")
    if not place:
        pytest.skip("COMPRESSOR_DATA is not set; it names the folder of real images and weights")
    if not Path(place).is_dir():
        pytest.skip(f"COMPRESSOR_DATA names {place!r}, which is no folder here")
    return Path(place)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors run faster on one thread, and sums come out the same on any machine's core count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
