"""The table of criteria. A new one is a function in a module of this folder and a row here.

Each row carries its paper's way of reading units; `ScoreOptions` can change it. Knows no network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx

from ..errors import RecipeError, did_you_mean
from ..records import Group
from ..tasks import Targets
from ..tensors import Inputs
from . import activations, gradients, weights
from .feeding import Feed
from .gradients import Measure, Take
from .lrp import LrpOptions, prepare, uncovered
from .options import Per, Place, ScoreOptions, Sign, Start

# a graph, the names of the nodes to measure at, options
Prepare = Callable[[fx.GraphModule, Sequence[str], ScoreOptions], Measure]
# by a site's place in its group, what computes the site's units
FindFeeds = Callable[[fx.GraphModule, Group, ScoreOptions], Mapping[int, tuple[Feed, ...]]]


@dataclass(frozen=True, slots=True)
class AtNodes:
    """Tensors measured at the sites, batch by batch, and how they become units.

    `uncovered` names the operations the criterion has no rule for and only approximates.
    """

    prepare: Prepare
    start: Start | None = None
    sign: Sign = "absolute"
    per: Per | None = None
    place: Place = "site"
    uncovered: Callable[[fx.GraphModule, ScoreOptions], tuple[str, ...]] | None = None


@dataclass(frozen=True, slots=True)
class OnWeights:
    """A number per unit from the weights that compute it.

    `feeds` finds those weights; `collect`, where the criterion needs images, sums their gradients over a batch.
    """

    weigh: weights.Weigh
    collect: weights.Collect | None = None
    feeds: FindFeeds = weights.weight_feeds


@dataclass(frozen=True, slots=True)
class AtRandom:
    """A seeded draw per group: what every criterion has to beat."""


Criterion = AtNodes | OnWeights | AtRandom


def lrp(graph: fx.GraphModule, nodes: Sequence[str], options: ScoreOptions) -> Measure:
    """Layer-wise relevance propagation by the composite of `options.lrp`.

    Raises RecipeError where relevance is to start at the loss, UncoveredError where `strict` meets an operation
    without a rule.
    """
    propagate = prepare(graph, _lrp_options(options))

    def measure(images: Inputs, targets: Targets, take: Take) -> None:
        def reduce(name: str, relevance: Tensor) -> Tensor:
            take(name, relevance)
            return relevance.new_empty(0)  # frees the layer's relevance before the next one is computed

        propagate(images, targets, nodes, take=reduce)

    return measure


def _lrp_options(options: ScoreOptions) -> LrpOptions:
    lrp_options = replace(options.lrp or LrpOptions(), objective=options.objective)
    if options.start == "loss":
        raise RecipeError("relevance can't start from the loss's gradient; start it from 'one' or 'logit'")
    return replace(lrp_options, start=options.start) if options.start else lrp_options


def _lrp_uncovered(graph: fx.GraphModule, options: ScoreOptions) -> tuple[str, ...]:
    return uncovered(graph, _lrp_options(options))


# `settled`: taken behind normalisation and activation, where the value is what the next layer reads
CRITERIA: Mapping[str, Criterion] = {
    "lrp": AtNodes(lrp, uncovered=_lrp_uncovered),
    "gradient": AtNodes(gradients.gradient, start="loss", per="element"),
    "gradient_x_input": AtNodes(gradients.gradient_x_value, start="one", place="settled"),
    "taylor": AtNodes(gradients.gradient_x_value, start="loss", place="settled"),
    "fisher": AtNodes(gradients.gradient_x_value, start="loss", sign="squared", per="sample", place="settled"),
    "integrated_gradients": AtNodes(gradients.integrated_gradients, start="one", place="settled"),
    "activation": AtNodes(activations.activation, per="element", place="settled"),
    "l1": OnWeights(weights.l1),
    "l2": OnWeights(weights.l2),
    "fpgm": OnWeights(weights.geometric_median),
    "bn_scale": OnWeights(weights.l1, feeds=weights.scale_feeds),
    "taylor_weights": OnWeights(weights.taylor_of_weights, collect=weights.sum_gradients),
    "hessian": OnWeights(weights.curvature_of_weights, collect=weights.sum_squared_gradients),
    "random": AtRandom(),
}


def criterion_named(name: str) -> Criterion:
    """The table's row of that name. Raises RecipeError on an unknown one."""
    if name not in CRITERIA:
        names = sorted(CRITERIA)
        raise RecipeError(
            f"there is no criterion {name!r}; choose one of {', '.join(names)}.{did_you_mean(name, names)}"
        )
    return CRITERIA[name]
