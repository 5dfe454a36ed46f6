"""A model in, its exported program out: ATen operations, evaluation mode, batch axis free.

A model that fails, needs more than the image or can't be followed is refused, with the line of the user's code where
it happened. Knows nothing of what becomes of the program; `graph` turns it into the graph that is pruned.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ModelError

_HERE = Path(__file__).resolve().parents[1]  # this package: its own frames are not the user's
_LIBRARIES = ("site-packages", "dist-packages", "<frozen", "<string>", "<eval")
# `File "a/model.py", line 31` as Python prints a frame, `(model.py:31 in forward` as torch does
_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+)|\((?P<short_file>[\w./-]+\.py):(?P<short_line>\d+) in '
)
_LONGEST_LINE = 300  # characters of an error that are shown


def export_program(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The model as `torch.export` reads it, free in the batch axis of `example` [N, C, H, W], which stays as it is.

    Raises ModelError where forward needs more than the image, fails, branches on values or fixes the batch size.
    """
    require_one_input(model)
    _require_runs(model, example)

    reasons = []
    for strict in (False, True):  # the strict reading alone follows `len(x)`, the other follows more of Python
        try:
            return _exported(model, example, strict=strict)
        except Exception as error:
            place = place_in(str(error)) or _place_of(error)
            reasons.append(f"{first_line(error)}{_at(place)}")
    raise ModelError(
        f"the model can't be traced with a free batch axis: {reasons[0]}; its forward must not branch on values "
        "nor fix the batch size"
    )


def _exported(model: nn.Module, example: Tensor, *, strict: bool) -> torch.export.ExportedProgram:
    free_batch = ({0: torch.export.Dim.DYNAMIC},)
    with contextlib.redirect_stderr(io.StringIO()), _plain_attention():  # where it fails, torch prints a graph
        return torch.export.export(model, (example.clone(),), dynamic_shapes=free_batch, strict=strict)


def _require_runs(model: nn.Module, example: Tensor) -> None:
    try:
        model(example.clone())  # a forward may write to its input
    except Exception as error:
        raise ModelError(
            f"the model's forward fails on an input of shape {list(example.shape)}{_at(_place_of(error))}: "
            f"{first_line(error)}; check --size, and that --mean and --std have one value for grey images, three "
            "for RGB"
        ) from error


def require_one_input(model: nn.Module) -> None:
    """Raises ModelError where forward needs more than the image."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # of a callable that isn't Python
        return
    required = [parameter for parameter in parameters if parameter.default is parameter.empty]
    positional_kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in required if parameter.kind in positional_kinds]
    names += [parameter.name for parameter in required if parameter.kind is parameter.KEYWORD_ONLY]
    if len(names) > 1:
        raise ModelError(
            f"the model's forward needs {len(names)} inputs ({', '.join(names)}), and one image batch [N, C, H, W] "
            "is what is given; wrap the model in a module whose forward takes the image alone and makes the others "
            "itself"
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; modes and buffers are as before afterwards, whatever the model's forward writes."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers() if not buffer.is_meta}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for name, buffer in model.named_buffers():
            before = buffers.get(name)  # None for a buffer that forward made
            if before is not None and before.shape == buffer.shape and not torch.equal(before, buffer):
                buffer.detach().copy_(before)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """`nn.MultiheadAttention` of an input with itself, batch first, is read with three transpositions and not eight.

    The same function and names of parameters; PyTorch's own puts the tokens first and back, a copy each time.
    """
    original_forward = nn.MultiheadAttention.forward

    def forward(
        self: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        options = dict(zip(("key_padding_mask", "need_weights", "attn_mask"), args, strict=False)) | kwargs
        masked = options.get("key_padding_mask") is not None or options.get("attn_mask") is not None
        extended = self.bias_k is not None or self.add_zero_attn or not self._qkv_same_embed_dim
        to_itself = query is key and key is value and self.batch_first and query.dim() == 3
        if not to_itself or masked or extended or options.get("need_weights", True):
            return original_forward(self, query, key, value, *args, **kwargs)

        projected = functional.linear(query, self.in_proj_weight, self.in_proj_bias)  # [N, tokens, 3 * heads * d]
        # [N, tokens, 3, heads, d] to [3, N, heads, tokens, d]
        q, k, v = projected.reshape(*query.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [N, tokens, heads * d]
        return functional.linear(attended, self.out_proj.weight, self.out_proj.bias), None

    nn.MultiheadAttention.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.MultiheadAttention.forward = original_forward  # type: ignore[method-assign]


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 300 characters of it; its type's name where it has no text."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:_LONGEST_LINE]


def place_in(stack: str) -> str:
    """`model.py:31`, the last line of the user's own code that a printed stack names; "" where none is."""
    places = []
    for frame in _FRAME.finditer(stack):
        file = frame["file"] or frame["short_file"]
        line = frame["line"] or frame["short_line"]
        in_library = any(library in file for library in _LIBRARIES)
        if not in_library and not file.startswith(str(_HERE)):
            places.append(f"{Path(file).name}:{line}")
    return places[-1] if places else ""


def _place_of(error: BaseException) -> str:
    return place_in("".join(traceback.format_tb(error.__traceback__)))


def _at(place: str) -> str:
    return f" (at {place})" if place else ""
