"""The door to OpenVINO: an ONNX file in, a network that it runs on the processor in float32 out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import ModelError
from .openers import Images, LoadedModel, OpenOptions, Output


def open_file(path: Path, options: OpenOptions) -> LoadedModel:
    """Raises ModelError for a file of several inputs."""
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
    if len(model.inputs) != 1:
        raise ModelError(f"{path} takes {len(model.inputs)} inputs, expected one batch of images")

    compiled = openvino.compile_model(model, "CPU", settings)
    request, output = compiled.create_infer_request(), compiled.output(0)
    takes_half = model.input(0).element_type == openvino.Type.f16

    def call(images: Images) -> Output:
        feed = images.astype(np.float16) if takes_half else images
        return np.array(request.infer([feed], share_inputs=True)[output])

    shape = tuple(axis.get_length() if axis.is_static else -1 for axis in model.input(0).partial_shape)
    return LoadedModel(shape, call, {"device": "CPU", "precision": "f32"})
