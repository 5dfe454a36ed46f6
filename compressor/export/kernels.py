"""Kernel times of an ONNX file in, milliseconds per layer of the traced network out.

A runtime names a fused kernel after a node or a tensor of the file; the exporter named tensors after the traced
graph's nodes and kept the parameters' names. What neither explains (layout changes) is its own row, never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from ..device.profiling import KernelTime
from .precision import named

ELSEWHERE = "(between layers)"
_SUFFIX = re.compile(r"(_nchwc|_token_\d+|_quant|_QuantizeLinear\w*|_DequantizeLinear\w*|_fused|_kernel)$")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def layer_times_ms(path: Path | str, kernels: Sequence[KernelTime], layers: Mapping[str, str]) -> dict[str, float]:
    """Sum of the kernels' medians by layer; `layers` maps the traced graph's node names to layers."""
    model = onnx.load(path, load_external_data=False)
    owner = _owners(model, layers)
    makers = {name: node for node in model.graph.node for name in node.output}
    by_name = {node.name: node for node in model.graph.node}
    times: dict[str, float] = {}
    for kernel in kernels:
        node = _node_of(kernel, by_name, makers)
        layer = owner.get(node.name, ELSEWHERE) if node is not None else ELSEWHERE
        times[layer] = times.get(layer, 0.0) + kernel.median_us / 1e3
    return times


def node_layers(path: Path | str, layers: Mapping[str, str]) -> dict[str, str]:
    """The layer of every node of the file, by the node's name; unnamed nodes get the name precision gives them."""
    return _owners(named(onnx.load(path, load_external_data=False)), layers)


def _owners(model: onnx.ModelProto, layers: Mapping[str, str]) -> dict[str, str]:
    """Node name to layer: by the parameter it takes, else by the tensor it makes, else by who reads that."""
    known = set(layers.values())
    owner: dict[str, str] = {}
    readers: dict[str, str] = {}
    for node in reversed(model.graph.node):
        made = next((layers[name] for name in node.output if name in layers), "")
        taken = next((p for name in node.input if (p := name.rpartition(".")[0]) in known and p), "")
        read = next((readers[name] for name in node.output if name in readers), "")
        owner[node.name] = (taken if node.op_type in _WEIGHTED else "") or made or taken or read or ELSEWHERE
        for name in node.input:
            readers[name] = owner[node.name]
    return owner


def _node_of(
    kernel: KernelTime, by_name: Mapping[str, onnx.NodeProto], makers: Mapping[str, onnx.NodeProto]
) -> onnx.NodeProto | None:
    """The node a kernel is named after; one fused into its activation is named after that tensor: walk back."""
    name = kernel.name
    while name not in by_name and name not in makers:
        shorter = _SUFFIX.sub("", name)
        if shorter == name:
            return None
        name = shorter
    if name in by_name:
        return by_name[name]
    node = makers[name]
    while any(w in kernel.operation for w in _WEIGHTED) and node.op_type not in _WEIGHTED:
        before = next((makers[i] for i in node.input if i in makers), None)
        if before is None:
            break
        node = before
    return node
