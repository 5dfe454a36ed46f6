"""The table of runtimes; and a model file in, a session that runs it out: one contract for all, numpy in and out.

Whatever anybody asks about a runtime is in its row, which says in words why it is not available here. Never falls back
to another one in silence. Knows nothing of timing, bundles or how the file came about.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

import numpy as np

from ..errors import CompressorError, EngineError, InputError, MissingPackageError, ModelError, did_you_mean
from . import cuda, onnxruntime, openvino, tensorrt
from .external import require_weights_beside
from .feeds import Array, Arrays, as_tuple, unwrapped
from .openers import Call, LoadedModel, Opener, OpenOptions, Port

ModelKind = Literal["onnx", "engine", "network"]
REFERENCE = "onnxruntime"
"""The runtime whose answers stand for a file's: others are compared with it, and it is taken where none is named."""
FILES: tuple[ModelKind, ...] = ("onnx", "engine")
"""What a bundle can hold and `open_model` opens; a network is in memory."""
_NOT_INSTALLED = "not installed: pip install"


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
    """A loaded model, its inputs and outputs in the file's order; `details` is what the runtime says of itself.

    `outputs` is empty where nothing but running says what they are, as of a network in memory.
    """

    runtime: str
    version: str
    path: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    threads: int
    call: Call
    details: Mapping[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The first input's, with -1 for free axes."""
        return self.inputs[0].shape

    def run(self, inputs: Arrays) -> Arrays:
        """The answer to one array, or to a tuple of one for each input: a tuple where the model has several outputs.

        Raises ModelError for a shape or type the model does not take.
        """
        arrays = _checked(as_tuple(inputs), self.inputs, self.path)
        try:
            answers = self.call(arrays)
        except CompressorError:
            raise
        except Exception as error:
            shapes = " and ".join(str(list(array.shape)) for array in arrays)
            with_what = f"an input of shape {shapes}" if len(arrays) == 1 else f"inputs of shapes {shapes}"
            raise ModelError(f"{self.runtime} failed on {self.path} with {with_what}: {_reason(error)}") from error
        return unwrapped(answers)

    __call__ = run


def runtime_names(*kinds: ModelKind) -> tuple[str, ...]:
    """The runtimes that take models of these kinds, in the table's order; every one without a kind."""
    accepted = kinds or get_args(ModelKind)
    return tuple(row.name for row in RUNTIMES if row.takes in accepted)


def row_of(name: str) -> Runtime:
    """A runtime's row; raises InputError for a name that is none's."""
    for row in RUNTIMES:
        if row.name == name:
            return row
    raise _unknown(name, runtime_names())


def require_runtime(name: str) -> None:
    """Raises InputError for a name that is no runtime's that takes files, with those that are near it.

    An empty one leaves the choice to others, and passes.
    """
    names = runtime_names(*FILES)
    if name not in ("", *names):
        raise _unknown(name, names)


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
    ModelError when the file is missing, can't be read or takes weights from outside its folder.
    """
    require_runtime(runtime)
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no model file at {path}")
    row = row_of(runtime)
    reason = _unavailable(row)
    if reason:
        raise unavailable_error(f"can't run {path.name} in {runtime}: {reason}", [reason])

    try:
        if kind_of(path) == "onnx":
            require_weights_beside(path)
        model = row.open(path, OpenOptions(threads, fused))
    except CompressorError:
        raise
    except Exception as error:
        raise ModelError(f"{runtime} can't load {path}: {_reason(error)}; the file is damaged or not for it") from error
    if not model.inputs or not model.outputs:
        raise ModelError(f"{path} has {len(model.inputs)} inputs and {len(model.outputs)} outputs, expected both")
    version = version_of(runtime)
    return Session(runtime, version, str(path), model.inputs, model.outputs, threads, model.call, model.details)


def available() -> dict[str, str]:
    """Every runtime that takes files by name; an empty string where it can run here, else the reason in words."""
    return {name: _unavailable(row_of(name)) for name in runtime_names(*FILES)}


def unavailable_error(message: str, reasons: Iterable[str]) -> CompressorError:
    """What to raise where nothing can run, by the reasons that `available` gives.

    MissingPackageError where one is that a library is not installed, which can be mended here, else EngineError.
    """
    missing = any(_NOT_INSTALLED in reason for reason in reasons)
    return MissingPackageError(message) if missing else EngineError(message)


def version_of(runtime: str) -> str:
    """The runtime's library version, or an empty string where it is not installed."""
    try:
        module: ModuleType = importlib.import_module(row_of(runtime).library)
    except ImportError:
        return ""
    return str(getattr(module, "__version__", ""))


def kind_of(path: Path | str) -> ModelKind:
    """`engine` for a TensorRT plan, `onnx` for the rest, by the name's ending."""
    return "engine" if Path(path).suffix in (".plan", ".engine", ".trt") else "onnx"


def _unavailable(row: Runtime) -> str:
    """Why it can't run here; empty where it can."""
    if importlib.util.find_spec(row.library) is None:
        return f"{_NOT_INSTALLED} {row.package or row.library}"
    return row.lacks()


def _unknown(name: str, runtimes: tuple[str, ...]) -> InputError:
    return InputError(f"no runtime {name!r}; there are {', '.join(runtimes)}.{did_you_mean(name, [*runtimes])}")


def _checked(arrays: tuple[Array, ...], ports: tuple[Port, ...], path: str) -> tuple[Array, ...]:
    """Each array in one block of memory; ModelError unless they are what the model takes."""
    if len(arrays) != len(ports):
        names = ", ".join(port.name for port in ports)
        raise ModelError(f"{path} takes {len(ports)} arrays ({names}), {len(arrays)} were given")
    counts = []  # of samples, where their number is free
    for array, port in zip(arrays, ports, strict=True):
        _require_fit(array, port, path, "the input" if len(ports) == 1 else f"the input {port.name!r}")
        if port.shape[:1] == (-1,):
            counts.append(len(array))
    if len(set(counts)) > 1:
        listed = ", ".join(map(str, counts))
        raise ModelError(f"{path} takes equally many samples of each input, {listed} were given")
    return tuple(np.asarray(array, order="C") for array in arrays)


def _require_fit(array: Array, port: Port, path: str, subject: str) -> None:
    """Raises ModelError unless an array is of the input's shape, where -1 fits anything, and type."""
    if not port.takes(array.shape):
        expected = ", ".join("N" if size == -1 else str(size) for size in port.shape)
        raise ModelError(f"{subject} has shape {list(array.shape)}, {path} takes [{expected}]")
    dtype = port.fed_dtype
    if array.dtype != dtype:
        raise ModelError(f"{subject} is {array.dtype}, {path} takes {dtype}; cast it with .astype({dtype!r})")


def _reason(error: BaseException) -> str:
    """The first line that says something: OpenVINO puts the place in its own source first."""
    lines = [line.strip() for line in str(error).splitlines() if not line.startswith("Exception from")]
    return next(filter(None, lines), type(error).__name__)[:300]
