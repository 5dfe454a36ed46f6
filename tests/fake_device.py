"""A pretended GPU with real numbers: tensors that lie on `FAKE`, computed on the CPU, refused beside the CPU's own.

Under `fake_device()` every operation checks that its tensors lie on one device, as a GPU's kernels do: a tensor made
on the CPU by default, an index left there or a batch that was not moved is a `MixedDevices` error at that line, and
`.numpy()` of a tensor there fails as CUDA's does. What PyTorch allows is allowed: scalar tensors (no axis) of the CPU,
indices of the CPU in `x[i]`, copies. FAKE is the device type `lazy`, which this program uses for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
CPU = torch.device("cpu")
FAKE = torch.device("lazy", 0)

_MOVES = (aten._to_copy.default, aten.copy_.default, aten.copy.default)
_TAKE_INDICES = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)


class MixedDevices(RuntimeError):  # as PyTorch raises it
    pass


class Far(Tensor):
    """A tensor on FAKE; `near` holds its numbers."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        made: Far = Tensor._make_wrapper_subclass(cls, near.size(), **layout, device=FAKE)  # type: ignore[attr-defined]
        made.near = near
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Far({self.near})"

    def tolist(self) -> Any:
        return self.near.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Far:
        if id(self) not in memo:
            twin: Tensor = Far(self.near.detach().clone())
            if isinstance(self, torch.nn.Parameter):
                twin = torch.nn.Parameter(twin, self.requires_grad)
            memo[id(self)] = twin
        found: Far = memo[id(self)]
        return found


class _Mode(TorchDispatchMode):
    """Factories name their device here: `torch.zeros(3, device=FAKE)` has no tensor to dispatch on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    far = any(isinstance(tensor, Far) for tensor in tensors)
    if far and func not in _MOVES:
        _require_one_device(func, args, tensors)
    wanted = kwargs.get("device")
    there = far if wanted is None else torch.device(wanted).type == FAKE.type
    near_args, near_kwargs = tree_map(lambda x: x.near if isinstance(x, Far) else x, (args, kwargs))
    if wanted is not None and there:
        near_kwargs["device"] = CPU
    if far and not there and func is aten._to_copy.default:  # a copy even where both are the CPU's memory
        near_args = (near_args[0].clone(), *near_args[1:])
    out = func(*near_args, **near_kwargs)
    if func is aten.copy_.default:
        return args[0]
    if there:
        out = tree_map(lambda x: Far(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if far and there else out


def _require_one_device(func: Any, args: Any, tensors: list[Tensor]) -> None:
    indices = func in _TAKE_INDICES and isinstance(args[0], Far)
    allowed = {id(index) for index in args[1] if index is not None} if indices else set()
    for tensor in tensors:
        if not isinstance(tensor, Far) and tensor.dim() > 0 and id(tensor) not in allowed:
            where = f"{tensor.device}, {list(tensor.shape)} {tensor.dtype}"
            raise MixedDevices(f"{func} takes a tensor on {FAKE} and one on {where}")


@contextmanager
def fake_device() -> Iterator[torch.device]:
    """FAKE, usable inside like any device: `placed(graph, FAKE)`, `x.to(FAKE)`, `torch.zeros(3, device=FAKE)`."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(values, device=FAKE)` is made here, then moved
    try:
        with _Mode():
            yield FAKE
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
