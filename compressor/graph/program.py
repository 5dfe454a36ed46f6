"""A model in, its exported program out: ATen operations, evaluation mode, batch axis free.

The first half of `tracing`, which turns the program into the graph that is pruned. A model that fails, needs other
inputs than it gets or can't be followed is refused, with the line of the user's code where it happened.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import sysconfig
import traceback
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ModelError, with_article
from ..tensors import INPUT, OUTPUT, Inputs, as_tuple, count, cut, joined, mapped, named_leaves
from .exporter import exported_program

_HERE = Path(__file__).resolve().parents[1]  # this package: its own frames are not the user's
_LIBRARIES = re.compile("site-packages|dist-packages|<frozen|<string>|<eval")
# `File "a/model.py", line 31` as Python prints a frame, `(model.py:31 in forward` as torch does
_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+)|\((?P<short_file>[\w./-]+\.py):(?P<short_line>\d+) in '
)
_FIXED_BATCH = "Constraints violated"  # what torch says of a batch that forward compares with a number
_TWO_TYPES = re.compile(r"dtype|scalar type|data type|should be the same|same type")
_GRADIENT = "We found a fake tensor in the exported program constant's list"  # what torch says of autograd in forward
_KEEPERS = (dict, OrderedDict, list, set)  # what forward may put something aside in
_LONGEST_LINE = 300  # characters of an error that are shown
_SPLIT = (
    ". Where it chooses boxes by their values (a threshold, non-maximum suppression), give backbone and heads as the "
    "model, and keep what follows as its decode"
)


@dataclass(frozen=True, slots=True)
class Program:
    """What `torch.export` read, and what the inputs and the tensors of the answer are called.

    `constant` names those tensors of the answer that no sample changes; they are not part of the program's answer.
    """

    exported: torch.export.ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constant: tuple[str, ...] = ()


def export_program(model: nn.Module, example: Inputs, keywords: Sequence[str] = ()) -> Program:
    """The model as `torch.export` reads it, flat: tensors in, tensors out, free in the batch axis; `example` stays as
    it is, with at least two samples [N, ...] of each input.

    `keywords` name the inputs where forward takes them by name, or as one dictionary. Raises ModelError where forward
    needs other inputs, fails, branches on values or fixes the batch size, or where a tensor of its answer does not
    have the samples on its first axis.
    """
    _require_inputs(model, len(as_tuple(example)), keywords)
    answer = _trial(model, example, keywords)
    constant = _constant_leaves(model, example, keywords, answer)
    outputs = tuple(name for name in answer if name not in constant)
    inputs = _input_names(model, len(as_tuple(example)), keywords)

    reasons: list[str] = []
    # the strict reading alone follows `len(x)`, the other follows more of Python; and a model may remember the shape it
    # was last called with and compare: of another batch, or before any call, that tells nothing
    for samples, strict, called in (
        (example, False, True),
        (example, True, True),
        (_one_more(example), False, True),
        (example, False, False),
    ):
        if samples is not example and _FIXED_BATCH not in reasons[0]:
            continue
        try:
            with _as_before(model):
                if called:  # what a first call makes (tables of positions) is there then, whether there was one or not
                    with evaluating(model):
                        call(model, mapped(Tensor.clone, example), keywords)
                with _flat(model, inputs, keywords, outputs):
                    return Program(exported_program(model, samples, strict=strict), inputs, outputs, constant)
        except Exception as error:
            place = place_in(str(error)) or raised_at(error)
            reasons.append(f"{first_line(error)}{_at(place)}")
    # what a forward that remembers shapes is refused for without its memory tells more than that it remembers
    reason = next((reason for reason in reversed(reasons) if _FIXED_BATCH not in reason), reasons[0])
    raise ModelError(f"the model can't be traced with a free batch axis: {reason}; {_remedy(reason)}")


def _remedy(reason: str) -> str:
    """What to do about a forward that can't be followed."""
    if _GRADIENT in reason:
        return (
            "its forward takes gradients or writes to a parameter's .data, which a device can't: leave gradients out "
            "in evaluation (if self.training: ...), and mask a weight where it is used, conv2d(x, weight * mask)"
        )
    remedy = "its forward must not branch on values nor fix the batch size"
    return remedy + _SPLIT if "data-dependent" in reason else remedy


