"""How fast images in tar shards become batches, beside a bare loop of tarfile and Pillow over the same shards.

In: how many images, their size, the number of threads. Out: images a second of both, in turns, and the ratio; the last
line is one JSON object. The bare loop opens, decodes and converts, no more: no tensor, no batch, no label. Each thread
of it takes a whole shard at a time, each of the product's pieces of a batch. They take turns after every few shards, so
that what else the machine does meets both alike.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from compressor.inputs.images import Batches, Images, Preprocessing
from compressor.inputs.sources import load_images

_DIFFERENT = 500  # images that are drawn; the shards repeat them
_CELL_PX = 8  # of the random colours that an image is a smooth field of
_CLASSES = 10


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder or None) as folder:
        write_shards(Path(folder), options)
        began = time.process_time()
        images = load_images(folder)
        index_s = time.process_time() - began
        side = (options.px, options.px)
        images = images.prepared(Preprocessing(side, (options.px,), "bilinear", (0.5,) * 3, (0.5,) * 3))
        print(
            f"{platform.processor() or platform.machine()}, {options.workers} threads; {len(images):,} images of "
            f"{options.px} px in {options.shards} shards, indexed in {index_s:.2f} s of processor time"
        )
        parts = parts_of(images, sorted(Path(folder).glob("*.tar")), max(1, options.workers))
        report([measured(parts, options) for _ in range(options.rounds)], index_s, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--px", type=int, default=64, help="side of an image in pixels")
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1, help="threads of either; 0: none beside the main one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default="", help="where the shards are put while it runs; else the system's own")
    return parser.parse_args()


def write_shards(folder: Path, options: argparse.Namespace) -> None:
    """JPEGs with their class indices, as `webdataset.TarWriter` names them."""
    generator = np.random.default_rng(0)
    jpegs = [_jpeg(generator, options.px) for _ in range(min(_DIFFERENT, options.images))]
    for number, indices in enumerate(np.array_split(np.arange(options.images), options.shards)):
        with tarfile.open(folder / f"train-{number:06d}.tar", "w") as shard:
            for index in indices.tolist():
                _add(shard, f"{index:08d}.jpg", jpegs[index % len(jpegs)])
                _add(shard, f"{index:08d}.cls", str(index % _CLASSES).encode())


def _jpeg(generator: np.random.Generator, px: int) -> bytes:
    cells = max(2, px // _CELL_PX)
    colours = generator.integers(0, 256, (cells, cells, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((px, px), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


def parts_of(images: Images, shards: list[Path], at_once: int) -> list[tuple[list[Path], Images]]:
    """The same images as so many shards at a time and as the product has them."""
    shard_of = np.array([name.partition("/")[0] for name in images.names])
    parts = []
    for start in range(0, len(shards), at_once):
        files = shards[start : start + at_once]
        parts.append((files, images.subset(np.flatnonzero(np.isin(shard_of, [file.name for file in files])))))
    return parts


def bare_loop(shards: list[Path], workers: int) -> int:
    """How many images were decoded."""
    if workers < 1:
        return sum(map(_decoded, shards))
    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(_decoded, shards))


def _decoded(shard: Path) -> int:
    count = 0
    with tarfile.open(shard) as archive:
        for member in archive:
            if member.name.endswith(".jpg"):
                content = archive.extractfile(member)
                assert content is not None
                Image.open(io.BytesIO(content.read())).convert("RGB")
                count += 1
    return count


def product_loop(images: Images, batch_size: int, workers: int) -> int:
    """How many images came in batches; none of them is kept for another pass."""
    return sum(len(inputs) for inputs, _ in Batches(images, batch_size, cache_bytes=0, workers=workers))


Times = dict[str, tuple[float, float]]  # of each loop: seconds by the clock, and of all threads' processor time


def measured(parts: list[tuple[list[Path], Images]], options: argparse.Namespace) -> Times:
    """One pass over all images by both loops, part by part; who is first changes."""
    times = {"bare": (0.0, 0.0), "ours": (0.0, 0.0)}
    for number, (shards, images) in enumerate(parts):
        loops: dict[str, Callable[[], int]] = {
            "bare": partial(bare_loop, shards, options.workers),
            "ours": partial(product_loop, images, options.batch, options.workers),
        }
        for name in list(loops)[:: -1 if number % 2 else 1]:
            began, began_cpu = time.perf_counter(), time.process_time()
            assert loops[name]() == len(images)
            clock, processor = times[name]
            times[name] = (clock + time.perf_counter() - began, processor + time.process_time() - began_cpu)
    return times


def report(rounds: list[Times], index_s: float, options: argparse.Namespace) -> None:
    """Medians over the rounds, and of the ratios of each round."""
    print(f"{'':12}{'images/s':>10}{'least':>10}{'most':>10}{'processor us/image':>22}")
    facts = {key: getattr(options, key) for key in ("images", "px", "shards", "batch", "workers", "rounds")}
    for name in ("bare", "ours"):
        rates = [options.images / times[name][0] for times in rounds]
        cpu_us = statistics.median(1e6 * times[name][1] / options.images for times in rounds)
        print(f"{name:12}{statistics.median(rates):10.0f}{min(rates):10.0f}{max(rates):10.0f}{cpu_us:22.1f}")
        facts |= {f"{name}_per_s": round(statistics.median(rates), 1), f"{name}_cpu_us": round(cpu_us, 2)}

    ratios = [times["bare"][0] / times["ours"][0] for times in rounds]
    cpu_ratio = statistics.median(times["bare"][1] / times["ours"][1] for times in rounds)
    ratio, index_us = statistics.median(ratios), 1e6 * index_s / options.images
    print(f"ours / bare {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), by processor time {cpu_ratio:.2f}")
    print(f"the index, made once: {index_us:.1f} us an image")
    facts |= {"ratio": round(ratio, 3), "ratios": [round(value, 3) for value in ratios]}
    print(json.dumps({**facts, "cpu_ratio": round(cpu_ratio, 3), "index_us": round(index_us, 2)}))


if __name__ == "__main__":
    main()
