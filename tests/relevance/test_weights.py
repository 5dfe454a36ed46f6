"""Criteria from weights against definitions, loops, and what torch_pruning has right (and what it has not)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch_pruning
from timm.layers import StdConv2d
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, fx, nn
from torch.nn import functional

from compressor.graph import aten, trace
from compressor.records import Group, Groups, Site
from compressor.relevance import ScoreOptions, score
from compressor.relevance.feeding import feeds

# Float64 here; torch_pruning computes in the weights' float32.
FLOAT64_TOLERANCE = 1e-12
FLOAT32_TOLERANCE = 1e-5
N = 5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4, 3)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.norm(self.a(x)).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def graph(model: nn.Module) -> fx.GraphModule:
    return trace(model, torch.randn(2, 3, 8, 8))


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 1, 0])


def group_at(*places: tuple[str, tuple[int, ...], Sequence[int]], kind: str = "channel") -> Groups:
    sites = tuple(Site(node, node, axes, np.asarray(units)) for node, axes, units in places)
    size = max(int(site.units.max()) for site in sites) + 1
    return Groups((Group("g", kind, size, sites, np.zeros(size, np.int64)),))  # type: ignore[arg-type]


def scored(
    graph: fx.GraphModule, groups: Groups, criterion: str, data: tuple[Tensor, Tensor] | None = None, over: str = "sum"
) -> np.ndarray:
    batches = [] if data is None else [(data[0][:2], data[1][:2]), (data[0][2:], data[1][2:])]
    options = ScoreOptions(over=over)  # type: ignore[arg-type]
    return score(graph, groups, batches, criterion=criterion, options=options).values["g"]


def close(found: np.ndarray, expected: np.ndarray | Tensor, tolerance: float) -> bool:
    expected = np.asarray(expected.detach().double() if isinstance(expected, Tensor) else expected)
    return bool(np.abs(found - expected).max() <= tolerance * np.abs(expected).max())


def importance(model: nn.Module, module: nn.Module, criterion: object, example: Tensor) -> Tensor:
    """torch_pruning's, of one layer's output channels, neither reduced over layers nor normalised."""
    graph = torch_pruning.DependencyGraph().build_dependency(model, example)
    prune = torch_pruning.prune_conv_out_channels
    group = graph.get_pruning_group(module, prune, idxs=list(range(module.out_channels)))  # type: ignore[arg-type]
    found: Tensor = criterion(group)  # type: ignore[operator]
    return found


def test_norms_of_the_producers_rows(graph: fx.GraphModule, model: Net) -> None:
    first = group_at(("conv2d", (1,), range(6)))
    weight = model.a.weight.flatten(1).double()
    assert close(scored(graph, first, "l1")[0], weight.abs().sum(1), FLOAT64_TOLERANCE)
    assert close(scored(graph, first, "l2")[0], weight.norm(dim=1), FLOAT64_TOLERANCE)
    distances = torch.stack([(weight - weight[i]).norm(dim=1).sum() for i in range(6)])
    assert close(scored(graph, first, "fpgm")[0], distances, FLOAT64_TOLERANCE)
    assert close(scored(graph, first, "bn_scale")[0], model.norm.weight.abs(), FLOAT64_TOLERANCE)


def test_norms_equal_torch_prunings_on_one_layer(graph: fx.GraphModule, model: Net) -> None:
    last = group_at(("conv2d_1", (1,), range(4)))
    for p, criterion in ((1, "l1"), (2, "l2")):
        theirs = torch_pruning.importance.MagnitudeImportance(p=p, group_reduction="first", normalizer=None)
        expected = importance(model, model.b, theirs, torch.randn(1, 3, 8, 8))
        assert close(scored(graph, last, criterion)[0] ** p, expected, FLOAT32_TOLERANCE)


def test_torch_prunings_fpgm_does_not_see_signs(model: Net) -> None:
    """Why ours is not theirs: filters w and -w are as far apart as filters can be, theirs calls them equal."""
    theirs = torch_pruning.importance.FPGMImportance(group_reduction="first", normalizer=None)
    mirrored = copy.deepcopy(model)
    with torch.no_grad():
        mirrored.b.weight[1:] = -mirrored.b.weight[:1]
    assert float(importance(mirrored, mirrored.b, theirs, torch.randn(1, 3, 8, 8)).abs().max()) == 0
    graph = trace(mirrored, torch.randn(2, 3, 8, 8))
    ours = scored(graph, group_at(("conv2d_1", (1,), range(4))), "fpgm")[0]
    norm = float(mirrored.b.weight[0].detach().double().norm())
    assert close(ours, np.array([6 * norm, 2 * norm, 2 * norm, 2 * norm]), 1e-6)  # equal filters: products leave 1e-8


def per_sample_gradients(model: nn.Module, parameter: Tensor, data: tuple[Tensor, Tensor]) -> list[Tensor]:
    losses = [functional.cross_entropy(model(data[0][i : i + 1]), data[1][i : i + 1]) for i in range(N)]
    return [torch.autograd.grad(loss, parameter)[0].double() for loss in losses]


def test_hessian_sums_squares_sample_by_sample(graph: fx.GraphModule, model: Net, data: tuple[Tensor, Tensor]) -> None:
    squares = torch.stack(per_sample_gradients(model, model.b.weight, data)).square()
    expected = (model.b.weight.double().square() * squares.sum(0)).flatten(1).sum(1) / 2
    last = group_at(("conv2d_1", (1,), range(4)))
    assert close(scored(graph, last, "hessian", data)[0], expected, FLOAT32_TOLERANCE)
    assert close(scored(graph, last, "hessian", data, "mean")[0], expected / N, FLOAT32_TOLERANCE)


def test_torch_prunings_hessian_keeps_only_the_last_sample(model: Net, data: tuple[Tensor, Tensor]) -> None:
    """Why ours is not theirs: fed all samples, theirs is that of the last one alone."""
    theirs = torch_pruning.importance.GroupHessianImportance(group_reduction="first", normalizer=None)
    model.zero_grad()
    losses = functional.cross_entropy(model(data[0]), data[1], reduction="none")
    theirs.zero_grad()
    for loss in losses:
        model.zero_grad()
        loss.backward(retain_graph=True)
        theirs.accumulate_grad(model)
    found = importance(model, model.b, theirs, data[0][:1]).double()
    gradients = per_sample_gradients(model, model.b.weight, data)
    weight = model.b.weight.detach().double()
    saliency = [(weight.square() * g.square()).flatten(1).sum(1) for g in gradients]
    last, average = saliency[-1], torch.stack(saliency).mean(0)
    ratio_to_last, ratio_to_average = found / last, found / average
    assert float((ratio_to_last / ratio_to_last.mean() - 1).abs().max()) < FLOAT32_TOLERANCE
    assert float((ratio_to_average / ratio_to_average.mean() - 1).abs().max()) > 0.05
    model.zero_grad(set_to_none=True)


def test_torch_prunings_taylor_does_not_count_batch_norm(model: Net, data: tuple[Tensor, Tensor]) -> None:
    """Why ours is not theirs: scaling a BatchNorm's gradient a thousandfold changes nothing."""
    theirs = torch_pruning.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None)
    functional.cross_entropy(model(data[0]), data[1]).backward()
    before = importance(model, model.a, theirs, data[0][:1])
    assert model.norm.weight.grad is not None
    model.norm.weight.grad.mul_(1000)
    after = importance(model, model.a, theirs, data[0][:1])
    model.zero_grad(set_to_none=True)
    assert torch.equal(before, after)


