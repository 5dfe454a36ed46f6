"""Fixtures that more than one room's tests need."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers on two cores, each with threads for both, take half as long again
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes that tests start
    torch.set_num_threads(1)

from compressor.device.runtimes import open_model
from compressor.device.timing import Schedule, Timing, time_interleaved
from compressor.inputs.images import Images, Preprocessing
from compressor.inputs.sources import load_images

Shortened = Callable[[pytest.MonkeyPatch], None]

LONGEST = (
    "test_pipeline.py",
    "test_precisions.py",
    "test_cli.py",
    "test_search.py",
    "test_damage.py",
    "test_placement.py",
    "test_latency.py",
    "test_benchmarking.py",
)
"""Files with whole runs in them, which are begun first: a worker that began one last would end alone with it."""


def pytest_configure(config: pytest.Config) -> None:
    """Files go to workers in the order below, not by how many tests they have."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))  # stable: the others stay as they are


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


def _timed_here(
    files: Mapping[str, Path], images: np.ndarray, *, schedule: Schedule, runtime: str
) -> dict[str, Timing]:
    """As `worker.time_files`, without a process for every file."""
    sessions = {name: open_model(path, runtime=runtime, threads=1) for name, path in files.items()}
    subjects = {name: session.run for name, session in sessions.items()}
    return time_interleaved(subjects, images, schedule=schedule, runtimes=dict.fromkeys(files, runtime))


@pytest.fixture(scope="session")
def shorten() -> Shortened:
    """Takes out of a run what costs seconds and what tests of its flow don't look at: plots, warm-ups, workers.

    Plots are held by tests/report, workers by tests/device and by the runs that tests/test_cli starts.
    """

    def patched(patch: pytest.MonkeyPatch) -> None:
        from compressor.delivery import latency
        from compressor.report import pictures, plots

        patch.setattr(plots, "draw_plots", lambda run: {})
        patch.setattr(pictures, "draw_comparison", lambda comparison: b"")
        patch.setattr(latency, "Schedule", partial(Schedule, warmup_s=0.0, warmup_limit_s=0.0))
        patch.setattr(latency, "time_files", _timed_here)

    return patched


@pytest.fixture(scope="module")
def short_runs(shorten: Shortened) -> Iterator[None]:
    """Every run of the module's tests in its short form."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_table_of_operators() -> Iterator[None]:
    """PyTorch's exporter reads the source of a thousand functions at every call: half of what a small export takes."""
    from torch.onnx._internal._lazy_import import onnxscript_apis

    @cache
    def operators() -> Any:
        return type(onnxscript_apis).__getattr__(onnxscript_apis, "get_torchlib_ops")()  # imports onnxscript, if asked

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(onnxscript_apis.__dict__, "get_torchlib_ops", operators)
        yield


@pytest.fixture(scope="session", autouse=True)
def _short_tables_of_composites() -> Iterator[None]:
    """`torch.export` collects 500 composite operations at every call, and prepares each for twelve kinds of devices."""
    from torch.export import exported_program

    def at_hand(keys: str) -> list[Any]:
        devices = ("CPU", "CUDA", "Meta")
        return [key for key in getattr(exported_program, keys) if key.name.removeprefix("Autograd") in devices]

    with pytest.MonkeyPatch.context() as patch:
        collect = "_collect_all_valid_cia_ops"
        patch.setattr(exported_program, collect, cache(getattr(exported_program, collect)))
        for keys in ("_BACKEND_KEYS_TO_OVERRIDE", "_AUTOGRAD_ALIAS_BACKEND_KEYS_TO_OVERRIDE"):
            patch.setattr(exported_program, keys, at_hand(keys))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors run faster on one thread, and sums come out the same on any machine's core count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
