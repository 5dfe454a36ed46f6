"""The door to TensorRT 10, TensorRT 11 and TensorRT-RTX: build one engine, load one engine.

`python -m compressor.device.tensorrt` is the build worker: a builder may crash its process, so it gets
its own. Knows nothing of caches, sidecars or bundles.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, TypedDict

import numpy as np

from ..errors import EngineError, MissingPackageError
from . import child, cuda
from .feeds import Array
from .openers import LoadedModel, OpenOptions, Port

if TYPE_CHECKING:  # TensorRT-RTX calls them the same
    from tensorrt import IBuilderConfig, ICudaEngine, IExecutionContext, ILogger, ParserError, Runtime

PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu13"}  # what pip installs, by library
LIBRARIES = tuple(PACKAGES)
_NO_LIBRARY = f"no library for engines; there are {', '.join(LIBRARIES)}"
# Strong typing is complete from TensorRT 10.12 (Jetson's JetPack 6 has 10.3); before it, builder flags choose.
_STRONG_FROM = (10, 12)
_PRECISION_FLAGS = {"fp16": ("FP16",), "int8": ("INT8", "FP16")}

Buffers = dict[str, tuple[int, int]]  # by a tensor's name: address on the GPU, bytes


class BuildJob(TypedDict):
    """A `builder.EngineJob` as JSON, and the files; `profiles[input]` = [min, optimal, max]."""

    library: str
    onnx: str
    out: str
    profiles: Mapping[str, Sequence[Sequence[int]]]
    compute_capabilities: Sequence[str]
    precision: str
    workspace_bytes: int


class Log(Protocol):
    """What a logger has kept."""

    problems: list[str]
    lowering: list[str]


def unavailable(library: str) -> str:
    """Why engines of `library` can't run here, in words; an empty string when they can."""
    if library not in LIBRARIES:
        return _NO_LIBRARY
    if importlib.util.find_spec(library) is None:
        return f"not installed: pip install {PACKAGES[library]}"
    return cuda.unavailable()


def buildable(library: str) -> str:
    """Why engines can't be built here; TensorRT-RTX needs no GPU for named compute capabilities."""
    if library == "tensorrt_rtx" and importlib.util.find_spec(library) is not None:
        return ""
    return unavailable(library)


def import_library(library: str) -> ModuleType:
    """The library's module; a name from a recipe or a sidecar imports nothing else."""
    if library not in LIBRARIES:
        raise EngineError(f"{library!r} is {_NO_LIBRARY}")
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise MissingPackageError(f"{library} is not installed: pip install {PACKAGES[library]}") from error


def version(library: str) -> str:
    """The installed library's own version; raises MissingPackageError where it is not installed."""
    return str(import_library(library).__version__)


def version_here(library: str) -> str:
    """The same where engines of the library can run here, else an empty string."""
    is_installed = library in LIBRARIES and importlib.util.find_spec(library) is not None
    return version(library) if is_installed and not cuda.unavailable() else ""


def is_strongly_typed(library: str, library_version: str) -> bool:
    """Whether the ONNX alone decides the precision; else the builder's FP16 / INT8 flags must allow it."""
    return library == "tensorrt_rtx" or _numbers(library_version)[:2] >= _STRONG_FROM


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, filter(str.isdigit, text.split("."))))


def build(job: BuildJob, report: child.Report) -> child.Event:
    """Writes job's engine file; returns its log. Raises EngineError with the parser's or the builder's reasons.

    Every TensorRT object lives in this one scope: a parser that outlives its network crashes the process.
    """
    trt = import_library(job["library"])
    name = Path(job["out"]).name
    logger = _logger(trt)
    builder = trt.Builder(logger)

    network = builder.create_network(_network_flags(trt, job["library"]))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(job["onnx"])):
        errors = map(parser.get_error, range(parser.num_errors))
        raise EngineError(f"{name} can't be parsed: {_joined(list(map(_parser_reason, errors)))}")
    if network.num_outputs == 0:  # bytes that are no ONNX parse as an empty model
        raise EngineError(f"{name} can't be built: {job['onnx']} holds no network; it is damaged or not ONNX")

    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _set_flags(trt, config, job)
    profile = builder.create_optimization_profile()
    for tensor, shapes in job["profiles"].items():
        profile.set_shape(tensor, *map(tuple, shapes))  # least, usual, largest
    config.add_optimization_profile(profile)
    monitor = _monitor(trt, report)
    config.progress_monitor = monitor

    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{name} can't be built: {_joined(logger.problems) or 'the builder gave no reason'}")
    Path(job["out"]).write_bytes(plan)
    return {"log": logger.lowering, "warnings": logger.problems}


def _joined(reasons: Sequence[str]) -> str:
    return "; ".join(" ".join(reason.split())[:400] for reason in reasons[:3])


