"""How the learned criteria learn: frozen records of numbers, ours and those of the paper.

Ganjdanesh, Gao, Huang: Interpretations Steered Network Pruning via Amortized Inferred Saliency Maps (ECCV 2022,
arXiv 2209.02869).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..records import UnitKind

Schedule = Literal["", "isp2022"]


@dataclass(frozen=True, slots=True)
class GateOptions:
    """How gates learn.

    `travel` is how far a logit comes in all `steps` that go one way; gates begin open and shut at -3. The share of the
    MACs falls to `least` in steps alike, or is that from the first step on where not `falls`. `pressure` weighs it
    against what is to be kept.
    """

    steps: int = 240
    travel: float = 36.0
    weight_decay: float = 1e-3
    least: float = 0.1
    falls: bool = True
    pressure: float = 1.5


@dataclass(frozen=True, slots=True)
class SteeringOptions:
    """What a learned criterion goes by.

    `explanation` is the share of what is to be kept that is the selector's mask, the rest is the answer. Units of other
    than these `kinds` have no gate. `start` names the criterion whose scores the logits begin with, "" for none.
    """

    gates: GateOptions = field(default_factory=GateOptions)
    schedule: Schedule = ""
    explanation: float = 0.0
    start: str = ""
    kinds: tuple[UnitKind, ...] = ("channel", "neuron", "stream", "head", "conv_group")
    seed: int = 0


GATES: Mapping[Schedule, GateOptions] = {
    "": GateOptions(),
    # 200 epochs of 2,500 images in batches of 128 at a rate of 1e-3, half of the MACs
    "isp2022": GateOptions(steps=4000, travel=4.0, least=0.5, falls=False, pressure=1.0),
}
