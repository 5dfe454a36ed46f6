"""Who goes first and what a group is worth, measured: against brute force, and on networks whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from compressor.errors import DataError
from compressor.graph import fetch, trace
from compressor.planning import RankingOptions, measure_scores
from compressor.planning.covariance import Inputs, _Sums, collect, features_of, shrinkage, shrunk
from compressor.planning.redundancy import consumers_of, counts_of, order_of_loss
from compressor.planning.sensitivity import SensitivityOptions, repair, rising_slopes, slope_of_each
from compressor.pruning import Structure, find_structure, prune
from compressor.records import FloatArray, Plan, Scores
from compressor.relevance import score
from compressor.repair.consumers import Layer, find_layers

EXACT = 1e-9  # float64 sums in another order
PLAIN = RankingOptions(multiple=1)


def two_layers(width: int = 8, *, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 5)).double().eval()


def rows(n: int, width: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def read(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, Structure, dict[fx.Node, Layer]]:
    graph = trace(model, x[:2])
    return graph, find_structure(graph, x[:2]), find_layers(graph, set(graph.graph.nodes))[0]


def unshrunk(covariance: Tensor, mean: Tensor) -> Inputs:
    return Inputs(mean, covariance + 1e-12 * torch.eye(len(mean), dtype=torch.float64))


# moments


def test_a_covariance_is_that_of_the_patches_a_convolution_reads() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(64, 2)).double().eval()
    x = torch.randn(40, 3, 8, 8, dtype=torch.float64)
    graph, _, layers = read(model, x)
    found = {layers[node].weight: inputs for node, inputs in collect(graph, layers, [x[:25], x[25:]]).items()}
    patches = functional.unfold(x, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    for name, expected in (("0.weight", patches), ("2.weight", model[:2](x))):
        covariance = torch.cov(expected.detach().T, correction=0)
        assert torch.allclose(found[name].mean, expected.mean(0), rtol=0, atol=EXACT)
        assert torch.allclose(
            found[name].covariance, shrunk(covariance, shrinkage(covariance, len(expected))), rtol=0, atol=EXACT
        )


def test_fewer_rows_are_trusted_less() -> None:
    x = rows(2000, 30) @ rows(30, 30, seed=2)
    shares = []
    for n in (4, 40, 400, 2000):
        covariance = torch.cov(x[:n].T, correction=0)
        got = shrunk(covariance, shrinkage(covariance, n))
        assert float(torch.linalg.eigvalsh(got).min()) > 0
        assert torch.allclose(got.diagonal(), covariance.diagonal(), rtol=1e-4)
        off = ~torch.eye(30, dtype=torch.bool)
        shares.append(float((got[off] / covariance[off]).median()))
    assert shares == sorted(shares)
    assert shares[0] < 0.9
    assert shares[-1] > 0.95


def test_shrinking_brings_a_small_sample_nearer_to_the_truth() -> None:
    mix = rows(20, 20, seed=3)
    truth = mix.T @ mix
    sample = torch.cov((rows(15, 20, seed=4) @ mix).T, correction=0)
    assert float((shrunk(sample, shrinkage(sample, 15)) - truth).norm()) < float((sample - truth).norm())


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, EXACT), (torch.float32, 1e-3)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 12, 30, 31])
def test_of_few_rows_the_covariance_and_its_inverse_are_the_same(dtype: torch.dtype, close: float, count: int) -> None:
    x = 10 + rows(count, 60) @ rows(60, 60, seed=2)
    x[:, 7] = 3.0  # a dead input
    sums = _Sums(60)
    for part in x.to(dtype).split(5):
        sums.add(part)
    found = sums.inputs()
    assert (found.few is None) == (count > 30)
    expected = torch.cov(x.T, correction=0)
    expected = shrunk(expected, shrinkage(expected, count))
    size = float(expected.diagonal().max())
    assert torch.allclose(found.mean, x.mean(0), rtol=close, atol=close)
    assert torch.allclose(found.covariance, expected, rtol=0, atol=close * size)
    scale = found.covariance.diagonal().sqrt()  # of features that differ in size by orders
    unit = (scale.outer(scale) * found.inverse.double()) @ (found.covariance / scale.outer(scale))
    assert torch.allclose(unit, torch.eye(60, dtype=torch.float64), rtol=0, atol=close)


def test_a_constant_input_does_no_harm() -> None:
    assert bool(torch.linalg.inv(shrunk(torch.zeros(4, 4, dtype=torch.float64), 1.0)).isfinite().all())


def test_grouped_and_very_wide_layers_are_left_out() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 2, 1), nn.Flatten(), nn.Linear(2 * 88 * 88, 3))
    graph, _, layers = read(model.eval(), torch.randn(2, 4, 90, 90))
    widths = {layer.weight: features_of(graph, layer) for layer in layers.values()}
    assert widths == {"0.weight": 0, "1.weight": 8, "3.weight": 0}


# who goes first


def residual(weights: Tensor, covariance: Tensor, kept: list[int], worth: Tensor) -> float:
    """What least squares on the kept inputs leaves of the outputs' variance, each by its worth: no shortcuts taken."""
    target = weights @ covariance @ weights.T
    if kept:
        part, across = covariance[kept][:, kept], covariance[kept] @ weights.T
        left = target - across.T @ torch.linalg.solve(part, across)
    else:
        left = target
    variance = target.diagonal()
    return float((worth * left.diagonal() / variance.clamp(min=1e-3 * variance.mean())).sum())


