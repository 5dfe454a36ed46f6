"""A pruned graph back into the model's own class: torch_pruning's layer functions on a copy, then checked.

For whoever wants to go on in their own code. Only models whose code takes its widths from its layers can
follow; where the class and the graph differ, that is an error and the graph is what computes rightly.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch_pruning as tp
from torch import Tensor, fx, nn

from ..errors import ModelError
from ..graph import fetch, store
from ..graph.interface import answers, output_paths
from ..graph.program import call
from ..graph.tracing import named_tensors
from ..placement import CPU, placed
from ..records import IntArray, Slices
from ..tensors import Inputs, mapped, moved, named_leaves

AGREEMENT = 1e-9  # float64, relative: both run the same operations on the same numbers, in another order

Cut = Callable[[nn.Module, list[int]], object]  # takes a layer and the indices that go
CUTS: Mapping[type[nn.Module], tuple[Cut, Cut | None]] = {
    nn.modules.conv._ConvNd: (tp.prune_conv_out_channels, tp.prune_conv_in_channels),
    nn.Linear: (tp.prune_linear_out_channels, tp.prune_linear_in_channels),
    nn.modules.batchnorm._BatchNorm: (tp.prune_batchnorm_out_channels, None),
    nn.LayerNorm: (tp.prune_layernorm_out_channels, None),
    nn.GroupNorm: (tp.prune_groupnorm_out_channels, None),
    nn.PReLU: (tp.prune_prelu_out_channels, None),
}
"""By layer type: what cuts its outputs and, where it has some of its own, its inputs."""


def to_module(
    model: nn.Module, pruned: fx.GraphModule, slices: Slices, example: Inputs, keywords: Sequence[str] = ()
) -> nn.Module:
    """A copy of `model` with the layers and weights of its pruned graph.

    `example` is [N, ...] of every input, as the graph was traced with, and so are `keywords`. Raises ModelError when
    the class fixes widths in its code (attention's head counts, reshapes by attribute): the traced network is then the
    one to use.
    """
    small = copy.deepcopy(model).eval()
    for name, layer in small.named_modules():
        _cut_layer(layer, name, slices)
    _fill(small, pruned)
    _require_equal(small, pruned, example, keywords)
    return small


def _cut_layer(layer: nn.Module, name: str, slices: Slices) -> None:
    cuts = next((cuts for kind, cuts in CUTS.items() if isinstance(layer, kind)), None)
    kept = slices.kept.get(f"{name}.weight" if name else "weight")  # no name where the model is the layer itself
    if cuts is None or kept is None:
        return
    cut_outputs, cut_inputs = cuts
    # a transposed convolution's weight is [inputs, outputs, *kernel], all others' [outputs, inputs, ...]
    output_axis, input_axis = (1, 0) if getattr(layer, "transposed", False) else (0, 1)
    outputs = _gone(layer, kept, output_axis)
    inputs = _gone(layer, kept, input_axis)

    if getattr(layer, "groups", 1) > 1:
        _require_depthwise(layer, name)
        # an output channel and its one input go together
        tp.prune_depthwise_conv_out_channels(layer, outputs)
        return
    if outputs:
        cut_outputs(layer, outputs)
    if inputs and cut_inputs is not None:
        cut_inputs(layer, inputs)


def _require_depthwise(layer: nn.Module, name: str) -> None:
    if not layer.groups == layer.in_channels == layer.out_channels:
        raise ModelError(f"layer '{name}' is a grouped convolution, which stays in the traced network's form only")


def _gone(layer: nn.Module, kept: Sequence[IntArray], axis: int) -> list[int]:
    """The indices that went from an axis of the layer's weight, ascending; none where it has no such axis."""
    weight = fetch(layer, "weight")
    if axis >= weight.ndim:
        return []
    return sorted(set(range(weight.shape[axis])) - set(kept[axis].tolist()))


def _fill(small: nn.Module, pruned: fx.GraphModule) -> None:
    """Every tensor of the graph under its own name; bare parameters take the graph's shape with its values."""
    graph_tensors = named_tensors(pruned)
    model_tensors = named_tensors(small)
    for name in model_tensors.keys() & graph_tensors.keys():
        value = graph_tensors[name].detach().to(model_tensors[name].device, copy=True)
        store(small, name, value)


@torch.no_grad()
def _require_equal(small: nn.Module, pruned: fx.GraphModule, example: Inputs, keywords: Sequence[str]) -> None:
    remedy = "its code fixes widths that were pruned; use the traced network, which computes the same for every model"
    images = mapped(_doubled, moved(example, CPU))
    expected = answers(copy.deepcopy(placed(pruned, CPU)).double(), images)
    try:
        leaves = named_leaves(call(copy.deepcopy(placed(small, CPU)).double(), images, keywords))
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise ModelError(f"the class {type(small).__name__} can't follow: {error}; {remedy}") from error
    outputs = [leaves[name] for name in output_paths(pruned)]
    error_share = max(_difference(one, other) for one, other in zip(outputs, expected, strict=True))
    if error_share > AGREEMENT:
        raise ModelError(f"the class {type(small).__name__} gives other outputs ({error_share:.1e}); {remedy}")


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _difference(output: Tensor, expected: Tensor) -> float:
    """Of one output, over the largest number expected; of whole numbers 0 or infinite."""
    if output.shape != expected.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(output, expected) else math.inf
    return float((output - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
