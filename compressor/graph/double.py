"""A graph run in float64, where rounding does not count: what its answers are, beside those in float32."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx
from torch.fx.node import Argument, Target

from ..placement import CPU, placed
from ..tensors import Inputs, as_tuple, moved
from .interface import answers


class Double(fx.Interpreter):
    """Runs a graph in float64; a parameter is converted when it is read and freed after its last use."""

    def get_attr(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, object]) -> object:
        return doubled(super().get_attr(target, args, kwargs))

    def call_function(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, object]) -> object:
        """Tensors that the graph makes itself (zeros, a mask in float32) are converted too."""
        return doubled(super().call_function(target, args, kwargs))


def doubled(value: object) -> object:
    """Floating-point tensors in float64, complex ones in complex128, all else as it is."""
    match value:
        case tuple() | list():
            return type(value)([doubled(piece) for piece in value])
        case Tensor() if value.is_complex():
            return value.to(torch.complex128)
        case Tensor() if value.is_floating_point():
            return value.double()
        case _:
            return value


def parameters_late(graph: fx.GraphModule) -> fx.GraphModule:
    """The same parameters, each read just before its first use, so that `Double` holds few of them at a time."""
    late = copy.deepcopy(graph.graph)
    place = {node: index for index, node in enumerate(late.nodes)}
    for parameter in late.find_nodes(op="get_attr"):
        if parameter.users:
            first_user = min(parameter.users, key=place.__getitem__)
            first_user.prepend(parameter)
    return fx.GraphModule(graph, late)


def exactly(interpreter: fx.Interpreter, images: Inputs) -> tuple[Tensor, ...]:
    """The tensors of the answer as an interpreter of a flat graph computes them from inputs in float64."""
    exact_inputs = [doubled(tensor) for tensor in as_tuple(images)]
    answer: Tensor | tuple[Tensor, ...] = interpreter.run(*exact_inputs)
    return as_tuple(answer)


@torch.no_grad()
def in_both_widths(graph: fx.GraphModule, images: Inputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The graph's answers to images [N, ...] in float32 and in float64, on the CPU.

    They are alike (to about 1e-6) for a trained network. Where they are not, the network multiplies rounding, and two
    programs that add up in another order differ by as much.
    """
    graph, images = placed(graph, CPU), moved(images, CPU)
    return answers(graph, images), exactly(Double(parameters_late(graph)), images)
