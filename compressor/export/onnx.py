"""A torch module in, one checked ONNX file out: free batch axis, norms and constants folded, metadata inside.

Knows nothing of pruning, precisions or runtimes; what it exports is exactly what the module computes.
Weights are counted before and after the optimisers, so that a rebuilt dense net can't slip through.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import logging
import math
import os
import shutil
import string
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import fx, nn

from ..device.external import aside_of, files_of
from ..errors import FolderError, GateError, ModelError, first_line, unwritten_temporary
from ..files import replacing
from ..graph.interface import input_names, output_names
from ..placement import CPU, placed, release
from ..tensors import INPUT, OUTPUT, Inputs, as_tuple, count, joined, moved
from .attention import spelled_out
from .parts import WEIGHTED, attributes_of, constants_of, stored_bytes

BATCH = "batch"
_PROTOBUF_LIMIT_BYTES = 2**31 - 2**20  # the message must stay below 2 GiB; 1 MiB left for the graph
_LARGE_BYTES = 2**26  # of weights: collecting garbage takes half a second, which smaller models are not worth
_SIZE_KEEPING = ("Transpose", "Reshape", "Identity", "Cast", "CastLike", "Squeeze", "Unsqueeze")
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)
_CHATTER = ("torch.onnx", "onnxscript", "onnx_ir", "onnxslim", "torch.export")


@dataclass(frozen=True, slots=True)
class Dialect:
    """The versions of ONNX that a file is written in."""

    opset: int
    ir_version: int


# One for all, since one file serves every runtime. Opset 20 is the highest Jetson's TensorRT 10.3 parser reads and the
# first with Gelu as one node; IR 10 came with it, so every runtime that reads the one reads the other.
DIALECT = Dialect(opset=20, ir_version=10)


def export_onnx(
    model: nn.Module,
    example: Inputs,
    path: Path | str,
    *,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes `model` for inputs like `example` [N, ...]; the batch axis is free.

    A traced graph's inputs and outputs have its names for them (`graph.interface`), any other module's one input and
    one output are `input` and `output`. A model on a GPU is exported from a copy on the CPU.

    The file appears whole or not at all. Raises ModelError when the exporter or the checker refuses the
    model, GateError when weights were lost or added on the way, FolderError when the file can't be written.
    """
    model, example = placed(model, CPU), moved(example, CPU)
    with _silence(), torch.no_grad():
        raw = _torch_export(model, example)
        most = weight_elements(raw)
        least = weight_elements(raw, equal_once=True)
        is_large = stored_bytes(raw) > _LARGE_BYTES
        folded, folded_by = _folded(raw)
        del raw  # every form of the model holds all its weights: none lives longer than the next one needs
        if is_large:
            release()
        with _scratch_folder() as folder:
            unslimmed = _spilled(folded, folder)
            del folded
            slim, optimiser = _slimmed(unslimmed, folded_by)
        if is_large:
            release()

    _finish(slim, {**(metadata or {}), "compressor.optimiser": optimiser})
    after = weight_elements(slim)
    if not least <= after <= most:
        raise GateError(
            f"the export of {path} holds {after} weights of convolutions and matrix products, the model {most}; "
            "report the model, its file would not be what was pruned"
        )
    return write_model(slim, Path(path))


def _torch_export(model: nn.Module, example: Inputs) -> onnx.ModelProto:
    if count(example) < 2:  # a batch of one would be taken for a constant
        example = joined([example, example])  # [2, ...]
    tensors = as_tuple(example)
    inputs, outputs = [INPUT], [OUTPUT]
    if isinstance(model, fx.GraphModule):
        inputs, outputs = list(input_names(model)), list(output_names(model))
        model = spelled_out(model)
    try:
        program = torch.onnx.export(
            model,
            tensors,
            dynamo=True,
            opset_version=DIALECT.opset,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) * len(tensors),
            input_names=inputs,
            output_names=outputs,
            optimize=False,
            verbose=False,
        )
    except Exception as error:
        raise ModelError(f"the ONNX exporter refuses the model: {_reason(error)}") from error
    assert program is not None
    _part_names(program.model)
    return program.model_proto


