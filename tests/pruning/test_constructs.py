"""Constructs people really write: their units are found or named, removal is exact, and measuring and repair hold.

One row each, after public reports of users of pruning tools. Random thirds are removed and the graph is held against
the user's own module with the same slices at zero, in float64: independent of the masks the product checks by.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.graph import trace
from compressor.graph.cost import measure_cost
from compressor.graph.lockstep import changed_nodes
from compressor.planning import RankingOptions, measure_scores
from compressor.pruning import Structure, find_structure, identity_error, prune
from compressor.pruning.check import random_units
from compressor.records import Plan, Slices
from compressor.relevance import score
from compressor.repair import compensate

PX, IMAGES = 16, 12
EXACT = 1e-12  # float64 rounding over a few thousand terms


class Grouped(nn.Module):
    """Groups of 4, then of 6: two ways of parting the same channels, neither of which refines the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 48, 3, 2, 1), nn.Conv2d(48, 96, 3, 1, 1, groups=4)
        self.c, self.head = nn.Conv2d(96, 72, 3, 2, 1, groups=6), nn.Linear(72, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))).mean((2, 3)))  # type: ignore[no-any-return]


class StateOfZeros(nn.Module):
    """A recurrent state made in forward, as ConvLSTMs and query decoders begin."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.x = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.h, self.o, self.head = nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 24, 3, 1, 1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        state = torch.zeros(x.shape[0], 16, y.shape[2], y.shape[3])
        for _ in range(2):
            state = torch.tanh(self.x(y) + self.h(state))
        return self.head(F.relu(self.o(state)).mean((2, 3)))  # type: ignore[no-any-return]


class Selected(nn.Module):
    """Zeros and ones like a map, chosen by a mask; the sum of all, masked."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 24, 3, 1, 1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = torch.where(y > 0, y, torch.zeros_like(y)) + 0.1 * torch.ones_like(y)
        return self.head(F.relu(self.b(y)).mean((2, 3)))  # type: ignore[no-any-return]


class Pooled(nn.Module):
    """What `pool` makes of the last map; `width` features a channel."""

    def __init__(self, pool: Callable[[Tensor], Tensor], width: int = 1) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 24, 3, 1, 1)
        self.pool, self.head = pool, nn.Linear(24 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(F.relu(self.b(F.relu(self.a(x))))))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """Columns through recurrent layers: what they read goes, and their input weights with it; their width stays."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 8, 3, 2, 1)
        self.cell = kind(8 * 4, 16, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.b(F.relu(self.a(x)))).permute(0, 3, 1, 2).flatten(2)
        return self.head(self.cell(y)[0][:, -1])  # type: ignore[no-any-return]


class Overwritten(nn.Module):
    """A map that is written to by index and by slice, as shifts along time or space are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 24, 3, 1, 1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        shifted = torch.zeros_like(y)
        shifted[:, :, 1:] = y[:, :, :-1]
        shifted[:, :, :, 0] = y[:, :, :, 1]
        return self.head(F.relu(self.b(y + shifted)).mean((2, 3)))  # type: ignore[no-any-return]