def _one_more(example: Inputs) -> Inputs:
    """[N + 1, ...]: the first sample once more at the end."""
    return joined([example, cut(example, 0, 1)])


def call(model: nn.Module, inputs: Inputs, keywords: Sequence[str] = ()) -> object:
    """The model's answer to inputs that are given by position, or by the names in `keywords`."""
    return _call_by(model, as_tuple(inputs), keywords, by_name=takes_by_name(model, keywords))


def _call_by(
    forward: Callable[..., object], tensors: Sequence[Tensor], keywords: Sequence[str], *, by_name: bool
) -> object:
    """By position without keywords; else by name where `by_name`, or as one dictionary."""
    if not keywords:
        return forward(*tensors)
    named = dict(zip(keywords, tensors, strict=True))
    return forward(**named) if by_name else forward(named)


def takes_by_name(model: nn.Module, keywords: Sequence[str]) -> bool:
    """Whether forward has those parameters; else it takes the dictionary itself."""
    parameters = _parameters(model)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return takes_any or {parameter.name for parameter in parameters}.issuperset(keywords)


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    """Forward's own; none of a callable that isn't Python."""
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return []


def inputs_wanted(model: nn.Module) -> tuple[str, ...]:
    """Names of the inputs that forward can't do without."""
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    required = [parameter for parameter in _parameters(model) if parameter.default is parameter.empty]
    return tuple(parameter.name for parameter in required if parameter.kind in kinds)


def parameter_names(model: nn.Module) -> tuple[str, ...]:
    """What forward calls its inputs, those that it can do without among them."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(parameter.name for parameter in _parameters(model) if parameter.kind not in variable)


def _input_names(model: nn.Module, given: int, keywords: Sequence[str]) -> tuple[str, ...]:
    """What several inputs are called: by forward's own names, or by their number."""
    if keywords:
        return tuple(keywords)
    if given == 1:
        return (INPUT,)
    names = parameter_names(model)
    if len(names) >= given:
        return names[:given]
    return tuple(f"{INPUT}.{index}" for index in range(given))


def _require_inputs(model: nn.Module, given: int, keywords: Sequence[str]) -> None:
    """Raises ModelError where forward needs more inputs than there are."""
    wanted = inputs_wanted(model)
    if keywords and not takes_by_name(model, keywords):  # as one dictionary
        given = 1
    missing: Collection[str] = wanted[given:]
    if keywords and given > 1:
        missing = set(wanted) - set(keywords)
    if not missing:
        return
    what_is_given = f"{given} are" if given > 1 else "one batch [N, ...] is what is"
    raise ModelError(
        f"the model's forward needs {len(wanted)} inputs ({', '.join(wanted)}), and {what_is_given} given; give a "
        "loader that yields all of them (a tuple, or a dictionary by name), or wrap the model in a module whose "
        "forward makes the others itself"
    )