def _part_names(model: Any) -> None:
    """A buffer `mean` and the result of a mean both come out as `mean`; results are renamed, parameters keep theirs."""
    taken = set(model.graph.initializers)
    for node in model.graph:
        for value in node.outputs:
            if value.name in taken:
                value.name = f"{value.name}_of_{node.op_type}"


def _reason(error: BaseException) -> str:
    """The innermost cause's first line: the exporter wraps it in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error, longest=300)


def _folded(raw: onnx.ModelProto) -> tuple[onnx.ModelProto, str]:
    """Constants and norms folded by onnxscript, and who did it."""
    import onnxscript.optimizer

    try:
        return onnxscript.optimizer.optimize(raw), "onnxscript"
    except Exception as error:  # what is not folded computes the same
        return raw, f"nothing (onnxscript: {_reason(error)})"
    finally:
        _forget_matches()


@contextlib.contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A folder for the time of the block; FolderError where the disk or its rights are in the way."""
    try:
        with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
            yield Path(folder)
    except OSError as error:
        raise unwritten_temporary(error) from error


def _spilled(model: onnx.ModelProto, folder: Path) -> Path:
    """The model in a file, its weights beside it where it is larger than a message may be."""
    path = folder / "model.onnx"
    _save(model, path, aside=exceeds_message(model))
    return path


def exceeds_message(model: onnx.ModelProto) -> bool:
    """Whether its weights must lie beside the file, or it is more than protobuf writes or reads at once."""
    return stored_bytes(model) > _PROTOBUF_LIMIT_BYTES


def _save(model: onnx.ModelProto, path: Path, *, aside: bool) -> None:
    """Takes the model's weights, where they go `aside`."""
    onnx.save(model, path, save_as_external_data=aside, location=aside_of(path).name, convert_attribute=False)


def _slimmed(folded: Path, folded_by: str) -> tuple[onnx.ModelProto, str]:
    """What onnxslim fuses of what onnxscript left (measured: both beat either), and who optimised it."""
    if aside_of(folded).exists():  # above the limit of what onnxslim handles
        return onnx.load(folded), folded_by
    import onnxslim

    try:
        return onnxslim.slim(str(folded)), f"{folded_by}+onnxslim"
    except Exception as error:  # an optional fusion pass: the folded graph computes the same without it
        return onnx.load(folded), f"{folded_by} (onnxslim: {_reason(error)})"
    finally:
        _forget_matches()


def _forget_matches() -> None:
    """Frees what both optimisers keep: their rules hold the nodes they matched last, and so the graph and its weights.

    Of a large model that is three times its weights, for as long as the process lives.
    """
    import onnxscript.rewriter

    # other versions may keep them elsewhere, which costs memory and nothing else
    with contextlib.suppress(AttributeError, ImportError, TypeError):
        for rule in onnxscript.rewriter._DEFAULT_REWRITE_RULES:
            for name in ("_graph", "_match", "_current_node", "_tracer"):
                vars(rule._matcher).pop(name, None)
    with contextlib.suppress(AttributeError, ImportError, TypeError):
        from onnxslim.core.pattern.registry import DEFAULT_FUSION_PATTERNS

        for matcher in itertools.chain.from_iterable(DEFAULT_FUSION_PATTERNS.values()):
            for name in ("output", *(node.name for node in matcher.pattern.nodes)):
                vars(matcher).pop(name, None)


