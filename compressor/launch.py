"""What `torchrun` told this process of the others, by its environment alone: quick to read, no library needed."""

from __future__ import annotations

import os
import signal
from types import FrameType


def launched_rank() -> int:
    """This process's number among those that `torchrun` started; 0 where it did not."""
    return int(os.environ["RANK"]) if is_launched() else 0


def is_launched() -> bool:
    """Whether `torchrun` started this process as one of several."""
    is_told = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    return is_told and int(os.environ["WORLD_SIZE"]) > 1


def end_as_interrupted() -> None:
    """`torchrun` ends the others with SIGTERM where one of them fails: it counts as Ctrl-C, which leaves no scratch."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: the end must not be interrupted
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
