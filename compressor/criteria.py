"""The table of criteria: how each scores, in a sentence, and which function of `relevance/` or `steering/` does it.

Imports no torch, so that a misspelt name is refused and a list is shown at once: functions are named here, as
`module.function`, and found by `relevance/` when they are needed. Each row carries its paper's way of reading units;
`relevance.ScoreOptions` can change it. A new criterion is a function in a module of `relevance/` and a row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# what is propagated back from a network's answer: 1 at the class, its logit, the loss's gradient
Start = Literal["one", "logit", "loss"]
# what becomes of a unit's values once they are summed up to `Per`
Sign = Literal["absolute", "signed", "squared"]
Per = Literal["all", "sample", "position", "element"]
# where values are read: at the layer, or behind its normalisation and activation, where the next layer reads them
Place = Literal["site", "settled"]


@dataclass(frozen=True, slots=True)
class AtNodes:
    """Tensors measured at the sites, batch by batch, and how they become units.

    `prepare` names a `criteria.Prepare`; `uncovered` a function that says which operations the criterion has no rule
    for and only approximates.
    """

    summary: str
    prepare: str
    start: Start | None = None
    sign: Sign = "absolute"
    per: Per | None = None
    place: Place = "site"
    uncovered: str = ""


@dataclass(frozen=True, slots=True)
class OnWeights:
    """A number per unit from the weights that compute it.

    `weigh` names a `weights.Weigh`; `feeds` finds those weights; `collect`, where the criterion needs images, sums
    their gradients over a batch (a `weights.Collect`).
    """

    summary: str
    weigh: str
    collect: str = ""
    feeds: str = "weights.weight_feeds"


@dataclass(frozen=True, slots=True)
class AtRandom:
    """A seeded draw per group."""

    summary: str


@dataclass(frozen=True, slots=True)
class Learned:
    """Gates on every unit that `steering/` trains, for which the recipe's `gates_...` stand."""

    summary: str


Criterion = AtNodes | OnWeights | AtRandom | Learned

CRITERIA: Mapping[str, Criterion] = {
    "lrp": AtNodes(
        "layer-wise relevance propagation: the network's decision, sent back to the unit by rules (--composite)",
        "criteria.lrp",
        uncovered="criteria.lrp_uncovered",
    ),
    "gradient": AtNodes(
        "absolute gradient of the loss at the unit's values (Sun et al. 2017)",
        "gradients.gradient",
        start="loss",
        per="element",
    ),
    "gradient_x_input": AtNodes(
        "the unit's value times the gradient of the class's score",
        "gradients.gradient_x_value",
        start="one",
        place="settled",
    ),
    "taylor": AtNodes(
        "the unit's value times the gradient of the loss: what losing it costs, to first order (Molchanov et al. 2017)",
        "gradients.gradient_x_value",
        start="loss",
        place="settled",
    ),
    "fisher": AtNodes(
        "the square of what `taylor` gives for each image: the empirical Fisher information",
        "gradients.gradient_x_value",
        start="loss",
        sign="squared",
        per="sample",
        place="settled",
    ),
    "integrated_gradients": AtNodes(
        "gradient times change of the unit's value, along the way from a black image to the image",
        "gradients.integrated_gradients",
        start="one",
        place="settled",
    ),
    "activation": AtNodes(
        "how strongly the unit fires: its absolute activations, summed (Molchanov et al. 2017)",
        "activations.activation",
        per="element",
        place="settled",
    ),
    "l1": OnWeights("sum of the absolute weights that compute the unit (Li et al. 2017)", "weights.l1"),
    "l2": OnWeights("root of the sum of the squared weights that compute the unit", "weights.l2"),
    "fpgm": OnWeights(
        "distances of the unit's weights to those of the others: the most replaceable goes first (He et al. 2019)",
        "weights.geometric_median",
    ),
    "bn_scale": OnWeights(
        "absolute scale of the normalisation at the unit (Liu et al. 2017)",
        "weights.l1",
        feeds="weights.scale_feeds",
    ),
    "taylor_weights": OnWeights(
        "the unit's weights times the gradient of the loss at them, summed and absolute",
        "weights.taylor_of_weights",
        collect="weights.sum_gradients",
    ),
    "hessian": OnWeights(
        "half the unit's squared weights times the curvature of the loss, by Fisher's diagonal (LeCun et al. 1990)",
        "weights.curvature_of_weights",
        collect="weights.sum_squared_gradients",
    ),
    "random": AtRandom("a seeded draw, which every criterion has to beat"),
    "gates": Learned(
        "learned: a gate on every unit, trained to keep the network's answers while its MACs are pressed down"
    ),
    "isp": Learned(
        "learned: the same gates, trained to keep what a selector finds in each image (Ganjdanesh et al. 2022)"
    ),
}

LEARNED = tuple(name for name, row in CRITERIA.items() if isinstance(row, Learned))
"""Criteria that train gates, for which the recipe's `gates_...` stand."""

UNLEARNED = tuple(name for name in CRITERIA if name not in LEARNED)
"""Criteria that read the network as it is."""