def _finish(model: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    """Names the batch axis, respells equations, puts our metadata in place of the exporter's notes."""
    model.ir_version = DIALECT.ir_version
    model.producer_name, model.producer_version = "compressor", ""
    _drop_notes(model)
    for key in sorted(metadata):
        model.metadata_props.add(key=key, value=metadata[key])

    for node in model.graph.node:
        _respell_equation(node)
    for tensor in (*model.graph.input, *model.graph.output):
        axes = tensor.type.tensor_type.shape.dim
        if axes and axes[0].dim_param:
            axes[0].dim_param = BATCH


def _drop_notes(model: onnx.ModelProto) -> None:
    """The exporter's: they hold paths of sources, and what it inferred before the optimisers."""
    graph = model.graph
    del model.metadata_props[:]
    del graph.metadata_props[:]
    del graph.value_info[:]
    for entry in (*graph.node, *graph.input, *graph.output, *graph.initializer, *model.functions):
        del entry.metadata_props[:]
        entry.doc_string = ""


def _respell_equation(node: onnx.NodeProto) -> None:
    """Of an Einsum: TensorRT's parser takes lower-case letters without spaces only."""
    for attribute in node.attribute:
        if node.op_type == "Einsum" and attribute.name == "equation":
            attribute.s = respelled(attribute.s.decode()).encode()


def respelled(equation: str) -> str:
    """`B G H I D, B G H J D -> B G H I J` to `abcde,abcfe->abcdf`."""
    plain = equation.replace(" ", "")
    letters = "".join(dict.fromkeys(char for char in plain if char.isalpha()))  # each once, as they come
    return plain.translate(str.maketrans(letters, string.ascii_lowercase[: len(letters)]))


def weight_elements(model: onnx.ModelProto, *, equal_once: bool = False) -> int:
    """Elements of the constant operands of the convolutions and matrix products that work on the image.

    A weight may still be computed (before folding): transposed, or standardised. Its size is that of its stated
    shape or, where none is stated, is followed from initializers through operations that keep it. Products of
    constants alone may be folded, and don't count. With `equal_once`, it is the initializers alone, those of one
    content once: equal products of them may become one.
    """
    weights = _weights(model)
    if not equal_once:
        return sum(elements for _, elements in weights)
    contents = {tensor.name: _content(tensor) for tensor in model.graph.initializer}
    # Slices of an initializer (a joint q, k, v) may be equal where the whole is not: they are left out.
    elements_of = {contents[source]: elements for source, elements in weights if source in contents}
    return sum(elements_of.values())


def _weights(model: onnx.ModelProto) -> list[tuple[str, int]]:
    """The source and the elements of each: an initializer's name where it holds one, reshaped or not, else its own."""
    sizes = _sizes(model)
    sources: dict[str, str] = {}
    image_tensors = {tensor.name for tensor in model.graph.input} - constants_of(model.graph).keys()
    weights = []
    for node in model.graph.node:
        _follow_size(node, sizes, sources)
        if image_tensors.isdisjoint(_read_values(node)):
            continue
        if node.op_type in WEIGHTED:
            constants = [name for name in _factors(node) if name not in image_tensors]
            weights += [(sources.get(name, name), sizes.get(name, 0)) for name in constants]
        if node.op_type != "Shape":  # an image's sizes are no image
            image_tensors.update(node.output)
    return weights


def _read_values(node: onnx.NodeProto) -> Sequence[str]:
    """The operands whose values matter: of the tensor whose type a cast takes, none do."""
    operands: Sequence[str] = node.input[:1] if node.op_type == "CastLike" else node.input
    return operands


def _follow_size(node: onnx.NodeProto, sizes: dict[str, int], sources: dict[str, str]) -> None:
    """Adds what the node makes, if it is a constant or another's elements in another shape."""
    if node.op_type == "Constant" and node.attribute[0].name == "value":
        sizes[node.output[0]] = math.prod(node.attribute[0].t.dims)
    elif node.op_type in _SIZE_KEEPING and node.input[0] in sizes:
        kept = node.input[0]
        sizes[node.output[0]] = sizes[kept]
        sources[node.output[0]] = sources.get(kept, kept)


def _factors(node: onnx.NodeProto) -> Sequence[str]:
    """The operands that may be weights: either side of a product, a convolution's second."""
    factors: Sequence[str] = node.input[:2] if node.op_type in ("MatMul", "Gemm") else node.input[1:2]
    return factors


def _sizes(model: onnx.ModelProto) -> dict[str, int]:
    """Elements of the tensors whose shape is stated without a free axis, and of the initializers."""
    sizes = {}
    for tensor in model.graph.value_info:
        shape = [axis.dim_value for axis in tensor.type.tensor_type.shape.dim]
        if shape and all(shape):
            sizes[tensor.name] = math.prod(shape)
    for constant in model.graph.initializer:
        sizes[constant.name] = math.prod(constant.dims)
    return sizes


def _content(tensor: onnx.TensorProto) -> str:
    return hashlib.sha256(tensor.raw_data or numpy_helper.to_array(tensor).tobytes()).hexdigest()


def write_model(model: onnx.ModelProto, path: Path) -> Path:
    """Checks the model and writes it atomically; above 2 GB its weights go beside the file, and from the model.

    Raises what `check_structure` raises, ModelError for what is no valid ONNX, FolderError when it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    check_structure(model, str(path))
    try:
        if exceeds_message(model):
            _write_with_aside(model, path)
        else:
            with replacing(path) as file:
                file.write_bytes(model.SerializeToString())
                _check(file)
            aside_of(path).unlink(missing_ok=True)  # of a larger model before
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"{path} would not be valid ONNX: {_reason(error)}") from error
    except OSError as error:
        raise FolderError(f"can't write {path}: {error.strerror}; free some space or choose another folder") from error
    return path


def _write_with_aside(model: onnx.ModelProto, path: Path) -> None:
    """Both under their own names in a folder of the same disk first, since the file names the other."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as folder:
        written = Path(folder) / path.name
        _save(model, written, aside=True)
        _check(written)
        for source in reversed(files_of(written)):  # the file itself last
            with replacing(path.with_name(source.name)) as temporary:
                shutil.copymode(temporary, source)
                os.replace(source, temporary)


def _check(path: Path) -> None:
    """From the disk: what lies in memory would be copied three times with its weights."""
    onnx.checker.check_model(str(path), full_check=True)


@contextlib.contextmanager
def loadable(model: onnx.ModelProto) -> Iterator[bytes | str]:
    """What a runtime loads the model from: a message or, where it would be too large for one, a file for the time."""
    if not exceeds_message(model):
        yield model.SerializeToString()
        return
    with _scratch_folder() as folder:
        yield str(_spilled(model, folder))


def check_structure(model: onnx.ModelProto, name: str) -> None:
    """Raises GateError for what must not ship: training-mode operations, a fixed batch, values that are not numbers."""
    for node in model.graph.node:
        is_training_norm = node.op_type == "BatchNormalization" and attributes_of(node).get("training_mode")
        if is_training_norm or node.op_type == "Dropout":
            raise GateError(f"{name}: {node.op_type} {node.name!r} is in training mode; export the model after eval()")
    for tensor in (*model.graph.input, *model.graph.output):
        _require_free_batch(tensor, name)
    for weight in model.graph.initializer:
        if _holds_nan(weight):
            raise GateError(f"{name}: weight {weight.name!r} holds values that are not finite")


def _require_free_batch(tensor: onnx.ValueInfoProto, name: str) -> None:
    shape = tensor.type.tensor_type.shape.dim
    if shape and shape[0].dim_param:
        return
    batch = shape[0].dim_value if shape else "none"
    raise GateError(f"{name}: {tensor.name!r} has the fixed batch {batch}; export it with a free batch axis")


def _holds_nan(tensor: onnx.TensorProto) -> bool:
    """Attention masks hold -inf on purpose; NaN is never on purpose. What lies outside the file is not looked at."""
    if tensor.data_type not in _FLOATS or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return False
    return bool(np.isnan(numpy_helper.to_array(tensor)).any())


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporters report progress on stdout and warn about their own internals."""
    with silenced(*_CHATTER), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def silenced(*names: str) -> Iterator[None]:
    """Inside, loggers of these names, and those below that have no level of their own, say errors alone."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
