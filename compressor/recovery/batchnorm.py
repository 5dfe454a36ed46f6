"""Normalisation statistics from images instead of a moving average: a network in, its statistics replaced.

Means and variances are pooled over all images in float64, layer after layer, each with the earlier layers'
new ones in force. Batch normalisation: Ioffe & Szegedy, arXiv 1502.03167. Knows nothing of how it was pruned.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..distributed import sum_over_ranks
from ..graph import arguments, aten, fetch, store, trace
from ..lockstep import Batch, Lockstep, Values, changed_nodes, images_of
from ..placement import CPU, device_of, placed
from ..records import Slices
from .evaluate import evaluating

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
    were the data's (folded normalisations) keep their meaning. A module that is no graph is traced for it.
    """
    images = [images_of(batch) for batch in batches]
    if not isinstance(network, fx.GraphModule):
        return _reestimate_module(network, images, limit_bytes)
    dense = network if reference is None else reference
    if reference is None:
        changed = set[fx.Node]()
    elif slices is None:
        changed = set(dense.graph.nodes)
    else:
        changed = changed_nodes(dense, network)
    with (
        evaluating(network),
        Lockstep(dense, network, tuple(dense.graph.nodes), images, changed, {}, limit_bytes) as walk,
    ):
        return _walk(walk, slices, matching=reference is not None)


def _reestimate_module(module: nn.Module, images: list[Tensor], limit_bytes: int) -> tuple[str, ...]:
    example = images[0][:2] if len(images[0]) > 1 else images[0].repeat(2, *[1] * (images[0].dim() - 1))
    graph = placed(trace(module, example.to(CPU)), device_of(module))
    layers = reestimate(graph, images, limit_bytes=limit_bytes)
    own = dict(module.named_buffers())
    with torch.no_grad():
        for name, buffer in graph.named_buffers():
            if name in own:
                own[name].copy_(buffer)
    return layers


def _walk(walk: Lockstep, slices: Slices | None, *, matching: bool) -> tuple[str, ...]:
    layers = []
    for stop, node in enumerate(walk.order):
        if node.target is aten.batch_norm.default and (node in walk.changed or not matching):
            _restate(walk, stop, slices, matching=matching)
            layers.append(str(node.meta["layer"]))
    return tuple(layers)


def _restate(walk: Lockstep, stop: int, slices: Slices | None, *, matching: bool) -> None:
    args = arguments(walk.twin(walk.order[stop]))
    mean_name, var_name = str(args["running_mean"].target), str(args["running_var"].target)
    old_mean = fetch(walk.pruned, mean_name)
    kept = None if slices is None else slices.kept.get(mean_name)
    index = torch.arange(len(old_mean)) if kept is None else torch.from_numpy(kept[0])  # as all that is pooled: CPU
    dense_mean, dense_var = (fetch(walk.dense, name).cpu().double()[index] for name in (mean_name, var_name))
    seen = _statistics(walk, stop, index.to(old_mean.device))
    mean, var = seen[1]
    if matching:
        ratio = torch.where(
            seen[0][1] > LEAST_VARIANCE, var / seen[0][1].clamp(min=LEAST_VARIANCE), torch.ones_like(var)
        )
        mean = mean - (seen[0][0] - dense_mean) * ratio.sqrt()
        var = ((dense_var + args["eps"]) * ratio - args["eps"]).clamp(min=0)
    for name, value in ((mean_name, mean), (var_name, var)):
        store(walk.pruned, name, value.to(old_mean))


def _statistics(walk: Lockstep, stop: int, index: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and unbiased variance per channel of the normalisation's input: of the dense graph, of the pruned one."""
    source = arguments(walk.order[stop])["input"]
    sums = np.zeros((2, 3, len(index)))

    def visit(_: int, dense: Values, pruned: Values) -> None:
        for side, value in enumerate((dense[source].index_select(1, index), pruned[source])):
            flat = value.transpose(0, 1).flatten(1).double()
            count = torch.full_like(flat[:, 0], flat.shape[1])
            sums[side] += torch.stack([count, flat.sum(1), flat.square().sum(1)]).cpu().numpy()

    walk.advance(stop, visit)
    found = []
    for n, total, squares in torch.from_numpy(sum_over_ranks({"sums": sums})["sums"]):
        variance = (squares / n - (total / n).square()).clamp(min=0) * n / (n - 1).clamp(min=1)
        found.append((total / n, variance))
    return found
