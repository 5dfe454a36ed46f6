"""An fp32 file and calibration images in; which way each int8 weight is rounded out, and what biases make up for.

Weights are rounded one input after the other, each time the remaining ones take over what rounding did to the
outputs (GPTQ, arXiv 2210.17323); the mean that is left goes to the bias (arXiv 1906.04721). Knows no ranges.

Covariances grow with the square of a layer's inputs. So layers are looked at some at a time, in passes of their own,
and what comes of a covariance lies in a file where memory has no room for all.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from ..device import feeds
from ..errors import unwritten_temporary
from ..graph.windows import Window, position_count, rows_of
from .calibration import Exposed, Images, exposed, values_of
from .parts import attributes_of, constants_of, readers_of

WIDEST = 4608  # inputs of one output; the covariance of more is not held, and such weights are rounded to the nearest
ROWS = 25_600  # of each layer that are looked at
_DAMPING = 0.01  # of the covariance's mean diagonal
_BLOCK = 128
_SQUARES_BYTES = 1 << 30  # of products of inputs that are summed in one pass
_FACTORS_BYTES = 1 << 30  # of inverses' factors that are held in memory
_ROUNDED = ("Conv", "Gemm", "MatMul")


@dataclass
class _Layer:
    """A node with constant weights [groups, outputs, inputs], and its inputs' mean and covariance, once seen.

    Sums are of inputs less `origin` [groups, inputs], the first image's mean, in float64: where inputs hardly vary,
    the mean's square would leave nothing of their variance. With a bias to take up the mean (`centred`), only what
    varies around it needs to come out right.
    """

    node: onnx.NodeProto
    weight: Tensor
    window: Window
    centred: bool = False
    count: int = 0
    origin: Tensor | None = None
    total: Tensor | float = 0.0
    square: Tensor | float = 0.0

    def see(self, value: Tensor, most: int) -> None:
        """An input of one image, at so many places at most, evenly spread."""
        places = _spread(position_count(value, self.window), most)
        rows = rows_of(value, self.window, places)[:, 0].float()  # [groups, n, inputs]
        if self.origin is None:
            self.origin = rows.mean(1)  # [groups, inputs]
        rows -= self.origin.unsqueeze(1)

        self.count += len(places)
        self.total = self.total + rows.sum(1, dtype=torch.float64)
        if self.weight.shape[2] <= WIDEST:
            # products of one image in float32, which is exact enough so near the mean; their sum is not
            self.square = self.square + (rows.mT @ rows).double()  # [groups, inputs, inputs]

    @property
    def _shift(self) -> Tensor:
        """The mean less the origin, [groups, inputs]."""
        return torch.as_tensor(self.total) / self.count

    @property
    def mean(self) -> Tensor:
        """Of the inputs, [groups, inputs]."""
        assert self.origin is not None
        return self.origin + self._shift

    @property
    def squares_bytes(self) -> int:
        """What the products of its inputs take while they are summed."""
        groups, _, inputs = self.weight.shape
        return 8 * groups * inputs**2 if inputs <= WIDEST else 0

    def covariance(self) -> Tensor | None:
        """[groups, inputs, inputs] around the mean or, not centred, around zero; None where there are too many."""
        if self.weight.shape[2] > WIDEST:
            return None
        around_origin = torch.as_tensor(self.square) / self.count
        around_mean = around_origin - self._shift.unsqueeze(2) * self._shift.unsqueeze(1)
        return around_mean if self.centred else around_mean + self.mean.unsqueeze(2) * self.mean.unsqueeze(1)

    def factor(self) -> Tensor | None:
        """`inverse_factor` of the covariance, whose sums are let go of."""
        covariance = self.covariance()
        self.square = 0.0
        return None if covariance is None else inverse_factor(covariance)


class _Factors:
    """`inverse_factor` of layers by the name of their weight: in memory, and in files what would not fit there."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # which goes with this object

    def put(self, name: str, factor: Tensor) -> None:
        """Raises FolderError where there is room for it neither in memory nor on the disk."""
        if sum(held.nbytes for held in self._held.values()) + factor.nbytes <= _FACTORS_BYTES:
            self._held[name] = factor
            return
        try:
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="compressor-")
            path = Path(self._folder.name) / f"{len(self._files)}.npy"
            np.save(path, factor.numpy())
        except OSError as error:
            raise unwritten_temporary(error) from error
        self._files[name] = path

    def get(self, name: str) -> Tensor | None:
        """None of a layer that has none."""
        if name in self._files:
            return torch.from_numpy(np.load(self._files[name]))
        return self._held.get(name)


