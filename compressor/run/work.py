"""What the stages of one run share: recipe, folder, dense network, images. It stays as it was read.

`prepare` reads and checks all of it before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx

from ..choices import require_known
from ..device import feeds
from ..device.feeds import Arrays
from ..distributed import in_turns, rank, shares_out, world
from ..errors import DataError, ModelError
from ..export.exportable import require_exportable
from ..graph import trace
from ..graph.behaviour import require_function
from ..graph.interface import answers, constant_outputs, output_names, output_nodes
from ..inputs.images import Batches, Preprocessing, Source, batches, require_decodable
from ..inputs.models import Model, load_model
from ..inputs.samples import TargetKind
from ..inputs.sources import require_labels
from ..inputs.splits import Splits
from ..placement import CPU, device_of, inputs_to, placed, resolve
from ..recipe import Recipe
from ..records import NO_DEPTH, Depth, InputSpec
from ..tasks import class_leaf
from ..tensors import Inputs, noise_like
from .fingerprints import Known
from .reading import Data, read_data
from .rehearsal import rehearse
from .stages import Notify, Stages, open_run
from .task_choice import CLASSES, NO_PARTS, Chosen, UserParts, choose, decode_of


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What the stages of one run share. `warnings` are what reading the model gave to be warned of."""

    recipe: Recipe
    stages: Stages
    model: Model
    splits: Splits
    dense: fx.GraphModule
    calibration: Batches
    evaluation: Batches
    preprocessing: Preprocessing | None  # None where the data are tensors as the network takes them
    inputs: tuple[InputSpec, ...]
    chosen: Chosen
    keywords: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    device: torch.device = CPU  # where scores, repair, recovery and evaluation are computed
    depth: Depth = NO_DEPTH  # residual branches that went whole
    shallow: fx.GraphModule | None = None  # the dense network without them

    @property
    def base(self) -> fx.GraphModule:
        """The network that units go from: the dense one, or what is left of it without whole branches."""
        return self.dense if self.shallow is None else self.shallow

    @property
    def example(self) -> Inputs:
        """What the network was traced with, two samples of noise."""
        return noise_like(self.inputs)

    @property
    def prepared_as(self) -> dict[str, object] | None:
        """The pre-processing as stages' keys hold it."""
        return None if self.preprocessing is None else asdict(self.preprocessing)

    @property
    def calibration_images(self) -> Known:
        """The calibration images as a stage's input."""
        return self._known(self.calibration, "calibration")

    @property
    def evaluation_images(self) -> Known:
        """The evaluation images as a stage's input."""
        return self._known(self.evaluation, "evaluation")

    def first_evaluation_images(self, most: int) -> Known:
        """So many of them at most, as a stage's input."""
        count = min(most, len(self.splits.evaluation))
        first = batches(self.splits.evaluation.subset(np.arange(count)), self.recipe.batch_size)
        return Known(first, [self.evaluation_images.stands_for, count])

    def _known(self, images: Batches, purpose: str) -> Known:
        sha256 = self.splits.hashes[purpose]
        return Known(images, [sha256, images.batch_size, self.prepared_as, self.chosen.labelled])

    def sample(self, count: int) -> Arrays:
        """[count, ...] of each input, the first calibration images as the network takes them; few ones come again."""
        gathered: list[Arrays] = []
        for images, _ in self.calibration:
            gathered.append(arrays_of(images))
            if sum(map(feeds.count, gathered)) >= count:
                break
        return feeds.mapped(lambda array: np.resize(array, (count, *array.shape[1:])), feeds.joined(gathered))


def own_share(images: Known) -> Known:
    """Of a stage's images those batches that this process looks at, where there are several and a batch for each.

    A stage that takes a share is done by all of them together, and its sums go over all.
    """
    if not shares_out(len(images.value)):
        return images
    return replace(images, value=images.value.share(rank(), world()))


def arrays_of(inputs: Inputs) -> Arrays:
    """The tensors as arrays, one alone as one."""
    if isinstance(inputs, Tensor):
        return inputs.numpy()
    return tuple(tensor.numpy() for tensor in inputs)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A recipe, and what a Python caller has in memory in place of what it names.

    `parts` are a user's own functions of the task. `search` images are set apart from calibration and evaluation, or at
    most `spare` of what both leave.
    """

    recipe: Recipe
    model: Model | None = None
    data: object = None
    parts: UserParts = NO_PARTS
    search: int = 0
    spare: int = 0


def prepare(request: Request, notify: Notify) -> Work:
    """What the run is made of, read and checked; nothing is written.

    Raises InputError's subclasses, and FolderError where the recipe's folder holds something else.
    """
    work = read_work(request, notify)
    return replace(work, stages=open_run(request.recipe.folder, work.stages.identity, notify))


def read_work(request: Request, notify: Notify) -> Work:
    """The same, whatever its folder holds: nobody has looked at that yet."""
    recipe = request.recipe
    require_known(recipe)
    model = request.model or load_model(recipe.model, recipe.weights or None, seed=recipe.seed)
    read = read_data(recipe, model, request.data, search=request.search, spare=request.spare)
    splits, device = read.splits, resolve(recipe.device)
    dense = placed(_traced(model, read), device)

    for images in (splits.calibration, splits.search, splits.evaluation):
        require_decodable(images)
    calibration = batches(splits.calibration, recipe.batch_size)
    decode = decode_of(model, read.inputs[0].shape)
    chosen = choose(recipe, dense, calibration, request.parts, decode=decode)
    if chosen.name == CLASSES:
        splits = with_labels(splits, dense, model, recipe, chosen)
        calibration = batches(splits.calibration, recipe.batch_size)
    evaluation = batches(splits.evaluation, recipe.batch_size)
    rehearse(chosen, dense, calibration, evaluation)
    identity = {"model": recipe.model, "weights": model.sha256, "data": splits.hashes["evaluation"]}
    return Work(
        recipe,
        Stages(recipe.folder, notify, identity),
        model,
        splits,
        dense,
        calibration,
        evaluation,
        read.preprocessing,
        read.inputs,
        chosen,
        read.keywords,
        warnings=(*_notes(model, dense), *read.notes, *chosen.warnings),
        device=device,
    )


def _traced(model: Model, data: Data) -> fx.GraphModule:
    """The model's network as it is with such data, tried. Raises ModelError where it is none that can be compressed."""
    example = noise_like(data.inputs)
    traced = trace(model.module, example, data.keywords)
    require_function(model.module, traced, example, data.keywords)
    require_exportable(traced)
    return traced


