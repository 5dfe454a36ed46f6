"""A run's stages as they are notified in, what a person reads while waiting out: counted, in plain words.

`measured-1` of a run with nine stages is "3 of 9: measuring what each layer may lose". Knows no terminal.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..budgets import parse_budgets
from ..recipe import Recipe
from ..report import facts

_ENDING = re.compile(r"^(?P<name>.*?)(?P<ending> \((?:done before|again: .*)\))?$", re.DOTALL)
_STAGE_OF = {"latency budget": "budget"}  # what is notified under another name than its stage's


@dataclass(frozen=True, slots=True)
class Step:
    """`key` is the same for all that is notified of one stage; `detail` is what just happens in it."""

    key: str
    title: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.title} ({self.detail})" if self.detail else self.title


@dataclass
class Course:
    """The stages to come, in order; `read` turns what is notified into a step of them."""

    stages: Sequence[str] = ()
    current: str = ""

    def read(self, notified: str) -> Step | None:
        """None for a stage that this run only passes through, such as a recovery of no minutes."""
        match = _ENDING.match(notified)
        assert match is not None
        name, ending = match["name"], (match["ending"] or "").strip(" ()")
        is_to_come = not self.stages or name in self.stages
        if name in PASSED_THROUGH and not is_to_come:
            return None
        stage, detail = self._stage_of(name)
        self.current = stage
        details = filter(None, (detail, ending))
        return Step(stage, self._title(stage), ", ".join(details))

    def _stage_of(self, name: str) -> tuple[str, str]:
        """The stage and what happens in it; what is said of no stage (`precisions: ranges`) happens in the current."""
        head, _, detail = name.partition(": ")
        head = _STAGE_OF.get(head, head)
        if name in self.stages or not detail:
            return name, ""
        if head in self.stages:
            return head, detail
        if self.current in self.stages:
            return self.current, detail
        return name, ""

    def _title(self, stage: str) -> str:
        if stage not in self.stages:
            return facts.title_of(stage, several=False)
        several = any(name.endswith("-2") for name in self.stages)
        number = list(self.stages).index(stage) + 1
        return f"{number} of {len(self.stages)}: {facts.title_of(stage, several=several)}"


QUARTERS = (0.25, 0.5, 0.75)
SILENCE_S = 20.0  # without a line for so long, somebody who reads a log wonders


@dataclass
class Log:
    """What is written where no bar moves: each text once, and quarters of what takes long."""

    clock: Callable[[], float] = time.monotonic
    reached: dict[str, float] = field(default_factory=dict)  # the last quarter of each text that was written
    last_line_s: float = 0.0

    def line(self, text: str, share: float) -> str:
        """The text when it is new, `text: 60 %` when it is past another quarter and there was silence; else empty."""
        quarter = max((mark for mark in QUARTERS if share >= mark), default=0.0)
        is_new = text not in self.reached
        is_further = quarter > self.reached.get(text, 0.0) and share < 1
        is_silent = self.clock() - self.last_line_s >= SILENCE_S
        if not is_new and not (is_further and is_silent):
            return ""
        self.reached[text] = quarter
        self.last_line_s = self.clock()
        if is_new:
            return text
        return f"{text}: {100 * share:.0f} %"


PASSED_THROUGH = ("finetune", "engines")
"""Stages that every run notifies and few have work for."""


def course_of(recipe: Recipe) -> Course:
    """The stages that a run of this recipe goes through."""
    if recipe.as_it_is:
        return Course(["network", *_delivery_stages(recipe)])
    timed = any(budget.kind == "latency" for budget in parse_budgets(recipe.budget))
    stages = ["groups"]
    if timed:
        stages.append("latency-model")
    elif not recipe.multiple:
        stages.append("steps")

    for number in range(1, recipe.rounds + 1):
        stages.append(f"scores-{number}")
        if recipe.normalisation == "measured":
            stages.append(f"measured-{number}")
        if timed and number == recipe.rounds:  # earlier rounds only go part of the way
            stages.append("budget")
        stages.append(f"repair-{number}")
    if recipe.recovers:
        stages.append("finetune")

    return Course([*stages, *_delivery_stages(recipe)])


def course_after_training(recipe: Recipe) -> Course:
    """The stages that a run's network goes through once more, with the weights of its owner's training."""
    return Course(["trained", *_delivery_stages(recipe)])


def _delivery_stages(recipe: Recipe) -> list[str]:
    """What every network goes through, whatever was removed from it."""
    stages = ["accuracy", "fidelity", "onnx", *_made_precisions(recipe), "parity", "accuracy of the files"]
    if recipe.targets:
        stages.append("engines")
    return [*stages, "latency", "layers", "explanation", "pictures"]


def _made_precisions(recipe: Recipe) -> list[str]:
    """fp16 is made where int8 is wanted, too: what is not int8 on a GPU is fp16."""
    if "int8" in recipe.precisions:
        return ["fp16", "int8"]
    return ["fp16"] if "fp16" in recipe.precisions else []
