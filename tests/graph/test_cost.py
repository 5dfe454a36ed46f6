"""MACs against closed forms and against torch's own counter; parameters, ties and what is not counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from compressor.errors import ModelError
from compressor.graph import cost, trace
from compressor.graph.cost import formula_of, macs_by_layer, measure_cost

COUNTER_TOLERANCE = 1e-9  # both count integers; only their ratio is a float


class Apply(nn.Module):
    """A module around a function of (its own parameter, the input)."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.weight, x)


class First(nn.Module):
    """The first of a recurrent layer's results, the outputs at every step, of [N, steps, features]."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x.transpose(0, 1))[0]
        return outputs.transpose(0, 1)


def macs_of(model: nn.Module, *shape: int, batch: int = 2) -> int:
    return measure_cost(trace(model, torch.randn(batch, *shape))).macs


CLOSED_FORMS: list[tuple[str, nn.Module, tuple[int, ...], int]] = [
    ("strided convolution", nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 9, 7), 5 * 4 * 8 * 3 * 9),
    ("same padding", nn.Conv2d(3, 8, 3, padding="same"), (3, 9, 7), 9 * 7 * 8 * 3 * 9),
    ("dilated convolution", nn.Conv2d(3, 8, 3, dilation=2), (3, 9, 7), 5 * 3 * 8 * 3 * 9),
    ("grouped convolution", nn.Conv2d(6, 8, (3, 1), groups=2), (6, 5, 5), 3 * 5 * 8 * 3 * 3),
    ("depthwise convolution", nn.Conv2d(6, 6, 3, groups=6), (6, 5, 5), 3 * 3 * 6 * 9),
    ("convolution 1d", nn.Conv1d(3, 4, 3), (3, 10), 8 * 4 * 3 * 3),
    ("convolution 3d", nn.Conv3d(2, 4, 3), (2, 5, 5, 5), 27 * 4 * 2 * 27),
    ("transposed convolution", nn.ConvTranspose2d(3, 4, 3, stride=2), (3, 5, 6), 5 * 6 * 3 * 4 * 9),
    ("grouped transposed convolution", nn.ConvTranspose2d(4, 6, 2, groups=2), (4, 5, 6), 30 * 4 * 3 * 4),
    ("dilated in groups", nn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2, groups=4), (4, 9, 7), 5 * 4 * 8 * 1 * 9),
    ("transposed and dilated", nn.ConvTranspose1d(3, 4, 3, 2, 1, 1, dilation=2), (3, 5), 5 * 3 * 4 * 3),
    ("transposed 3d", nn.ConvTranspose3d(2, 4, 2), (2, 3, 3, 3), 27 * 2 * 4 * 8),
    ("linear on tokens", nn.Linear(5, 7), (3, 5), 3 * 5 * 7),
    (
        "recurrent, two layers both ways",
        First(nn.GRU(5, 3, 2, bidirectional=True)),
        (7, 5),
        7 * 2 * 9 * (5 + 3 + 6 + 3),
    ),
    (
        "recurrent, its state projected",
        First(nn.LSTM(5, 6, proj_size=2)),
        (7, 5),
        7 * (4 * 6 * 5 + 4 * 6 * 2 + 2 * 6),
    ),
    ("matmul", Apply(lambda w, x: x @ w, 5, 6), (4, 5), 4 * 5 * 6),
    ("matmul of two images' maps", Apply(lambda w, x: (x * w) @ x.transpose(1, 2), 5), (4, 5), 4 * 4 * 5),
    ("matrix by vector", Apply(lambda w, x: x @ w, 5), (4, 5), 4 * 5),
    ("addmm", Apply(lambda w, x: torch.addmm(x.new_zeros(6), x, w), 5, 6), (5,), 5 * 6),
    ("baddbmm", Apply(lambda w, x: torch.baddbmm(x, x, x * w), 4), (4, 4), 4**3),
    (
        "addbmm, summed over a table",
        Apply(lambda w, x: x + torch.addbmm(w[0, :, :3] * 0, w, w.mT), 2, 3, 5),
        (3, 3),
        2 * 3 * 5 * 3,
    ),
    ("addmv and dot", Apply(lambda w, x: x + torch.addmv(w[0], w, w[0]) * torch.dot(w[0], w[1]), 5, 5), (5,), 25 + 5),
    ("bilinear", nn.Sequential(Apply(lambda w, x: F.bilinear(x, x, w), 6, 4, 5 - 1)), (4,), 6 * (4 * 4 + 4)),
    ("einsum, two operands", Apply(lambda w, x: torch.einsum("bchw,cd->bdhw", x, w), 3, 4), (3, 5, 6), 5 * 6 * 3 * 4),
    ("einsum, dots", Apply(lambda w, x: torch.einsum("b...c,cd->b...d", x, w), 3, 4), (5, 6, 3), 5 * 6 * 3 * 4),
    ("einsum, sums a lone index first", Apply(lambda w, x: torch.einsum("bnc,ck->bk", x, w), 3, 4), (9, 3), 3 * 4),
    ("einsum, outer", Apply(lambda w, x: torch.einsum("bi,j->bij", x, w), 4), (3,), 0),
    ("einsum, no arrow", Apply(lambda w, x: torch.einsum("bc,cd", x, w), 3, 4), (3,), 3 * 4),
    (
        "einsum, three operands",
        Apply(lambda w, x: torch.einsum("bnc,cd,de->bne", x, w, w), 3, 3),
        (7, 3),
        2 * 7 * 3 * 3,
    ),
    (
        "attention with fewer keys",
        Apply(lambda w, x: F.scaled_dot_product_attention(x, x[:, :, :3], (x * w)[:, :, :3, :2]), 1),
        (4, 5, 6),
        4 * 5 * 3 * (6 + 2),
    ),
    (
        "attention, keys shared by two heads each",
        Apply(lambda w, x: F.scaled_dot_product_attention(x, x[:, :2], x[:, :2] * w, enable_gqa=True), 1),
        (4, 5, 6),
        4 * 5 * 5 * (6 + 6),
    ),
    ("attention without heads", Apply(lambda w, x: F.scaled_dot_product_attention(x, x * w, x), 6), (5, 6), 5 * 5 * 12),
]


@pytest.mark.parametrize(
    ("model", "shape", "expected"), [f[1:] for f in CLOSED_FORMS], ids=[f[0] for f in CLOSED_FORMS]
)
def test_an_operation_costs_its_closed_form(model: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    assert macs_of(model, *shape) == expected


@pytest.mark.parametrize(
    ("transposed", "weight", "expected"),
    [(False, (8, 3, 3, 3), 2 * 8 * 25 * 3 * 9), (True, (6, 4, 3, 3), 2 * 6 * 49 * 4 * 9)],
)
def test_the_general_convolution_says_itself_whether_it_is_transposed(
    transposed: bool, weight: tuple[int, ...], expected: int
) -> None:
    """In two groups of 3 channels, on 7 x 7: plain to 4 each, [8, 3, 3, 3]; transposed to 4 each, [6, 4, 3, 3]."""
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    settings = ([1, 1], [0, 0], [1, 1], transposed, [0, 0], 2)
    node = graph.call_function(torch.ops.aten.convolution.default, (x, w, None, *settings))
    for operand, shape in ((x, (2, 6, 7, 7)), (w, weight)):
        operand.meta["val"] = torch.empty(shape, device="meta")
    node.meta["val"] = torch.ops.aten.convolution.default(x.meta["val"], w.meta["val"], None, *settings)
    formula = formula_of(node)
    assert formula is not None
    assert formula(node) == expected


def test_the_batch_of_the_example_does_not_matter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    assert macs_of(model, 3, 8, 8, batch=2) == macs_of(model, 3, 8, 8, batch=7) == 36 * 4 * 27 + 144 * 5


def test_what_runs_once_for_a_batch_is_not_divided_by_it() -> None:
    """A product of parameters (a position table, a composed weight) costs the same at every batch size."""
    model = Apply(lambda w, x: x @ (w @ w), 3, 3)
    assert macs_of(model, 4, 3, batch=6) == 4 * 3 * 3 + 27


def test_what_mixes_images_is_named() -> None:
    """One product for the whole batch, [1, 5] @ [5, 3] = 15 MACs, cannot be shared out among two images."""
    found = measure_cost(trace(Apply(lambda w, x: x + (x.mean(0, keepdim=True) @ w).sum(), 5, 3), torch.randn(2, 5)))
    assert found.uncounted == ("aten.matmul.default (not proportional to the batch)",)


META = "meta"  # only shapes are read, so nothing need be computed
NETWORKS: list[tuple[str, Callable[[], nn.Module], int, str]] = [
    ("resnet18", torchvision.models.resnet18, 64, META),
    ("mobilenet_v2", torchvision.models.mobilenet_v2, 64, META),
    ("vision transformer", lambda: torchvision.models.VisionTransformer(48, 16, 3, 4, 64, 128), 48, META),
    ("swin_t", torchvision.models.swin_t, 64, "cpu"),
]


@pytest.mark.parametrize(
    ("build", "size", "device"),
    [
        pytest.param(*n[1:], id=n[0], marks=[] if n[0] in ("resnet18", "vision transformer") else pytest.mark.slow)
        for n in NETWORKS
    ],
)
def test_agrees_with_torch_counter(
    build: Callable[[], nn.Module], size: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device(device):
        model, images = build().eval(), torch.zeros(2, 3, size, size)
    found = measure_cost(trace(model, images))
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)  # its fused attention escapes the counter
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images[:1])
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=COUNTER_TOLERANCE)
    assert found.uncounted == ()
    assert found.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.thorough
def test_resnet50_costs_what_its_authors_publish() -> None:
    with torch.device(META):
        model, images = torchvision.models.resnet50(), torch.empty(2, 3, 224, 224)
    found = measure_cost(trace(model, images))
    assert round(found.macs / 1e9, 2) == 4.09
    assert found.parameters == 25_557_032
    assert round(found.activations / 1e6, 1) == 11.1  # outputs of its convolutions and classifier


def test_a_tied_parameter_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert measure_cost(trace(model, torch.randn(2, 4))).parameters == 16


def test_activations_are_the_outputs_of_counted_operations() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    assert measure_cost(trace(model, torch.randn(3, 3, 8, 8))).activations == 4 * 36 + 5


def test_an_operation_without_a_formula_is_named() -> None:
    model = Apply(lambda w, x: torch.fft.rfft(x, dim=1).real @ w, 5, 2)
    found = measure_cost(trace(model, torch.randn(2, 4, 5)))
    assert found.uncounted == ("aten.fft_rfft.default",)
    assert found.macs == 3 * 5 * 2


def test_layers_add_up_to_the_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Flatten(), nn.Linear(144, 5)))
    graph = trace(model, torch.randn(2, 3, 8, 8))
    found = measure_cost(graph)
    assert macs_by_layer(graph, found) == {"0": 36 * 4 * 27, "1.1": 144 * 5}
    assert sum(found.by_node.values()) == found.macs


def test_a_graph_without_shapes_is_refused() -> None:
    graph: Any = fx.symbolic_trace(nn.Linear(3, 4))
    with pytest.raises(ModelError, match="carries no shape"):
        measure_cost(graph)


def test_the_tables_name_real_operations_and_do_not_overlap() -> None:
    operators = [name.split("::") for name in [*cost.ZERO_MACS, *cost.FORMULAS]]
    assert [f"{space}::{name}" for space, name in operators if not hasattr(getattr(torch.ops, space), name)] == []
    assert cost.ZERO_MACS.isdisjoint(cost.FORMULAS)
