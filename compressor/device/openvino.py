"""The door to OpenVINO: an ONNX file in, a network that it runs on the processor in float32 out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .feeds import Array
from .openers import LoadedModel, OpenOptions, Port

if TYPE_CHECKING:
    from openvino import Output


def open_file(path: Path, options: OpenOptions) -> LoadedModel:
    """One request of one stream, as latency is asked for."""
    import openvino

    # f32: of itself it computes fp32 files in bfloat16 on processors that have it.
    settings: dict[str, str | int] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": 1,
    }
    if options.threads:
        settings["INFERENCE_NUM_THREADS"] = options.threads
    model = openvino.Core().read_model(str(path))
    inputs, outputs = tuple(map(_port, model.inputs)), tuple(map(_port, model.outputs))

    compiled = openvino.compile_model(model, "CPU", settings)
    request, answer_places = compiled.create_infer_request(), compiled.outputs

    def call(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        feeds = [array.astype(port.dtype, copy=False) for port, array in zip(inputs, arrays, strict=True)]
        answers = request.infer(feeds, share_inputs=True)
        return tuple(np.array(answers[place]) for place in answer_places)  # copies: the request's own are reused

    return LoadedModel(inputs, outputs, call, {"device": "CPU", "precision": "f32"})


def _port(place: Output) -> Port:
    shape = tuple(axis.get_length() if axis.is_static else -1 for axis in place.partial_shape)
    return Port(place.get_any_name(), shape, place.element_type.to_dtype().name)
