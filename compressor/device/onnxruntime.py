"""The door to ONNX Runtime: an ONNX file in, a network that one of its providers runs out.

Its packages differ in the providers they bring. Knows no table of runtimes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import EngineError, ModelError
from . import cuda
from .feeds import Array
from .openers import NUMBER_TYPES, LoadedModel, OpenOptions, Port

if TYPE_CHECKING:
    from onnxruntime import NodeArg, SessionOptions

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_NUMPY_NAMES = {"float": "float32", "double": "float64"}  # where ONNX Runtime calls a type otherwise than numpy


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
    """Raises EngineError where the provider does not start, ModelError for what is no tensor of numbers."""
    import onnxruntime

    settings = session_options(options.threads)
    if not options.fused:
        settings.add_session_config_entry("session.disable_quant_qdq", "1")

    session = onnxruntime.InferenceSession(str(path), settings, providers=[provider])
    if provider not in session.get_providers():
        raise EngineError(
            f"onnxruntime could not start {provider} for {path}; its CUDA or TensorRT libraries are missing"
        )
    inputs, outputs = ports(session.get_inputs(), path), ports(session.get_outputs(), path)
    output_names = [port.name for port in outputs]

    def call(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        answers = session.run(output_names, by_name(inputs, arrays))
        return tuple(map(np.asarray, answers))

    return LoadedModel(inputs, outputs, call, {"providers": ", ".join(session.get_providers())})


def ports(nodes: Sequence[NodeArg], path: Path) -> tuple[Port, ...]:
    """A session's inputs or outputs, in their order; ModelError for one that is no tensor of numbers."""
    return tuple(_port(node, path) for node in nodes)


def _port(node: NodeArg, path: Path) -> Port:
    kind = node.type.removeprefix("tensor(").removesuffix(")")  # such as "tensor(int64)", or "seq(tensor(float))"
    dtype = _NUMPY_NAMES.get(kind, kind)
    if dtype not in NUMBER_TYPES:
        raise ModelError(f"{path} has {node.name!r} of type {node.type}, expected a tensor of numpy's numbers")
    shape = tuple(size if isinstance(size, int) else -1 for size in node.shape)  # a free axis has a name
    return Port(node.name, shape, dtype)


def by_name(inputs: Sequence[Port], arrays: Sequence[Array]) -> dict[str, Array]:
    """The arrays as a session is fed; for inputs in half floats they are made of float32 here."""
    return {port.name: array.astype(port.dtype, copy=False) for port, array in zip(inputs, arrays, strict=True)}
