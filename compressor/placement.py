"""Where tensors lie: a device's name in, networks and batches on that device out.

A GPU computes float32 in full precision here, as the CPU does, and running out of its memory is an error that
names a remedy. Knows nothing of what is computed.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import math
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from .errors import CompressorError, RecipeError
from .tensors import Inputs, count, cut, mapped

CPU = torch.device("cpu")
NAMES = re.compile(r"auto|cpu|cuda(:\d+)?")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for `mallopt`
_KEPT_BLOCK, _KEPT_TOP = 1 << 30, (1 << 31) - 1  # bytes; the most that an int holds
_USUAL_BLOCK, _USUAL_TOP = 1 << 25, 1 << 26  # where glibc's own adaptation ends, once a large block was freed

Network = TypeVar("Network", bound=nn.Module)


def resolve(name: str) -> torch.device:
    """`auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:n`. Raises RecipeError where there is none such."""
    if not NAMES.fullmatch(name):
        raise RecipeError(f"device = {name!r} is not known; write auto, cpu, cuda or cuda:n (--device)")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return CPU

    index = 0
    if ":" in name:
        index = torch.device(name).index
    elif count:
        index = torch.cuda.current_device()
    if index >= count:
        raise RecipeError(f"device = {name!r} needs a GPU, {_gpus_in_words(count)}; use --device auto or --device cpu")
    return torch.device("cuda", index)


def _gpus_in_words(count: int) -> str:
    if not count:
        return "there is none"
    names = ", ".join(f"cuda:{index}" for index in range(count))
    return f"PyTorch finds {count} ({names})"


def device_of(network: nn.Module) -> torch.device:
    """Where a network's first parameter lies, or its first buffer where it has none; without either, the CPU."""
    tensor = next(_tensors(network), None)
    return CPU if tensor is None else tensor.device


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def placed(network: Network, device: torch.device) -> Network:
    """The network on that device: itself where it is there already, else a copy, tied tensors tied in it too.

    Tensors that a traced graph makes itself (`zeros`, `arange`) are made there.
    """
    tensors = list(_tensors(network))
    if all(tensor.device == device for tensor in tensors):
        return network
    memo: dict[int, Any] = {id(tensor): _copied(tensor, device) for tensor in tensors}  # deepcopy takes these as done
    moved = copy.deepcopy(network, memo)
    for module in moved.modules():
        if isinstance(module, fx.GraphModule):
            _make_tensors_on(module, device)
    return moved


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    copied = tensor.detach().to(device, copy=True)
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _make_tensors_on(graph: fx.GraphModule, device: torch.device) -> None:
    def moved(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for node in graph.graph.nodes:
        node.args = map_aggregate(node.args, moved)
        node.kwargs = map_aggregate(node.kwargs, moved)
    graph.recompile()


def code_of(graph: fx.GraphModule) -> str:
    """The graph's code as it reads on the CPU, so that a stage done on one device stands for all."""
    return re.sub(r"device\(type='\w+'(, index=\d+)?\)", "device(type='cpu')", str(graph.code))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; on its way to a GPU from pinned memory, so that the next batch is prepared meanwhile."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def inputs_to(inputs: Inputs, device: torch.device) -> Inputs:
    """`to_device` of each."""
    return mapped(lambda tensor: to_device(tensor, device), inputs)


def within_memory(
    batches: Iterable[tuple[Inputs, Any]], graph: fx.GraphModule, limit_bytes: int = 3 << 30
) -> Iterator[tuple[Inputs, Any]]:
    """The same (inputs, targets) on the graph's device, a batch in even parts where all its values pass `limit_bytes`.

    What a pass back through the network keeps is less than everything the forward pass computes, which is what counts
    here: 161 MB an image for Swin-T at 224 px, so that 32 images come as two times 16.
    """
    device = device_of(graph)
    most = max(1, limit_bytes // max(1, value_bytes(graph)))
    for images, labels in batches:
        times = math.ceil(count(images) / most)
        size = math.ceil(count(images) / times)  # 33 images of at most 16 are three times 11
        for start in range(0, count(images), size):
            targets = None if labels is None else labels[start : start + size]
            if isinstance(targets, Tensor):
                targets = to_device(targets, device)
            yield inputs_to(cut(images, start, start + size), device), targets


def value_bytes(graph: fx.GraphModule) -> int:
    """Bytes of everything the traced graph computes for one image, views not counted."""
    nodes = graph.graph.nodes
    placeholder = next(node for node in nodes if node.op == "placeholder")
    traced_images = int(placeholder.meta["val"].shape[0])  # every input holds as many
    total = 0
    for node in nodes:
        if node.op == "call_function" and not _is_view(node):
            total += _bytes(node.meta.get("val"))
    return total // max(1, traced_images)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(argument.alias_info for argument in schema.arguments)


def _bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return int(value.numel()) * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(map(_bytes, value))
    return 0


@contextmanager
def computing() -> Iterator[None]:
    """float32 is multiplied in full precision (no TF32, no autocast) inside.

    Raises CompressorError where a GPU's memory is too small.
    """
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with without_autocast():
            yield
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).split(". ")[:2])  # "CUDA out of memory. Tried to allocate 2.00 GiB"
        raise CompressorError(f"{reason}; use a smaller --batch-size, or --device cpu") from error
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, operations compute in the types of their inputs, also where the caller stands in `torch.autocast`."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextmanager
def reusing_freed_memory() -> Iterator[None]:
    """Inside, blocks that PyTorch frees on the CPU are its next ones; at the end they go back to the system.

    For passes over batches, each of which allocates what the one before has freed. glibc gives a tensor of more than
    32 MB back at once, and the system fills the next one's pages with zeros while the process waits: 32 images of 224
    px through MobileNetV2 and back again took 8.3 to 9.9 s so, and 5.7 s with blocks that stay. Peaks are about the
    same. Not for matrices of many sizes, of which a block that stays is rarely the next one. A no-op without glibc.
    """
    _freeing.count(1)
    try:
        yield
    finally:
        _freeing.count(-1)


class _Freeing:
    """When the C library gives freed blocks back, by how many threads of this process are reusing them."""

    def __init__(self) -> None:
        self.users, self.lock = 0, threading.Lock()

    def count(self, more: int) -> None:
        with self.lock:
            self.users += more
            if self.users == 1 and more == 1:
                self._return_above(_KEPT_BLOCK, _KEPT_TOP)
            if self.users == 0:
                self._return_above(_USUAL_BLOCK, _USUAL_TOP)
                _tell_allocator("malloc_trim", 0)

    @staticmethod
    def _return_above(block_bytes: int, top_bytes: int) -> None:
        """Larger blocks at once; what lies free at the heap's end where it is longer than that."""
        _tell_allocator("mallopt", _MMAP_THRESHOLD, block_bytes)
        _tell_allocator("mallopt", _TRIM_THRESHOLD, top_bytes)


_freeing = _Freeing()


def release() -> None:
    """Gives memory that PyTorch and the C library keep for later back: before a stage with large matrices of its own.

    Without it, gradients of 16 images of ResNet-50 leave a gigabyte of freed blocks behind that no other stage can use.
    """
    gc.collect()
    _tell_allocator("malloc_trim", 0)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def _tell_allocator(function: str, *arguments: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)