class Attended(nn.Module):
    """PyTorch's own attention as tutorials call it, weights and all."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 4, 4), nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, **options)
        self.fc1, self.fc2, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 5)
        self.first = options.get("batch_first", False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).permute((0, 2, 1) if self.first else (2, 0, 1))
        y = self.norm(tokens)
        tokens = tokens + self.attention(y, y, y)[0]
        tokens = tokens + self.fc2(F.gelu(self.fc1(tokens)))
        return self.head(tokens.mean(1 if self.first else 0))  # type: ignore[no-any-return]


class Queried(nn.Module):
    """Learned queries and cross attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.queries = nn.Conv2d(3, 32, 4, 4), nn.Parameter(torch.randn(4, 32))
        layer = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.decoder, self.head = nn.TransformerDecoder(layer, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.stem(x).flatten(2).transpose(1, 2)
        queries = self.queries.unsqueeze(0).expand(x.shape[0], -1, -1)
        return self.head(self.decoder(queries, memory)[:, 0])  # type: ignore[no-any-return]


class Unfolded(nn.Module):
    """Patches by unfold, put back by fold."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 24, 3, 1, 1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(F.relu(self.a(x)), 2, stride=2)
        y = F.fold(torch.tanh(patches), (8, 8), 2, stride=2)
        return self.head(F.relu(self.b(y)).mean((2, 3)))  # type: ignore[no-any-return]


class KernelsPerImage(nn.Module):
    """Experts mixed into one kernel an image: as many groups as the batch has images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.route, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 3), nn.Linear(16, 5)
        self.experts, self.b = nn.Parameter(torch.randn(3, 10 * 8 * 9) * 0.1), nn.Conv2d(10, 16, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        n, c, h, w = y.shape
        kernels = (self.route(y.mean((2, 3))).sigmoid() @ self.experts).view(n * 10, c, 3, 3)
        y = F.conv2d(y.reshape(1, n * c, h, w), kernels, padding=1, groups=n).view(n, 10, h, w)
        return self.head(F.relu(self.b(F.relu(y))).mean((2, 3)))  # type: ignore[no-any-return]


class FiltersPerImage(nn.Module):
    """A dynamic filter network: a layer predicts a depthwise kernel for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.predict = nn.Conv2d(3, 12, 3, 2, 1), nn.Linear(12, 12 * 9)
        self.b, self.head = nn.Conv2d(12, 16, 3, 2, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        n, c, h, w = y.shape
        filters = torch.tanh(self.predict(y.mean((2, 3)))).view(n * c, 1, 3, 3)
        y = F.conv2d(y.reshape(1, n * c, h, w), filters, padding=1, groups=n * c).view(n, c, h, w)
        return self.head(F.relu(self.b(F.relu(y))).mean((2, 3)))  # type: ignore[no-any-return]


class GroupsPerImage(nn.Module):
    """Experts of a grouped, biased convolution in strides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.route = nn.Conv2d(3, 12, 3, 2, 1), nn.Linear(12, 3)
        self.experts, self.bias = nn.Parameter(torch.randn(3, 18 * 4 * 9) * 0.1), nn.Parameter(torch.randn(3, 18))
        self.b, self.head = nn.Conv2d(18, 16, 3, 2, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        n, c, h, w = y.shape
        routing = self.route(y.mean((2, 3))).sigmoid()
        kernels, bias = (routing @ self.experts).view(n * 18, 4, 3, 3), (routing @ self.bias).view(n * 18)
        y = F.conv2d(y.reshape(1, n * c, h, w), kernels, bias, padding=1, stride=2, groups=3 * n)
        y = F.relu(y.permute(1, 0, 2, 3).reshape(n, 18, h // 2, w // 2))
        return self.head(F.relu(self.b(y)).mean((2, 3)))  # type: ignore[no-any-return]


class SplitAttention(nn.Module):
    """Two branches of two groups each, weighed against each other and added, as ResNeSt does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 32, 3, 1, 1, groups=4)
        self.down, self.up = nn.Conv2d(16, 8, 1, groups=2), nn.Conv2d(8, 32, 1, groups=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.b(F.relu(self.a(x))))
        branches = y.split(16, 1)
        shares = self.up(F.relu(self.down((branches[0] + branches[1]).mean((2, 3), keepdim=True))))  # [N, 32, 1, 1]
        shares = shares.view(len(x), 2, 2, 8).transpose(1, 2).softmax(1).reshape(len(x), 2, 16, 1, 1)
        y = shares[:, 0] * branches[0] + shares[:, 1] * branches[1]
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


class Copied(nn.Module):
    """A grouped convolution that reads two functions of the same channels, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(24, 16, 3, 2, 1, groups=4)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.head(F.relu(self.b(torch.cat([y.relu(), y.tanh()], 1))).mean((2, 3)))  # type: ignore[no-any-return]


class Frequencies(nn.Module):
    """A filter for each frequency, as GFNet has, on the channels that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1)
        self.filters, self.head = nn.Parameter(torch.randn(12, 8, 5, 2) * 0.3), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))  # [N, 12, 8, 8]
        spectrum = torch.fft.rfft2(y, norm="ortho") * torch.view_as_complex(self.filters)
        y = y + torch.fft.irfft2(spectrum, s=(8, 8), norm="ortho")
        return self.head(F.relu(self.b(y)).mean((2, 3)))  # type: ignore[no-any-return]


class Laid(nn.Module):
    """A kernel of its own, laid out as a matrix against patches; a mask of two comparisons."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.kernel = nn.Conv2d(3, 12, 3, 2, 1), nn.Parameter(torch.randn(16, 12, 3, 3) * 0.1)
        self.b, self.head = nn.Conv2d(16, 16, 3, 2, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        y = y * ((y > 0.1) & (y < 2.0))
        y = (self.kernel.view(16, -1) @ F.unfold(y, 3, padding=1)).view(len(x), 16, 8, 8)
        return self.head(F.relu(self.b(y)).mean((2, 3)))  # type: ignore[no-any-return]


class Neighbours(nn.Module):
    """Each token beside those most like it, as graphs of patches have them; places stretched over channels, or not."""

    def __init__(self, stretch: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.stretch = nn.Conv2d(3, 12, 3, 4, 1), nn.Conv2d(24, 16, 1), stretch
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x)).flatten(2)  # [N, 12, 16]
        nearest = (y.mT @ y).topk(3, 2)[1].flatten(1).unsqueeze(1)  # [N, 1, 16 * 3]
        beside = y.gather(2, self.stretch(nearest, y.shape[1])).unflatten(2, (16, 3)).amax(3)  # [N, 12, 16]
        return self.head(F.relu(self.b(torch.cat([y, beside - y], 1).unsqueeze(3))).mean((2, 3)))  # type: ignore[no-any-return]


def named(build: Callable[[], nn.Module], name: str, *units: str) -> object:
    return pytest.param(build, units, id=name)


CONSTRUCTS = [
    named(Grouped, "crossing groups", "a", "b", "c"),
    named(StateOfZeros, "state of zeros", "a", "x", "o"),
    named(Selected, "zeros like", "a", "b"),
    named(lambda: Pooled(lambda y: F.adaptive_max_pool2d(y, 1).flatten(1)), "global maximum", "a", "b"),
    named(lambda: Pooled(lambda y: F.adaptive_max_pool2d(y, (3, 2)).flatten(1), 6), "uneven maximum", "a", "b"),
    named(lambda: Pooled(lambda y: y.flatten(2).max(2)[0]), "max(dim)", "a", "b"),
    named(lambda: Pooled(lambda y: y.flatten(2).topk(3, 2)[0].mean(2)), "topk", "a", "b"),
    named(lambda: Pooled(lambda y: y.flatten(2).sort(2)[0][..., -2:].sum(2)), "sort", "a", "b"),
    named(lambda: Pooled(lambda y: y.flatten(2).median(2)[0]), "median", "a", "b"),
    named(lambda: Pooled(lambda y: y.flatten(2).logsumexp(2)), "logsumexp", "a", "b"),
    named(lambda: Pooled(lambda y: y.flatten(2).cumsum(2)[..., -1]), "cumsum", "a", "b"),
    named(lambda: Pooled(lambda y: F.max_pool2d(y, 2, return_indices=True)[0].mean((2, 3))), "with indices", "a", "b"),
    named(lambda: Recurrent(nn.GRU), "gru", "a", "b"),
    named(lambda: Recurrent(nn.LSTM), "lstm", "a", "b"),
    named(lambda: Recurrent(partial(nn.RNN, nonlinearity="relu", bias=False)), "rnn without bias", "a", "b"),
    named(Overwritten, "overwritten", "a", "b"),
    named(Attended, "tokens first", "fc1", "attention@head"),
    named(lambda: Attended(batch_first=True), "batch first", "fc1", "attention@head"),
    named(Queried, "queries", "decoder.layers.0.linear1"),
    named(Unfolded, "unfold", "a", "b"),
    named(KernelsPerImage, "kernels per image", "a", "route", "b"),
    named(FiltersPerImage, "filters per image", "a", "b"),
    named(GroupsPerImage, "groups per image", "a@conv_group", "a", "route", "b"),
    named(SplitAttention, "split attention", "a", "down"),
    named(Copied, "copies read in groups", "a"),
    named(Frequencies, "frequencies", "a", "b"),
    named(Laid, "a kernel as a matrix", "a", "b"),
    named(lambda: Neighbours(lambda i, c: i.expand(-1, c, -1)), "neighbours, expanded", "a", "b"),
    named(lambda: Neighbours(lambda i, c: i.repeat(1, c, 1)), "neighbours, repeated", "a", "b"),
]


def built(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return make().eval(), torch.randn(IMAGES, 3, PX, PX)


def zeroed(model: nn.Module, graph: torch.fx.GraphModule, slices: Slices) -> nn.Module:
    """The user's module with every removed slice of every parameter at zero."""
    twin = copy.deepcopy(model)
    for name, kept in slices.kept.items():
        tensor = dict(twin.named_parameters())[name]
        for axis, stays in enumerate(kept):
            gone = np.setdiff1d(np.arange(tensor.shape[axis]), stays)
            tensor.data.index_fill_(axis, torch.from_numpy(gone), 0.0)
    return twin


@pytest.mark.parametrize(("make", "units"), CONSTRUCTS)
def test_units_are_found_and_removal_is_exact(make: Callable[[], nn.Module], units: tuple[str, ...]) -> None:
    model, images = built(make)
    graph = trace(model, images[:2])
    structure = find_structure(graph, images[:2])
    assert set(units) <= {group.name for group in structure.groups.groups}, structure.groups.left_alone
    for seed in range(2):
        plan = Plan(random_units(structure, seed), 0, 0)
        small, slices = prune(graph, structure, plan)
        assert identity_error(graph, small, structure, plan.kept, images[:4]) < EXACT
        for count in (1, 3):
            assert small(images[:count]).shape == (count, 5)
        if not any(group.inexact for group in structure.groups.groups) and "attention" not in " ".join(slices.kept):
            with torch.no_grad():
                expected = zeroed(model, graph, slices)(images)
                assert torch.allclose(small(images), expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.thorough
@pytest.mark.parametrize(("make", "units"), CONSTRUCTS)
def test_scores_measuring_and_repair_hold(make: Callable[[], nn.Module], units: tuple[str, ...]) -> None:
    model, images = built(make)
    graph = trace(model, images[:2])
    structure = find_structure(graph, images[:2])
    batches = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(6)]
    scores = score(graph, structure.groups, batches)
    measured = measure_scores(graph, structure, scores, [part for part, _ in batches], RankingOptions(multiple=1))
    assert all(np.isfinite(values).all() for values in measured.values.values())
    small, slices = prune(graph, structure, Plan(random_units(structure, 0), 0, 0))
    compensate(graph, small, slices, [part for part, _ in batches])
    assert torch.isfinite(small(images)).all()


def nothing_gone(structure: Structure) -> Plan:
    return Plan({group.name: np.arange(group.size) for group in structure.groups.groups}, 0, 0)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_recurrent_layers_weights_lose_its_inputs_and_nothing_else(kind: type[nn.RNNBase]) -> None:
    model, images = built(lambda: Recurrent(kind))
    graph = trace(model, images[:2])
    structure = find_structure(graph, images[:2])
    kept = nothing_gone(structure).kept | {"b": np.array([0, 2, 3, 5, 7])}
    small, slices = prune(graph, structure, Plan(kept, 0, 0))
    features = [channel * 4 + row for channel in kept["b"] for row in range(4)]  # [channels, 4 rows] in one
    for name, dense in model.cell.named_parameters():
        remaining = dict(small.named_parameters())[f"cell.{name}"]
        expected = dense[:, features] if "ih_l0" in name and "weight" in name else dense
        assert torch.equal(remaining, expected)
    assert any(layer.layer == "cell" for layer in compensate(graph, small, slices, [images]).left_alone)
    assert measure_cost(small).macs < measure_cost(graph).macs


@pytest.mark.thorough
@pytest.mark.parametrize(("make", "units"), CONSTRUCTS)
def test_where_nothing_goes_nothing_changes(make: Callable[[], nn.Module], units: tuple[str, ...]) -> None:
    model, images = built(make)
    graph = trace(model, images[:2])
    structure = find_structure(graph, images[:2])
    small, _ = prune(graph, structure, nothing_gone(structure))
    assert not changed_nodes(graph, small)
