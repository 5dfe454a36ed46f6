"""A run's selector and what shipped in, its masks of an image in the dense and in the shipped network out.

Both networks are asked the dense one's question; units that are gone count as 0 to the selector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..placement import device_of, inputs_to
from ..pruning import Structure
from ..pruning.structure import Keep
from ..pruning.surgery import removed_classes
from ..run.fingerprints import Known
from ..run.work import Work
from ..steering import learned_in, read_selector
from ..steering.selector import Selector, in_place, pass_of, question_of
from ..tensors import Inputs
from .results import Outcome


@dataclass(frozen=True, slots=True, eq=False)
class Spotter:
    """A run's selector, and which classes of the dense network's units are gone in the shipped one."""

    selector: Selector
    structure: Structure
    gone: Keep

    @torch.no_grad()
    def masks(self, dense: fx.GraphModule, shipped: fx.GraphModule, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """[N, 1, H, W] in 0 to 1, by what the dense and the shipped network find."""
        device = device_of(dense)
        inputs, selector = inputs_to(inputs, device), self.selector.to(device)
        scales = selector.scales
        nodes = [scale.node for scale in scales]
        whole, answers = pass_of(dense, inputs, nodes)
        question = question_of(answers)
        small = in_place(pass_of(shipped, inputs, nodes)[0], scales, self.structure, self.gone)
        return selector(whole, question).map().cpu(), selector(small, question).map().cpu()


def spots_of(work: Work, outcome: Outcome) -> Known | None:
    """The first round's selector, which reads the dense network, as a stage's input; None where none was learned."""
    if work.recipe.criterion != "isp" or outcome.structure is None or outcome.plan is None:
        return None
    selector = read_selector(work.stages.folder / learned_in(1))
    if selector is None:
        return None
    gone = removed_classes(outcome.structure, outcome.plan.kept)
    return Known(Spotter(selector, outcome.structure, gone), work.stages.keys.get("scores-1", ""))
