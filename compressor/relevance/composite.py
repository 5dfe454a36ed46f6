"""Which LRP rule applies where, as data: one rule with its parameters per depth group, and the fixed choices around.

A composite is a point in one typed space; `SPACE` names the choices and ranges a search may walk.
Knows no graph, no tensor and no architecture. Sources: Bach et al. 2015, Montavon et al. 2019 (rules),
Yeom et al. 2021 and Hatefi et al. 2024 (presets), Achtibat et al. 2024 (AttnLRP).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..errors import RecipeError, did_you_mean

RuleName = Literal["epsilon", "zplus", "alphabeta", "gamma", "zbox", "wsquare", "flat", "pass", "norm"]
SoftmaxRule = Literal["attnlrp", "zplus", "zplus-bias", "cp"]
NormalisationRule = Literal["epsilon", "pass"]
ActivationRule = Literal["pass", "taylor"]
GateRule = Literal["half", "signal"]
DepthGroup = Literal["low", "mid", "high", "fc"]


@dataclass(frozen=True, slots=True)
class Rule:
    """An LRP rule for a convolution or a linear layer; a parameter the rule does not have is ignored.

    `epsilon` stabilises every denominator. `beta` is `alpha - 1`. `bias` False leaves the bias out of
    the denominators. `box` is the lowest and highest pixel value per channel for z-box; empty means
    each image's own.
    """

    name: RuleName
    epsilon: float = 1e-6
    gamma: float = 0.25
    alpha: float = 2.0
    bias: bool = True
    box: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(RuleName):
            known = list(get_args(RuleName))
            raise RecipeError(f"LRP rule {self.name!r} is unknown; rules: {known}.{did_you_mean(self.name, known)}")
        if self.epsilon < 0 or self.gamma < 0 or self.alpha < 1:
            raise RecipeError(
                f"LRP rule {self.name!r} has epsilon {self.epsilon}, gamma {self.gamma}, alpha {self.alpha}; "
                "expected epsilon >= 0, gamma >= 0, alpha >= 1"
            )


@dataclass(frozen=True, slots=True)
class Composite:
    """The rules of one network. Depth groups follow the network's own depth (`boundaries`, in shares of it).

    `fc` is the classifying head, `linear` the rule of the other linear layers where it differs from
    their depth group's, `first` the rule of the layers that read the image. `gate` is how a product of
    two signals is split: `half` each (AttnLRP), or all to the one that is no gate.
    """

    low: Rule = Rule("zplus")
    mid: Rule = Rule("zplus")
    high: Rule = Rule("zplus")
    fc: Rule = Rule("epsilon")
    linear: Rule | None = Rule("epsilon")
    first: Rule = Rule("flat")
    softmax: SoftmaxRule = "attnlrp"
    normalisation: NormalisationRule = "epsilon"
    activation: ActivationRule = "pass"
    gate: GateRule = "half"
    boundaries: tuple[float, float] = (0.25, 0.75)
    epsilon: float = 1e-6

    def of_group(self, group: DepthGroup) -> Rule:
        rules: dict[DepthGroup, Rule] = {"low": self.low, "mid": self.mid, "high": self.high, "fc": self.fc}
        return rules[group]


_ZPLUS_UNBIASED = Rule("zplus", bias=False)

PRESETS: Mapping[str, Composite] = {
    "epsilon-plus-flat": Composite(),
    "yeom2021": Composite(
        low=_ZPLUS_UNBIASED, mid=_ZPLUS_UNBIASED, high=_ZPLUS_UNBIASED, linear=_ZPLUS_UNBIASED, first=Rule("zbox")
    ),
    "hatefi2024": Composite(
        low=Rule("epsilon"), mid=Rule("epsilon"), high=Rule("epsilon"), linear=None, first=Rule("epsilon")
    ),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """One axis of the space a search walks: a composite's field and the values it may take."""

    field: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """One continuous axis: a parameter of every rule that has it, between two bounds."""

    field: str
    lowest: float
    highest: float
    logarithmic: bool = True


_SEARCHED = ("epsilon", "zplus", "alphabeta", "gamma")

SPACE: tuple[Choice | Range, ...] = (
    *(Choice(group, _SEARCHED) for group in get_args(DepthGroup)),
    Choice("softmax", get_args(SoftmaxRule)),
    Range("epsilon", 1e-9, 1e-1),
    Range("gamma", 1e-2, 1e2),
    Range("alpha", 1.0, 4.0, logarithmic=False),
)


def preset(name: str) -> Composite:
    """The composite of that name. Raises RecipeError on an unknown one."""
    if name not in PRESETS:
        known = sorted(PRESETS)
        raise RecipeError(f"LRP composite {name!r} is unknown; composites: {known}.{did_you_mean(name, known)}")
    return PRESETS[name]


def at(point: Mapping[str, str | float], base: Composite = PRESETS["hatefi2024"]) -> Composite:
    """The composite at a point of `SPACE`: `{"low": "gamma", "softmax": "cp", "gamma": 0.1, ...}`.

    Continuous values hold for every rule named; fields not named stay as in `base`.
    """
    known = [axis.field for axis in SPACE]
    for field in point:
        if field not in known:
            raise RecipeError(f"the LRP space has no field {field!r}; fields: {known}.{did_you_mean(field, known)}")
    numbers = {
        axis.field: float(point[axis.field]) for axis in SPACE if isinstance(axis, Range) and axis.field in point
    }
    changed = base
    for axis in SPACE:
        if isinstance(axis, Choice):
            changed = _choose(changed, axis, point.get(axis.field), numbers)
    return changed


def _choose(composite: Composite, axis: Choice, value: str | float | None, numbers: Mapping[str, float]) -> Composite:
    if value is not None and value not in axis.values:
        raise RecipeError(f"field {axis.field!r} is {value!r}; expected one of {list(axis.values)}")
    if axis.field == "softmax":
        return replace(composite, softmax=value) if value else composite  # type: ignore[arg-type]
    rule: Rule = getattr(composite, axis.field)
    named = replace(rule, name=value) if value else rule  # type: ignore[arg-type]
    return replace(composite, **{axis.field: replace(named, **numbers)})  # type: ignore[arg-type]
