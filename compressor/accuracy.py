"""How often a network is right: batches of labelled images in, `records.Accuracy` out.

Runs a `torch.fx.GraphModule` or any `nn.Module` in evaluation mode and leaves its mode as it was. Counts
are summed over the ranks of a run. Knows neither where images come from nor what the answer is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .distributed import sum_over_ranks
from .errors import DataError
from .graph import aten
from .graph.program import modes_kept
from .graph.training import set_training
from .placement import device_of, inputs_to, reusing_freed_memory
from .records import Accuracy, IntArray
from .tensors import Inputs, as_tuple

LabelledBatches = Iterable[tuple[Inputs, Any]]  # with class indices [N], or another task's targets


def logits_of(network: nn.Module, images: Inputs) -> Tensor:
    """[N, classes]; a network that answers with a sequence or a mapping answers with its first entry."""
    answer = network(*as_tuple(images))
    while isinstance(answer, (tuple, list, dict)):
        answer = next(iter(answer.values())) if isinstance(answer, dict) else answer[0]
    assert isinstance(answer, Tensor)
    return answer


@contextmanager
def evaluating(network: nn.Module) -> Iterator[nn.Module]:
    """The network in evaluation mode; every module's mode and every traced normalisation is put back."""
    # a traced normalisation holds its mode as an argument; graphs that evaluate anyway are not recompiled
    training_graphs: dict[fx.GraphModule, list[Any]] = {}
    for module in network.modules():
        if isinstance(module, fx.GraphModule):
            flags = [node.args[5] for node in batch_norms(module)]
            if any(flags):
                training_graphs[module] = flags
    try:
        with modes_kept(network):
            for module in network.modules():
                module.training = False  # not .eval(): an exported graph refuses it
            for graph in training_graphs:
                set_training(graph, False)
            yield network
    finally:
        for graph, flags in training_graphs.items():
            for node, flag in zip(batch_norms(graph), flags, strict=True):
                node.update_arg(5, flag)
            graph.recompile()


def batch_norms(graph: fx.GraphModule) -> list[fx.Node]:
    """The batch normalisations of a traced graph, in its order; argument 5 is whether they train."""
    return [node for node in graph.graph.nodes if node.target is aten.batch_norm.default]


@torch.no_grad()
@reusing_freed_memory()
def evaluate(
    network: nn.Module,
    batches: LabelledBatches,
    *,
    metric: str = "top-1",
    progress: Callable[[int], None] | None = None,
) -> Accuracy:
    """Top-1, called `metric` where labels are no truth, and from six classes on top-5; `progress` gets images done.

    Over [N, ...] inputs and [N] labels. Counts are those of all ranks together. Raises DataError where none of them has
    an image.
    """
    correct, correct_top5, seen, classes = 0, 0, 0, 0
    answers: list[Tensor] = []
    truths: list[Tensor] = []
    device = device_of(network)
    with evaluating(network):
        for images, labels in batches:
            logits = logits_of(network, inputs_to(images, device)).float().cpu()  # [N, classes]
            truth = labels.cpu().long()
            classes = logits.shape[1]
            ranked = logits.topk(min(5, classes), dim=1).indices
            hits = ranked == truth.unsqueeze(1)  # [N, 5]: which place the labelled class has
            correct += int(hits[:, 0].sum())
            correct_top5 += int(hits.any(1).sum())
            seen += len(labels)
            answers.append(logits.argmax(1))
            truths.append(truth)
            if progress is not None:
                progress(seen)

    by_chance = 0.0
    if seen:
        by_chance = seen * chance_of(torch.cat(answers).numpy(), torch.cat(truths).numpy())
    if classes <= 5:  # every answer would be right
        correct_top5 = -1
    return _over_ranks(correct, correct_top5, seen, by_chance, metric)


def chance_of(answers: IntArray, truths: IntArray) -> float:
    """The share of `truths` [N] that the same answers [N] in a random order would meet, on average.

    The agreement by chance of Cohen's kappa: the sum over classes of both shares' product.
    """
    alike = 0.0
    for label in np.unique(truths):
        alike += float((answers == label).mean() * (truths == label).mean())
    return alike


def _over_ranks(correct: int, correct_top5: int, seen: int, by_chance: float, metric: str) -> Accuracy:
    """`by_chance` right answers are expected of chance on this rank's images; a `correct_top5` of -1: not counted."""
    counts = [correct, max(correct_top5, 0), seen, correct_top5 >= 0, by_chance]
    sums = sum_over_ranks({"counts": np.array(counts, np.float64)})["counts"]
    total, total_top5, n, has_top5 = map(int, sums[:4])
    if n == 0:
        raise DataError("there are no images to evaluate on; expected at least one batch; check the evaluation split")
    if not has_top5:
        total_top5 = -1
    return Accuracy(total, n, total_top5, chance=float(sums[4]) / n, metric=metric)
