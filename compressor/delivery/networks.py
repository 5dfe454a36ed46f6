"""A PyTorch network in, something callable with numpy images out: eager, compiled, or replayed as a CUDA graph.

One contract for all ways, so that they are timed like any other runtime. Says why a way is not available here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..device.feeds import Arrays
from ..device.runtimes import runtime_names
from ..errors import EngineError, InputError, did_you_mean
from ..placement import placed, resolve
from ..tensors import Outputs, from_arrays, moved

Caller = Callable[[Arrays], Arrays]
WAYS = runtime_names("network")
_COMPILERS = ("g++", "c++", "clang++")
_WARM_UP = 3  # runs on a side stream before a capture, as CUDA graphs ask for


def unavailable(way: str) -> str:
    """Why `way` can't run here, in words; an empty string when it can. Raises InputError for an unknown one."""
    if way not in WAYS:
        raise InputError(f"PyTorch has no way {way!r}; there are {', '.join(WAYS)}.{did_you_mean(way, list(WAYS))}")
    if "cuda" in way and not torch.cuda.is_available():
        return "no GPU: PyTorch finds no CUDA device"
    if way == "pytorch-compile" and not any(map(shutil.which, _COMPILERS)):
        return "no C++ compiler, which torch.compile needs on CPUs: install g++"
    return ""


def caller(network: nn.Module, way: str) -> Caller:
    """`network` as a function of its inputs [N, ...]; copies to and from a GPU are part of a call.

    The network itself stays where it lies. Raises EngineError where `way` can't run here.
    """
    reason = unavailable(way)
    if reason:
        raise EngineError(f"can't run {way}: {reason}")
    device = resolve("cuda" if "cuda" in way else "cpu")
    network = placed(network, device)
    if way == "pytorch-cuda-graph":
        return _graphed(network)
    forward: Callable[..., Outputs] = network
    if "compile" in way:
        forward = torch.compile(network, dynamic=False)

    def call(inputs: Arrays) -> Arrays:
        with torch.inference_mode():
            tensors = moved(from_arrays(inputs), device)
            return _arrays(forward(*tensors))

    return call


def _arrays(answer: Outputs) -> Arrays:
    if isinstance(answer, Tensor):
        array: Arrays = answer.cpu().numpy()
        return array
    return tuple(leaf.cpu().numpy() for leaf in answer)


def _graphed(network: nn.Module) -> Caller:
    """One captured graph for each shape, replayed on fixed buffers."""
    captures: dict[tuple[tuple[int, ...], ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Outputs]] = {}

    def call(inputs: Arrays) -> Arrays:
        tensors = from_arrays(inputs)
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if shapes not in captures:
            captures[shapes] = captured(network, *(tensor.cuda() for tensor in tensors))
        graph, sources, result = captures[shapes]
        for source, tensor in zip(sources, tensors, strict=True):
            source.copy_(tensor)
        graph.replay()
        return _arrays(result)

    return call


def captured(network: nn.Module, *sources: Tensor) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Outputs]:
    """A graph that reads from `sources` on the GPU and writes to what is last; the caller keeps all of them alive."""
    # first calls allocate and choose kernels, which a capture must not hold
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            network(*sources)
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        result = network(*sources)
    return graph, sources, result
