"""How long a recovery takes, what it follows, and the settings that it tries first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["auto", "float32"]
Norms = Literal["frozen", "batch"]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is found by trying: the optimiser's rate at its highest, and whose statistics batch normalisation goes by.

    "frozen" keeps the running statistics, "batch" takes each batch's own and moves the running ones after them.
    """

    rate: float
    norms: Norms = "frozen"

    def __str__(self) -> str:
        statistics = {"frozen": "statistics kept", "batch": "statistics of each batch"}
        return f"rate {self.rate:.2g}, {statistics[self.norms]}"


@dataclass(frozen=True, slots=True)
class RecoveryOptions:
    """`minutes` and `passes` over the images both end it, whichever comes first.

    `rate` is the highest of those tried. `features` weighs the distance in front of the head beside the answers'
    own; `labels` is the share of the loss that follows labels, where there are classes. Layers compute in bfloat16
    where machine and network bear it (`pace`), unless `precision` is "float32".
    """

    minutes: float = 2.0
    passes: int = 30
    rate: float = 1e-3
    features: float = 1.0
    labels: float = 0.0
    seed: int = 0
    precision: Precision = "auto"

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Those worth a trial, the one that is taken without a trial first."""
        slow = self.rate / 3
        return (Setting(slow), Setting(self.rate), Setting(slow / 3), Setting(self.rate, "batch"))
