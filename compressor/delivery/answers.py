"""A model file's answers as a task judges them: tensors in, tensors by the names of the file's outputs out."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..device import feeds
from ..device.feeds import Arrays
from ..device.runtimes import REFERENCE, Session, open_model
from ..run.work import arrays_of
from ..tasks import Leaves, Predict
from ..tensors import Inputs, from_arrays


def predict_of_file(path: Path, *, runtime: str = REFERENCE, fused: bool = True, at_once: int = 0) -> Predict:
    """The file in a runtime, `at_once` samples at a time (0: as many as come); `fused` as in `open_model`."""
    session = open_model(path, runtime=runtime, fused=fused)

    def predict(inputs: Inputs) -> Leaves:
        arrays = arrays_of(inputs)
        batches = feeds.parted(arrays, at_once or feeds.count(arrays))
        return named(session, feeds.joined(list(map(session.run, batches))))

    return predict


def named(session: Session, outputs: Arrays) -> dict[str, Tensor]:
    """The arrays of an answer by the names that the session has for them."""
    names = [port.name for port in session.outputs]
    return dict(zip(names, from_arrays(outputs), strict=True))
