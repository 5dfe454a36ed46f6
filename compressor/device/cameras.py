"""A camera's number or a video's file in, its frames out, as OpenCV reads them: RGB pixels, one after the other.

OpenCV is asked for when a frame is wanted, and is no dependency. Knows no model.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, MissingPackageError

VIDEO_FILES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".mjpeg", ".ogv", ".ts")
_CAMERA = re.compile(r"(?:camera:)?([0-9]+)")
_LARGEST_NUMBER = 255


def camera_number(word: str) -> int | None:
    """The camera that `0` or `camera:0` names, unless a file is called so; None for anything else."""
    match = _CAMERA.fullmatch(word)
    if match is None or Path(word).exists():
        return None
    number = match[1][:9]
    if int(number) > _LARGEST_NUMBER:
        raise DataError(f"there is no camera {number}; cameras count from 0, as in /dev/video0")
    return int(match[1])


def is_video(path: Path) -> bool:
    """By the name's ending."""
    return path.suffix.lower() in VIDEO_FILES


def frames_of(source: int | Path, *, most: int = 0) -> Iterator[NDArray[np.uint8]]:
    """Frames [H, W, 3], at most that many (0: until the video ends).

    Raises MissingPackageError without OpenCV, DataError for a camera that is not there and a file it can't read.
    """
    cv2 = _opencv()
    _require_source(source)
    capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    count = 0
    try:
        for frame in itertools.islice(_captured(capture), most or None):
            count += 1
            yield np.ascontiguousarray(frame[..., ::-1])  # BGR
    finally:
        capture.release()
    if not count:
        raise DataError(_no_frame(source))


def _captured(capture: Any) -> Iterator[Any]:
    """Frames until there are no more, in BGR."""
    while capture.isOpened():
        _, frame = capture.read()
        if frame is None:
            return
        yield frame


def _opencv() -> ModuleType:
    if importlib.util.find_spec("cv2") is None:
        raise MissingPackageError("reading a camera or a video needs OpenCV: pip install opencv-python-headless")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what is wrong is one line of ours
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
    try:
        cv2: Any = importlib.import_module("cv2")
    except ImportError as error:
        raise MissingPackageError(f"OpenCV is installed and can't be imported ({error}); install it again") from error
    return cv2  # type: ignore[no-any-return]


def _require_source(source: int | Path) -> None:
    """What can be seen to be missing is said before OpenCV tries each of its ways."""
    if isinstance(source, Path):
        if not source.is_file():
            raise DataError(f"no video at {source}")
        return
    if sys.platform != "linux":
        return
    device = Path(f"/dev/video{source}")
    if not device.exists():
        cameras = ", ".join(sorted(path.name for path in Path("/dev").glob("video*")))
        there = f"there are {cameras}" if cameras else "this machine has none"
        raise DataError(f"there is no camera {source} ({device}): {there}; plug it in, or name a file")
    if not os.access(device, os.R_OK):
        raise DataError(f"camera {source} can't be read: this user may not read {device}; join its group")


def _no_frame(source: int | Path) -> str:
    if isinstance(source, int):
        return f"camera {source} gives no frame: another program may hold it; close that, or name another camera"
    return f"{source} gives no frame: it is damaged, or of a format that this OpenCV does not know"
