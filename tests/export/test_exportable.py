"""What no ONNX file can hold is named before anything long; maxima to a given size are spelled out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError
from compressor.export.exportable import require_exportable
from compressor.export.onnx import export_onnx
from compressor.graph import trace

PX = 9


class Net(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.between = nn.Conv2d(3, 4, 3, 1, 1), between

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self.conv(x)).flatten(1)


def traced(between: Callable[[Tensor], Tensor]) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return trace(Net(between).eval(), torch.randn(2, 3, PX, PX))


@pytest.mark.thorough
@pytest.mark.parametrize("cells", [1, 3, 4, (4, 2), (9, 1), (None, 2)])
def test_adaptive_maxima_are_spelled_exactly(cells: int, tmp_path: Path) -> None:
    graph = traced(lambda y: F.adaptive_max_pool2d(y, cells))
    require_exportable(graph)
    path = export_onnx(graph, torch.randn(2, 3, PX, PX), tmp_path / "net.onnx")
    images = torch.randn(3, 3, PX, PX)
    got = onnxruntime.InferenceSession(str(path)).run(None, {"input": images.numpy()})[0]
    assert np.allclose(got, graph(images).detach().numpy(), atol=1e-5)


def twice(y: Tensor) -> Tensor:
    return torch.cat([y, y.flip(-1)])


SPLITS: dict[str, Callable[[Tensor], Tensor]] = {
    "halves": lambda y: torch.sub(*twice(y).chunk(2, 0)),
    "by the batch": lambda y: torch.sub(*twice(y).split(len(y))),
    "each by the batch": lambda y: torch.sub(*twice(y).split([y.shape[0], y.shape[0]])),
    "of two lengths": lambda y: torch.cat([y, twice(y)]).split([y.shape[0], 2 * y.shape[0]])[1][: y.shape[0]],
}


@pytest.mark.parametrize("name", SPLITS)
def test_parts_as_long_as_the_batch_are_slices(name: str, tmp_path: Path) -> None:
    """Test-time augmentation, twins: several views of each image, folded into the batch and taken apart again."""
    graph = traced(SPLITS[name])
    path = export_onnx(graph, torch.randn(2, 3, PX, PX), tmp_path / "net.onnx")
    assert "SplitToSequence" not in {node.op_type for node in onnx.load(path).graph.node}
    session = onnxruntime.InferenceSession(str(path))
    for count in (1, 3):
        images = torch.randn(count, 3, PX, PX)
        got = session.run(None, {"input": images.numpy()})[0]
        assert np.allclose(got, graph(images).detach().numpy(), atol=1e-5)


def per_image(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    kernels = y[..., :3, :3].reshape(n * c, 1, 3, 3)
    return F.conv2d(y.reshape(1, n * c, h, w), kernels, padding=1, stride=2, groups=n * c).reshape(n, c, 5, 5)


def per_volume(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    kernels = y.mean((2, 3)).reshape(n * c, 1, 1, 1, 1)
    return F.conv3d(y.reshape(1, n * c, 1, h, w), kernels, groups=n * c).reshape(n, c, h, w)


@pytest.mark.thorough
def test_a_kernel_for_each_image_fits_in_a_file_of_any_batch_size(tmp_path: Path) -> None:
    graph = traced(per_image)
    require_exportable(graph)
    path = export_onnx(graph, torch.randn(2, 3, PX, PX), tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(path))
    for count in (1, 3):
        images = torch.randn(count, 3, PX, PX)
        got = session.run(None, {"input": images.numpy()})[0]
        assert np.allclose(got, graph(images).detach().numpy(), atol=1e-5)


def per_image_back(y: Tensor) -> Tensor:
    """A transposed convolution by a kernel for each image."""
    n, c, h, w = y.shape
    kernels = y.mean((2, 3)).view(n * c, 1, 1, 1).expand(-1, 2, 3, 3)
    return F.conv_transpose2d(y.reshape(1, n * c, h, w), kernels, groups=n).view(n, 2, h + 2, w + 2)


class Projecting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(PX, 4, proj_size=2, bidirectional=True, batch_first=True)

    def forward(self, y: Tensor) -> Tensor:
        rows, _ = self.cell(y[:, 0])
        return rows  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (per_volume, "as many groups as the batch has images"),
        (lambda y: y.flatten(2).median(2)[0], "aten.median.dim in .*has no ONNX function"),
        (lambda y: torch.cat([*F.adaptive_max_pool2d(y, 3, return_indices=True)], 1), "places of its maxima"),
        (lambda y: torch.cdist(y[:, 0], y[:, 1], p=3), "takes another norm than 1 and 2"),
        (Projecting(), "projects its state"),
        (per_image_back, "as many groups as the batch has images"),
        (
            lambda y: y[:, :3, :3, 0].slogdet()[1].unsqueeze(1),
            r"has no ONNX function \(aten._linalg_slogdet.default in it\)",
        ),
    ],
    ids=["groups", "median", "places", "distances", "projections", "transposed", "composite"],
)
def test_what_has_no_form_in_a_file_is_named_with_its_line(between: Callable[[Tensor], Tensor], words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        require_exportable(traced(between))
    assert "test_exportable.py:" in str(caught.value)


@pytest.mark.parametrize("cells", [3, (4, 2)])
def test_what_is_made_of_parts_that_the_exporter_takes_apart_passes(cells: int, tmp_path: Path) -> None:
    graph, images = traced(lambda y: F.adaptive_avg_pool2d(y, cells)), torch.randn(3, 3, PX, PX)
    require_exportable(graph)
    path = export_onnx(graph, images, tmp_path / "net.onnx")
    got = onnxruntime.InferenceSession(str(path)).run(None, {"input": images.numpy()})[0]
    assert np.allclose(got, graph(images).detach().numpy(), atol=1e-5)


def gathered(y: Tensor) -> Tensor:
    """Tokens at places that are computed, for all channels the same, and at places of the network's own."""
    flat = y.flatten(2)  # [N, 4, PX * PX]
    places = flat.sum(1, keepdim=True).topk(5, 2)[1].expand(-1, 4, -1)
    own = torch.tensor([3, 1, 4]).view(1, 1, 3).expand(len(y), 4, 3)
    return torch.cat([flat.gather(2, places), flat.gather(2, own)], 2)


def test_places_for_all_channels_are_stretched_in_the_file(tmp_path: Path) -> None:
    graph = traced(gathered)
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.aten.take_along_dim.default) == 2
    path = export_onnx(graph, torch.randn(2, 3, PX, PX), tmp_path / "net.onnx")
    for count in (1, 3):
        images = torch.randn(count, 3, PX, PX)
        got = onnxruntime.InferenceSession(str(path)).run(None, {"input": images.numpy()})[0]
        assert np.allclose(got, graph(images).detach().numpy(), atol=1e-5)


def test_a_buffer_called_as_an_operation_is_keeps_its_values(tmp_path: Path) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1))
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x - self.mean).mean((2, 3))  # type: ignore[no-any-return]

    model, images = Centred().eval(), torch.randn(3, 3, PX, PX)
    path = export_onnx(trace(model, images), images, tmp_path / "net.onnx")
    got = onnxruntime.InferenceSession(str(path)).run(None, {"input": images.numpy()})[0]
    assert np.allclose(got, model(images).detach().numpy(), atol=1e-5)
