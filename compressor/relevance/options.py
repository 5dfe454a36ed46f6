"""How a score is read off a network: one typed record, whose `None` means the criterion's own paper.

The fields are what a search can walk. Knows no network and no criterion.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..criteria import Per, Place, Sign, Start
from .lrp import LrpOptions
from .starts import Objective

Target = Literal["true", "predicted"]
Over = Literal["sum", "mean"]


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """A unit's values are summed with their sign up to `per`, there `sign` is taken, and the rest is summed.

    `start`: what is propagated back from the output: 1 at the target class, its logit, or the gradient of the
    cross-entropy.
    `target`: the labelled class (the predicted one where it is -1), or the predicted one always.
    `per`: all samples, one sample, one position of it, or one element. None: samples where channels come before
    space, positions (tokens, queries) elsewhere; a head's features then sum with their sign.
    `place`: at the site, or behind the normalisation and activation that only it feeds.
    `over`: how samples are combined. `steps`: integrated gradients. `seed`: the random criterion. `objective`: what
    relevance starts from where that is no class; whoever scores fills it in.
    """

    start: Start | None = None
    target: Target = "true"
    sign: Sign | None = None
    per: Per | None = None
    place: Place | None = None
    over: Over = "sum"
    steps: int = 20
    seed: int = 0
    lrp: LrpOptions | None = None
    objective: Objective = field(default_factory=Objective, compare=False, repr=False)
