"""Which LRP rule applies where, as data: one rule with its parameters per depth group, and the fixed choices around.

A composite is a point in one typed space; `SPACE` names the choices and ranges a search may walk.
Knows no graph, no tensor and no architecture. Sources: Bach et al. 2015, Montavon et al. 2019 (rules),
Yeom et al. 2021 and Hatefi et al. 2024 (presets), Achtibat et al. 2024 (AttnLRP).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

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
            names = list(get_args(RuleName))
            raise RecipeError(f"LRP rule {self.name!r} is unknown; rules: {names}.{did_you_mean(self.name, names)}")
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
        """The rule of a depth group, before `linear` and `first` are asked."""
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
    """One axis of a space a search walks: a field and the values it may take.

    `when` names another axis and the values of it that make this one count; elsewhere it is not asked.
    """

    field: str
    values: tuple[str, ...]
    when: tuple[str, tuple[str, ...]] | None = None


@dataclass(frozen=True, slots=True)
class Range:
    """One continuous axis, between two bounds."""

    field: str
    lowest: float
    highest: float
    logarithmic: bool = True
    when: tuple[str, tuple[str, ...]] | None = None


Axis = Choice | Range
Point = Mapping[str, str | float]

# What a layer's axis may say; `depth` (inner linear layers only) follows the depth group's rule.
RULES: Mapping[str, Rule] = {
    "epsilon": Rule("epsilon"),
    "zplus": Rule("zplus"),
    "zplus-unbiased": _ZPLUS_UNBIASED,
    "alphabeta": Rule("alphabeta"),
    "gamma": Rule("gamma"),
    "flat": Rule("flat"),
    "wsquare": Rule("wsquare"),
    "zbox": Rule("zbox"),
}
BY_DEPTH = "depth"
# what every layer's axis offers
_INNER = ("epsilon", "zplus", "zplus-unbiased", "alphabeta", "gamma")
_PARAMETERS = (
    Range("epsilon", 1e-9, 1e-1),
    Range("gamma", 1e-2, 1e2),
    Range("alpha", 1.0, 4.0, logarithmic=False),
)
# the rules under which a parameter's axis counts
OWNERS = {"epsilon": ("epsilon",), "gamma": ("gamma",), "alpha": ("alphabeta",)}
LAYERS = ("low", "mid", "high", "fc", "linear", "first")


def _layer_axes(layer: str) -> tuple[Axis, ...]:
    """The choice of a layer's rule and, for each parameter, a range that counts only under the rules that have it."""
    rule_field = f"{layer}.rule"
    choices: tuple[str, ...] = _INNER
    if layer == "linear":
        choices = (*_INNER, BY_DEPTH)
    elif layer == "first":  # these are made for layers that read pixels
        choices = (*_INNER, "flat", "wsquare", "zbox")

    ranges = []
    for parameter in _PARAMETERS:
        rules_with_it = OWNERS[parameter.field]
        ranges.append(replace(parameter, field=f"{layer}.{parameter.field}", when=(rule_field, rules_with_it)))
    return (Choice(rule_field, choices), *ranges)


SPACE: tuple[Axis, ...] = (
    *(axis for layer in LAYERS for axis in _layer_axes(layer)),
    Choice("softmax", get_args(SoftmaxRule)),
    Choice("normalisation", get_args(NormalisationRule)),
    Choice("activation", get_args(ActivationRule)),
    Choice("gate", get_args(GateRule)),
    Range("epsilon", 1e-9, 1e-2),
)


def preset(name: str) -> Composite:
    """The composite of that name. Raises RecipeError on an unknown one."""
    if name not in PRESETS:
        names = sorted(PRESETS)
        raise RecipeError(f"LRP composite {name!r} is unknown; composites: {names}.{did_you_mean(name, names)}")
    return PRESETS[name]


def at(point: Point, base: Composite = PRESETS["epsilon-plus-flat"]) -> Composite:
    """The composite at a point of `SPACE`: `{"low.rule": "gamma", "low.gamma": 0.1, "softmax": "cp"}`.

    What is not named stays as in `base`. Raises RecipeError for a field or a value the space does not have.
    """
    axes = {axis.field: axis for axis in SPACE}
    changed: dict[str, Any] = {}
    settings_by_layer: dict[str, dict[str, str | float]] = {}
    for field, value in point.items():
        if field not in axes:
            raise RecipeError(f"the LRP space has no field {field!r}.{did_you_mean(field, list(axes))}")
        require_inside(axes[field], value)
        layer, _, parameter = field.partition(".")  # `low.gamma`, but `softmax` is of no layer
        if parameter:
            settings_by_layer.setdefault(layer, {})[parameter] = value
        else:
            changed[field] = value

    for layer, settings in settings_by_layer.items():
        changed[layer] = _rule_at(settings, getattr(base, layer))
    return replace(base, **changed)


def require_inside(axis: Axis, value: object) -> None:
    """Raises RecipeError for a value that the axis does not have."""
    if isinstance(axis, Choice):
        if value not in axis.values:
            raise RecipeError(f"{axis.field} = {value!r} is not one of {', '.join(axis.values)}")
    elif not isinstance(value, (int, float)) or not axis.lowest <= value <= axis.highest:
        raise RecipeError(f"{axis.field} = {value!r} must lie between {axis.lowest:g} and {axis.highest:g}")


def _rule_at(settings: Point, before: Rule | None) -> Rule | None:
    """`before` with another name or other parameters; None where the layer follows its depth group."""
    name = settings.get("rule")
    if name == BY_DEPTH:
        return None
    rule = before or Rule("epsilon")
    if name:
        rule = RULES[str(name)]
    parameters = {field: float(value) for field, value in settings.items() if field != "rule"}
    return replace(rule, **parameters)  # type: ignore[arg-type]


# the fields of a composite that are axes by themselves, in no layer
_PLAIN = ("softmax", "normalisation", "activation", "gate", "epsilon")


def point_of(composite: Composite) -> dict[str, str | float]:
    """The point of `SPACE` a composite stands at, `at`'s inverse for what the space can say; `boundaries` it can't."""
    point: dict[str, str | float] = {}
    for layer in LAYERS:
        rule: Rule | None = getattr(composite, layer)
        name = _name_in_space(rule)
        point[f"{layer}.rule"] = name
        for parameter, rules_with_it in OWNERS.items():
            if rule is not None and name in rules_with_it:
                point[f"{layer}.{parameter}"] = getattr(rule, parameter)
    return point | {field: getattr(composite, field) for field in _PLAIN}


def _name_in_space(rule: Rule | None) -> str:
    if rule is None:
        return BY_DEPTH
    if rule.name == "zplus" and not rule.bias:
        return "zplus-unbiased"
    return rule.name
