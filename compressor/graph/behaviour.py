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

from ..errors import ModelError
from ..placement import CPU, placed
from ..tensors import Inputs, Outputs, as_tuple, count, cut, mapped, moved, named_leaves
from .interface import answers, output_paths
from .operators import arguments
from .program import call, evaluating, first_line
from .tracing import aten, place_of
from .wrappers import plain

AGREEMENT = 1e-3
"""Of the largest output: float32 sums in another order differ by less, another answer by more."""
_NUDGE = 1e-6  # a network that answers this relative change by more than AGREEMENT is allowed ten times as much

_RANDOM = (
    "the model is random in evaluation: two passes over the same images differ; look for random numbers of Python, "
    "NumPy or torch in forward, or for state kept outside its buffers (a counter), and use them in training only"
)

Network = Callable[[Inputs], Outputs]
_IMAGES = 3  # with the two images a network is traced with, a second batch size


@torch.no_grad()
def require_function(model: nn.Module, graph: fx.GraphModule, example: Inputs, keywords: Sequence[str] = ()) -> None:
    """Raises ModelError, with place and remedy, unless each image's answer depends on that image alone.

    `example` is [2, ...], of every input, as the graph was traced with, and so are `keywords`; `graph` lies anywhere.
    The model is left as it was.
    """
    module, graph = plain(model, convert=False).module, placed(graph, CPU)
    names = output_paths(graph)

    def answer(inputs: Inputs) -> Outputs:
        leaves = named_leaves(call(module, inputs, keywords))
        return tuple(leaves[name] for name in names if name in leaves)

    def traced(inputs: Inputs) -> Outputs:
        return answers(graph, inputs)

    generator = torch.Generator().manual_seed(1)
    images = mapped(lambda tensor: _one_more(tensor, generator), moved(cut(example, 0, 2), CPU))
    with evaluating(module):
        together = _require_same_twice(module, answer, images)
        _require_numbers(graph, images, together)
        _require_alone(answer, graph, images, together)
        # at another batch size than the graph was traced with, then at that one
        _require_traced(answer, traced, images, together)
        two_images = cut(images, 0, 2)
        _require_traced(answer, traced, two_images, _answers(answer, two_images))


