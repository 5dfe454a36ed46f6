"""From tensors to units: where samples lie, what is summed with its sign, what a unit's coordinates are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, fx, nn
from torchvision.models import VisionTransformer

from compressor.errors import ModelError
from compressor.graph import Watcher, aten, trace
from compressor.graph.samples import Samples, sample_layouts
from compressor.records import Group, Site
from compressor.relevance.options import Per, Sign
from compressor.relevance.units import Reading, named, read_units, readings, settled

# Float64; single samples and batches multiply in other orders.
TOLERANCE = 1e-10
N = 3


class SamplesLast(nn.Module):
    """Folds the batch into the rows of a product as the fastest-running axis."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).permute(2, 0, 1)  # [HW, N, C]
        rows = self.inner(tokens.reshape(-1, 4)).relu()
        return self.outer(rows).reshape(x.shape[2] * x.shape[3], -1, 3).mean(0)


class BatchMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(0)
        return self.inner(x.flatten(2).transpose(1, 2).reshape(-1, 4)).reshape(x.shape[0], -1, 6).mean(1)


def torchvision_vit() -> tuple[nn.Module, tuple[int, int, int]]:
    model = VisionTransformer(8, 4, 1, 2, 8, 12, num_classes=3)
    nn.init.normal_(model.heads.head.weight)
    return model, (3, 8, 8)


def swin() -> tuple[nn.Module, tuple[int, int, int]]:
    model = SwinTransformer(
        img_size=16, patch_size=2, embed_dim=4, depths=(2, 1), num_heads=(2, 2), window_size=4, num_classes=3
    )
    return model, (3, 16, 16)


def values_of(graph: fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}

    def watch(node: fx.Node, value: Any) -> Any:
        if isinstance(value, Tensor):
            values[node.name] = value
        return value

    with torch.no_grad():
        Watcher(graph, watch).run(images)
    return values


@pytest.mark.thorough
@pytest.mark.parametrize("build", [torchvision_vit, swin, lambda: (SamplesLast(), (4, 2, 2))])
@pytest.mark.parametrize("per", ["sample", "position"])
def test_a_batch_reads_as_its_samples_one_by_one(build: Any, per: Per) -> None:
    torch.manual_seed(0)
    model, shape = build()
    images = torch.randn(N, *shape, dtype=torch.float64)
    graph = trace(model.double(), images[:2])
    producers = (aten.linear.default, aten.conv2d.default, aten.scaled_dot_product_attention.default)
    nodes = [n.name for n in graph.graph.nodes if n.target in producers]
    layouts = sample_layouts(graph, nodes, images)
    together = values_of(graph, images)
    alone = [values_of(graph, images[i : i + 1]) for i in range(N)]
    assert len(nodes) > 1
    for name in nodes:
        target, rank = named(graph, name).target, together[name].ndim
        axis = rank - 1 if target is aten.linear.default else 1
        units = np.arange(together[name].shape[axis])
        layout = layouts[name]
        assert layout is not None
        reading = Reading(name, Site(name, "", (axis,), units), len(units), "channel", layout)
        one = Reading(
            name, reading.site, len(units), "channel", Samples(layout.axis, alone[0][name].shape[layout.axis])
        )
        found = read_units(together[name], reading, N, sign="absolute", per=per)
        expected = torch.cat([read_units(v[name], one, 1, sign="absolute", per=per) for v in alone])
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
        assert (expected[0] - expected[1]).abs().max() > 0


def test_samples_can_run_fastest() -> None:
    graph = trace(SamplesLast(), torch.randn(2, 4, 2, 2))
    layouts = sample_layouts(graph, ["linear", "mean"], torch.randn(1, 4, 2, 2))
    assert layouts == {"linear": Samples(0, 1), "mean": Samples(0, 1)}
    swin_graph = trace(swin()[0], torch.randn(2, 3, 16, 16))
    assert sample_layouts(swin_graph, ["linear"], torch.randn(1, 3, 16, 16)) == {"linear": Samples(0, 4)}


