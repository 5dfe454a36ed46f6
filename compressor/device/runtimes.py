"""A model file in, a session that runs it out: one contract for every runtime, numpy in and out.

Says for each runtime why it is not available here; never falls back to another one in silence.
Knows nothing of timing, bundles or how the file came about.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CompressorError, EngineError, InputError, MissingPackageError, ModelError, did_you_mean
from . import cuda, tensorrt

Images = NDArray[np.float32]
Output = NDArray[Any]

_PROVIDERS = {
    "onnxruntime": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}


@dataclass(frozen=True, slots=True)
class Session:
    """A loaded model. `shape` is the input's, with -1 for free axes; `details` what the runtime says of itself."""

    runtime: str
    version: str
    path: str
    shape: tuple[int, ...]
    threads: int
    call: Callable[[Images], Output]
    details: Mapping[str, str] = field(default_factory=dict)

    def run(self, images: Images) -> Output:
        """Output 0 for images [N, C, H, W]; raises ModelError for a shape or type the model does not take."""
        images = _checked(images, self.shape, self.path)
        try:
            return self.call(images)
        except CompressorError:
            raise
        except Exception as error:
            raise ModelError(
                f"{self.runtime} failed on {self.path} with an input of shape {list(images.shape)}: {_reason(error)}"
            ) from error

    __call__ = run


def open_model(path: Path | str, *, runtime: str = "onnxruntime", threads: int = 0, fused: bool = True) -> Session:
    """Loads `path` in `runtime`; 0 threads leaves the number to the runtime.

    `fused=False` keeps ONNX Runtime from turning Q/DQ pairs into integer kernels: a file made for another library
    is then computed as that library reads it.
    Raises InputError for an unknown runtime, MissingPackageError or EngineError when it is not available here,
    ModelError when the file is missing or can't be read.
    """
    require_runtime(runtime)
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no model file at {path}")
    reason = available()[runtime]
    if reason:
        error_type = MissingPackageError if reason.startswith("not installed") else EngineError
        raise error_type(f"can't run {path.name} in {runtime}: {reason}")

    try:
        if runtime in _PROVIDERS:
            return _open_onnxruntime(path, runtime, threads, fused=fused)
        return _OPENERS[runtime](path, runtime, threads)
    except CompressorError:
        raise
    except Exception as error:
        raise ModelError(f"{runtime} can't load {path}: {_reason(error)}; the file is damaged or not for it") from error


def require_runtime(name: str) -> None:
    """Raises InputError for a name that is no runtime's, with those that are near it."""
    if name not in _OPENERS:
        raise InputError(f"no runtime {name!r}; there are {', '.join(_OPENERS)}.{did_you_mean(name, [*_OPENERS])}")


def available() -> dict[str, str]:
    """Every runtime by name; an empty string where it can run here, else the reason in words."""
    return {name: _unavailable(name) for name in _OPENERS}


def version_of(runtime: str) -> str:
    """The runtime's library version, or an empty string where it is not installed."""
    package = runtime.split("-")[0]  # onnxruntime-cuda is onnxruntime's
    if importlib.util.find_spec(package) is None:
        return ""
    try:
        module: ModuleType = importlib.import_module(package)
    except ImportError:
        return ""
    return str(getattr(module, "__version__", ""))


def kind_of(path: Path | str) -> str:
    """`engine` for a TensorRT plan, `onnx` for the rest, by the name's ending."""
    return "engine" if Path(path).suffix in (".plan", ".engine", ".trt") else "onnx"


def _unavailable(runtime: str) -> str:
    """Why it can't run here; empty where it can. ONNX Runtime's packages differ in the providers they bring."""
    if runtime.startswith("tensorrt"):
        return tensorrt.unavailable(runtime)
    package = runtime.split("-")[0]
    if importlib.util.find_spec(package) is None:
        return f"not installed: pip install {package}"
    if runtime in ("onnxruntime", "openvino"):
        return ""

    import onnxruntime

    if _PROVIDERS[runtime] not in onnxruntime.get_available_providers():
        return f"this onnxruntime has no {_PROVIDERS[runtime]}: pip install onnxruntime-gpu"
    return cuda.unavailable()


def _open_onnxruntime(path: Path, runtime: str, threads: int, *, fused: bool = True) -> Session:
    import onnxruntime

    provider = _PROVIDERS[runtime]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # a failure reaches us as an exception; its log line would be a second copy
    if not fused:
        options.add_session_config_entry("session.disable_quant_qdq", "1")

    session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
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

    return Session(
        runtime=runtime,
        version=onnxruntime.__version__,
        path=str(path),
        shape=tuple(size if isinstance(size, int) else -1 for size in inputs[0].shape),  # a free axis has a name
        threads=threads,
        call=call,
        details={"providers": ", ".join(session.get_providers())},
    )


def _open_openvino(path: Path, runtime: str, threads: int) -> Session:
    import openvino

    # f32: of itself it computes fp32 files in bfloat16 on processors that have it.
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    model = openvino.Core().read_model(str(path))
    if len(model.inputs) != 1:
        raise ModelError(f"{path} takes {len(model.inputs)} inputs, expected one batch of images")

    compiled = openvino.compile_model(model, "CPU", options)
    request, output = compiled.create_infer_request(), compiled.output(0)
    takes_half = model.input(0).element_type == openvino.Type.f16

    def call(images: Images) -> Output:
        feed = images.astype(np.float16) if takes_half else images
        return np.array(request.infer([feed], share_inputs=True)[output])

    return Session(
        runtime=runtime,
        version=openvino.__version__,
        path=str(path),
        shape=tuple(axis.get_length() if axis.is_static else -1 for axis in model.input(0).partial_shape),
        threads=threads,
        call=call,
        details={"device": "CPU", "precision": "f32"},
    )


def _open_engine(path: Path, runtime: str, threads: int) -> Session:
    engine = tensorrt.load_engine(path, runtime)
    return Session(runtime, engine.version, str(path), engine.shape, threads, engine.run, engine.details)


_OPENERS: dict[str, Callable[[Path, str, int], Session]] = {
    "onnxruntime": _open_onnxruntime,
    "onnxruntime-cuda": _open_onnxruntime,
    "onnxruntime-tensorrt": _open_onnxruntime,
    "openvino": _open_openvino,
    "tensorrt": _open_engine,
    "tensorrt_rtx": _open_engine,
}

RUNTIMES = tuple(_OPENERS)


def _checked(images: Images, shape: tuple[int, ...], path: str) -> Images:
    """The images in one block of memory; ModelError unless they are float32 of the model's shape, -1 fits anything."""
    has_all_axes = images.ndim == len(shape)
    if not has_all_axes or any(size not in (-1, length) for size, length in zip(shape, images.shape, strict=True)):
        expected = ", ".join("N" if size == -1 else str(size) for size in shape)
        raise ModelError(f"the input has shape {list(images.shape)}, {path} takes [{expected}]")
    if images.dtype != np.float32:
        raise ModelError(f"the input is {images.dtype}, {path} takes float32; pass images.astype(np.float32)")
    return np.ascontiguousarray(images)


def _reason(error: BaseException) -> str:
    """The first line that says something: OpenVINO puts the place in its own source first."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    return lines[0].strip()[:300] if lines else type(error).__name__
