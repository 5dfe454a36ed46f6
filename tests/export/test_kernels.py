"""Kernel times by layer: every kernel counted once, fused ones under the layer with the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from compressor.device.profiling import RUNS, KernelTime, profile_kernels
from compressor.export.kernels import ELSEWHERE, layer_times_ms, node_layers
from compressor.export.onnx import export_onnx
from compressor.graph import trace


@pytest.fixture(scope="module", params=["residual", "attentive"])
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A network's file, exported from its traced graph, and the layer of each of the graph's nodes."""
    module: nn.Module = request.getfixturevalue(request.param)
    example = torch.randn(2, 3, 16, 16)
    graph = trace(module, example)
    path = export_onnx(graph, example, tmp_path_factory.mktemp("traced") / "net.onnx")
    return path, {n.name: n.meta["layer"] for n in graph.graph.nodes if n.meta.get("layer")}


def test_every_layer_with_weights_has_a_time_and_the_sum_is_all_kernels(
    traced: tuple[Path, dict[str, str]], images: NDArray[np.float32]
) -> None:
    path, layers = traced
    kernels = profile_kernels(path, images, threads=1)
    assert {len(k.us) for k in kernels} == {RUNS}
    found = layer_times_ms(path, kernels, layers)
    weighted = {"stem.0", "depthwise.0", "pointwise.0", "projection.0", "head"}
    weighted = weighted if "stem.0" in layers.values() else {"patches", "qkv", "out", "mlp.1", "mlp.3", "head"}
    assert weighted <= found.keys() - {ELSEWHERE}
    assert sum(found.values()) == pytest.approx(sum(k.median_us for k in kernels) / 1e3)


def test_a_kernel_fused_with_its_activation_counts_for_the_convolution(
    traced: tuple[Path, dict[str, str]],
) -> None:
    path, layers = traced
    if "depthwise.0" not in layers.values():
        pytest.skip("only the convolutional network has such a kernel")
    activation = next(name for name, layer in layers.items() if layer == "depthwise.2")
    convolution = KernelTime(f"{activation}_nchwc", "Conv", (3000.0,))
    kernels = [convolution, KernelTime("ReorderInput", "ReorderInput", (500.0,))]
    assert layer_times_ms(path, kernels, layers) == {"depthwise.0": 3.0, ELSEWHERE: 0.5}


def test_nodes_are_named_by_layers(traced: tuple[Path, dict[str, str]]) -> None:
    path, layers = traced
    owners = node_layers(path, layers)
    assert "head" in owners.values()
    assert set(owners.values()) <= {*layers.values(), ELSEWHERE}