@pytest.mark.parametrize("counted", [False, True])
def test_units_go_in_the_order_brute_force_finds(counted: bool) -> None:
    model, x = two_layers(), rows(500)
    graph, structure, layers = read(model, x)
    (group,) = structure.groups.groups
    inputs = collect(graph, layers, [x])
    node = next(n for n in layers if layers[n].weight == "2.weight")
    counts: dict[str, FloatArray] = {node.name: np.array([9.0, 0, 0, 0, 1])} if counted else {}
    readers = consumers_of(structure, layers)[group.name]
    assert set(readers) == {node}
    got = order_of_loss(graph, group, readers, layers, inputs, counts)
    worth = torch.tensor([0.9, 0, 0, 0, 0.1] if counted else [0.2] * 5, dtype=torch.float64)
    left, expected = list(range(8)), []
    while left:
        without = {
            u: residual(model[2].weight.detach(), inputs[node].covariance, [k for k in left if k != u], worth)
            for u in left
        }
        expected.append(min(without, key=lambda u: without[u]))
        left.remove(expected[-1])
    assert got is not None
    assert np.argsort(got).tolist() == expected


def test_a_copy_goes_before_anything_of_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = model[0].weight[1], model[0].bias[1]
    x = torch.randn(64, 3, 10, 10)
    graph, structure, layers = read(model.eval(), x)
    group = next(g for g in structure.groups.groups if g.size == 6)
    order = order_of_loss(
        graph, group, consumers_of(structure, layers)[group.name], layers, collect(graph, layers, [x]), {}
    )
    assert order is not None
    assert int(np.argmin(order)) in (1, 4)
    assert max(order[1], order[4]) > 0


def test_scores_say_what_an_output_counts_for() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(4, 2)).eval()
    _, structure, _ = read(model, torch.randn(2, 3, 5, 5))
    scores = Scores("x", {g.name: np.arange(g.size, dtype=float)[None] for g in structure.groups.groups}, 0)
    counts = counts_of(scores, structure.groups.groups)
    assert {len(v): v.tolist() for v in counts.values()} == {6: [0, 1, 2, 3, 4, 5], 4: [0, 1, 2, 3]}


# what the others take over


@pytest.mark.parametrize("norm", [False, True])
def test_what_can_be_carried_is_carried(norm: bool) -> None:
    """Half the hidden units are copies: without them, repaired, the network is the same."""
    torch.manual_seed(0)
    hidden = nn.Conv2d(3, 8, 3).double()
    with torch.no_grad():
        hidden.weight[4:], hidden.bias[4:] = 2 * hidden.weight[:4], 2 * hidden.bias[:4]
    behind: list[nn.Module] = [nn.Conv2d(8, 5, 3, bias=not norm), nn.BatchNorm2d(5)] if norm else [nn.Conv2d(8, 5, 3)]
    model = nn.Sequential(hidden, nn.ReLU(), *behind, nn.Flatten(), nn.Linear(5 * 16, 3)).double().eval()
    x = torch.randn(300, 3, 8, 8, dtype=torch.float64)
    graph, structure, layers = read(model, x)
    node = next(n for n in layers if layers[n].weight == "2.weight")
    patches = functional.unfold(torch.relu(hidden(x)), 3).transpose(1, 2).flatten(0, 1).detach()
    inputs = unshrunk(torch.cov(patches.T, correction=0), patches.mean(0))
    group = next(g for g in structure.groups.groups if g.size == 8)
    small, slices = prune(graph, structure, Plan({group.name: np.arange(4)}, 0, 0))
    with torch.no_grad():
        raw = float((small(x) - graph(x)).abs().max())
        repair(graph, small, layers[node], slices, inputs)
        assert float((small(x) - graph(x)).abs().max()) < 1e-6 < raw  # the ridge that makes copies solvable