def _notes(model: Model, dense: fx.GraphModule) -> tuple[str, ...]:
    """What reading the model gave to be warned of."""
    notes = [f"the model was taken as a plain network: {note}" for note in model.notes]
    for name in constant_outputs(dense):
        notes.append(f"the model's answer {name!r} is the same for every sample and is left out of the files")
    return tuple(notes)


_TARGETS: Mapping[TargetKind, str] = {
    "mask": "masks",
    "boxes": "boxes",
    "image": "images",
    "values": "other numbers than one whole one a sample",
}


def with_labels(splits: Splits, dense: fx.GraphModule, model: Model, recipe: Recipe, chosen: Chosen) -> Splits:
    """The parts as a classifier is judged on them: with labels that are its own, or the dense network's where there
    are none, but for a task that compares the answers itself. Raises DataError for labels that it can't give, and for
    images of which only some have one, ModelError for a network without an answer [N, classes]."""
    named = dict(zip(output_names(dense), output_nodes(dense), strict=True))
    answer = {name: node.meta["val"] for name, node in named.items()}
    if all(leaf.ndim != 2 for leaf in answer.values()):
        forms = ", ".join(map(_form, answer.values()))
        raise ModelError(
            f"the network answers with {forms}, and classification takes one answer [N, classes]; say another task, or "
            "wrap the model so that its forward returns class scores"
        )
    outputs = int(class_leaf(answer)[1].shape[1])
    if not chosen.labelled:
        return _labelled_splits(splits, dense, recipe.batch_size) if chosen.classifies else splits
    source, kind = splits.calibration.source, splits.calibration.target_kind
    if kind != "class":
        raise DataError(
            f"the targets of {source} are {_TARGETS[kind]}, and classification takes one whole number a sample, its "
            "class; give those, or say another task"
        )
    require_own_classes(splits.calibration, outputs, model)
    for images in (splits.calibration, splits.search, splits.evaluation):
        require_labels(images, outputs)
    return splits


def _form(leaf: Tensor) -> str:
    """`[N, 10, 7, 7]`: an answer's shape, whatever the batch."""
    return str(["N", *map(int, leaf.shape[1:])]).replace("'", "")


def _labelled_splits(splits: Splits, dense: fx.GraphModule, batch_size: int) -> Splits:
    """Every part with the dense network's classes for labels."""
    return replace(
        splits,
        calibration=_labelled_by(dense, splits.calibration, batch_size),
        search=_labelled_by(dense, splits.search, batch_size),
        evaluation=_labelled_by(dense, splits.evaluation, batch_size),
    )


@torch.no_grad()
def _labelled_by(dense: fx.GraphModule, images: Source, batch_size: int) -> Source:
    """The images with the class that the dense network gives each of them."""
    if not len(images):
        return images
    mine = batches(images, batch_size).share(rank(), world())
    labels_by_batch = []  # of this process's batches
    for inputs, _ in mine:
        (logits,) = answers(dense, inputs_to(inputs, device_of(dense)))
        labels_by_batch.append(logits.argmax(1).cpu().numpy())
    labels = np.concatenate(in_turns(labels_by_batch))
    return images.labelled(labels.astype(np.int64))


def require_own_classes(images: Source, outputs: int, model: Model) -> None:
    """Raises DataError where named classes would be taken for the first few of more outputs, whose names aren't known.

    Numbers as names are the model's own class numbers where they count from 0.
    """
    names = images.class_names
    are_named = model.class_names is not None and model.weights != "none"
    numbered = all(name.isdigit() and int(name) == index for index, name in enumerate(names))
    if are_named or numbered or len(names) >= outputs:
        return
    listed = ", ".join([*names[:3], "..."] if len(names) > 3 else names)
    remedy = _built_for(model.builder, len(names))
    labelled = "labels.csv with" if images.storage == "files" else "labels that are"
    raise DataError(
        f"{images.source} has {len(names)} classes ({listed}), the model {outputs} outputs, and which of them are "
        f"meant is not known; {remedy}, or give {labelled} the model's class numbers"
    )


def _built_for(spec: str, classes: int) -> str:
    """What to call for a model of so many classes, as that kind of model is spelt."""
    name, _, arguments = spec.removesuffix(")").partition("(")
    if not spec.startswith(("torchvision:", "timm:")):
        return f"build {spec or 'the model'} for {classes} classes"
    written = [argument.strip() for argument in arguments.split(",") if "num_classes" not in argument]
    arguments = ", ".join([*filter(None, written), f"num_classes={classes}"])
    return f"take --model '{name}({arguments})' with weights trained for them"