def test_our_taylor_at_the_site_sees_batch_norm(graph: fx.GraphModule, data: tuple[Tensor, Tensor]) -> None:
    first = group_at(("conv2d", (1,), range(6)))
    before = scored(graph, first, "taylor", data)
    shift = dict(graph.named_parameters())["norm.bias"]
    with torch.no_grad():
        shift.add_(1.0)
        after = scored(graph, first, "taylor", data)
        shift.sub_(1.0)
    assert np.abs(before - after).max() > 0.01 * before.max()


def test_taylor_of_weights_is_one_gradient_of_the_whole_loss(
    graph: fx.GraphModule, model: Net, data: tuple[Tensor, Tensor]
) -> None:
    loss = functional.cross_entropy(model(data[0]), data[1], reduction="sum")
    gradient = torch.autograd.grad(loss, model.b.weight)[0]
    expected = (model.b.weight * gradient).flatten(1).sum(1).abs()
    last = group_at(("conv2d_1", (1,), range(4)))
    assert close(scored(graph, last, "taylor_weights", data)[0], expected, FLOAT32_TOLERANCE)


def test_a_heads_weights_are_its_rows_of_queries_keys_and_values() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=3)
    attention = vit.blocks[0].attn.qkv.weight.detach().double().reshape(3, 2, 4, 8)
    expected = attention.abs().sum((0, 2, 3))
    graph = trace(vit, torch.randn(2, 3, 8, 8))
    heads = group_at(("scaled_dot_product_attention", (1,), range(2)), kind="head")
    assert close(scored(graph, heads, "l1")[0], expected, FLOAT64_TOLERANCE)
    dims = group_at(("scaled_dot_product_attention", (1, 3), np.arange(8).reshape(2, 4)), kind="head_dim")  # type: ignore[arg-type]
    assert close(scored(graph, dims, "l1")[0], attention[2].abs().sum(2).flatten(), FLOAT64_TOLERANCE)