def test_samples_that_depend_on_each_other_are_refused() -> None:
    graph = trace(BatchMean(), torch.randn(2, 4, 2, 2))
    with pytest.raises(ModelError, match="can't be told apart"):
        sample_layouts(graph, ["linear"], torch.randn(1, 4, 2, 2))


def test_a_node_without_samples_has_no_reading() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner, self.outer = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 3), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(x.flatten(1) + self.inner(self.table[:4]).flatten())

    graph = trace(Biased(), torch.randn(2, 3, 2, 2))
    group = Group("g", "neuron", 3, (Site("linear", "inner", (1,), np.arange(3)),), np.zeros(3, np.int64))
    layouts = sample_layouts(graph, ["linear"], torch.randn(1, 3, 2, 2))
    assert layouts == {"linear": None}
    assert readings(graph, group, "site", layouts) == {}


def _reading(axes: tuple[int, ...], units: Any, size: int, kind: Any = "channel") -> Reading:
    return Reading("n", Site("n", "", axes, np.asarray(units)), size, kind, Samples(0, 1))


@pytest.mark.parametrize("sign", ["absolute", "signed", "squared"])
def test_where_the_sign_is_taken(sign: Sign) -> None:
    take = {"absolute": torch.abs, "signed": lambda x: x, "squared": torch.square}[sign]
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    channel = _reading((1,), range(5), 5)
    for per, expected in {
        "sample": take(x.sum((2, 3))),
        "element": take(x).sum((2, 3)),
        "position": take(x).sum((2, 3)),
        "all": x.sum((2, 3)),
        None: take(x.sum((2, 3))),
    }.items():
        assert torch.allclose(read_units(x, channel, 2, sign=sign, per=per), expected, rtol=1e-12)  # type: ignore[arg-type]
    token = _reading((3,), range(4), 4, "neuron")
    assert torch.allclose(read_units(x, token, 2, sign=sign, per=None), take(x).sum((1, 2)), rtol=1e-12)
    head = _reading((1,), range(5), 5, "head")  # [N, heads, queries, keys]: signed over keys, then per query
    assert torch.allclose(read_units(x, head, 2, sign=sign, per=None), take(x.sum(3)).sum(2), rtol=1e-12)


def test_coordinates_are_scattered_to_units() -> None:
    x = torch.arange(12, dtype=torch.float64).reshape(1, 2, 6) - 6  # [N, tokens, coordinates]
    found = read_units(x, _reading((2,), [0, 0, -1, 1, 1, 1], 3, "neuron"), 1, sign="absolute", per=None)
    # token 0: -6 -5 | -4 dropped | -3 -2 -1; token 1: 0 1 | 2 dropped | 3 4 5
    assert found.tolist() == [[11 + 1, 6 + 12, 0]]
    dims = read_units(
        x.reshape(1, 2, 1, 6), _reading((1, 3), [[0] * 6, [1] * 6], 2, "head_dim"), 1, sign="signed", per=None
    )
    assert dims.tolist() == [[-21, 15]]


def test_settled_ends_behind_what_only_it_feeds() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
            self.gate, self.scale = nn.Linear(4, 1), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.hardswish(self.norm(self.a(x)))
            pooled = (self.b(y) + y).mean((2, 3)).softmax(1)
            return pooled + self.gate(pooled) * self.scale

    graph = trace(Net(), torch.randn(2, 3, 4, 4))
    assert settled(named(graph, "conv2d")).target is aten.hardswish.default
    assert settled(named(graph, "conv2d_1")).name == "conv2d_1"  # the sum has another input
    assert settled(named(graph, "mean")).name == "mean"  # softmax mixes units
    assert settled(named(graph, "linear")).name == "linear"  # one unit is spread over four
    with pytest.raises(ModelError, match="find the groups of this graph again"):
        named(graph, "conv2d_7")
