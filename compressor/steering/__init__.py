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
from ..placement import code_of, reusing_freed_memory
from ..pruning import Structure
from ..records import FloatArray, Scores
from ..tasks import Task
from ..tensors import as_tuple
from .augmentation import Augmentation
from .centres import relevant_centres
from .checkpoints import Checkpoint
from .explanation import both_lost
from .gates import Lost, learn_gates
from .gating import Gated, Gating, find_gates
from .lessons import Lessons, image_count
from .masks import side_of
from .objectives import answers_lost, distance_of
from .options import GATES, SELECTORS, Counted, GateOptions, SelectorOptions, SteeringOptions, selector_options
from .predictor import require_images, train_predictor
from .saving import learned_in, read_selector, write_selector
from .selector import Selector, make_selector, train_selector
from .training import parted

__all__ = [
    "GATES",
    "SELECTORS",
    "Augmentation",
    "Counted",
    "GateOptions",
    "SelectorOptions",
    "SteeringOptions",
    "hash_of_network",
    "learn_scores",
    "learn_selector",
    "learned_in",
    "read_selector",
    "start_logits",
]

STAGES = ("predictor", "selector", "gates")
_SECONDS_A_STEP = (3.5, 2.5, 2.0)  # of each stage, one over the other: what a bar goes by
SPREAD = 1.5  # logits that other scores start lie this far about 0
_SOURCES = Path(__file__).parent


@reusing_freed_memory()
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
    """Scores of every unit, the same at each site of its group: the part of the way to a tenth of the cost that its
    gate was open. Units of kinds that have no gates score 1.

    Targets of the batches are not used. `start` are another criterion's scores, whose order within each group the gates
    begin with. What is learned is put aside in `folder` every few seconds, and gone on with from there; a selector
    stays in it.
    """
    course = _course_of(criterion, options, progress)
    gating = find_gates(graph, structure, options.kinds)
    if not gating.count:
        return _scores(criterion, gating, np.zeros(0), image_count(batches))
    belongs = [criterion, options, hash_of_network(graph), _hash_of_lessons(batches), _hash_of_start(start)]
    checkpoint = _checkpoints(folder, criterion, belongs)
    if criterion == "isp":
        selector, _ = learn_selector(graph, structure, batches, options, task, checkpoint, course)
        if folder is not None:
            write_selector(folder, selector, hash_of_network(graph))
        lost = _lost_by_isp(gating, selector, batches, options, task)
    else:
        lost = answers_lost(Gated(gating), batches, task)
    open_shares = learn_gates(
        gating,
        batches,
        lost,
        options=options.gates,
        augmentation=options.augmentation,
        seed=options.seed,
        start=start_logits(gating, start),
        checkpoint=checkpoint("gates"),
        progress=course.of("gates"),
    )
    for stage in STAGES:
        checkpoint(stage).close()
    return _scores(criterion, gating, open_shares, image_count(batches))


def _checkpoints(folder: Path | None, criterion: str, belongs: Sequence[object]) -> Callable[[str], Checkpoint]:
    """A checkpoint for each stage, of what a training `belongs` to and of this very code."""
    code = _hash_of_code()

    def checkpoint(stage: str) -> Checkpoint:
        path = None if folder is None else folder / f"learning-{criterion}-{stage}.safetensors"
        return Checkpoint(path, [stage, *belongs, code])

    return checkpoint


def _lost_by_isp(
    gating: Gating, selector: Selector, batches: Lessons, options: SteeringOptions, task: Task | None
) -> Lost:
    """What gates cost of the answers and of the selector's explanation of them."""
    run = Gated(gating, [scale.node for scale in selector.scales])
    distance = distance_of(gating.graph, batches, task)
    as_paper = options.schedule == "isp2022"
    return both_lost(run, selector, batches, distance, share=options.explanation, as_paper=as_paper)


@reusing_freed_memory()
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
    course = course or _course_of("isp", options, lambda share: None)
    shape = require_images(graph)
    settings = selector_options(options, side_of(shape))
    distance = distance_of(graph, batches, task)
    learning, held_out = parted(batches)
    selector = make_selector(graph, structure, learning, settings, options.seed)
    predictor = train_predictor(
        graph,
        learning,
        held_out,
        distance,
        options=settings,
        augmentation=options.augmentation,
        seed=options.seed + 10_000,
        checkpoint=checkpoint("predictor"),
        progress=course.of("predictor"),
    )
    train_selector(
        graph,
        predictor,
        selector,
        learning,
        held_out,
        distance,
        options=settings,
        augmentation=options.augmentation,
        seed=options.seed + 20_000,
        centres=relevant_centres(graph, task) if settings.led else None,
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
        """Where a stage says its own share: 0.5 of "selector" is 0.35 + 0.5 * 0.25 of the whole."""
        names = [name for name, _ in self.stages]
        widths = [width for _, width in self.stages]
        place = names.index(stage)
        before = sum(widths[:place])
        return lambda share: self.progress(min(1.0, before + widths[place] * share))


def _course_of(criterion: str, options: SteeringOptions, progress: Callable[[float], None]) -> _Course:
    """The stages of a criterion, each as long as its steps take."""
    if criterion != "isp":
        return _Course(progress, (("gates", 1.0),))
    steps = (options.selector.predictor_steps, options.selector.steps, options.gates.steps)
    seconds = [count * each for count, each in zip(steps, _SECONDS_A_STEP, strict=True)]
    shares = [each / max(sum(seconds), 1) for each in seconds]
    return _Course(progress, tuple(zip(STAGES, shares, strict=True)))


def _scores(criterion: str, gating: Gating, open_shares: FloatArray, samples: int) -> Scores:
    """`open_shares` [gates] by group, [sites, units]; 1 for a group without gates."""
    values: dict[str, FloatArray] = {}
    for group in gating.structure.groups.groups:
        row = np.ones(group.size)
        if group.name in gating.units:
            row = open_shares[gating.units[group.name]]
        values[group.name] = np.tile(row, (len(group.sites), 1))
    return Scores(criterion, values, samples)


def start_logits(gating: Gating, scores: Scores | None) -> Tensor:
    """[units] logits that keep the order of the scores within each group, evenly from -1.5 to 1.5; 0 without any."""
    logits = torch.zeros(gating.count)
    values = {} if scores is None else scores.values
    for name, units in gating.units.items():
        if name in values and units.stop - units.start > 1:
            order = values[name].mean(0).argsort(kind="stable")
            logits[units.start + torch.from_numpy(order)] = torch.linspace(-SPREAD, SPREAD, len(order))
    return logits


def hash_of_network(graph: fx.GraphModule) -> str:
    """Of its code and its weights."""
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in graph.state_dict().items()}
    return content_hash(code_of(graph), weights)


def _hash_of_lessons(batches: Lessons) -> str:
    """Of the images, and of how they come in batches."""
    if isinstance(batches, Batches):
        return content_hash(batches.images.content_hash(), batches.batch_size)
    return content_hash(*([tensor.numpy() for tensor in as_tuple(inputs)] for inputs, _ in batches))


def _hash_of_start(start: Scores | None) -> str:
    return "" if start is None else content_hash(start.values)


def _hash_of_code() -> str:
    return content_hash(*(file_sha256(path) for path in sorted(_SOURCES.glob("*.py"))))
