"""The table of runtimes; and a model file in, a session that runs it out: one contract for all, numpy in and out.

Whatever anybody asks about a runtime is in its row, which says in words why it is not available here. Never falls back
to another one in silence. Knows nothing of timing, bundles or how the file came about.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np

from ..errors import CompressorError, EngineError, InputError, MissingPackageError, ModelError, did_you_mean
from . import cuda, onnxruntime, openvino, tensorrt
from .openers import Images, LoadedModel, Opener, OpenOptions, Output

ModelKind = Literal["onnx", "engine", "network"]
REFERENCE = "onnxruntime"
"""The runtime whose answers stand for a file's: others are compared with it, and it is taken where none is named."""
FILES: tuple[ModelKind, ...] = ("onnx", "engine")
"""What a bundle can hold and `open_model` opens; a network is in memory."""


def _nothing() -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Runtime:
    """One row. `library` is the module it is imported as, `package` what pip installs where that is called otherwise.

    `lacks()` says in words what else this machine lacks for it, `untimed_layers` why single layers can't be timed on
    it, as a latency budget does; both are empty where there is nothing to say. `on_processor`: it computes on the
    processor alone, so a thread's processor time is its time. `synonyms` are other words for it in a budget.
    """

    name: str
    open: Opener
    library: str
    package: str = ""
    takes: ModelKind = "onnx"
    lacks: Callable[[], str] = _nothing
    untimed_layers: str = ""
    on_processor: bool = False
    synonyms: tuple[str, ...] = ()


def _provider(name: str, provider: str) -> Runtime:
    """ONNX Runtime on a GPU."""
    opener = partial(onnxruntime.open_file, provider=provider)
    return Runtime(name, opener, "onnxruntime", lacks=partial(onnxruntime.lacks, provider))


def _engines_of(library: str) -> Runtime:
    return Runtime(
        library,
        partial(tensorrt.open_engine, library=library),
        library,
        tensorrt.PACKAGES[library],
        takes="engine",
        lacks=cuda.unavailable,
        untimed_layers="its engines are built one by one",
    )


def _way_of_pytorch(name: str) -> Runtime:
    """Opened by `delivery.networks`, which has torch; what this room may know of it are its facts."""
    untimed_layers = "in PyTorch, layers are timed on the processor and not compiled"
    return Runtime(name, _refuse_file, "torch", takes="network", untimed_layers=untimed_layers)


def _refuse_file(path: Path, options: OpenOptions) -> LoadedModel:
    raise InputError(f"{path} is a file, PyTorch runs a network: rebuild it from the run's folder")


RUNTIMES: tuple[Runtime, ...] = (
    Runtime(REFERENCE, onnxruntime.open_file, "onnxruntime", on_processor=True, synonyms=("onnxruntime-cpu",)),
    _provider("onnxruntime-cuda", onnxruntime.CUDA),
    _provider("onnxruntime-tensorrt", onnxruntime.TENSORRT),
    Runtime("openvino", openvino.open_file, "openvino", on_processor=True, synonyms=("openvino-cpu",)),
    _engines_of("tensorrt"),
    _engines_of("tensorrt_rtx"),
    Runtime("pytorch", _refuse_file, "torch", takes="network", on_processor=True, synonyms=("pytorch-cpu",)),
    _way_of_pytorch("pytorch-compile"),
    _way_of_pytorch("pytorch-cuda"),
    _way_of_pytorch("pytorch-cuda-compile"),
    _way_of_pytorch("pytorch-cuda-graph"),
)
"""Every runtime there is. One that takes ONNX files is a row here and the module that opens them."""


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


def runtime_names(*kinds: ModelKind) -> tuple[str, ...]:
    """The runtimes that take models of these kinds, in the table's order; every one without a kind."""
    return tuple(row.name for row in RUNTIMES if not kinds or row.takes in kinds)


def row_of(name: str) -> Runtime:
    """A runtime's row; raises InputError for a name that is none's."""
    for row in RUNTIMES:
        if row.name == name:
            return row
    raise _unknown(name, runtime_names())


def require_runtime(name: str) -> None:
    """Raises InputError for a name that is no runtime's that takes files, with those that are near it."""
    if name not in runtime_names(*FILES):
        raise _unknown(name, runtime_names(*FILES))


def takers(kind: ModelKind) -> tuple[str, ...]:
    """The runtimes that take a kind of model, in the order tried when none is named.

    Those on the processor come first: nothing but their library need be there.
    """
    rows = [row for row in RUNTIMES if row.takes == kind]
    rows.sort(key=lambda row: not row.on_processor)  # keeps the table's order otherwise
    return tuple(row.name for row in rows)


def layer_timers() -> tuple[str, ...]:
    """The runtimes that single layers can be timed on, and so a latency budget be met."""
    return tuple(row.name for row in RUNTIMES if not row.untimed_layers)


def canonical_name(word: str) -> str:
    """The name of the runtime whose synonym a word is; any other word as it is."""
    return next((row.name for row in RUNTIMES if word in row.synonyms), word)


def open_model(path: Path | str, *, runtime: str = REFERENCE, threads: int = 0, fused: bool = True) -> Session:
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
    row = row_of(runtime)
    reason = _unavailable(row)
    if reason:
        error_type = MissingPackageError if reason.startswith("not installed") else EngineError
        raise error_type(f"can't run {path.name} in {runtime}: {reason}")

    try:
        model = row.open(path, OpenOptions(threads, fused))
    except CompressorError:
        raise
    except Exception as error:
        raise ModelError(f"{runtime} can't load {path}: {_reason(error)}; the file is damaged or not for it") from error
    return Session(runtime, version_of(runtime), str(path), model.shape, threads, model.call, model.details)


def available() -> dict[str, str]:
    """Every runtime that takes files by name; an empty string where it can run here, else the reason in words."""
    return {name: _unavailable(row_of(name)) for name in runtime_names(*FILES)}


def version_of(runtime: str) -> str:
    """The runtime's library version, or an empty string where it is not installed."""
    library = row_of(runtime).library
    if importlib.util.find_spec(library) is None:
        return ""
    try:
        module: ModuleType = importlib.import_module(library)
    except ImportError:
        return ""
    return str(getattr(module, "__version__", ""))


def kind_of(path: Path | str) -> ModelKind:
    """`engine` for a TensorRT plan, `onnx` for the rest, by the name's ending."""
    return "engine" if Path(path).suffix in (".plan", ".engine", ".trt") else "onnx"


def _unavailable(row: Runtime) -> str:
    """Why it can't run here; empty where it can."""
    if importlib.util.find_spec(row.library) is None:
        return f"not installed: pip install {row.package or row.library}"
    return row.lacks()


def _unknown(name: str, runtimes: tuple[str, ...]) -> InputError:
    return InputError(f"no runtime {name!r}; there are {', '.join(runtimes)}.{did_you_mean(name, [*runtimes])}")


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
