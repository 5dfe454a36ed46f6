"""Kernel times of an ONNX file in, milliseconds per layer of the traced network out.

A runtime names a fused kernel after a node or a tensor of the file; the exporter named tensors after the traced
graph's nodes and kept the parameters' names. What neither explains (layout changes) is its own row, never dropped.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from ..device.profiling import KernelTime
from .parts import WEIGHTED, makers_of
from .precision import named

ELSEWHERE = "(between layers)"
_SUFFIX = re.compile(r"(_nchwc|_token_\d+|_quant|_QuantizeLinear\w*|_DequantizeLinear\w*|_fused|_kernel)$")


def layer_times_ms(path: Path | str, kernels: Sequence[KernelTime], layers: Mapping[str, str]) -> dict[str, float]:
    """Sum of the kernels' medians by layer; `layers` maps the traced graph's node names to layers."""
    model = onnx.load(path, load_external_data=False)
    owners = _owners(model, layers)
    makers = makers_of(model.graph)
    nodes = {node.name: node for node in model.graph.node}

    times_ms: defaultdict[str, float] = defaultdict(float)
    for kernel in kernels:
        node = _node_of(kernel, nodes, makers)
        layer = ELSEWHERE if node is None else owners[node.name]
        times_ms[layer] += kernel.median_us / 1e3
    return dict(times_ms)


def node_layers(path: Path | str, layers: Mapping[str, str]) -> dict[str, str]:
    """The layer of every node of the file, by the node's name; unnamed nodes get the name precision gives them."""
    return _owners(named(onnx.load(path, load_external_data=False)), layers)


def _owners(model: onnx.ModelProto, layers: Mapping[str, str]) -> dict[str, str]:
    """Node name to layer: by the parameter it takes, else by the tensor it makes, else by who reads that."""
    layer_names = {layer: layer for layer in layers.values() if layer}
    owners: dict[str, str] = {}
    reading_layers: dict[str, str] = {}  # by tensor; readers stand behind the maker, so the file is read backwards
    for node in reversed(model.graph.node):
        # The parameter `stem.conv.weight` is of the layer `stem.conv`.
        prefixes = [name.rpartition(".")[0] for name in node.input]
        by_parameter = _first_layer(prefixes, layer_names)
        by_output = _first_layer(node.output, layers)
        by_reader = _first_layer(node.output, reading_layers)

        candidates = [by_output, by_parameter, by_reader]
        if node.op_type in WEIGHTED:
            candidates = [by_parameter, by_output, by_reader]
        owners[node.name] = next(filter(None, candidates), ELSEWHERE)
        reading_layers |= dict.fromkeys(node.input, owners[node.name])
    return owners


def _first_layer(names: Sequence[str], layers: Mapping[str, str]) -> str:
    """The layer of the first name that has one; empty where none has."""
    return next((layers[name] for name in names if name in layers), "")


def _node_of(
    kernel: KernelTime, nodes: Mapping[str, onnx.NodeProto], makers: Mapping[str, onnx.NodeProto]
) -> onnx.NodeProto | None:
    """The node a kernel is named after; one fused into its activation is named after that tensor: walk back."""
    name = kernel.name
    while name not in nodes and name not in makers and _SUFFIX.search(name):
        name = _SUFFIX.sub("", name)
    node = nodes.get(name, makers.get(name))
    has_weights = any(operation in kernel.operation for operation in WEIGHTED)
    if node is None or name in nodes or not has_weights:
        return node
    return _weighted_before(node, makers)


def _weighted_before(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto:
    """The operation with weights behind the first inputs, or the last one on that way."""
    while node.op_type not in WEIGHTED:
        before = [makers[name] for name in node.input if name in makers]
        if not before:
            break
        node = before[0]
    return node