@dataclass
class Rounding:
    """Chooses the weights' int8 codes in quantised forms of one file."""

    layers: Mapping[str, _Layer]  # by the name of their weight
    factors: _Factors
    _cached_codes: dict[tuple[str, bytes, int], Tensor] = field(default_factory=dict, repr=False)

    def apply(self, quantised: onnx.ModelProto, most: int) -> None:
        """Rewrites codes, within -most .. most, and biases of the model, in place; scales stay."""
        constants = constants_of(quantised.graph)
        for name, layer in self.layers.items():
            target = constants.get(f"{name}_quantized")
            if target is None:
                continue
            scales = numpy_helper.to_array(constants[f"{name}_scale"])
            codes = self._codes(name, layer, scales, most)
            target.CopyFrom(numpy_helper.from_array(_flat(codes, layer.node, target), f"{name}_quantized"))
            bias = _bias_of(layer.node, constants)
            if bias is not None:
                lost = layer.weight - codes * _per_output(scales, layer.weight)
                lost_mean = lost @ layer.mean.unsqueeze(2)  # [groups, outputs, 1]
                _shift(constants, bias, lost_mean.reshape(-1).numpy())

    def _codes(self, name: str, layer: _Layer, scales: NDArray[np.float32], most: int) -> Tensor:
        """int8 [groups, outputs, inputs]; kept, as one file is quantised over and over with the same scales."""
        key = (name, scales.tobytes(), most)
        if key not in self._cached_codes:
            steps = layer.weight / _per_output(scales, layer.weight)
            factor = self.factors.get(name)
            codes = steps.round() if factor is None else rounded(steps, factor, most)
            self._cached_codes[key] = codes.clamp(-most, most).to(torch.int8)
        return self._cached_codes[key]


def find_rounding(path: Path | str, images: Images) -> Rounding:
    """Runs the file on images [N, ...], one at a time. Layers that share weights or a bias are left out.

    Raises FolderError where what is found fits neither in memory nor on the disk.
    """
    model = onnx.load(path)
    layers = _layers_of(model)
    file = exposed(model)
    del model  # the session has its weights

    factors = _Factors()
    for some in _passes(layers):
        _see(some, file, images)
        for name in some:
            factor = layers[name].factor() if layers[name].count else None
            if factor is not None:
                factors.put(name, factor)
    return Rounding({name: layer for name, layer in layers.items() if layer.count}, factors)


def _passes(layers: Mapping[str, _Layer]) -> Iterator[dict[str, _Layer]]:
    """So many layers at a time, in their order, as there is room for the products of their inputs."""
    some: dict[str, _Layer] = {}
    room = _SQUARES_BYTES
    for name, layer in layers.items():
        if some and layer.squares_bytes > room:
            yield some
            some, room = {}, _SQUARES_BYTES
        some[name] = layer
        room -= layer.squares_bytes
    if some:
        yield some


def _see(layers: Mapping[str, _Layer], file: Exposed, images: Images) -> None:
    """Shows the layers what they read of each image."""
    readers: dict[str, list[_Layer]] = {}  # by the tensor they read
    for layer in layers.values():
        readers.setdefault(layer.node.input[0], []).append(layer)
    rows_per_image = math.ceil(ROWS / feeds.count(images))
    for image in feeds.parted(images, 1):
        for name, value in values_of(file, [image], readers):
            for layer in readers[name]:
                layer.see(torch.from_numpy(value), rows_per_image)


def _layers_of(model: onnx.ModelProto) -> dict[str, _Layer]:
    """Layers by their weight, which, as their bias, nobody else reads."""
    constants = constants_of(model.graph)
    shared = {name for name, readers in readers_of(model.graph).items() if len(readers) > 1}
    layers = {}
    for node in model.graph.node:
        if node.op_type not in _ROUNDED:
            continue
        weight = node.input[1]
        if weight in constants and shared.isdisjoint(node.input[1:]):
            layers[weight] = _layer_of(node, constants)
    return layers


@torch.no_grad()
def inverse_factor(covariance: Tensor) -> Tensor:
    """Upper triangular, upper.mT @ upper = inverse(covariance + damping), each [groups, inputs, inputs].

    In float32, half as large to hold: damping of a hundredth of the mean variance is far above its rounding.
    """
    # With both axes reversed the lower factor is an upper one: covariance + damping = root @ root.mT
    root = _damped_root(covariance.float().flip(1, 2)).flip(1, 2)
    eye = torch.eye(covariance.shape[-1], dtype=root.dtype)
    upper: Tensor = torch.linalg.solve_triangular(root, eye, upper=True)
    return upper


