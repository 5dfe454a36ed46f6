"""How the learned criteria learn: frozen records of numbers, ours and those of the paper.

Ganjdanesh, Gao, Huang: Interpretations Steered Network Pruning via Amortized Inferred Saliency Maps (ECCV 2022,
arXiv 2209.02869).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ..records import UnitKind
from .augmentation import Augmentation

Schedule = Literal["", "isp2022"]
Counted = Literal["macs", "parameters"]


@dataclass(frozen=True, slots=True)
class GateOptions:
    """How gates learn.

    `travel` is how far a logit comes in all `steps` that go one way; gates begin open and shut at -3. The share of what
    is `counted` falls to `least` in steps alike, or is that from the first step on where not `falls`. `pressure` weighs
    it against what is to be kept.
    """

    steps: int = 240
    travel: float = 36.0
    weight_decay: float = 1e-3
    least: float = 0.1
    falls: bool = True
    pressure: float = 1.5
    counted: Counted = "macs"


@dataclass(frozen=True, slots=True)
class SelectorOptions:
    """How predictor and selector learn.

    `keeps` is the share of what an empty mask loses that a mask may lose, for which its width's price is sought, by
    `step` at most each time; without it the price is `area` times a root (`power`) of the mask and its `roughness`.

    `widths` are the narrowest and the widest spot of the predictor's masks, as shares of the image's side, and no spot
    of the selector is narrower: what the predictor never saw, it answers with the likeliest class, and a selector
    would shut its mask on that class's images. Without them both are the paper's. `discs`: a mask is a disc
    as large as the spot's sum, and else each pixel is drawn by itself, a haze that shows the image far outside.

    For the first part of the steps, `led`, centres are drawn to where relevance lies, less and less.
    """

    predictor_steps: int = 120
    steps: int = 120
    rate: float = 3e-3
    predictor_rate: float = 3e-4
    weight_decay: float = 1e-4
    keeps: float = 0.25
    step: float = 0.1
    widths: tuple[float, float] | None = (1 / 12, 1 / 3)
    discs: bool = True
    led: float = 0.5
    area: float = 0.0
    power: float = 1.0
    roughness: float = 0.0


@dataclass(frozen=True, slots=True)
class SteeringOptions:
    """What a learned criterion goes by.

    `explanation` is the share of what is to be kept that is the selector's mask, the rest is the answer. Units of other
    than these `kinds` have no gate. `start` names the criterion whose scores the logits begin with, "" for none.
    """

    gates: GateOptions = field(default_factory=GateOptions)
    selector: SelectorOptions = field(default_factory=SelectorOptions)
    schedule: Schedule = ""
    explanation: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    start: str = ""
    kinds: tuple[UnitKind, ...] = ("channel", "neuron", "stream", "head", "conv_group")
    seed: int = 0


GATES: Mapping[Schedule, GateOptions] = {
    "": GateOptions(),
    # 200 epochs of 2,500 images in batches of 128 at a rate of 1e-3, half of the MACs
    "isp2022": GateOptions(steps=4000, travel=4.0, least=0.5, falls=False, pressure=1.0),
}

# 300 and 20 epochs of 45,000 images in batches of 128 and 16 are more than unlabelled calibration images can tell:
# so many steps as their learning rate asks for
_PAPERS = SelectorOptions(
    predictor_steps=4000,
    steps=4000,
    rate=1e-4,
    predictor_rate=1e-4,
    keeps=0.0,
    widths=None,
    discs=False,
    led=0.0,
    area=0.2,
    power=0.3,
    roughness=1e-3,
)
SELECTORS: Mapping[Schedule, SelectorOptions] = {"": SelectorOptions(), "isp2022": _PAPERS}


def selector_options(options: SteeringOptions, side: float) -> SelectorOptions:
    """For images of that side: the paper has other prices for 224 pixels than for 32."""
    if options.schedule == "isp2022" and side > 100:
        return replace(options.selector, area=1.0, power=0.5, roughness=1e-4)
    return options.selector