def test_a_mean_is_kept_where_nothing_else_can_be() -> None:
    model, x = two_layers(4), rows(400)
    with torch.no_grad():
        model[0].bias += 3
    graph, structure, layers = read(model, x)
    (group,) = structure.groups.groups
    inputs = collect(graph, layers, [x])
    small, slices = prune(graph, structure, Plan({group.name: np.array([0])}, 0, 0))
    with torch.no_grad():
        for node, some in inputs.items():
            repair(graph, small, layers[node], slices, some)
        assert torch.allclose(small(x).mean(0), graph(x).mean(0), atol=1e-6)
    assert torch.equal(fetch(graph, "2.weight"), model[2].weight)


# what a group is worth


@pytest.mark.parametrize(
    ("errors", "slopes"),
    [
        ([0, 1, 3, 6], [1, 2, 3]),
        ([0, 3, 5, 6], [2, 2, 2]),
        ([0, 2, 1, 6], [1, 1, 4]),
        ([0, 0, 0, 0], [0, 0, 0]),
        ([0, 60, 61, 62], [60, 60, 60]),
        ([0, 20, 60, 61], [20, 40, 40]),
    ],
)
def test_slopes_never_fall_and_a_lost_network_does_not_make_its_way_cheap(errors: list[int], slopes: list[int]) -> None:
    found = 100 * rising_slopes(np.arange(4), np.array(errors) / 100)
    assert found == pytest.approx(slopes)


def test_what_each_unit_costs_rises_through_the_measured_slopes() -> None:
    at = np.array([0, 2, 6, 10])
    each = slope_of_each(at, np.array([0.0, 2, 10, 30]))
    assert len(each) == 10
    assert bool((np.diff(each) > 0).all())
    assert each[[0, 9]] == pytest.approx([1, 5], rel=1e-5)
    assert each[3] == pytest.approx(1 + 2.5 / 3, rel=1e-5)  # turn 3.5, between slope 1 at 1 and 2 at 4
    assert bool((np.diff(slope_of_each(at, np.zeros(4))) > 0).all())


def test_units_are_worth_more_the_later_they_go() -> None:
    model, x = two_layers(20).float(), rows(300).float()
    graph, structure, layers = read(model, x)
    (group,) = structure.groups.groups
    scores = score(graph, structure.groups, [], criterion="l1")
    inputs = collect(graph, layers, list(torch.split(x[32:], 300)))
    readers = consumers_of(structure, layers)[group.name]
    order = order_of_loss(graph, group, readers, layers, inputs, counts_of(scores, structure.groups.groups))
    values = measure_scores(graph, structure, scores, [x], replace(PLAIN, least=0)).values[group.name][0]
    assert order is not None
    assert np.argsort(values)[:-1].tolist() == np.argsort(order)[:-1].tolist()  # the last one always stays


class Branches(nn.Module):
    """Two equal branches of which one counts for a hundredth."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet = (nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.loud(x) + 0.01 * self.quiet(x)


def measured(
    model: nn.Module, x: Tensor, *, ranking: RankingOptions = PLAIN, criterion: str = "l1"
) -> tuple[Structure, Scores]:
    graph, structure, _ = read(model.eval(), x)
    scores = score(graph, structure.groups, [(x, torch.zeros(len(x), dtype=torch.long))], criterion=criterion)
    return structure, measure_scores(graph, structure, scores, list(torch.split(x, 32)), ranking)


def test_what_the_output_does_not_need_is_worth_little() -> None:
    torch.manual_seed(0)
    _, found = measured(Branches(), rows(120).float())
    worth = {name.partition(".")[0]: values.mean() for name, values in found.values.items()}
    assert worth["quiet"] < 1e-2 * worth["loud"]
    assert all(bool(np.isfinite(values).all()) and values.min() >= 0 for values in found.values.values())
    assert found.criterion == "l1, measured"


def test_units_that_others_carry_are_worth_least() -> None:
    model = two_layers(6).float()
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = model[0].weight[2], model[0].bias[2]
    structure, found = measured(model, rows(200).float())
    values = found.values[structure.groups.groups[0].name][0]
    assert int(values.argmin()) in (2, 5)
    assert values.min() < 0.05 * values.mean()


@pytest.mark.thorough
def test_measuring_again_gives_the_same_and_packs_do_not_matter() -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(6, 6), nn.ReLU())), nn.Linear(6, 3)),
        rows(90).float(),
    )
    graph, structure, _ = read(model.eval(), x)
    scores = score(graph, structure.groups, [], criterion="l1")
    found = [
        measure_scores(graph, structure, scores, [x], PLAIN, options=replace(SensitivityOptions(), limit_bytes=limit))
        for limit in (1 << 30, 1 << 30, 1)
    ]
    for other in found[1:]:
        assert all(np.array_equal(found[0].values[name], values) for name, values in other.values.items())


class FusedHeads(nn.Module):
    """One projection makes queries, keys and values, so that their dimensions must lose equally many."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 3 * 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1)


