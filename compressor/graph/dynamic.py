"""Dynamic convolutions: kernels computed for each image, as many groups as the batch has images, in; products out.

CondConv (Yang et al. 2019) and dynamic filter networks fold the images of a batch into the channels, [1, N * C, H, W],
and convolve with N * groups groups. No file of ONNX holds such a number, and nothing behind sees the images any more.
Here it becomes the product of each image's kernel with that image's patches, [N, groups, out, in * taps] @
[N, groups, in * taps, places], which has as many MACs. What isn't of that form stays as it is.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from .neighbours import calls_of, shape_of
from .operators import CONVOLUTIONS, Convolution, arguments, paddings_of

aten = torch.ops.aten

_PLANE = 2  # `im2col` takes two spatial axes
_REGROUPINGS = (
    *(aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.unflatten.int),
    *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
)
_ORDERINGS = (aten.permute.default, aten.transpose.int, aten.movedim.int)
MIXTURES = (aten.matmul.default, aten.mm.default)
"""What mixes stored kernels for each image: shares [N, K] times [K, out * in * taps]."""
_PADDINGS = (aten.pad.default, aten.constant_pad_nd.default)


@dataclass(frozen=True, slots=True)
class DynamicPart:
    """What a node [N, ...] is to a dynamic convolution, whose kernels have so many taps.

    A kernel is [N, (groups,) outputs of a group, inputs of a group * taps], without the axis for one group.
    """

    role: Literal["kernel", "bias", "result"]
    taps: int
    depthwise: bool


@dataclass(frozen=True, slots=True)
class _Geometry:
    """Of one image: [C, *lengths] in, [out, *places] out; `batch` is the node that counts the images."""

    batch: fx.Node
    groups: int
    channels: int
    outputs: int
    lengths: tuple[int, ...]
    kernel: tuple[int, ...]
    places: tuple[int, ...]


def part_of(node: object) -> DynamicPart | None:
    """What a node is to a dynamic convolution; None for any other node, and for what is no node."""
    return node.meta.get("dynamic") if isinstance(node, fx.Node) else None


def is_part(node: object, *roles: str) -> bool:
    """Whether a node plays one of those roles in a dynamic convolution."""
    part = part_of(node)
    return part is not None and part.role in roles


def unfold_images(graph: fx.GraphModule) -> None:
    """Writes every dynamic convolution of a traced graph with shapes as products that keep the images in front.

    In place. A convolution stays where its groups are not the batch's images times a number, or its images don't lie in
    the channels, or it has three spatial axes.
    """
    # read before any is written: what one is replaced by may be the next one's input
    read = [(node, _geometry(node)) for node in calls_of(graph)]
    geometries = {node: geometry for node, geometry in read if geometry is not None}
    if not geometries:
        return
    for node, geometry in geometries.items():
        _Writer(graph, node).write(geometry)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _geometry(node: fx.Node) -> _Geometry | None:
    """None for any other node than a dynamic convolution that can be written otherwise."""
    if CONVOLUTIONS.get(node.target, _PLANE + 1) > _PLANE:
        return None
    convolution = Convolution.of(node)
    if not isinstance(convolution.groups, fx.Node):
        return None
    counted = _images_times(convolution.groups)
    images_axis, folded, *lengths = shape_of(arguments(node)["input"])
    if counted is None or images_axis != 1:
        return None
    batch, groups = counted
    images = batch.meta["val"]
    outputs, _, *kernel = shape_of(convolution.weight)
    places = shape_of(node)[2:]
    return _Geometry(batch, groups, folded // images, outputs // images, tuple(lengths), tuple(kernel), places)


def _images_times(size: object) -> tuple[fx.Node, int] | None:
    """The batch's length and the number it is multiplied with; None for a size that is no such product.

    `sym_size(input, 0)` is the batch times 1, `mul(sym_size(input, 0), 480)` the batch times 480.
    """
    if not isinstance(size, fx.Node):
        return None
    if size.target is aten.sym_size.int:
        settings = arguments(size)
        is_batch = settings["self"].op == "placeholder" and settings["dim"] == 0
        return (size, 1) if is_batch else None
    if size.target is not operator.mul:
        return None
    for one, factor in itertools.permutations(size.args):  # either may stand first
        counted = _images_times(one)
        if counted is not None and isinstance(factor, int):
            batch, number = counted
            return batch, number * factor
    return None


@dataclass(frozen=True, slots=True)
class _Writer:
    """Puts nodes with shapes in front of a convolution, under its layer's name."""

    graph: fx.GraphModule
    convolution: fx.Node

    def call(self, target: Any, *args: Any) -> fx.Node:
        """A new node of that operation, its value's shape recorded."""
        with self.graph.graph.inserting_before(self.convolution):
            node = self.graph.graph.call_function(target, args)
        values = fx.map_arg(args, lambda source: source.meta["val"])
        node.meta = {**self.convolution.meta, "val": target(*values)}
        return node

    def write(self, geometry: _Geometry) -> None:
        """The convolution as a product, in its place."""
        settings = Convolution.of(self.convolution)
        shape = (geometry.channels, *geometry.lengths)
        images = self._images(arguments(self.convolution)["input"], geometry.batch, shape)  # [N, C, ...]
        images = self._padded(images, paddings_of(settings.padding, geometry.kernel, settings.dilation))
        patches = self._patches(images, settings, geometry)

        groups, taps = geometry.groups, math.prod(geometry.kernel)
        outputs, inputs = geometry.outputs // groups, geometry.channels // groups
        parts = () if groups == 1 else (groups,)  # no axis for one group
        columns = self._regrouped(patches, geometry.batch, (*parts, inputs * taps, math.prod(geometry.places)))
        kernels = self._regrouped(settings.weight, geometry.batch, (*parts, outputs, inputs * taps))
        kernels.meta["dynamic"] = DynamicPart("kernel", taps, inputs == 1)
        product = self.call(aten.matmul.default, kernels, columns)  # [N, (groups,) out / groups, places]

        result = self._regrouped(product, geometry.batch, (geometry.outputs, *geometry.places))
        if settings.bias is not None:
            ones = [1] * len(geometry.places)
            bias = self._regrouped(settings.bias, geometry.batch, (geometry.outputs, *ones))
            bias.meta["dynamic"] = DynamicPart("bias", taps, inputs == 1)
            result = self.call(aten.add.Tensor, result, bias)
        result.meta["dynamic"] = DynamicPart("result", taps, inputs == 1)
        self._replace(result)

    def _images(self, folded: fx.Node, batch: fx.Node, shape: Sequence[int]) -> fx.Node:
        """[N, *shape] of what the convolution reads, [1, N * C, ...]; a padding is done over the images instead."""
        if folded.target not in _PADDINGS or len(arguments(folded)["pad"]) > 2 * (len(shape) - 1):
            return self._regrouped(folded, batch, shape)
        source = arguments(folded)["self"]
        inside = (shape[0], *shape_of(source)[2:])
        images = self._images(source, batch, inside)
        return self.call(folded.target, images, *folded.args[1:])

    def _padded(self, images: fx.Node, paddings: Sequence[tuple[int, int]]) -> fx.Node:
        amounts = list(itertools.chain.from_iterable(reversed(paddings)))  # the last axis first
        if not any(amounts):
            return images
        return self.call(aten.pad.default, images, amounts)

    def _patches(self, images: fx.Node, settings: Convolution, geometry: _Geometry) -> fx.Node:
        """[N, C * taps, places] of [N, C, ...], or in another shape with the same values in the same order."""
        if math.prod(geometry.kernel) == 1:
            for axis, step in enumerate(settings.stride, start=2):
                if step > 1:
                    images = self.call(aten.slice.Tensor, images, axis, 0, shape_of(images)[axis], step)
            return images
        kernel, dilation, stride = geometry.kernel, settings.dilation, settings.stride
        if len(kernel) < _PLANE:  # a line is a plane of height 1
            images = self.call(aten.unsqueeze.default, images, 2)
            kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
        padding = (0,) * _PLANE
        return self.call(aten.im2col.default, images, *map(list, (kernel, dilation, padding, stride)))

    def _regrouped(self, node: fx.Node, batch: fx.Node, shape: Sequence[int]) -> fx.Node:
        """[N, *shape]: the tensor a node was made from where that has this shape already, else its values reshaped."""
        wanted = (batch.meta["val"], *shape)
        source = node
        while True:
            if shape_of(source) == wanted:
                return source
            if not keeps_order(source):
                return self.call(aten.reshape.default, source, [batch, *shape])
            source = source.args[0]  # type: ignore[assignment]

    def _replace(self, result: fx.Node) -> None:
        """Puts the images' own result in the place of what brings [1, N * out, ...] into that shape further on."""
        wanted = shape_of(result)
        behind: list[fx.Node] = [self.convolution]
        regrouped: list[fx.Node] = []
        for node in behind:  # grows on the way
            for user in filter(keeps_order, node.users):
                if shape_of(user) == wanted:
                    regrouped.append(user)
                else:
                    behind.append(user)
        for node in regrouped:
            node.replace_all_uses_with(result)

        readers = itertools.chain.from_iterable(node.users for node in behind)
        if not all(map(keeps_order, readers)):  # something reads [1, N * out, ...] as such
            places = shape_of(self.convolution)[2:]
            folded = self.call(aten.reshape.default, result, [1, -1, *places])
            self.convolution.replace_all_uses_with(folded)


def keeps_order(node: fx.Node) -> bool:
    """Whether a node's values are its first argument's in the same order: a reshape, or axes of length 1 moved."""
    if node.target in _REGROUPINGS:
        return True
    if node.target not in _ORDERINGS:
        return False
    sizes = shape_of(arguments(node)["self"])
    numbered = torch.empty([axis + 1 for axis in range(len(sizes))], device="meta")  # each axis as long as its number
    moved: Tensor = node.target(numbered, *node.args[1:])
    longer = [number for number in moved.shape if sizes[number - 1] > 1]
    return longer == sorted(longer)
