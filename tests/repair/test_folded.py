"""Layers that see images folded into another axis: windows, tokens first, frames beside images."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compressor.graph import trace
from compressor.graph.operators import arguments
from compressor.graph.samples import Samples
from compressor.planning import RankingOptions, measure_scores
from compressor.planning.covariance import collect, shrinkage, shrunk
from compressor.pruning import find_structure
from compressor.relevance import score
from compressor.repair import CompensationOptions, compensate
from compressor.repair import compensation as subject
from compressor.repair.consumers import find_layers
from compressor.repair.gathering import Gathering

from .conftest import distance, sliced

RIDGE_TOLERANCE = 1e-3  # the weakest ridge leaves an error of its own size where the fit could be perfect
EXACT = 1e-5  # float32 products


class Folding(nn.Module):
    """Two layers between a folding of the input's axes and its way back to logits."""

    def __init__(self, fold: Callable[[Tensor], Tensor], back: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 5)
        with torch.no_grad():  # units 4 to 7 are half of the others
            self.first.weight[4:], self.first.bias[4:] = 0.5 * self.first.weight[:4], 0.5 * self.first.bias[:4]
        self.fold, self.back = fold, back

    def forward(self, x: Tensor) -> Tensor:  # [N, 16 tokens, 3]
        return self.back(self.second(self.first(self.fold(x)).relu()), x.shape[0])


def windows(x: Tensor) -> Tensor:
    """[N, 16, 3] to [N * 4 windows, 4, 3]."""
    return x.unflatten(1, (4, 4)).flatten(0, 1)


FOLDINGS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, int], Tensor]]] = {
    "windows": (windows, lambda y, n: y.unflatten(0, (n, 4)).mean((1, 2))),
    "windows, images inside": (
        lambda x: x.unflatten(1, (4, 4)).transpose(0, 1).flatten(0, 1),
        lambda y, n: y.unflatten(0, (4, n)).mean((0, 2)),
    ),
    "tokens first": (lambda x: x.transpose(0, 1), lambda y, n: y.mean(0)),
    "all rows on one axis": (lambda x: x.flatten(0, 1), lambda y, n: y.unflatten(0, (n, 16)).mean(1)),
}


@pytest.fixture(params=FOLDINGS)
def folding(request: pytest.FixtureRequest) -> nn.Module:
    return Folding(*FOLDINGS[request.param]).eval()


