"""A model and its traced graph in, an error that names the cause out where the model is no function of one image.

What runs on a device answers each image by itself, the same each time. Tried on few images of noise, before anything
long: two passes, one image alone and within a batch, the input before and after, buffers before and after, the graph
against the model at two batch sizes. Knows no units, no plan and no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import ModelError
from ..placement import CPU, placed
from .operators import arguments
from .program import evaluating, first_line
from .tracing import aten, place_of
from .wrappers import plain

AGREEMENT = 1e-3
"""Of the largest output: float32 sums in another order differ by less, another answer by more."""
_NUDGE = 1e-6  # a network that answers this relative change by more than AGREEMENT is allowed ten times as much

_IMAGES = 3  # with the two images a network is traced with, a second batch size


@torch.no_grad()
def require_function(model: nn.Module, graph: fx.GraphModule, example: Tensor) -> None:
    """Raises ModelError, with place and remedy, unless each image's answer depends on that image alone.

    `example` is [2, C, H, W] as the graph was traced with, `graph` lies anywhere. The model is left as it was.
    """
    model, graph = plain(model, convert=False).module, placed(graph, CPU)
    generator = torch.Generator().manual_seed(1)
    images = torch.cat([example.to(CPU), torch.randn(_IMAGES - 2, *example.shape[1:], generator=generator)])
    with evaluating(model):
        together = _require_same_twice(model, images)
        _require_numbers(graph, images, together)
        _require_alone(model, graph, images, together)
        _require_traced(model, graph, images, together)
        _require_traced(model, graph, images[:2], _answers(model, images[:2]))


def _require_same_twice(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The answer; the second pass finds what the first left: other random numbers, counters and running means."""
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    first, second = _answers(model, images), _answers(model, images)
    if _difference(first, second) <= AGREEMENT:
        return second
    written = [name for name, tensor in model.named_buffers() if not torch.equal(tensor, before[name])]
    if written:
        raise ModelError(
            f"the model's answer depends on state that its forward writes: buffers {', '.join(map(repr, written))} "
            "change at every call, and two passes over the same images differ; keep them fixed in evaluation "
            "(if self.training: ...)"
        )
    raise ModelError(
        "the model is random in evaluation: two passes over the same images differ; look for random numbers of Python, "
        "NumPy or torch in forward, or for state kept outside its buffers, and use them in training only"
    )


def _require_numbers(graph: fx.GraphModule, images: Tensor, answers: Sequence[Tensor]) -> None:
    """Some number in the answer: a mask's infinity beside others is one, NaN alone is the end of every stage."""
    floating = [answer for answer in answers if answer.is_floating_point() and answer.numel()]
    if not floating or any(bool(answer.isfinite().any()) for answer in floating):
        return
    trial = _FirstNaN(graph)
    trial.run(images.clone())
    where = f", first from {trial.first.target} at {place_of(trial.first)}" if trial.first is not None else ""
    raise ModelError(
        f"the model answers with NaN or infinity alone{where}; look at its weights there, and at what is divided by, "
        "or taken the root or logarithm of"
    )


class _FirstNaN(fx.Interpreter):
    """Runs a graph; `first` is the first operation in whose result there is NaN, None without one."""

    first: fx.Node | None = None

    def run_node(self, n: fx.Node) -> object:
        result: object = super().run_node(n)
        is_new = self.first is None and n.op == "call_function" and isinstance(result, Tensor)
        if is_new and bool(torch.isnan(result).any()):  # type: ignore[arg-type]
            self.first = n
        return result


def _require_alone(model: nn.Module, graph: fx.GraphModule, images: Tensor, together: Sequence[Tensor]) -> None:
    try:
        alone = _answers(model, images[:1])
    except Exception as error:
        raise ModelError(
            f"the model fails on one image alone ({first_line(error)}), which is what a device gives it; "
            f"{_batch_remedy(graph)}"
        ) from error
    first_of_many = [answer[:1] for answer in together if answer.ndim]  # a number alone belongs to no image
    difference = _difference(first_of_many, [answer for answer in alone if answer.ndim])
    if difference > _allowed(model, images, difference):
        raise ModelError(
            "the model's answer to an image depends on the other images of its batch: statistics of the batch; "
            f"{_batch_remedy(graph)}"
        )


def _batch_remedy(graph: fx.GraphModule) -> str:
    places = [place_of(node) for node in graph.graph.nodes if _takes_statistics(node)]
    where = f"{places[0]} normalises by them; " if places else ""
    return f"{where}train with track_running_stats=True, or normalise each image by itself"


def _takes_statistics(node: fx.Node) -> bool:
    """Whether a batch normalisation reads its batch here, in evaluation too."""
    if node.target in (aten._native_batch_norm_legit.no_stats, aten._native_batch_norm_legit.default):
        return True
    return node.target is aten.batch_norm.default and bool(arguments(node)["training"])


def _require_traced(model: nn.Module, graph: fx.GraphModule, images: Tensor, expected: Sequence[Tensor]) -> None:
    try:
        traced = _answers(graph, images)
    except Exception as error:
        raise ModelError(
            f"the model as it was traced fails on {len(images)} images ({first_line(error)}); its forward must not "
            "fix the batch size: take it from x.shape[0]"
        ) from error
    difference = _difference(expected, traced)
    if difference > _allowed(model, images, difference):
        raise ModelError(
            f"the model as it was traced answers {len(images)} images otherwise than the model does; its forward "
            "depends on what tracing can't follow (the batch size in Python, the clock, attributes it changes): make "
            "it a function of its input"
        )


def _answers(network: Callable[[Tensor], object], images: Tensor) -> list[Tensor]:
    """The tensors of the network's answer; it gets a copy, which it may write to."""
    answer = network(images.clone())
    # a dictionary of its own class (as libraries' outputs are) would be taken for a leaf
    leaves = pytree.tree_leaves(dict(answer) if isinstance(answer, dict) else answer)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]


def _allowed(model: nn.Module, images: Tensor, difference: float) -> float:
    """AGREEMENT, or more where the network makes much of rounding: measured only where it matters.

    `difference` is the one that has to be allowed. Images that differ by a millionth show what rounding can do here.
    """
    if difference <= AGREEMENT:
        return AGREEMENT
    nudged = _difference(_answers(model, images), _answers(model, images * (1 + _NUDGE)))
    return max(AGREEMENT, 10 * nudged)


def _difference(expected: Sequence[Tensor], answered: Sequence[Tensor]) -> float:
    """The largest one, relative to the largest output; infinite where shapes differ. NaN on both sides is equal."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in answered]:
        return math.inf
    worst = 0.0
    for expected_tensor, answered_tensor in zip(expected, answered, strict=True):
        a, b = _finite(expected_tensor), _finite(answered_tensor)
        if a.numel():
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)))
    return worst


def _finite(tensor: Tensor) -> Tensor:
    """In float64, with 0 for what is no finite number."""
    return tensor.double().nan_to_num(0.0, 0.0, 0.0)
