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
from .parts import makers_of
from .precision import named

ELSEWHERE = "(between layers)"
_SUFFIX = re.compile(r"(_nchwc|_token_\d+|_quant|_QuantizeLinear\w*|_DequantizeLinear\w*|_fused|_kernel)$")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def layer_times_ms(path: Path | str, kernels: Sequence[KernelTime], layers: Mapping[str, str]) -> dict[str, float]:
    """Sum of the kernels' medians by layer; `layers` maps the traced graph's node names to layers."""
    model = onnx.load(path, load_external_data=False)
    owners = _owners(model, layers)
    makers = makers_of(model.graph)
    nodes = {node.name: node for node in model.graph.node}

    times_ms: dict[str, float] = {}
    for kernel in kernels:
        node = _node_of(kernel, nodes, makers)
        layer = owners.get(node.name, ELSEWHERE) if node is not None else ELSEWHERE
        times_ms[layer] = times_ms.get(layer, 0.0) + kernel.median_us / 1e3
    return times_ms


def node_layers(path: Path | str, layers: Mapping[str, str]) -> dict[str, str]:
    """The layer of every node of the file, by the node's name; unnamed nodes get the name precision gives them."""
    return _owners(named(onnx.load(path, load_external_data=False)), layers)


def _owners(model: onnx.ModelProto, layers: Mapping[str, str]) -> dict[str, str]:
    """Node name to layer: by the parameter it takes, else by the tensor it makes, else by who reads that."""
    layer_names = set(layers.values()) - {""}
    owners: dict[str, str] = {}
    reading_layers: dict[str, str] = {}  # by tensor; readers stand behind the maker, so the file is read backwards
    for node in reversed(model.graph.node):
        # The parameter `stem.conv.weight` is of the layer `stem.conv`.
        prefixes = [name.rpartition(".")[0] for name in node.input]
        by_parameter = next((prefix for prefix in prefixes if prefix in layer_names), "")
        by_output = next((layers[name] for name in node.output if name in layers), "")
        by_reader = next((reading_layers[name] for name in node.output if name in reading_layers), "")

        candidates = [by_output, by_parameter, by_reader]
        if node.op_type in _WEIGHTED:
            candidates = [by_parameter, by_output, by_reader]
        owners[node.name] = next(filter(None, candidates), ELSEWHERE)
        for name in node.input:
            reading_layers[name] = owners[node.name]
    return owners


def _node_of(
    kernel: KernelTime, nodes: Mapping[str, onnx.NodeProto], makers: Mapping[str, onnx.NodeProto]
) -> onnx.NodeProto | None:
    """The node a kernel is named after; one fused into its activation is named after that tensor: walk back."""
    name = kernel.name
    while name not in nodes and name not in makers:
        shorter = _SUFFIX.sub("", name)
        if shorter == name:
            return None
        name = shorter
    if name in nodes:
        return nodes[name]

    node = makers[name]
    if not any(operation in kernel.operation for operation in _WEIGHTED):
        return node
    while node.op_type not in _WEIGHTED:
        before = next((makers[name] for name in node.input if name in makers), None)
        if before is None:
            break
        node = before
    return node
