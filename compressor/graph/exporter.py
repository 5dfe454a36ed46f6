"""`torch.export`, with what PyTorch does by habit changed while it reads a model.

Fused encoder layers come apart, attention has no copies that it doesn't need, small buffers' numbers may be branched
on, and every operation knows its line. All of it is as before afterwards.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.proxy import TracerBase
from torch.nn import functional

from ..tensors import Inputs, as_tuple

_TORCH = str(Path(torch.__file__).parent)
_MOST_NUMBERS = 16  # of a buffer whose numbers forward may steer by


def exported_program(model: nn.Module, example: Inputs, *, strict: bool) -> torch.export.ExportedProgram:
    """The model in ATen operations, free in the batch axis; `example` is copied, forward may write to its input.

    `strict` reads forward's bytecode, else its operations are noted while it runs. Raises what `torch.export` raises.
    """
    tensors = tuple(tensor.clone() for tensor in as_tuple(example))
    free_batch = tuple({0: torch.export.Dim.DYNAMIC} for _ in tensors)
    known = [buffer for buffer in model.buffers() if not buffer.is_meta and _is_number(buffer)]
    # where it fails, torch prints a graph
    with contextlib.redirect_stderr(io.StringIO()), _unfused(), _plain_attention(), _whole_stacks():
        with _numbers_of(known) as copies:
            program = torch.export.export(model, tensors, dynamic_shapes=free_batch, strict=strict)
        if all(map(torch.equal, copies, known)):
            return program
        # one that forward counts in is another number at the next call
        return torch.export.export(model, tensors, dynamic_shapes=free_batch, strict=strict)


@contextlib.contextmanager
def _whole_stacks() -> Iterator[None]:
    """Operations in methods that forward calls are noted with their own lines; torch keeps those of forwards alone."""
    original = getattr(TracerBase, "_filter_traceback_frames", None)
    if original is None:  # not promised to be there: then the line is that of the call in forward
        yield
        return

    def below_forward(tracer: TracerBase, stack: traceback.StackSummary) -> traceback.StackSummary:
        frames = itertools.dropwhile(lambda frame: frame.name != "forward", stack)
        users = [frame for frame in frames if not frame.filename.startswith(_TORCH)]
        return traceback.StackSummary.from_list(users)

    TracerBase._filter_traceback_frames = below_forward  # type: ignore[assignment]
    try:
        yield
    finally:
        TracerBase._filter_traceback_frames = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _numbers_of(buffers: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """What these buffers hold is known inside: forward may branch on it, and count with it.

    `if self.initialized:` and `range(int(self.steps))` go as they would now. Yields copies, to which forward writes
    what it writes to the buffers.
    """
    copies = [buffer.detach().clone() for buffer in buffers]
    copy_of = dict(zip(map(id, buffers), copies, strict=True))
    original = FakeTensorMode.from_tensor

    def from_tensor(mode: FakeTensorMode, tensor: Tensor, **options: Any) -> FakeTensor:
        fake = original(mode, tensor, **options)
        fake.constant = copy_of.get(id(tensor), fake.constant)
        return fake

    FakeTensorMode.from_tensor = from_tensor  # type: ignore[assignment, method-assign]
    try:
        yield copies
    finally:
        FakeTensorMode.from_tensor = original  # type: ignore[method-assign]


def _is_number(buffer: Tensor) -> bool:
    """One or a few; whole ones steer more often than others."""
    return buffer.numel() <= (1 if buffer.dtype.is_floating_point or buffer.dtype.is_complex else _MOST_NUMBERS)


@contextlib.contextmanager
def _unfused() -> Iterator[None]:
    """Encoder layers are read as the operations that they are, not as PyTorch's one for evaluation."""
    was_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fused)


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
        if not (query is key is value and _is_plain_attention(self, query, options)):
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


def _is_plain_attention(attention: nn.MultiheadAttention, query: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether nothing is masked, added to keys and values or asked for beside the output; `query` is [N, tokens, C]."""
    extras = (attention.bias_k, options.get("key_padding_mask"), options.get("attn_mask"))
    has_extras = any(extra is not None for extra in extras)
    if has_extras or attention.add_zero_attn or options.get("need_weights", True):
        return False
    return attention._qkv_same_embed_dim and attention.batch_first and query.dim() == 3
