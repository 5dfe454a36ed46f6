"""A criterion by its name: the row of the house's table, and the functions that row names, found in this folder.

Holds the criterion `lrp`, which joins the propagation to the way scores are read. Knows no network.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from .. import criteria as table
from ..criteria import AtNodes, AtRandom, Learned, OnWeights
from ..errors import RecipeError, did_you_mean
from ..records import Group
from ..tasks import Targets
from ..tensors import Inputs
from .feeding import Feed
from .gradients import Measure, Take
from .lrp import LrpOptions, prepare, uncovered
from .options import ScoreOptions

# a graph, the names of the nodes to measure at, options
Prepare = Callable[[fx.GraphModule, Sequence[str], ScoreOptions], Measure]
# by a site's place in its group, what computes the site's units
FindFeeds = Callable[[fx.GraphModule, Group, ScoreOptions], Mapping[int, tuple[Feed, ...]]]
# the names of the operations that a criterion has no rule for
FindUncovered = Callable[[fx.GraphModule, ScoreOptions], tuple[str, ...]]


def criterion_named(name: str) -> AtNodes | OnWeights | AtRandom:
    """The table's row of that name. Raises RecipeError on an unknown one, and on one that is learned."""
    row = table.CRITERIA.get(name)
    if row is None or isinstance(row, Learned):
        names = sorted(table.UNLEARNED)
        raise RecipeError(
            f"there is no criterion {name!r}; choose one of {', '.join(names)}.{did_you_mean(name, names)}"
        )
    return row


def function_named(name: str) -> Any:
    """`weights.l1` as the function `l1` of this folder's `weights.py`; its type is said where it is called."""
    module, _, function = name.partition(".")
    return getattr(importlib.import_module(f".{module}", __package__), function)


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


def lrp_uncovered(graph: fx.GraphModule, options: ScoreOptions) -> tuple[str, ...]:
    """The operations that LRP passes by input x gradient, as they are named in reports."""
    return uncovered(graph, _lrp_options(options))


def _lrp_options(options: ScoreOptions) -> LrpOptions:
    lrp_options = replace(options.lrp or LrpOptions(), objective=options.objective)
    if options.start == "loss":
        raise RecipeError("relevance can't start from the loss's gradient; start it from 'one' or 'logit'")
    return replace(lrp_options, start=options.start) if options.start else lrp_options
