"""The door to ONNX Runtime: an ONNX file in, a network that one of its providers runs out.

Its packages differ in the providers they bring. Knows no table of runtimes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import EngineError, ModelError
from . import cuda
from .openers import Images, LoadedModel, OpenOptions, Output

if TYPE_CHECKING:
    from onnxruntime import SessionOptions

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


def lacks(provider: str) -> str:
    """What the installed library or this machine lacks for a provider on a GPU, in words; empty where nothing."""
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        return f"this onnxruntime has no {provider}: pip install onnxruntime-gpu"
    return cuda.unavailable()


def session_options(threads: int) -> SessionOptions:
    """Options as every session here has them; 0 threads leaves the number to the library."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # a failure reaches us as an exception; its log line would be a second copy
    return options


def open_file(path: Path, options: OpenOptions, *, provider: str = CPU) -> LoadedModel:
    """Raises EngineError where the provider does not start, ModelError for a file of several inputs."""
    import onnxruntime

    settings = session_options(options.threads)
    if not options.fused:
        settings.add_session_config_entry("session.disable_quant_qdq", "1")

    session = onnxruntime.InferenceSession(str(path), settings, providers=[provider])
    if provider not in session.get_providers():
        raise EngineError(
            f"onnxruntime could not start {provider} for {path}; its CUDA or TensorRT libraries are missing"
        )
    inputs, output = session.get_inputs(), session.get_outputs()[0].name
    if len(inputs) != 1:
        raise ModelError(f"{path} takes {len(inputs)} inputs, expected one batch of images")
    name, takes_half = inputs[0].name, inputs[0].type == "tensor(float16)"

    def call(images: Images) -> Output:
        feed = images.astype(np.float16) if takes_half else images
        return np.asarray(session.run([output], {name: feed})[0])

    shape = tuple(size if isinstance(size, int) else -1 for size in inputs[0].shape)  # a free axis has a name
    return LoadedModel(shape, call, {"providers": ", ".join(session.get_providers())})
