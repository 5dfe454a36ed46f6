"""Normalisation statistics from images instead of a moving average: a network in, its statistics replaced.

Means and variances are pooled over all images in float64, layer after layer, each with the earlier layers'
new ones in force. Batch normalisation: Ioffe & Szegedy, arXiv 1502.03167. Knows nothing of how it was pruned.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..accuracy import evaluating
from ..distributed import sum_over_ranks
from ..graph import aten, fetch, store, trace
from ..graph.lockstep import Batch, Lockstep, Values, changed_nodes, inputs_of
from ..graph.operators import arguments
from ..placement import CPU, device_of, placed
from ..records import Slices
from ..tensors import Inputs, count, cut, joined, moved

LEAST_VARIANCE = 1e-12  # a channel that never varies keeps its variance: nothing can be learned of its scale


def reestimate(
    network: nn.Module,
    batches: Iterable[Batch],
    *,
    reference: fx.GraphModule | None = None,
    slices: Slices | None = None,
    limit_bytes: int = 2 << 30,
) -> tuple[str, ...]:
    """Replaces running means and variances by those of `batches`, in place; the names of the layers it changed.

    With the dense graph as `reference` (and the pruned one's `slices`), every normalisation's output gets the
    mean and variance the dense one's has on the same images: sampling noise cancels, and statistics that never
    were the data's (folded normalisations) keep their meaning. A module that is no graph is traced for it, and
    gets the statistics of the images: a `reference` is for graphs alone.
    Values that wait between layers lie in files beyond `limit_bytes`.
    """
    images = inputs_of(batches)
    if not isinstance(network, fx.GraphModule):
        return _reestimate_module(network, images, limit_bytes)

    if reference is None:
        dense, changed = network, set[fx.Node]()
    elif slices is None:  # who gives no slices may have changed any weight
        dense, changed = reference, set(reference.graph.nodes)
    else:
        dense, changed = reference, changed_nodes(reference, network)
    with (
        evaluating(network),
        Lockstep(dense, network, tuple(dense.graph.nodes), images, changed, {}, limit_bytes) as walk,
    ):
        return _walk(walk, slices or Slices({}), matching=reference is not None)


def _reestimate_module(module: nn.Module, images: Iterable[Inputs], limit_bytes: int) -> tuple[str, ...]:
    """Through a graph of it, whose buffers have the module's names."""
    example = cut(next(iter(images)), 0, 2)
    if count(example) < 2:  # a batch of one would be traced as a constant
        example = joined([example, example])
    graph = placed(trace(module, moved(example, CPU)), device_of(module))
    layers = reestimate(graph, images, limit_bytes=limit_bytes)

    module_buffers = dict(module.named_buffers())
    with torch.no_grad():
        for name, buffer in graph.named_buffers():
            if name in module_buffers:
                module_buffers[name].copy_(buffer)
    return layers


def _walk(walk: Lockstep, slices: Slices, *, matching: bool) -> tuple[str, ...]:
    """Layer after layer, so that each sees what the new statistics before it give."""
    layers = []
    for stop, node in enumerate(walk.order):
        is_norm = node.target is aten.batch_norm.default and node in walk.twins
        if is_norm and (node in walk.changed or not matching):
            _restate(walk, stop, slices, matching=matching)
            layers.append(str(node.meta["layer"]))
    return tuple(layers)


def _restate(walk: Lockstep, stop: int, slices: Slices, *, matching: bool) -> None:
    """New statistics for the normalisation at `walk.order[stop]`, which keep the dense one's outputs when `matching`.

    Of the outputs w (x - mean) / sqrt(var + eps) + b, mean and variance are the dense ones' on the same images:
    with `ratio` the pruned inputs' variance over the dense inputs', var + eps = ratio (dense var + eps), and mean lies
    as far from the inputs' own, in these new units, as the dense one's does.
    """
    args = arguments(walk.twin(walk.order[stop]))
    mean_name, var_name = str(args["running_mean"].target), str(args["running_var"].target)
    old_mean = fetch(walk.pruned, mean_name)
    (kept,) = slices.kept.get(mean_name, (np.arange(len(old_mean)),))
    index = torch.from_numpy(kept)  # as all that is pooled: CPU
    dense_mean, dense_var = (fetch(walk.dense, name).cpu().double()[index] for name in (mean_name, var_name))

    dense_inputs, pruned_inputs = _statistics(walk, stop, index.to(old_mean.device))
    mean, var = pruned_inputs
    if matching:
        dense_inputs_mean, dense_inputs_var = dense_inputs
        varies = dense_inputs_var > LEAST_VARIANCE
        ratio = torch.where(varies, var / dense_inputs_var.clamp(min=LEAST_VARIANCE), torch.ones_like(var))
        mean = mean - (dense_inputs_mean - dense_mean) * ratio.sqrt()
        var = ((dense_var + args["eps"]) * ratio - args["eps"]).clamp(min=0)

    for name, value in ((mean_name, mean), (var_name, var)):
        store(walk.pruned, name, value.to(old_mean))


def _statistics(walk: Lockstep, stop: int, index: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and unbiased variance per channel of the normalisation's input: of the dense graph, of the pruned one."""
    source = arguments(walk.order[stop])["input"]
    sums = np.zeros((2, 3, len(index)))  # [dense and pruned, (count, sum, sum of squares), channels]

    def visit(_: int, dense: Values, pruned: Values) -> None:
        for side, value in enumerate((dense[source].index_select(1, index), pruned[source])):
            flat = value.transpose(0, 1).flatten(1).double()  # [C, N * positions]
            count = torch.full_like(flat[:, 0], flat.shape[1])
            sums[side] += torch.stack([count, flat.sum(1), flat.square().sum(1)]).cpu().numpy()

    walk.advance(stop, visit)

    statistics = []
    for n, total, squares in torch.from_numpy(sum_over_ranks({"sums": sums})["sums"]):
        variance = (squares / n - (total / n).square()).clamp(min=0) * n / (n - 1).clamp(min=1)
        statistics.append((total / n, variance))
    return statistics
