"""A run's stages as they are notified in, what a person reads while waiting out: counted, in plain words.

`measured-1` of a run with nine stages is "3 of 9: measuring what each layer may lose". Knows no terminal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .budgets import parse_budget
from .recipe import Recipe
from .report import facts

_ENDING = re.compile(r"^(?P<name>.*?)(?P<ending> \((?:done before|again: .*)\))?$", re.DOTALL)
_PART_OF = {"latency budget": "budget"}


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
        """None for a stage that this run only passes through, such as a fine-tuning of no epochs."""
        found = _ENDING.match(notified)
        assert found is not None
        name, ending = found["name"], (found["ending"] or "").strip(" ()")
        if name in PASSED_THROUGH and self.stages and name not in self.stages:
            return None
        stage, detail = self._stage_of(name)
        self.current = stage
        return Step(stage, self._title(stage), ", ".join(part for part in (detail, ending) if part))

    def _stage_of(self, name: str) -> tuple[str, str]:
        head, _, detail = name.partition(": ")
        head = _PART_OF.get(head, head)
        if name in self.stages or not detail:
            return name, ""
        if head in self.stages:
            return head, detail
        return (self.current, detail) if self.current in self.stages else (name, "")

    def _title(self, stage: str) -> str:
        if stage not in self.stages:
            return facts.title_of(stage, several=False)
        several = any(name.endswith("-2") for name in self.stages)
        number = list(self.stages).index(stage) + 1
        return f"{number} of {len(self.stages)}: {facts.title_of(stage, several=several)}"


PASSED_THROUGH = ("finetune", "engines")


def course_of(recipe: Recipe) -> Course:
    """The stages that a run of this recipe goes through."""
    timed = parse_budget(recipe.budget).kind == "latency"
    stages = ["groups", *(["latency-model"] if timed else [] if recipe.multiple else ["steps"])]
    for r in range(1, recipe.rounds + 1):
        measured = [f"measured-{r}"] if recipe.normalisation == "measured" else []
        budget = ["budget"] if timed and r == recipe.rounds else []
        stages += [f"scores-{r}", *measured, *budget, f"repair-{r}"]
    precisions = [name for name in ("fp16", "int8") if name in recipe.precisions]
    if "int8" in precisions and "fp16" not in precisions:
        precisions.insert(0, "fp16")
    tuning, engines = (["finetune"] if recipe.finetune_epochs else []), (["engines"] if recipe.targets else [])
    files = ["onnx", *precisions, "parity", "accuracy of the files"]
    return Course([*stages, *tuning, "accuracy", *files, *engines, "latency", "layers"])
