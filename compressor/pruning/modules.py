"""A pruned graph back into the model's own class: its weights in a copy, whose layers take their widths from them.

For whoever wants to go on in their own code. Only models whose code takes its widths from its layers can
follow; where the class and the graph differ, that is an error and the graph is what computes rightly.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import ModelError
from ..graph.double import in_both_widths
from ..graph.interface import output_paths
from ..graph.neighbours import calls_of, stored_nodes
from ..graph.operators import ALL_CONVOLUTIONS, NORMALISATIONS, arguments
from ..graph.program import call, first_line, raised_at
from ..graph.tracing import named_tensors, store
from ..graph.wrappers import copied, plain
from ..placement import CPU, placed
from ..records import Slices
from ..tensors import Inputs, mapped, moved, named_leaves

AGREEMENT = 1e-9  # float64, relative: both run the same operations on the same numbers, in another order
# float32, relative: rounding is 6e-8 at each operation and comes to about 1e-6 at the end of a deep network, whose
# untrained layers may multiply it by ten; a wrong width shows as 1e-2
AGREEMENT_FLOAT32 = 1e-4
_REMEDY = "use the traced network, which computes the same for every model"

# the last is a batch norm that keeps no statistics
_NORMS = (*NORMALISATIONS, torch.ops.aten._native_batch_norm_legit.no_stats)

Widths = dict[str, object]  # a layer's attributes that say how wide it is


def to_module(
    model: nn.Module, pruned: fx.GraphModule, slices: Slices, example: Inputs, keywords: Sequence[str] = ()
) -> nn.Module:
    """A copy of `model` with the layers and weights of its pruned graph; weights that it computes are folded.

    `example` is [N, ...] of every input, as the graph was traced with, and so are `keywords`. Raises ModelError when
    the class fixes widths in its code (attention's head counts, reshapes by attribute): the traced network is then the
    one to use.
    """
    small = plain(copied(model), convert=False).module.eval()
    layers = dict(_layers_to_resize(small, slices))
    _fill(small, pruned)
    for name, layer in layers.items():
        calls = [node for node in calls_of(pruned) if node.meta["layer"] == name]
        for attribute, width in _widths(layer, calls).items():
            setattr(layer, attribute, width)
    _require_equal(small, pruned, example, keywords)
    return small


def _layers_to_resize(small: nn.Module, slices: Slices) -> Iterator[tuple[str, nn.Module]]:
    """Those that lose something, and those without tensors, whose width only the graph knows; before they are cut."""
    tensors = named_tensors(small)
    cut = {id(tensors[name]) for name in slices.kept if name in tensors}  # of tied tensors, `kept` has one name
    for name, layer in small.named_modules():
        own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
        if not own or any(id(tensor) in cut for tensor in own):
            yield name, layer


def _fill(small: nn.Module, pruned: fx.GraphModule) -> None:
    """Every tensor of the graph under its own name, tied ones to one; a parameter stays trainable or frozen."""
    graph_tensors = named_tensors(pruned)
    model_tensors = named_tensors(small)
    # of tied tensors, only the name that the graph reads was cut; what is stored first is the one for all
    read = [str(node.target) for node in stored_nodes(pruned)]
    names = [name for name in dict.fromkeys([*read, *graph_tensors]) if name in model_tensors]

    values: dict[int, Tensor] = {}
    for name in names:
        before = model_tensors[name]
        if id(before) not in values:
            values[id(before)] = _in_place_of(before, graph_tensors[name])
    for name, before in model_tensors.items():
        if id(before) in values:
            store(small, name, values[id(before)])


def _in_place_of(before: Tensor, value: Tensor) -> Tensor:
    value = value.detach().to(before.device, copy=True)
    return nn.Parameter(value, before.requires_grad) if isinstance(before, nn.Parameter) else value


def _widths(layer: nn.Module, calls: Sequence[fx.Node]) -> Widths:
    """What a layer's width attributes must be, by its new weights and by the graph's operations in it."""
    for kind, widths in WIDTHS.items():
        if isinstance(layer, kind):
            return widths(layer, calls)
    if hasattr(layer, "normalized_shape"):  # other libraries' norms, written as PyTorch's are
        return _layer_norm_widths(layer, calls)
    return {}


def _convolution_widths(layer: nn.modules.conv._ConvNd, calls: Sequence[fx.Node]) -> Widths:
    groups = layer.groups
    for node in calls:
        if node.target in ALL_CONVOLUTIONS:
            groups = arguments(node)["groups"]
    first, second = layer.weight.shape[:2]
    if layer.transposed:  # [inputs, outputs / groups, *kernel], all others' [outputs, inputs / groups, *kernel]
        return {"in_channels": first, "out_channels": second * groups, "groups": groups}
    return {"in_channels": second * groups, "out_channels": first, "groups": groups}


def _linear_widths(layer: nn.Linear, calls: Sequence[fx.Node]) -> Widths:
    outputs, inputs = layer.weight.shape
    return {"in_features": inputs, "out_features": outputs}


def _bilinear_widths(layer: nn.Bilinear, calls: Sequence[fx.Node]) -> Widths:
    outputs, inputs1, inputs2 = layer.weight.shape
    return {"in1_features": inputs1, "in2_features": inputs2, "out_features": outputs}


def _embedding_widths(layer: nn.Embedding | nn.EmbeddingBag, calls: Sequence[fx.Node]) -> Widths:
    entries, width = layer.weight.shape
    return {"num_embeddings": entries, "embedding_dim": width}


def _channel_norm_widths(layer: nn.Module, calls: Sequence[fx.Node]) -> Widths:
    """Batch, instance and group norms: one weight a channel, or the channels that come in."""
    attribute = "num_channels" if isinstance(layer, nn.GroupNorm) else "num_features"
    for name in ("weight", "running_mean"):
        tensor = getattr(layer, name, None)
        if tensor is not None:
            return {attribute: len(tensor)}
    norms = _norms(calls)
    return {attribute: norms[0]["input"].meta["val"].shape[1]} if norms else {}


def _layer_norm_widths(layer: Any, calls: Sequence[fx.Node]) -> Widths:
    """Layer and RMS norms: their weight is as large as what they normalise over."""
    if layer.weight is not None:
        return {"normalized_shape": tuple(layer.weight.shape)}
    norms = [settings for settings in _norms(calls) if "normalized_shape" in settings]
    return {"normalized_shape": tuple(norms[0]["normalized_shape"])} if norms else {}


def _norms(calls: Sequence[fx.Node]) -> list[dict[str, Any]]:
    """The arguments of those operations that normalise."""
    return [arguments(node) for node in calls if node.target in _NORMS]


def _prelu_widths(layer: nn.PReLU, calls: Sequence[fx.Node]) -> Widths:
    return {"num_parameters": len(layer.weight)}


def _recurrent_widths(layer: nn.RNNBase, calls: Sequence[fx.Node]) -> Widths:
    """Its hidden units are one operation's in the graph, and all stay."""
    return {"input_size": layer.get_parameter("weight_ih_l0").shape[1]}


def _cell_widths(layer: nn.RNNCellBase, calls: Sequence[fx.Node]) -> Widths:
    return {"input_size": layer.weight_ih.shape[1], "hidden_size": layer.weight_hh.shape[1]}


WIDTHS: Mapping[type[nn.Module], Callable[[Any, Sequence[fx.Node]], Widths]] = {
    nn.modules.conv._ConvNd: _convolution_widths,
    nn.Linear: _linear_widths,
    nn.Bilinear: _bilinear_widths,
    nn.Embedding: _embedding_widths,
    nn.EmbeddingBag: _embedding_widths,
    nn.modules.batchnorm._NormBase: _channel_norm_widths,
    nn.GroupNorm: _channel_norm_widths,
    nn.LayerNorm: _layer_norm_widths,
    nn.RMSNorm: _layer_norm_widths,
    nn.PReLU: _prelu_widths,
    nn.RNNBase: _recurrent_widths,
    nn.RNNCellBase: _cell_widths,
}
"""By layer type, among PyTorch's all that have widths but one: nn.MultiheadAttention takes its heads to be as wide
together as its input is, which pruning does not keep, so that it says itself what it expects."""


@torch.no_grad()
def _require_equal(small: nn.Module, pruned: fx.GraphModule, example: Inputs, keywords: Sequence[str]) -> None:
    """Raises ModelError where the class fails or answers otherwise than the graph does."""
    small, images = placed(small, CPU), moved(example, CPU)
    in_float32, in_float64 = in_both_widths(pruned, images)
    paths = output_paths(pruned)
    if _agrees_in_float64(small, images, keywords, dict(zip(paths, in_float64, strict=True))):
        return

    # a class that makes float32 tensors itself fails in float64, or rounds in it: such a one is judged in float32
    trial, name = copied(small), type(small).__name__
    try:
        leaves = named_leaves(call(trial, images, keywords))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        place = _failing_place(trial, error)
        raise ModelError(
            f"the class {name} can't follow: {place} fails with the widths that are left: {first_line(error)}; "
            f"{_REMEDY}"
        ) from error
    error_share = _largest_difference(leaves, dict(zip(paths, in_float32, strict=True)))
    if error_share > AGREEMENT_FLOAT32:
        raise ModelError(
            f"the class {name} gives other outputs than the traced network ({error_share:.1e} of the largest number): "
            f"its code computes something from widths that were pruned, or what it computes is not fixed; {_REMEDY}"
        )


def _agrees_in_float64(
    small: nn.Module, images: Inputs, keywords: Sequence[str], expected: Mapping[str, Tensor]
) -> bool:
    try:
        leaves = named_leaves(call(copied(small).double(), mapped(_in_float64, images), keywords))
    except Exception:  # whatever it is, the run in float32 says it
        return False
    return _largest_difference(leaves, expected) <= AGREEMENT


def _in_float64(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _failing_place(model: nn.Module, error: BaseException) -> str:
    """The innermost layer that an error came up through, and the line of the user's code."""
    names = {id(layer): name for name, layer in model.named_modules()}
    layers = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    innermost = [layer for layer in layers if id(layer) in names][-1:]
    place = "its forward"
    for layer in innermost:
        if names[id(layer)]:
            place = f"layer {names[id(layer)]!r} ({type(layer).__name__})"
    line = raised_at(error)
    return f"{place} at {line}" if line else place


def _largest_difference(leaves: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Infinite where one that is expected is missing."""
    if not expected.keys() <= leaves.keys():
        return math.inf
    return max(_difference(leaves[name], tensor) for name, tensor in expected.items())


def _difference(output: Tensor, expected: Tensor) -> float:
    """Of one output, over the largest number expected; of whole numbers 0 or infinite.

    What is no finite number on both sides at the same place (a mask's infinity) is equal.
    """
    if output.shape != expected.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(output, expected) else math.inf
    if not expected.numel():
        return 0.0
    same = (output == expected) | (output.isnan() & expected.isnan())
    difference = torch.where(same, 0.0, (output - expected).abs())
    scale = expected.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp_min(1e-30)
    return float(difference.nan_to_num(math.inf, math.inf).max() / scale)