@torch.no_grad()
def rounded(steps: Tensor, upper: Tensor, most: int) -> Tensor:
    """Whole numbers for weights [groups, outputs, inputs] in steps of 1, given the inputs' second moments.

    The error of each goes to the weights behind it as `upper`, the `inverse_factor` of those moments, says.
    """
    inputs = steps.shape[2]
    upper = upper.to(steps)
    wanted = steps.clone()  # what is still to be rounded, with what it took over
    codes = torch.empty_like(steps)
    for begin in range(0, inputs, _BLOCK):
        end = min(begin + _BLOCK, inputs)
        errors = torch.empty_like(steps[:, :, begin:end])  # [groups, outputs, block]
        for i in range(begin, end):
            codes[:, :, i] = wanted[:, :, i].round().clamp(-most, most)
            error = (wanted[:, :, i] - codes[:, :, i]) / upper[:, i, i].unsqueeze(1)  # [groups, outputs]
            wanted[:, :, i + 1 : end] -= error.unsqueeze(2) * upper[:, i, i + 1 : end].unsqueeze(1)
            errors[:, :, i - begin] = error
        wanted[:, :, end:] -= errors @ upper[:, begin:end, end:]  # behind the block all its errors at once: faster
    return codes


def _damped_root(covariance: Tensor) -> Tensor:
    """The lower Cholesky factor [groups, inputs, inputs] with a ridge that grows until there is one."""
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
    scale = covariance.diagonal(dim1=-2, dim2=-1).mean(1).clamp_min(0) + 1e-12
    for damping in (_DAMPING, 0.1, 1.0, 10.0):
        root: Tensor
        root, failed = torch.linalg.cholesky_ex(covariance + damping * scale[:, None, None] * eye)
        if not failed.any():
            return root
    return scale.sqrt()[:, None, None] * eye.expand_as(covariance)  # nothing is passed on: rounding to the nearest


def _layer_of(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> _Layer:
    attributes = attributes_of(node)
    groups = attributes.get("group", 1)
    stored = numpy_helper.to_array(constants[node.input[1]])
    if _is_transposed(node):
        stored = stored.T
    outputs_first = torch.from_numpy(np.array(stored))  # [outputs, inputs / groups, *kernel]
    weight = outputs_first.reshape(groups, len(outputs_first) // groups, -1)  # [groups, outputs, inputs]
    centred = _bias_of(node, constants) is not None
    node = _copied(node)
    if node.op_type != "Conv":
        return _Layer(node, weight, Window(), centred)

    kernel = tuple(attributes["kernel_shape"])
    axes = len(kernel)
    stride = tuple(attributes.get("strides", [1] * axes))
    dilation = tuple(attributes.get("dilations", [1] * axes))
    pads = attributes.get("pads", [0] * 2 * axes)  # begins of all axes, then ends
    padding = tuple(zip(pads[:axes], pads[axes:], strict=True))
    return _Layer(node, weight, Window(kernel, stride, padding, dilation, groups), centred)


def _copied(node: onnx.NodeProto) -> onnx.NodeProto:
    """Without the model that it is part of, which would stay in memory with all its weights."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _flat(codes: Tensor, node: onnx.NodeProto, like: onnx.TensorProto) -> NDArray[np.int8]:
    """The codes [groups, outputs, inputs] in the shape and order of the file's tensor `like`."""
    shape = tuple(like.dims)
    if _is_transposed(node):  # the file's shape is [inputs, outputs]
        return np.ascontiguousarray(codes.reshape(shape[::-1]).T)
    return np.ascontiguousarray(codes.reshape(shape))


def _is_transposed(node: onnx.NodeProto) -> bool:
    """Whether the weights lie [inputs, outputs]."""
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes_of(node).get("transB", 0))


def _per_output(scales: NDArray[np.float32], weight: Tensor) -> Tensor:
    """[groups, outputs, 1], also where one scale serves the whole tensor."""
    groups, outputs, _ = weight.shape
    flat = torch.from_numpy(scales.astype(np.float64)).reshape(-1)
    return flat.expand(groups * outputs).reshape(groups, outputs, 1)


def _spread(available: int, most: int) -> Tensor:
    """Indices of at most so many, evenly spread from the first to the last: 3 of 5 are 0, 2 and 4."""
    return torch.linspace(0, available - 1, min(available, most), dtype=torch.float64).round().long()


def _bias_of(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> str | None:
    """The name of the initialiser that holds the bias, in whole steps of its scale or in float."""
    bias = node.input[2] if len(node.input) > 2 else ""
    return next((name for name in (f"{bias}_quantized", bias) if name in constants), None)


def _shift(constants: Mapping[str, onnx.TensorProto], bias: str, difference: NDArray[np.float64]) -> None:
    """Adds `difference` [outputs] to a bias, in place; to one in whole steps the nearest number of them."""
    before = numpy_helper.to_array(constants[bias])
    scale = constants.get(f"{bias}_scale")
    steps = difference if scale is None else np.rint(difference / numpy_helper.to_array(scale))
    after = (before + steps).astype(before.dtype).reshape(before.shape)
    constants[bias].CopyFrom(numpy_helper.from_array(after, bias))
