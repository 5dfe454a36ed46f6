"""Criteria that read weights: the rows that compute each unit in, one number per unit out.

Plain ones need no images; the others need sums of gradients of those weights, collected here. Nothing of
torch_pruning is used: its Hessian keeps only the last sample, its Taylor never counts BatchNorm, its FPGM
compares squared weights, its norms are tied to its own groups; tests show each, and where both agree.
Sources: Li et al. 2017 (L1); He et al. 2019 (FPGM, eq. 4); Liu et al. 2017 (scale); LeCun et al. 1990 (OBD).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from ..graph import aten, fetch
from ..graph.neighbours import only_user, shape_of
from ..graph.operators import arguments
from ..records import Group, Site
from ..tasks import Targets
from ..tensors import Inputs, count, cut
from .feeding import Feed, feeds
from .options import ScoreOptions
from .starts import CLASSES, Objective
from .tape import record
from .units import is_elementwise, named

Rows = Sequence[Tensor]  # per unit, flat, in float64
# rows and, where the criterion collects any, sums over images shaped like them in; [units] scores out
Weigh = Callable[[Rows, Rows], Tensor]
# graph, images, targets, names of weight nodes and objective in; what one batch adds to each weight's sum out
Collect = Callable[[fx.GraphModule, Inputs, Targets, Sequence[str], Objective], Mapping[str, Tensor]]


def l1(rows: Rows, _: Rows) -> Tensor:
    """Sum of the absolute weights (Li et al. 2017); of a normalisation's scales for `bn_scale` (Liu et al. 2017)."""
    return torch.stack([unit.abs().sum() for unit in rows])


def l2(rows: Rows, _: Rows) -> Tensor:
    """Root of the sum of squared weights."""
    return torch.stack([unit.square().sum().sqrt() for unit in rows])


def geometric_median(rows: Rows, _: Rows) -> Tensor:
    """Sum of distances to the layer's other units; the unit nearest to all others is the most replaceable.

    He et al. 2019, equation 4, over the group's units.
    """
    width = max(unit.numel() for unit in rows)  # shorter rows (of several layers) end in zeros
    matrix = torch.stack([torch.nn.functional.pad(unit, (0, width - unit.numel())) for unit in rows])
    return torch.cdist(matrix, matrix).fill_diagonal_(0).sum(1)  # by products, which leave 1e-8 on the diagonal


def taylor_of_weights(rows: Rows, gradients: Rows) -> Tensor:
    """|sum of weight x gradient|: first-order change of the whole loss when the unit's weights go."""
    return torch.stack([(unit * gradient).sum().abs() for unit, gradient in zip(rows, gradients, strict=True)])


def curvature_of_weights(rows: Rows, curvatures: Rows) -> Tensor:
    """Half the sum of weight^2 x the empirical Fisher's diagonal, OBD's saliency."""
    pairs = zip(rows, curvatures, strict=True)
    return torch.stack([(unit.square() * curvature).sum() / 2 for unit, curvature in pairs])


def sum_gradients(
    graph: fx.GraphModule, images: Inputs, targets: Targets, weights: Sequence[str], objective: Objective = CLASSES
) -> Mapping[str, Tensor]:
    """Gradients of the task's loss (a classifier's cross-entropy), summed over the batch; float64, by weight node."""
    _, gradients = record(graph, images, targets, weights, start="loss", objective=objective)
    return {name: gradient.double() for name, gradient in gradients.items()}


def sum_squared_gradients(
    graph: fx.GraphModule, images: Inputs, targets: Targets, weights: Sequence[str], objective: Objective = CLASSES
) -> Mapping[str, Tensor]:
    """Squares of each sample's own gradient, summed over the batch; float64, by weight node.

    One pass a sample, as the square of a sum over samples is not the sum of their squares.
    """
    total: dict[str, Tensor] = {}
    for i in range(count(images)):  # slices, so that the batch axis stays: [1, C, H, W] and [1]
        target = None if targets is None else targets[i : i + 1]
        gradients = sum_gradients(graph, cut(images, i, i + 1), target, weights, objective)
        for name, gradient in gradients.items():
            add_into(total, name, gradient.square())
    return total


def add_into(sums: dict[str, Tensor], name: str, addend: Tensor) -> None:
    """Adds to the sum of that name, in place; the first addend becomes the sum and must be nobody else's."""
    if name in sums:
        sums[name].add_(addend)
    else:
        sums[name] = addend


def weight_feeds(graph: fx.GraphModule, group: Group, options: ScoreOptions) -> dict[int, tuple[Feed, ...]]:
    """Per site (by its place in the group) the rows that compute its units; sites without any are left out."""
    return _by_site(group, lambda site: feeds(graph, site))


def scale_feeds(graph: fx.GraphModule, group: Group, options: ScoreOptions) -> dict[int, tuple[Feed, ...]]:
    """The same of the affine normalisation at the site or right behind it."""
    return _by_site(group, lambda site: _scale_feeds(graph, site))


def _by_site(group: Group, feeds_of: Callable[[Site], tuple[Feed, ...]]) -> dict[int, tuple[Feed, ...]]:
    by_site: dict[int, tuple[Feed, ...]] = {}
    for i, site in enumerate(group.sites):
        site_feeds = feeds_of(site)
        if any((feed.units >= 0).any() for feed in site_feeds):
            by_site[i] = site_feeds
    return by_site


# those whose scale has one number for each channel
_NORMALISATIONS = (aten.batch_norm.default, aten.layer_norm.default, aten.group_norm.default)


def _scale_feeds(graph: fx.GraphModule, site: Site) -> tuple[Feed, ...]:
    """One, where the site's one axis is the one the scale is laid along, else none."""
    norm = _norm_behind(named(graph, site.node))
    if norm is None:
        return ()
    scale = arguments(norm)["weight"]
    if not isinstance(scale, fx.Node):  # a normalisation may have none
        return ()
    channel_axis = 1
    if norm.target is aten.layer_norm.default:  # [N, tokens, C]
        channel_axis = len(shape_of(norm)) - 1
    fits = site.axes == (channel_axis,) and shape_of(scale) == (site.units.size,)
    return (Feed(scale.name, site.units.reshape(-1)),) if fits else ()


def _norm_behind(node: fx.Node) -> fx.Node | None:
    """The normalisation at a node or behind element-wise operations that each alone read the one before."""
    while node.target not in _NORMALISATIONS:
        user = only_user(node)
        if user is None or not (user.target in _NORMALISATIONS or is_elementwise(user)):
            return None
        node = user
    return node


def unit_rows(tensors: Mapping[str, Tensor], site_feeds: Sequence[Feed], size: int) -> list[Tensor]:
    """Per unit everything that computes it, flat, in float64; one zero for a unit that nothing computes."""
    pieces: defaultdict[int, list[Tensor]] = defaultdict(list)  # those of -1 belong to no unit, and stay here
    for feed in site_feeds:
        rows = feed.rows(tensors[feed.weight])  # [rows, what each is made of]
        for row, unit in zip(rows, feed.units.tolist(), strict=True):
            pieces[unit].append(row)
    nothing = torch.zeros(1, dtype=torch.float64)
    return [torch.cat(pieces[unit] or [nothing]) for unit in range(size)]


@torch.no_grad()
def evaluated(graph: fx.GraphModule, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of weight nodes, computed ones (standardised weights) included; on the CPU, as rows are float64."""

    @functools.cache
    def value(node: fx.Node) -> Tensor:
        if node.op == "get_attr":
            return fetch(graph, str(node.target)).detach()
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        computed: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        return computed

    return {name: value(named(graph, name)).cpu() for name in names}
