"""Values come in their arguments' order, a bounded number ahead, whatever the number of threads; batches likewise."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compressor.errors import DataError
from compressor.inputs.images import Batches, Images, Preprocessing, decoding_workers, pixel_hashes
from compressor.inputs.lookahead import in_order, usable_workers
from compressor.inputs.sources import load_images

HOW = Preprocessing((4, 4), (4,), "bilinear", (0.5,) * 3, (0.5,) * 3)
WORKERS = (0, 1, 2, 5)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("images")]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_values_are_in_order(workers: int, count: int) -> None:
    def slow_first(index: int) -> int:
        time.sleep(0.002 if index % 5 == 0 else 0)
        return index * index

    assert list(in_order(slow_first, range(count), workers=workers, ahead=4)) == [i * i for i in range(count)]
    assert threads() == []


@pytest.mark.parametrize(("workers", "ahead"), [(1, 4), (2, 8), (4, 64)])
def test_no_more_is_made_than_is_asked_to_be_ahead(workers: int, ahead: int) -> None:
    made: list[int] = []

    def note(index: int) -> int:
        made.append(index)
        return index

    with closing(in_order(note, range(1000), workers=workers, ahead=ahead)) as values:
        for _ in range(100):
            next(values)
        time.sleep(0.02)  # time in which everything could be made
        assert 100 < len(made) <= 100 + 2 * ahead + workers
    assert threads() == []


def test_an_error_is_raised_in_its_turn_and_leaves_no_threads() -> None:
    def refuse(index: int) -> int:
        if index in (40, 70):
            raise ValueError(str(index))
        return index

    values = in_order(refuse, range(100), workers=3, ahead=12)
    with pytest.raises(ValueError, match="40"):
        list(values)
    assert threads() == []


def test_workers_are_shared_with_processes_of_the_same_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6), raising=False)
    assert usable_workers() == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert usable_workers() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "20")
    assert usable_workers() == 1


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """23 images in a folder."""
    folder = tmp_path_factory.mktemp("files")
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (23, 6, 6, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return load_images(str(folder)).prepared(HOW)


@pytest.mark.parametrize("workers", WORKERS[1:])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_batches_are_the_same_for_any_number_of_workers(images: Images, workers: int, cache_bytes: int) -> None:
    plain = Batches(images, 4, cache_bytes=0, workers=0)
    ahead = Batches(images, 4, cache_bytes=cache_bytes, workers=workers)
    for _ in range(2):  # the second pass is out of memory where that is allowed
        for seed in (None, 3):
            passes = [(iter(made) if seed is None else made.shuffled(seed)) for made in (plain, ahead)]
            for (ours, _), (theirs, _) in zip(*passes, strict=True):
                assert torch.equal(ours, theirs)


def test_the_next_batch_is_decoded_while_one_is_in_use(images: Images) -> None:
    read: list[str] = []

    def noting(name: str) -> Image.Image:
        read.append(name)
        return images.read(name)

    counted = Images(**{**{f: getattr(images, f) for f in images.__slots__}, "read": noting})
    passing = iter(Batches(counted, 4, cache_bytes=0, workers=1))
    next(passing)
    deadline = time.monotonic() + 5
    while len(read) < 8 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert 8 <= len(read) <= 4 + 2 * 4 + 1
    del passing
    assert threads() == []


def test_what_was_decoded_is_not_read_ahead_again(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Batches(images, 4, workers=2)
    list(made)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pool was made")

    monkeypatch.setattr("compressor.inputs.lookahead.ThreadPoolExecutor", refuse)
    assert len(list(made)) == 6


def test_only_files_are_decoded_in_threads(images: Images) -> None:
    assert decoding_workers(images) >= 1
    assert decoding_workers(load_images("digits")) == 0


def test_hashes_in_threads_are_those_of_one_after_the_other(images: Images, tmp_path: Path) -> None:
    fresh = load_images(images.source)
    assert pixel_hashes(fresh, fresh.names[::-1]) == [images.pixel_hash(name) for name in images.names[::-1]]
    (tmp_path / "b.png").write_bytes(b"no image")
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    broken = load_images(str(tmp_path))
    with pytest.raises(DataError, match=r"image 'b\.png' of"):
        pixel_hashes(broken, broken.names)