def _network_flags(trt: ModuleType, library: str) -> int:
    """Strong typing is asked for in TensorRT 10 alone: later ones and RTX know nothing else."""
    is_ten = library == "tensorrt" and _numbers(trt.__version__)[0] == 10
    if not is_ten or not is_strongly_typed(library, trt.__version__):
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _set_flags(trt: ModuleType, config: IBuilderConfig, job: BuildJob) -> None:
    capabilities = job["compute_capabilities"]
    if capabilities:  # none: the engine is for the GPU that the builder sees
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)

    if not is_strongly_typed(job["library"], trt.__version__):
        for flag in _PRECISION_FLAGS.get(job["precision"], ()):
            config.set_flag(getattr(trt.BuilderFlag, flag))

    if job["workspace_bytes"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace_bytes"])


def _parser_reason(error: ParserError) -> str:
    return f"{error.node_operator()} {error.node_name()!r}: {error.desc()}"


def _logger(trt: ModuleType) -> Log:
    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps the problems and the lowered layer list; the builder tells its reasons nowhere else."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.problems: list[str] = []
            self.lowering: list[str] = []

        def log(self, severity: ILogger.Severity, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.problems.append(message.strip())
            if message.startswith(("Layers:", "Total Activation Memory", "Total Weights Memory")):
                self.lowering.append(message)

    return Logger()


def _monitor(trt: ModuleType, report: child.Report) -> object:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Reports the steps of the outermost phase only: inner phases come and go in no fixed number."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outer: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.outer[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.outer:
                report({"event": "progress", "phase": phase_name, "step": step + 1, "steps": self.outer[phase_name]})
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.outer.pop(phase_name, None)

    return Monitor()


def open_engine(path: Path, options: OpenOptions, *, library: str) -> LoadedModel:
    """Deserialises a plan on GPU 0; buffers are allocated per shape and kept. Raises EngineError with the reason.

    Of the options an engine takes none: its threads are the GPU's, and what is fused was decided when it was built.
    """
    trt = import_library(library)
    reason = cuda.unavailable()
    if reason:
        raise EngineError(f"can't run {path.name}: {reason}")

    stream = cuda.attach()
    logger = _logger(trt)
    runtime = trt.Runtime(logger)
    plan = path.read_bytes()
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"{library} {trt.__version__} can't load {path}: {_why_not(trt, runtime, plan, logger)}")

    context = _context(trt, engine)
    inputs, outputs = _ports(trt, engine)
    buffers: Buffers = {}

    def run(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        feeds = {port.name: _feed(array, port) for port, array in zip(inputs, arrays, strict=True)}
        _set_shapes(context, feeds, path.name)
        results = {port.name: np.empty(tuple(context.get_tensor_shape(port.name)), port.dtype) for port in outputs}
        for name, array in {**feeds, **results}.items():
            context.set_tensor_address(name, _buffer(buffers, name, array.nbytes))

        # all is queued on one stream, in this order
        for name, feed in feeds.items():
            cuda.to_device(buffers[name][0], feed, stream)
        if not context.execute_async_v3(stream):
            raise EngineError(f"{path.name} failed to run: {'; '.join(logger.problems[-2:]) or 'no reason given'}")
        for name, array in results.items():
            cuda.to_host(array, buffers[name][0], stream)
        cuda.wait(stream)
        return tuple(results.values())

    gpu, capability = cuda.device()
    details = {"gpu": gpu, "compute_capability": capability}
    return LoadedModel(inputs, outputs, run, details)


def _ports(trt: ModuleType, engine: ICudaEngine) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Its inputs and its outputs, each in the engine's order."""
    inputs: list[Port] = []
    outputs: list[Port] = []
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        ports = inputs if is_input else outputs
        ports.append(_port(trt, engine, name))
    return tuple(inputs), tuple(outputs)


def _set_shapes(context: IExecutionContext, feeds: Mapping[str, Array], engine_name: str) -> None:
    """Of the inputs, from which the engine makes those of its outputs."""
    for name, feed in feeds.items():
        if not context.set_input_shape(name, feed.shape):
            shape = list(feed.shape)
            raise EngineError(f"{engine_name} was not built for the shape {shape} of {name!r}; see its profile")


def _port(trt: ModuleType, engine: ICudaEngine, name: str) -> Port:
    dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
    return Port(name, tuple(engine.get_tensor_shape(name)), dtype.name)


def _feed(array: Array, port: Port) -> Array:
    """In one block of memory, of the engine's type: what it takes in half floats comes as float32."""
    return np.asarray(array, dtype=port.dtype, order="C")


def _buffer(buffers: Buffers, name: str, size_bytes: int) -> int:
    """The address of at least that much memory for a tensor; a buffer only grows, so most runs allocate nothing."""
    pointer, allocated_bytes = buffers.get(name, (0, -1))
    if allocated_bytes >= size_bytes:
        return pointer
    if name in buffers:
        cuda.free(pointer)
    buffers[name] = (cuda.allocate(size_bytes), size_bytes)
    return buffers[name][0]


def _context(trt: ModuleType, engine: ICudaEngine) -> IExecutionContext:
    """RTX compiles kernels for a shape lazily in the background, which would blur every timing: ask for it at once."""
    if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    return engine.create_execution_context(config)


def _why_not(trt: ModuleType, runtime: Runtime, plan: bytes, logger: Log) -> str:
    reasons = list(logger.problems[-2:])
    if hasattr(runtime, "get_engine_validity"):  # of TensorRT-RTX
        _, diagnostics = runtime.get_engine_validity(plan)
        flags = getattr(trt, "EngineInvalidityDiagnostics", None)
        members = getattr(flags, "__members__", {})
        reasons += [name for name, flag in members.items() if int(diagnostics) & int(flag)]
    return "; ".join(reasons) or "no reason given; it may be from another version or GPU"


if __name__ == "__main__":
    child.serve(build)