@pytest.mark.parametrize("limit", [1, 1 << 30])
def test_groups_that_lose_equally_many_are_measured_together(limit: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 5, 6)
    graph, structure, _ = read(FusedHeads().eval(), x)
    (coupled,) = structure.coupled
    scores = score(graph, structure.groups, [], criterion="l1")
    ranking = replace(PLAIN, kinds=("head_dim",))
    said: list[float] = []
    options = SensitivityOptions(limit_bytes=limit)
    found = measure_scores(graph, structure, scores, [x], ranking, options=options, progress=said.append)
    assert set(found.values) == coupled
    assert said[-1] == 1
    assert all(bool(np.isfinite(values).all()) for values in found.values.values())


def test_only_kinds_that_may_go_are_measured_and_progress_ends_at_one() -> None:
    x = rows(60).float()
    graph, structure, _ = read(Branches().eval(), x)
    scores = score(graph, structure.groups, [], criterion="l1")
    said: list[float] = []
    nothing = measure_scores(graph, structure, scores, [x], replace(PLAIN, kinds=("head",)), progress=said.append)
    assert not nothing.values
    assert not said
    measure_scores(graph, structure, scores, [x], PLAIN, progress=said.append)
    assert said[-1] == 1
    assert said == sorted(said)


def test_measuring_moves_from_its_first_batch_to_its_end() -> None:
    x = rows(120).float()
    graph, structure, _ = read(Branches().eval(), x)
    scores = score(graph, structure.groups, [], criterion="l1")
    said: list[float] = []
    measure_scores(graph, structure, scores, list(torch.split(x, 24)), PLAIN, progress=said.append)
    steps = np.diff([0.0, *said])
    assert said[0] < 0.1
    assert steps.max() < 0.3


def test_a_handful_of_images_will_do() -> None:
    _, found = measured(Branches(), rows(33).float()[:3])
    assert all(bool(np.isfinite(values).all()) for values in found.values.values())


class MadeUpFor(nn.Module):
    """What the early layer loses the head still finds in the image; what the late one loses nobody behind it does."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.middle = nn.Linear(6, 16), nn.Linear(16, 6)
        self.late, self.head = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.middle(functional.leaky_relu(self.early(x), 0.8))
        return self.head(self.late(torch.cat([seen, x], 1)).relu())


def test_a_loss_that_later_layers_make_up_for_counts_less() -> None:
    torch.manual_seed(0)
    x = rows(240).float()
    graph, structure, _ = read(MadeUpFor().eval(), x)
    scores = score(graph, structure.groups, [], criterion="l1")
    alone, together = (
        measure_scores(graph, structure, scores, list(torch.split(x, 48)), PLAIN, options=options).values
        for options in (SensitivityOptions(stretches=0), SensitivityOptions(repairing=128))
    )
    left = {name: float(together[name].mean() / alone[name].mean()) for name in alone}
    assert set(left) >= {"early", "late"}
    assert left["early"] < 0.75 * left["late"]


def test_a_loss_on_no_image_is_refused() -> None:
    graph = trace(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten()), torch.randn(2, 3, 4, 4)
    )
    structure = find_structure(graph, torch.randn(2, 3, 4, 4))
    scores = Scores("given", {g.name: np.ones((len(g.sites), g.size)) for g in structure.groups.groups}, 1)
    for batches in ([], [torch.zeros(0, 3, 4, 4)]):
        with pytest.raises(DataError, match="no image was given to measure losses on"):
            measure_scores(graph, structure, scores, batches, PLAIN)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_dead_layer_is_measured_and_repaired(value: float) -> None:
    """Inputs that are the same for every image leave no covariance to factorise."""

    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(3, 8, 3)
            self.head = nn.Linear(8, 4)
            nn.init.zeros_(self.a.weight)
            nn.init.constant_(self.a.bias, value)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.b(self.a(x).relu()) + self.c(x)).mean((2, 3)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    images = torch.randn(20, 3, 12, 12)
    graph = trace(Dead().eval(), images[:2])
    structure = find_structure(graph, images[:2])
    scores = score(graph, structure.groups, [], criterion="random")
    measured = measure_scores(graph, structure, scores, [images], RankingOptions(multiple=1))
    assert all(np.isfinite(values).all() for values in measured.values.values())