def _one_more(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """[2, ...] to [3, ...]: noise, or of what is no float the first sample again, for any number may be no index."""
    another = tensor[:1]
    if tensor.is_floating_point():
        another = torch.randn(_IMAGES - 2, *tensor.shape[1:], generator=generator).to(tensor)
    return torch.cat([tensor, another])


def _require_same_twice(model: nn.Module, network: Network, images: Inputs) -> list[Tensor]:
    """The answer; the second pass finds what the first left: other random numbers, counters and running means."""
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    first, second = _answers(network, images), _answers(network, images)
    if _difference(first, second) <= AGREEMENT:
        return second
    written = [name for name, tensor in model.named_buffers() if not torch.equal(tensor, before[name])]
    if written:
        raise ModelError(
            f"the model's answer depends on state that its forward writes: buffers {', '.join(map(repr, written))} "
            "change at every call, and two passes over the same images differ; keep them fixed in evaluation "
            "(if self.training: ...)"
        )
    raise ModelError(_RANDOM)


def _require_numbers(graph: fx.GraphModule, images: Inputs, answers: Sequence[Tensor]) -> None:
    """Some number in the answer: a mask's infinity beside others is one, NaN alone is the end of every stage."""
    floating = [answer for answer in answers if answer.is_floating_point() and answer.numel()]
    if not floating or any(bool(answer.isfinite().any()) for answer in floating):
        return
    trial = _FirstNaN(graph)
    trial.run(*as_tuple(mapped(Tensor.clone, images)))
    where = ""
    if trial.first is not None:
        where = f", first from {trial.first.target} at {place_of(trial.first)}"
    raise ModelError(
        f"the model answers with NaN or infinity alone{where}; look at its weights there, and at what is divided by, "
        "or taken the root or logarithm of"
    )


class _FirstNaN(fx.Interpreter):
    """Runs a graph; `first` is the first operation in whose result there is NaN, None without one."""

    first: fx.Node | None = None

    def run_node(self, n: fx.Node) -> object:
        result: object = super().run_node(n)
        if self.first is None and n.op == "call_function" and _has_nan(result):
            self.first = n
        return result


def _has_nan(result: object) -> bool:
    return isinstance(result, Tensor) and bool(torch.isnan(result).any())


def _require_alone(network: Network, graph: fx.GraphModule, images: Inputs, together: Sequence[Tensor]) -> None:
    try:
        alone = _answers(network, cut(images, 0, 1))
    except Exception as error:
        raise ModelError(
            f"the model fails on one image alone ({first_line(error)}), which is what a device gives it; "
            f"{_batch_remedy(graph)}"
        ) from error
    first_of_many = [answer[:1] for answer in together if answer.ndim]  # a number alone belongs to no image
    difference = _difference(first_of_many, [answer for answer in alone if answer.ndim])
    if difference <= _allowed(network, images, difference):
        return
    if _difference(together, _answers(network, images)) > AGREEMENT:
        raise ModelError(_RANDOM)
    raise ModelError(f"the model's answer to an image depends on the other images of its batch: {_batch_remedy(graph)}")


def _batch_remedy(graph: fx.GraphModule) -> str:
    for node in graph.graph.nodes:
        if _takes_statistics(node):
            return (
                f"{place_of(node)} normalises by statistics of the batch; train with track_running_stats=True, or "
                "normalise each image by itself"
            )
    return "look for sums, norms and attention over the first axis in forward, and take them for each image by itself"


def _takes_statistics(node: fx.Node) -> bool:
    """Whether a batch normalisation reads its batch here, in evaluation too."""
    if node.target in (aten._native_batch_norm_legit.no_stats, aten._native_batch_norm_legit.default):
        return True
    return node.target is aten.batch_norm.default and bool(arguments(node)["training"])


def _require_traced(network: Network, graph: Network, images: Inputs, expected: Sequence[Tensor]) -> None:
    try:
        traced = _answers(graph, images)
    except Exception as error:
        raise ModelError(
            f"the model as it was traced fails on {count(images)} images ({first_line(error)}); its forward must not "
            "fix the batch size: take it from x.shape[0]"
        ) from error
    difference = _difference(expected, traced)
    if difference > _allowed(network, images, difference):
        raise ModelError(
            f"the model as it was traced answers {count(images)} images otherwise than the model does; its forward "
            "depends on what tracing can't follow (the batch size in Python, the clock, attributes it changes): make "
            "it a function of its input"
        )


def _answers(network: Network, images: Inputs) -> list[Tensor]:
    """The tensors of the network's answer; it gets a copy, which it may write to."""
    return [leaf.detach() for leaf in as_tuple(network(mapped(Tensor.clone, images)))]


def _allowed(network: Network, images: Inputs, difference: float) -> float:
    """AGREEMENT, or more where the network makes much of rounding: measured only where it matters.

    `difference` is the one that has to be allowed. Images that differ by a millionth show what rounding can do here.
    """
    if difference <= AGREEMENT:
        return AGREEMENT
    nudged_images = mapped(lambda tensor: tensor * (1 + _NUDGE) if tensor.is_floating_point() else tensor, images)
    nudged = _difference(_answers(network, images), _answers(network, nudged_images))
    return max(AGREEMENT, 10 * nudged)


def _difference(expected: Sequence[Tensor], answered: Sequence[Tensor]) -> float:
    """The largest one, relative to the largest output; infinite where shapes differ. NaN on both sides is equal."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in answered]:
        return math.inf
    return max(map(_relative_difference, expected, answered), default=0.0)


def _relative_difference(expected: Tensor, answered: Tensor) -> float:
    """Of two tensors of one shape, relative to the largest number expected; 0 of empty ones."""
    if not expected.numel():
        return 0.0
    a, b = _finite(expected), _finite(answered)
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))


def _finite(tensor: Tensor) -> Tensor:
    """In float64, with 0 for what is no finite number."""
    return tensor.double().nan_to_num(0.0, 0.0, 0.0)
