"""What `run` is given in, samples one by one out: files, folders, labelled ones with their labels, cameras and videos.

Every sample is read when it is asked for, so that any number fits. Knows no runtime and no answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import DataError
from .answering import read_samples
from .cameras import camera_number, frames_of, is_video
from .feeds import Arrays
from .images import Preprocessing, array_picture, crop_for, input_files, picture_file, picture_inputs
from .labelled import Labelled, read_labelled, truth_of
from .manifest import Manifest


@dataclass(frozen=True, slots=True)
class Sample:
    """Of one file or frame the inputs [N, ...], of images N is 1; `truth` is what the answer is held to, or None."""

    name: str
    inputs: Arrays
    truth: Any = None


def samples_of(words: Sequence[str], manifest: Manifest, *, most_frames: int = 0) -> Iterator[Sample]:
    """Of files, folders, cameras and videos in this order; what is missing among them is refused before any is read.

    Raises DataError for what holds no samples, and for labels of another kind than the task's answers.
    """
    parts = [_part(word, manifest, most_frames) for word in words]  # all, before the first sample is asked for
    return chain.from_iterable(parts)


def _part(word: str, manifest: Manifest, most_frames: int) -> Iterator[Sample]:
    camera, path = camera_number(word), Path(word)
    preprocessing = manifest.preprocessing
    if camera is not None or is_video(path):
        if preprocessing is None:
            raise DataError(f"{word} gives images, and the bundle's model takes none; give an .npz of its inputs")
        source = path if camera is None else camera
        return _frames(source, preprocessing, most_frames)

    if preprocessing is not None:
        labelled = read_labelled(path, manifest.task, manifest.labels)
        if labelled is not None:
            return _labelled_samples(labelled, preprocessing)
    return _file_samples(input_files(path), manifest)


def _frames(source: int | Path, preprocessing: Preprocessing, most: int) -> Iterator[Sample]:
    where = f"camera:{source}" if isinstance(source, int) else str(source)
    for index, pixels in enumerate(frames_of(source, most=most)):
        name = f"{where}[{index}]"
        yield Sample(name, picture_inputs(array_picture(pixels, name), preprocessing, name))


def _labelled_samples(labelled: Labelled, preprocessing: Preprocessing) -> Iterator[Sample]:
    for index, file in enumerate(labelled.files):
        picture = picture_file(file)
        truth = truth_of(labelled, index, picture, crop_for(picture, preprocessing))
        yield Sample(str(file), picture_inputs(picture, preprocessing, str(file)), truth)


def _file_samples(files: Sequence[Path], manifest: Manifest) -> Iterator[Sample]:
    for file in files:
        yield Sample(str(file), read_samples(file, manifest))
