"""Learned criteria: gates on every unit of a traced graph, learned while its cost is pressed down.

A graph, its units and images in, scores of every unit out, like any other criterion's. `gates` keep the dense
network's answers; `isp` keeps what a learned selector finds in each image. After Ganjdanesh, Gao, Huang:
Interpretations Steered Network Pruning via Amortized Inferred Saliency Maps (ECCV 2022, arXiv 2209.02869).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx

from ..files import content_hash, file_sha256
from ..inputs.images import Batches
from ..placement import code_of
from ..pruning import Structure
from ..records import FloatArray, Scores
from ..tasks import Task
from ..tensors import as_tuple
from .checkpoints import Checkpoint
from .explanation import both_lost
from .gates import learn_gates
from .gating import Gated, Gating, find_gates
from .lessons import Lessons, image_count
from .masks import side_of
from .objectives import answers_lost, distance_of
from .options import GATES, SELECTORS, GateOptions, SelectorOptions, SteeringOptions, selector_options
from .predictor import require_images, train_predictor
from .saving import read_selector, write_selector
from .selector import Selector, make_selector, train_selector
from .training import TrainingOptions, parted

__all__ = [
    "GATES",
    "SELECTORS",
    "GateOptions",
    "SelectorOptions",
    "SteeringOptions",
    "learn_scores",
    "learn_selector",
    "read_selector",
    "start_logits",
]

STAGES = (("predictor", 0.35), ("selector", 0.25), ("gates", 0.4))  # and their shares of the time
SPREAD = 1.5  # logits that other scores start lie this far about 0
_SOURCES = Path(__file__).parent


def learn_scores(
    graph: fx.GraphModule,
    structure: Structure,
    batches: Lessons,
    *,
    criterion: str,
    options: SteeringOptions = SteeringOptions(),
    task: Task | None = None,
    start: Scores | None = None,
    folder: Path | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Scores:
    """Scores of every unit, the same at each site of its group: the part of the way to a tenth of the MACs that its
    gate was open. Units of kinds that have no gates score 1.

    Targets of the batches are not used. `start` are another criterion's scores, whose order within each group the gates
    begin with. What is learned is put aside in `folder` every few seconds, and gone on with from there.
    """
    progress_of = _Course(progress, STAGES if criterion == "isp" else (("gates", 1.0),))
    gating = find_gates(graph, structure, options.kinds)
    belongs = [criterion, options, _hash_of(graph), _hash_of_lessons(batches), _hash_of_start(start), _hash_of_code()]

    def checkpoint(stage: str) -> Checkpoint:
        path = None if folder is None else folder / "stages" / f"learning-{criterion}-{stage}.safetensors"
        return Checkpoint(path, [stage, *belongs])

    lost = answers_lost(Gated(gating), batches, task)
    if criterion == "isp":
        selector, _ = learn_selector(graph, structure, batches, options, task, checkpoint, progress_of)
        if folder is not None:
            write_selector(folder, selector)
        nodes = [scale.node for scale in selector.scales]
        lost = both_lost(
            Gated(gating, nodes),
            selector,
            batches,
            distance_of(graph, batches, task),
            share=options.explanation,
            as_paper=options.schedule == "isp2022",
        )
    opened = learn_gates(
        gating,
        batches,
        lost,
        options=options.gates,
        seed=options.seed,
        start=start_logits(gating, start),
        checkpoint=checkpoint("gates"),
        progress=progress_of.of("gates"),
    )
    for stage, _ in STAGES:
        checkpoint(stage).close()
    return _scores(criterion, gating, opened, image_count(batches))


def learn_selector(
    graph: fx.GraphModule,
    structure: Structure,
    batches: Lessons,
    options: SteeringOptions = SteeringOptions(),
    task: Task | None = None,
    checkpoint: Callable[[str], Checkpoint] | None = None,
    course: _Course | None = None,
) -> tuple[Selector, fx.GraphModule]:
    """The selector and the predictor it learned with, each chosen on a fifth of the images that it did not learn from.

    Raises RecipeError for a network whose input is no image, ModelError where no layer has positions.
    """
    checkpoint = checkpoint or (lambda stage: Checkpoint(None, stage))
    course = course or _Course(lambda share: None, STAGES)
    shape = require_images(graph)
    settings = selector_options(options, side_of(shape))
    distance = distance_of(graph, batches, task)
    learning, held = parted(batches)
    selector = make_selector(graph, structure, learning, options.seed)
    predictor = train_predictor(
        graph,
        learning,
        held,
        distance,
        options=TrainingOptions(settings.predictor_steps, settings.predictor_rate, settings.weight_decay),
        seed=options.seed + 10_000,
        checkpoint=checkpoint("predictor"),
        progress=course.of("predictor"),
    )
    train_selector(
        graph,
        predictor,
        selector,
        learning,
        held,
        distance,
        options=settings,
        seed=options.seed + 20_000,
        checkpoint=checkpoint("selector"),
        progress=course.of("selector"),
    )
    return selector, predictor


@dataclass(frozen=True, slots=True)
class _Course:
    """One bar over several stages, each with its share of the way."""

    progress: Callable[[float], None]
    stages: Sequence[tuple[str, float]]

    def of(self, stage: str) -> Callable[[float], None]:
        names = [name for name, _ in self.stages]
        place = names.index(stage)
        before, width = sum(share for _, share in self.stages[:place]), self.stages[place][1]
        return lambda share: self.progress(min(1.0, before + width * share))


def _scores(criterion: str, gating: Gating, opened: FloatArray, samples: int) -> Scores:
    values: dict[str, FloatArray] = {}
    for group in gating.structure.groups.groups:
        units = gating.units.get(group.name)
        row = np.ones(group.size) if units is None else opened[units]
        values[group.name] = np.tile(row, (len(group.sites), 1))
    return Scores(criterion, values, samples)


def start_logits(gating: Gating, scores: Scores | None) -> Tensor:
    """[units] logits that keep the order of the scores within each group, evenly from -1.5 to 1.5; 0 without any."""
    logits = torch.zeros(gating.count)
    for name, units in gating.units.items():
        if scores is not None and name in scores.values and units.stop - units.start > 1:
            order = scores.values[name].mean(0).argsort(kind="stable")
            logits[units.start + torch.from_numpy(order)] = torch.linspace(-SPREAD, SPREAD, len(order))
    return logits


def _hash_of(graph: fx.GraphModule) -> str:
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in graph.state_dict().items()}
    return content_hash(code_of(graph), weights)


def _hash_of_lessons(batches: Lessons) -> str:
    if isinstance(batches, Batches):
        return content_hash(batches.images.content_hash(), batches.batch_size)
    return content_hash(*([tensor.numpy() for tensor in as_tuple(inputs)] for inputs, _ in batches))


def _hash_of_start(start: Scores | None) -> str:
    return "" if start is None else content_hash(start.values)


def _hash_of_code() -> str:
    return content_hash(*(file_sha256(path) for path in sorted(_SOURCES.glob("*.py"))))