@torch.no_grad()
def _trial(model: nn.Module, example: Inputs, keywords: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of the answer by name; the model forgets the call, for some keep the first shapes that they see."""
    try:
        with _as_before(model), evaluating(model):
            answer = call(model, mapped(Tensor.clone, example), keywords)  # a forward may write to its input
    except Exception as error:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in as_tuple(example))
        raise ModelError(
            f"the model's forward fails on an input of shape {shapes}{_at(raised_at(error))}: {first_line(error)}; "
            f"{_trial_remedy(str(error), example)}"
        ) from error
    leaves = named_leaves(answer)
    if not leaves:
        kind = with_article(type(answer).__name__)
        raise ModelError(f"the model answers with {kind} that holds no tensor; its forward must return some")
    return leaves


def _trial_remedy(reason: str, example: Inputs) -> str:
    """By what PyTorch says: numbers of two types, or shapes that don't fit."""
    if _TWO_TYPES.search(reason):
        return (
            "weights and images are float32 here, whatever type they came in: leave casts to other types out of forward"
        )
    if as_tuple(example)[0].ndim == 4:
        return "check --size, and that --mean and --std have one value for grey images, three for RGB"
    return "check what the loader yields"


def _constant_leaves(
    model: nn.Module, example: Inputs, keywords: Sequence[str], answer: dict[str, Tensor]
) -> tuple[str, ...]:
    """Names of the tensors that are as long for two samples as for three, so no sample's.

    Raises ModelError for one that holds the samples on another axis than the first, and where nothing is left.
    """
    if all(_has_samples(leaf, count(example)) for leaf in answer.values()):
        return ()
    more = _one_more(example)
    longer = _trial(model, more, keywords)
    constant = []
    for name, leaf in answer.items():
        other = longer.get(name)
        if _has_samples(leaf, count(example)) and _has_samples(other, count(more)):
            continue
        if other is None or other.shape != leaf.shape:
            raise ModelError(
                f"the model's answer {name!r} is {list(leaf.shape)} for {count(example)} samples, expected them on its "
                f"first axis; wrap the model so that its forward returns [N, ...]{_SPLIT}"
            )
        constant.append(name)
    if len(constant) == len(answer):
        raise ModelError(
            f"nothing in the model's answer depends on how many samples it gets; it must return [N, ...]{_SPLIT}"
        )
    return tuple(constant)


def _has_samples(leaf: Tensor | None, samples: int) -> bool:
    """Whether the first axis has one place for each sample."""
    return leaf is not None and leaf.shape[:1] == (samples,)


@contextlib.contextmanager
def _flat(model: nn.Module, inputs: Sequence[str], keywords: Sequence[str], outputs: Sequence[str]) -> Iterator[None]:
    """The model takes tensors by position and answers with a tensor or a tuple of them, those named in `outputs`.

    Its own forward is put back; a model that is so already is left alone.
    """
    takes_one = len(inputs) == len(inputs_wanted(model)) == 1
    if takes_one and not keywords and list(outputs) == [OUTPUT]:
        yield
        return

    original = model.forward
    had_own = "forward" in vars(model)

    def forward(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        leaves = named_leaves(_call_by(original, tensors, keywords, by_name=by_name))
        answer = tuple(leaves[name] for name in outputs)
        return answer if len(answer) > 1 else answer[0]

    by_name = takes_by_name(model, keywords)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(f"input_{index}", kind) for index in range(len(inputs))]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # the exporter counts them
    model.forward = forward
    try:
        yield
    finally:
        if had_own:
            model.forward = original
        else:
            del model.forward


@contextlib.contextmanager
def modes_kept(network: nn.Module) -> Iterator[None]:
    """Whatever is switched inside, every module trains or evaluates afterwards as it did before."""
    modes = {module: module.training for module in network.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Whatever forward leaves on the modules inside (attributes, entries of a list or dictionary) is gone afterwards;
    what it writes into tensors stays.
    """
    attributes = {module: dict(vars(module)) for module in model.modules()}
    entries = [
        (kept, copy.copy(kept)) for values in attributes.values() for kept in values.values() if type(kept) in _KEEPERS
    ]
    try:
        yield
    finally:
        for module, values in attributes.items():
            vars(module).clear()
            vars(module).update(values)
        for kept, before in entries:
            kept.clear()
            kept.extend(before) if isinstance(kept, list) else kept.update(before)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; modes and buffers are as before afterwards, whatever the model's forward writes."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers() if not buffer.is_meta}
    try:
        with modes_kept(model):
            model.eval()
            yield
    finally:
        for name, buffer in model.named_buffers():
            before = buffers.get(name)  # None for a buffer that forward made
            if before is not None and before.shape == buffer.shape and not torch.equal(before, buffer):
                buffer.detach().copy_(before)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 300 characters of it; its type's name where it has no text."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:_LONGEST_LINE]


def place_in(stack: str) -> str:
    """`model.py:31`, the last line of the user's own code that a printed stack names; "" where none is."""
    not_the_users = (str(_HERE), sysconfig.get_path("stdlib"))
    place = ""
    for frame in _FRAME.finditer(stack):
        file = frame["file"] or frame["short_file"]
        line = frame["line"] or frame["short_line"]
        if not file.startswith(not_the_users) and not _LIBRARIES.search(file):
            place = f"{Path(file).name}:{line}"
    return place


def raised_at(error: BaseException) -> str:
    """The same of the stack that an error came up through."""
    return place_in("".join(traceback.format_tb(error.__traceback__)))


def _at(place: str) -> str:
    return f" (at {place})" if place else ""