def test_written_out_window_attention_is_followed_too() -> None:
    torch.manual_seed(0)
    swin = SwinTransformer(
        img_size=16, patch_size=2, embed_dim=8, depths=(1,), num_heads=(2,), window_size=4, num_classes=3
    )
    weight = swin.layers[0].blocks[0].attn.qkv.weight.detach().double().reshape(3, 2, 4, 8)
    graph = trace(swin, torch.randn(2, 3, 16, 16))
    products = [n.name for n in graph.graph.nodes if n.target is aten.matmul.default]
    logits, outputs = (scored(graph, group_at((name, (1,), range(2)), kind="head"), "l1")[0] for name in products)
    assert close(logits, weight[:2].abs().sum((0, 2, 3)), FLOAT64_TOLERANCE)
    assert close(outputs, weight.abs().sum((0, 2, 3)), FLOAT64_TOLERANCE)


class Moved(nn.Module):
    """A standardised kernel, a shuffle, a transposed convolution in groups, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = StdConv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.head = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        shuffled = x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)
        both = torch.cat([shuffled.mean((2, 3)), self.b(x).mean((2, 3))], 1)
        return self.head(both)


def test_rows_are_found_behind_moves_and_computed_weights() -> None:
    torch.manual_seed(0)
    model = Moved()
    graph = trace(model, torch.randn(2, 3, 4, 4))
    cat = next(n.name for n in graph.graph.nodes if n.target is aten.cat.default)
    everything = group_at((cat, (1,), range(10)))
    first, second = feeds(graph, everything.groups[0].sites[0])
    assert first.units.tolist() == [0, 2, 1, 3]  # the shuffle put channel 1 at place 2
    assert second.units.tolist() == [4, 5, 6, 7, 8, 9]
    kernel = model.b.weight.detach().double()  # [in, out / 2, k, k]: channels 0, 1 make 4-6, channels 2, 3 make 7-9
    expected = torch.cat([kernel[:2].abs().sum((0, 2, 3)), kernel[2:].abs().sum((0, 2, 3))])
    assert close(scored(graph, everything, "l1")[0][4:], expected, FLOAT64_TOLERANCE)
    direct = group_at(("conv2d", (1,), range(4)))
    standardised = functional.batch_norm(model.a.weight.reshape(1, 4, -1), None, None, training=True, eps=model.a.eps)
    assert close(scored(graph, direct, "l1")[0], standardised.reshape(4, -1).abs().sum(1), FLOAT32_TOLERANCE)


def test_unreadable_sites_repeat_the_mean_and_unreadable_groups_are_named(graph: fx.GraphModule, model: Net) -> None:
    both = group_at(("conv2d", (1,), range(3, 9)), ("x", (1,), range(3)))
    values = scored(graph, both, "l1")
    assert (values[0] == values[1]).all()
    assert not values[0][:3].any()
    assert values[0][3:].all()
    found = score(graph, group_at(("x", (1,), range(3))), [], criterion="l1")
    assert found.unscored == ("g",)
    assert not found.values