@pytest.mark.parametrize("n", [16, 6])  # as many images as tokens, and not
def test_the_rows_of_an_image_are_all_in_its_fold(folding: nn.Module, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(n).float().reshape(n, 1, 1).expand(n, 16, 3) / n + 0.5  # an image's tokens hold its number
    graph = trace(folding, x[:2].clone())
    half = list(range(4))
    small, slices = sliced(graph, {"first.weight": {0: half}, "first.bias": {0: half}, "second.weight": {1: half}})
    folds = torch.arange(n) % 2
    monkeypatch.setattr(subject, "fold_of", lambda images: folds[(images[:, 0, 0] * n - n / 2).round().long()])
    taken: list[tuple[Tensor, Tensor]] = []
    take = Gathering._take

    def spy(self: object, rows: Tensor, *others: Tensor) -> None:
        taken.append((rows[0], others[2]))  # [entries, positions, features] and the fold of each entry
        take(self, rows, *others)

    monkeypatch.setattr(Gathering, "_take", spy)
    compensate(graph, small, slices, [x[: n // 2], x[n // 2 :]])
    expected = torch.relu(torch.nn.functional.linear(x[:, 0], folding.first.weight, folding.first.bias)).detach()[:, :4]
    assert taken
    for rows, fold in taken:
        for row, of in zip(rows.flatten(0, 1), fold.repeat_interleave(rows.shape[1]), strict=True):
            image = int((expected - row).square().sum(1).argmin())
            assert float((expected[image] - row).abs().max()) < EXACT
            assert int(of) == image % 2


@pytest.mark.parametrize("n", [16, 48])
def test_redundant_units_leave_no_trace(folding: nn.Module, n: int) -> None:
    x = torch.randn(n, 16, 3)
    graph = trace(folding, x[:2])
    half = list(range(4))
    small, slices = sliced(graph, {"first.weight": {0: half}, "first.bias": {0: half}, "second.weight": {1: half}})
    bare = copy.deepcopy(small)
    record = compensate(graph, small, slices, x.split(8), options=CompensationOptions(rows_least=64))
    assert [layer.layer for layer in record.repaired] == ["second"]
    assert record.repaired[0].rows <= 2 * max(64, 8 * 4, n)  # as many as were asked for, however they lie
    with torch.no_grad():
        assert distance(bare(x), graph(x)) > 0.05
        assert distance(small(x), graph(x)) < RIDGE_TOLERANCE


@pytest.mark.thorough
def test_covariances_and_measured_losses_are_those_of_the_unfolded_network(folding: nn.Module) -> None:
    x = torch.randn(40, 16, 3)
    graph = trace(folding, x[:2])
    layers, _ = find_layers(graph, set(graph.graph.nodes))
    found = {layers[node].name: inputs for node, inputs in collect(graph, layers, x.split(8)).items()}
    rows = (
        torch.nn.functional.linear(x, folding.first.weight, folding.first.bias).relu().flatten(0, 1).detach().double()
    )
    covariance = torch.cov(rows.T, correction=0)
    expected = shrunk(covariance, shrinkage(covariance, len(rows)))
    assert torch.allclose(found["second"].covariance, expected, rtol=1e-4, atol=1e-5)
    structure = find_structure(graph, x[:2])
    scores = score(graph, structure.groups, [(x, torch.zeros(40, dtype=torch.long))], criterion="activation")
    measured = measure_scores(graph, structure, scores, x.split(8), RankingOptions(multiple=1))
    for group in structure.groups.groups:
        assert (measured.values[group.name] >= 0).all()


def test_images_come_first_whatever_the_folding() -> None:
    x = torch.arange(3 * 8).reshape(3, 8)  # image n holds 8 n ... 8 n + 7
    for axis, inner, folded in (
        (0, 8, x.flatten()),
        (0, 1, x.T.flatten()),
        (0, 4, x.unflatten(1, (2, 4)).transpose(0, 1).flatten()),
        (1, 1, x.T),
        (1, 2, x.unflatten(1, (4, 2)).transpose(0, 1).flatten(1)[:, :, None]),
    ):
        first = Samples(axis, inner).images_first(folded, 3)
        assert torch.equal(first.reshape(3, 8).sort().values, x)


def test_frames_beside_images_are_convolved_and_repaired() -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 3, padding=1)
            with torch.no_grad():
                self.first.weight[4:], self.first.bias[4:] = 0.5 * self.first.weight[:4], 0.5 * self.first.bias[:4]

        def forward(self, x: Tensor) -> Tensor:  # [N, 4 frames, 3, H, W]
            y = self.second(self.first(x.flatten(0, 1)).relu())
            return y.unflatten(0, (x.shape[0], 4)).mean((1, 3, 4))

    x = torch.randn(12, 4, 3, 6, 6)
    graph = trace(Frames().eval(), x[:2])
    half = list(range(4))
    small, slices = sliced(graph, {"first.weight": {0: half}, "first.bias": {0: half}, "second.weight": {1: half}})
    record = compensate(graph, small, slices, x.split(4))
    node = next(n for n in graph.graph.nodes if n.meta.get("layer") == "second" and "conv" in str(n.target))
    layouts = subject.layouts_of(graph, find_layers(graph, set(graph.graph.nodes))[0], x)
    assert layouts[arguments(node)["input"].name] == Samples(0, 4)
    assert [layer.layer for layer in record.repaired] == ["second"]
    with torch.no_grad():
        assert distance(small(x), graph(x)) < RIDGE_TOLERANCE
