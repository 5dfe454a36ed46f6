"""A pruned graph back into the model's own class: torch_pruning's layer functions on a copy, then checked.

For whoever wants to go on in their own code. Only models whose code takes its widths from its layers can
follow; where the class and the graph differ, that is an error and the graph is what computes rightly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, fx, nn

from ..errors import ModelError
from ..graph import fetch, store
from ..placement import CPU, placed
from ..records import Slices

AGREEMENT = 1e-9  # float64, relative: both run the same operations on the same numbers, in another order

Cut = Callable[[nn.Module, list[int]], Any]
CUTS: Mapping[type[nn.Module], tuple[Cut, Cut | None]] = {
    nn.modules.conv._ConvNd: (tp.prune_conv_out_channels, tp.prune_conv_in_channels),
    nn.Linear: (tp.prune_linear_out_channels, tp.prune_linear_in_channels),
    nn.modules.batchnorm._BatchNorm: (tp.prune_batchnorm_out_channels, None),
    nn.LayerNorm: (tp.prune_layernorm_out_channels, None),
    nn.GroupNorm: (tp.prune_groupnorm_out_channels, None),
    nn.PReLU: (tp.prune_prelu_out_channels, None),
}
"""By layer type: what cuts its outputs and, where it has some of its own, its inputs."""


def to_module(model: nn.Module, pruned: fx.GraphModule, slices: Slices, example: Tensor) -> nn.Module:
    """A copy of `model` with the layers and weights of its pruned graph.

    `example` is [N, C, H, W]. Raises ModelError when the class fixes widths in its code (attention's head
    counts, reshapes by attribute): the traced network is then the one to use.
    """
    small = copy.deepcopy(model).eval()
    for name, layer in small.named_modules():
        _cut_layer(layer, name, slices)
    _fill(small, pruned)
    _require_equal(small, pruned, example)
    return small


def _cut_layer(layer: nn.Module, name: str, slices: Slices) -> None:
    cut = next((cuts for kind, cuts in CUTS.items() if isinstance(layer, kind)), None)
    kept = slices.kept.get(f"{name}.weight" if name else "weight")
    if cut is None or kept is None:
        return
    outputs, inputs = (_gone(layer, kept, axis) for axis in ((1, 0) if getattr(layer, "transposed", False) else (0, 1)))
    groups = getattr(layer, "groups", 1)
    if groups > 1:
        if groups != layer.in_channels or groups != layer.out_channels:
            raise ModelError(f"layer '{name}' is a grouped convolution, which stays in the traced network's form only")
        tp.prune_depthwise_conv_out_channels(layer, outputs)
        return
    if outputs:
        cut[0](layer, outputs)
    if inputs and cut[1] is not None:
        cut[1](layer, inputs)


def _gone(layer: nn.Module, kept: tuple[Any, ...], axis: int) -> list[int]:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if axis >= weight.ndim:
        return []
    return sorted(set(range(weight.shape[axis])) - set(kept[axis].tolist()))


def _fill(small: nn.Module, pruned: fx.GraphModule) -> None:
    """Every tensor of the graph under its own name; bare parameters take the graph's shape with its values."""
    names = dict([*pruned.named_parameters(remove_duplicate=False), *pruned.named_buffers(remove_duplicate=False)])
    own = dict([*small.named_parameters(remove_duplicate=False), *small.named_buffers(remove_duplicate=False)])
    for name in own.keys() & names.keys():
        value = fetch(pruned, name).detach().to(own[name].device, copy=True)
        store(small, name, nn.Parameter(value) if isinstance(own[name], nn.Parameter) else value)


@torch.no_grad()
def _require_equal(small: nn.Module, pruned: fx.GraphModule, example: Tensor) -> None:
    remedy = "its code fixes widths that were pruned; use the traced network, which computes the same for every model"
    images = example.to(CPU).double()
    expected = copy.deepcopy(placed(pruned, CPU)).double()(images)
    try:
        got = copy.deepcopy(placed(small, CPU)).double()(images)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise ModelError(f"the class {type(small).__name__} can't follow: {error}; {remedy}") from error
    error_share = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if error_share > AGREEMENT:
        raise ModelError(f"the class {type(small).__name__} gives other outputs ({error_share:.1e}); {remedy}")
