"""Compensation: exact where the removed units are redundant, least squares where they are not, and nothing hidden."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import os
import resource
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from compressor.graph import Watcher, fetch, store, trace
from compressor.graph.lockstep import Lockstep, changed_nodes
from compressor.graph.windows import position_count, rows_of, targets_of
from compressor.pruning.check import find_structure
from compressor.pruning.surgery import prune
from compressor.records import Compensation, Plan, Slices
from compressor.repair import compensation as subject
from compressor.repair import dual, gathering, least_squares
from compressor.repair.compensation import CompensationOptions, compensate
from compressor.repair.consumers import find_layers, schedule, window_of

from .conftest import ORDER_TOLERANCE, RANK_TOLERANCE, distance, sliced

# The weakest ridge leaves an error of its own size where the fit could be perfect.
RIDGE_TOLERANCE = 1e-3
IMAGES = 48


def answer(graph: fx.GraphModule, x: Tensor) -> Tensor:
    with torch.no_grad():
        return graph(x)[0] if isinstance(graph(x), (tuple, list)) else graph(x)


def randomised(model: nn.Module) -> nn.Module:
    """Normalisations with statistics and gains that show when they are forgotten."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            for tensor, low in ((module.running_mean, -0.5), (module.running_var, 0.5), (module.bias, -0.5)):
                assert tensor is not None
                tensor.data = torch.rand(tensor.shape, generator=generator) + low
            module.weight.data = torch.rand(module.weight.shape, generator=generator) + 0.5
    return model.eval()


CONSUMERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(8, 5, 3, padding=1), (9, 9)),
    "strided dilated conv2d": (lambda: nn.Conv2d(8, 5, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(2, 1)), (9, 9)),
    "same-padded conv2d": (lambda: nn.Conv2d(8, 5, (2, 3), padding="same"), (9, 9)),
    "1x1 without bias": (lambda: nn.Conv2d(8, 5, 1, bias=False), (6, 6)),
    "conv1d": (lambda: nn.Conv1d(8, 5, 3, padding=1), (12,)),
    "conv3d": (lambda: nn.Conv3d(8, 5, (1, 2, 2), padding=(0, 1, 1)), (2, 5, 5)),
    "linear": (lambda: nn.Linear(8, 5), ()),
    "linear without bias": (lambda: nn.Linear(8, 5, bias=False), ()),
}


@functools.cache
def redundant(kind: str) -> tuple[fx.GraphModule, fx.GraphModule, Slices, Tensor]:
    """A producer whose last four of eight units are multiples of the first four, and they are cut."""
    torch.manual_seed(0)
    make, size = CONSUMERS[kind]
    consumer = make()
    convolution = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(size)]
    producer = convolution(3, 8, 1) if size else nn.Linear(3, 8)
    with torch.no_grad():
        producer.weight[4:] = 0.5 * producer.weight[:4]
        producer.bias[4:] = 0.5 * producer.bias[:4]
    images = torch.randn(IMAGES, 3, *size)
    dense = trace(nn.Sequential(producer, nn.ReLU(), consumer), images[:2])
    half = list(range(4))
    pruned, slices = sliced(dense, {"0.weight": {0: half}, "0.bias": {0: half}, "2.weight": {1: half}})
    return dense, pruned, slices, images


@pytest.mark.parametrize("kind", CONSUMERS)
def test_redundant_units_leave_no_trace(kind: str) -> None:
    dense, pruned, slices, images = redundant(kind)
    pruned = copy.deepcopy(pruned)
    assert distance(answer(pruned, images), answer(dense, images)) > 0.05
    found = compensate(dense, pruned, slices, images.split(16))
    assert [layer.layer for layer in found.repaired] == ["2"]
    assert distance(answer(pruned, images), answer(dense, images)) < RIDGE_TOLERANCE
    assert found.repaired[0].error_after < RIDGE_TOLERANCE < found.repaired[0].error_before


def test_the_dense_graph_and_untouched_parameters_stay_bit_equal() -> None:
    dense, pruned, slices, images = redundant("conv2d")
    pruned, before = copy.deepcopy(pruned), copy.deepcopy(dense.state_dict())
    own = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    compensate(dense, pruned, slices, [(images, torch.zeros(IMAGES))])
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    assert torch.equal(pruned.state_dict()["0.weight"], own["0.weight"])
    assert not torch.equal(pruned.state_dict()["2.weight"], own["2.weight"])


def test_a_layer_too_wide_for_a_matrix_is_solved_by_its_rows() -> None:
    dense, pruned, slices, images = redundant("conv2d")
    bare = float((pruned(images) - dense(images)).detach().square().sum())
    found = compensate(dense, pruned, slices, images.split(16), options=CompensationOptions(widest=30))
    assert [layer.layer for layer in found.repaired] == ["2"]
    assert float((pruned(images) - dense(images)).detach().square().sum()) < 1e-6 * bare


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_rows_times_weights_are_the_convolution(groups: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(1, 2), groups=groups).double()
    x = torch.randn(4, 8, 7, 9, dtype=torch.float64)
    graph = trace(layer, x[:2])
    node = next(n for n in graph.graph.nodes if n.op == "call_function")
    y = layer(x).detach()
    window = window_of(node, layer.weight)
    positions = torch.tensor([0, 3, 11, y[0, 0].numel() - 1])
    assert position_count(x, window) == y[0, 0].numel()
    rows, targets = rows_of(x, window, positions), targets_of(y, window, positions)
    weights = layer.weight.detach().reshape(groups, 16 // groups, -1)
    made = rows @ weights.mT.unsqueeze(1) + layer.bias.detach().reshape(groups, 1, 1, -1)
    assert rows.shape == (groups, 4, 4, 8 // groups * 6)
    assert float((made - targets).abs().max()) < ORDER_TOLERANCE


def test_the_fit_is_numpys_least_squares() -> None:
    torch.manual_seed(0)
    dense = trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.randn(2, 3, 8, 8))
    images = torch.randn(IMAGES, 3, 8, 8)
    half = [1, 2, 5, 7]
    pruned, slices = sliced(dense, {"0.weight": {0: half}, "0.bias": {0: half}, "2.weight": {1: half}})
    compensate(dense, pruned, slices, [images], options=CompensationOptions(ridges=(1e-12,)))
    with torch.no_grad():
        inputs = functional.relu(functional.conv2d(images, fetch(pruned, "0.weight"), fetch(pruned, "0.bias")))
    rows = functional.unfold(inputs, 3).mT.reshape(-1, 36).double().numpy()
    rows = np.concatenate([rows, np.ones((len(rows), 1))], 1)
    targets = answer(dense, images).flatten(2).mT.reshape(-1, 4).double().numpy()
    oracle = np.linalg.lstsq(rows, targets, rcond=None)[0].T
    assert np.abs(fetch(pruned, "2.weight").detach().reshape(4, -1).numpy() - oracle[:, :-1]).max() < RANK_TOLERANCE
    assert np.abs(fetch(pruned, "2.bias").detach().numpy() - oracle[:, -1]).max() < RANK_TOLERANCE


class Depthwise(nn.Module):
    """Inverted residual: expand, depthwise, project, with normalisations and no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.n1 = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depth, self.n2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.project, self.n3 = nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu6(self.n1(self.expand(x)))
        y = functional.relu6(self.n2(self.depth(y)))
        return self.last((x + self.n3(self.project(y))).mean((2, 3)))


def narrowed(dense: fx.GraphModule, kept: list[int]) -> tuple[fx.GraphModule, Slices]:
    names = [f"{n}.{t}" for n in ("n1", "n2") for t in ("weight", "bias", "running_mean", "running_var")]
    cuts: dict[str, dict[int, list[int]]] = {name: {0: kept} for name in ("expand.weight", "depth.weight", *names)}
    pruned, slices = sliced(dense, cuts | {"project.weight": {1: kept}})
    node = next(n for n in pruned.graph.nodes if n.target is torch.ops.aten.conv2d.default and len(n.args) > 6)
    node.update_arg(6, len(kept))
    pruned.recompile()
    return pruned, slices


@functools.cache
def inverted_residual() -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    model = randomised(Depthwise())
    return trace(model, torch.randn(2, 6, 8, 8)), torch.randn(IMAGES, 6, 8, 8)


def test_depthwise_and_the_mean_behind_a_normalisation() -> None:
    dense, images = inverted_residual()
    pruned, slices = narrowed(dense, [0, 2, 3, 5, 8, 9, 11])
    raw = distance(answer(pruned, images), answer(dense, images))
    found = compensate(dense, pruned, slices, images.split(20))
    assert {layer.layer for layer in found.repaired} <= {"depth", "project", "last"}
    assert "project" in {layer.layer for layer in found.repaired}
    assert distance(answer(pruned, images), answer(dense, images)) < 0.5 * raw
    means = []
    for graph in (dense, pruned):
        seen: dict[str, Tensor] = {}
        Watcher(graph, lambda node, value, seen=seen: seen.setdefault(node.name, value)).run(images)
        means.append(seen["batch_norm_2"].detach().mean((0, 2, 3)))
    assert float((means[0] - means[1]).abs().max()) < RANK_TOLERANCE


def test_a_perturbed_depthwise_convolution_is_refitted_channel_by_channel() -> None:
    """Its inputs are halved before it: every channel's own kernel can double to make up for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU())
    images = torch.randn(IMAGES, 3, 6, 6)
    dense = trace(model, images[:2])
    pruned, slices = sliced(
        dense, {"0.weight": {0: [0, 1, 2, 4]}, "1.weight": {0: [0, 1, 2, 4]}, "1.bias": {0: [0, 1, 2, 4]}}
    )
    store(pruned, "0.weight", 0.5 * fetch(pruned, "0.weight").detach())
    node = [n for n in pruned.graph.nodes if n.op == "call_function"][1]
    node.update_arg(6, 4)
    pruned.recompile()
    compensate(dense, pruned, slices, [images])
    assert distance(answer(pruned, images), answer(dense, images)[:, [0, 1, 2, 4]]) < RIDGE_TOLERANCE


class Residual(nn.Module):
    """The second branch's last layer can make up for what the first one lost from the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 6)
        self.c, self.d = nn.Linear(6, 32), nn.Linear(32, 6)
        self.gain = nn.Parameter(torch.full((6,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(functional.relu(self.a(x)))
        return self.gain * self.d(functional.relu(self.c(x))) + x


def test_a_later_layer_makes_up_for_what_the_stream_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    images = torch.randn(400, 6)
    dense = trace(Residual(), images[:2])
    few = list(range(5))
    pruned, slices = sliced(dense, {"a.weight": {0: few}, "a.bias": {0: few}, "b.weight": {1: few}})
    corrected, plain = copy.deepcopy(pruned), copy.deepcopy(pruned)
    compensate(dense, corrected, slices, [images])
    monkeypatch.setattr("compressor.repair.consumers._partner", lambda at, changed: None)
    compensate(dense, plain, slices, [images])
    errors = [distance(answer(graph, images), answer(dense, images)) for graph in (corrected, plain)]
    assert errors[0] < 0.7 * errors[1]


class Downsample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.one, self.two, self.short = (
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.Conv2d(8, 6, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        return self.two(functional.relu(self.one(x))) + self.short(x)


def test_the_shortcut_is_computed_before_the_layer_it_is_added_to() -> None:
    dense = trace(Downsample(), torch.randn(2, 3, 6, 6))
    layers, _ = find_layers(dense, set(dense.graph.nodes))
    order = schedule(dense, layers)
    assert len(order) == len(dense.graph.nodes) == len(set(order))
    at = {node: index for index, node in enumerate(order)}
    assert all(at[used] < at[node] for node in order for used in node.all_input_nodes)
    named = {layer.name: node for node, layer in layers.items()}
    assert at[named["short"]] < at[named["two"]]


class Awkward(nn.Module):
    """A tied weight, a standardised weight and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied, self.up = nn.Linear(6, 6), nn.Linear(6, 6), nn.ConvTranspose1d(6, 4, 2)
        self.standard = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(functional.relu(self.tied(functional.relu(self.first(x)))))
        x = functional.linear(x, self.standard - self.standard.mean(1, keepdim=True)) @ self.standard
        return self.up(x.unsqueeze(-1))


def test_what_cannot_be_refitted_is_named_with_the_reason() -> None:
    dense = trace(Awkward(), torch.randn(2, 6))
    layers, left = find_layers(dense, set(dense.graph.nodes))
    assert [layer.name for layer in layers.values()] == ["first"]
    reasons = " ".join(item.reason for item in left)
    assert all(word in reasons for word in ("used again", "computed", "transposed", "product"))


class Towers(nn.Module):
    """Two images [N, 2, 3, H, W] through the same layers: one after the other or, stacked, as twice as many images."""

    def __init__(self, *, stacked: bool) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12)
        self.two, self.flat = nn.Conv2d(12, 10, 3, 2, 1, bias=False), nn.BatchNorm2d(10)
        self.three, self.stacked = nn.Linear(10, 6), stacked

    def tower(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm(self.one(x)))
        y = functional.relu(self.flat(self.two(y)))
        return self.three(y.mean((2, 3)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        if self.stacked:
            return self.tower(x.flatten(0, 1)).unflatten(0, (-1, 2)).flatten(1)
        return torch.cat([self.tower(x[:, 0]), self.tower(x[:, 1])], 1)


class Levels(nn.Module):
    """One head on three maps, each with a normalisation of its own behind it, then a residual branch in each."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList([nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)])
        self.head, self.branch = nn.Conv2d(8, 12, 3, 1, 1), nn.Conv2d(12, 12, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(12) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        answers = []
        for convolution, norm in zip(self.maps, self.norms, strict=True):
            x = functional.relu(convolution(x))
            y = functional.relu(norm(self.head(x)))
            answers.append((y + self.branch(y)).mean((2, 3)))
        return torch.cat(answers, 1)


def repaired(
    model: nn.Module, cuts: dict[str, dict[int, list[int]]], images: Tensor
) -> tuple[fx.GraphModule, fx.GraphModule, Compensation]:
    """The dense graph, and the one cut by hand and refitted with all rows of these images."""
    dense = trace(model.eval(), images[:2])
    pruned, slices = sliced(dense, cuts)
    record = compensate(dense, pruned, slices, images.split(16), options=CompensationOptions(clamps=False))
    return dense, pruned, record


KEPT = [0, 2, 3, 5, 7, 8, 10]
IN_TOWERS = {
    **{name: {0: KEPT} for name in ("one.weight", "one.bias", "norm.weight", "norm.bias")},
    **{name: {0: KEPT} for name in ("norm.running_mean", "norm.running_var")},
    "two.weight": {1: KEPT},
}


def test_twin_towers_are_refitted_as_one_tower_on_twice_as_many_images() -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 2, 3, 12, 12)
    twin = Towers(stacked=False)
    stacked = Towers(stacked=True)
    stacked.load_state_dict(twin.state_dict())
    dense, pruned, record = repaired(twin, IN_TOWERS, images)
    _, expected, expected_record = repaired(stacked, IN_TOWERS, images)
    names = [layer.layer for layer in record.repaired]
    assert names == [layer.layer for layer in expected_record.repaired] == ["two", "three"]
    assert [layer.rows for layer in record.repaired] == [layer.rows for layer in expected_record.repaired]
    for name, value in pruned.state_dict().items():
        # sums over the same rows in another order
        assert torch.allclose(value, expected.state_dict()[name], atol=1e-4), name
    with torch.no_grad():
        bare = sliced(dense, IN_TOWERS)[0]
        assert distance(pruned(images), dense(images)) < distance(bare(images), dense(images))


def test_a_head_on_several_maps_is_refitted_on_all_of_them() -> None:
    torch.manual_seed(0)
    images = torch.randn(48, 3, 24, 24)
    kept = [0, 1, 3, 4, 6]
    cuts: dict[str, dict[int, list[int]]] = {"head.weight": {1: kept}}
    for number in range(3):
        cuts[f"maps.{number}.weight"] = {0: kept} if number == 0 else {0: kept, 1: kept}
        cuts[f"maps.{number}.bias"] = {0: kept}
    dense, pruned, record = repaired(Levels(), cuts, images)
    assert {"head", "branch"} <= {layer.layer for layer in record.repaired}
    assert not record.left_alone
    unrepaired = sliced(dense, cuts)[0]
    for level in (slice(0, 12), slice(12, 24), slice(24, 36)):
        expected = dense(images)[:, level]
        with torch.no_grad():
            assert distance(pruned(images)[:, level], expected) < distance(unrepaired(images)[:, level], expected)


def test_all_inputs_of_a_shared_weight_come_before_its_first_use() -> None:
    dense = trace(Levels(), torch.randn(2, 3, 24, 24))
    layers, _ = find_layers(dense, set(dense.graph.nodes))
    order = schedule(dense, layers)
    assert len(order) == len(dense.graph.nodes) == len(set(order))
    at = {node: index for index, node in enumerate(order)}
    assert all(at[used] < at[node] for node in order for used in node.all_input_nodes)
    (head,) = (layer for layer in layers.values() if layer.name == "head")
    places = [at[use.node] for use in head.uses]
    assert places == list(range(places[0], places[0] + 3))


def test_spilled_activations_give_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dense, images = inverted_residual()
    kept = [0, 2, 3, 5, 8, 9, 11]
    (held, slices), (spilled, _) = narrowed(dense, kept), narrowed(dense, kept)
    folders: list[int] = []
    leave = Lockstep.__exit__

    def count_and_leave(walk: Lockstep, *how: object) -> None:
        folders.append(len(list(tmp_path.glob("compressor-*"))))
        leave(walk, *how)

    monkeypatch.setattr(Lockstep, "__exit__", count_and_leave)
    options = CompensationOptions(clamps=False)  # the clamped fit needs rows in memory, and 0 bytes hold none
    compensate(dense, held, slices, images.split(16), options=options)
    compensate(dense, spilled, slices, images.split(16), options=replace(options, limit_bytes=0))
    assert folders[0] == 0 < folders[1]
    assert all(torch.equal(a, b) for a, b in zip(held.parameters(), spilled.parameters(), strict=True))
    assert not list(tmp_path.glob("compressor-*"))


def test_an_error_midway_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dense, images = inverted_residual()
    pruned, slices = narrowed(dense, [0, 1, 2, 3, 4, 5])
    monkeypatch.setattr(least_squares, "correction", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError, match="no room"):
        compensate(dense, pruned, slices, images.split(16), options=CompensationOptions(limit_bytes=0))
    assert not list(tmp_path.glob("compressor-*"))


def test_each_node_runs_once_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, images = inverted_residual()
    pruned, slices = narrowed(dense, [0, 2, 3, 5, 8, 9, 11])
    calls: list[str] = []
    run = gathering.run_node
    for place in ("graph.lockstep", "repair.gathering"):
        monkeypatch.setattr(f"compressor.{place}.run_node", lambda g, n, v: (calls.append(n.name), run(g, n, v))[1])
    compensate(dense, pruned, slices, images.split(16))
    changed = changed_nodes(dense, pruned)
    called = [node for node in dense.graph.nodes if node.op == "call_function"]
    limit = 3 * (len(called) + sum(node in changed for node in called))
    assert 0 < len(calls) <= limit


class PaddedShortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        wide = nn.functional.pad(x, (0, 0, 0, 0, 2, 2))
        return self.head((wide + self.conv(x.relu())).mean((2, 3)))


def test_a_node_is_changed_where_only_its_sizes_are() -> None:
    images = torch.randn(8, 3, 6, 6)
    dense = trace(PaddedShortcut().eval(), images)
    structure = find_structure(dense, images)
    stream = next(g for g in structure.groups.groups if g.kind == "stream")
    padded = [u for u in range(stream.size) if all((site.units == u).sum() == 0 for site in stream.sites[:1])]
    plan = Plan({stream.name: np.setdiff1d(np.arange(stream.size), padded[:1])}, 0, 0)
    pruned, slices = prune(dense, structure, plan)
    changed = {str(node.target) for node in changed_nodes(dense, pruned)}
    assert any("pad" in name for name in changed)
    assert compensate(dense, pruned, slices, images.split(4)).repaired


def moments_of(x: Tensor, y: Tensor) -> least_squares.Moments:
    """Of rows [groups, n, features] and targets, counted from their own mean."""
    sums = least_squares.MomentSums(*x.shape[::2], y.shape[-1], x.device, (x.mean(1), y.mean(1)))
    sums.add(x, y)
    return sums.moments()


def test_moments_are_those_of_the_rows_wherever_they_are_counted_from() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 50, n, generator=generator, dtype=torch.float64) + 3 for n in (5, 4))
    got, n = moments_of(x, y), torch.tensor(50.0, dtype=torch.float64)
    expected = n, x.sum(1), y.sum(1), x.mT @ x, x.mT @ y, y.square().sum(1)
    for a, b in zip(got.tensors(), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_a_spread_far_below_the_mean_survives_float32() -> None:
    """Products of 1000 with 1000 leave nothing of a variance of 1e-4 in float32, counted from the mean they do."""
    generator = torch.Generator().manual_seed(0)
    x = 1000 + 1e-2 * torch.randn(1, 4000, 6, generator=generator)
    problem = least_squares.problem_of(moments_of(x, x[..., :1]), intercept=True)
    expected = torch.cov(x[0].double().T, correction=0)
    assert torch.allclose(problem.xx[0], expected, rtol=1e-3, atol=1e-3 * float(expected.diagonal().mean()))


def test_wide_symmetric_products_are_made_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "BLOCK", 3)
    x = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = torch.zeros(2, 8, 8, dtype=torch.float64)
    least_squares.add_lower_product(total, x)
    assert torch.allclose(least_squares.mirrored(total), x.mT @ x)


@pytest.mark.parametrize("errors", ["5432123", "1234567", "7654321", "i543212", "iiiiii1"])
def test_the_best_ridge_is_found_downhill(errors: str) -> None:
    values = [float("inf") if e == "i" else float(e) for e in errors]
    asked: list[float] = []

    def error_of(ridge: float) -> float:
        asked.append(ridge)
        return values[int(ridge)]

    assert least_squares.least_of([float(i) for i in range(7)], error_of) == (float(np.argmin(values)), 1.0)
    assert len(asked) == len(set(asked))


def chosen(folds: list[least_squares.Moments], strengths: Sequence[float], start: Tensor) -> float | None:
    """The strength for a layer with these weights and no bias."""
    left = [least_squares.unexplained_by(start, fold) for fold in folds]
    none = torch.zeros(start.shape[:2], dtype=torch.float64)
    return least_squares.choose_ridge(left, strengths, none, intercept=True)


def test_both_forms_of_ridge_regression_agree() -> None:
    """More rows than features and the other way round; chosen strength, weights and offset."""
    generator = torch.Generator().manual_seed(0)
    strengths = (1e-3, 1e-1, 10.0)
    for n in (40, 9):
        x = torch.randn(n, 12, generator=generator, dtype=torch.float64) + 1
        truth = torch.randn(4, 12, generator=generator, dtype=torch.float64)
        y = x @ truth.mT + 0.3 * torch.randn(n, 4, generator=generator, dtype=torch.float64)
        start = truth + 0.5 * torch.randn(4, 12, generator=generator, dtype=torch.float64)
        fold = (torch.arange(n) >= n // 2).long()
        folds = [moments_of(x[fold == part][None], y[fold == part][None]) for part in (0, 1)]
        none = torch.zeros(1, 4, dtype=torch.float64)
        ridge = chosen(folds, strengths, start[None])
        found = dual.fit(dual.Sample(x, y, fold), strengths, start, none[0], intercept=True)
        assert ridge is not None
        assert found is not None
        assert found[0] == ridge
        total = folds[0] + folds[1]
        left = least_squares.unexplained_by(start[None], total)
        change = least_squares.correction(least_squares.problem_of(left, intercept=True), ridge)
        assert change is not None
        problem, weights = least_squares.problem_of(total, intercept=True), start[None] + change
        assert torch.allclose(found[1], weights[0], rtol=1e-6, atol=1e-8)
        assert torch.allclose(found[2], least_squares.intercept_of(problem, weights)[0], rtol=1e-6, atol=1e-8)


def test_a_refit_that_generalises_worse_is_not_kept() -> None:
    """One row to fit on and one to test: the start, exact but for a little noise, is better than any refit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 400, 6, generator=generator, dtype=torch.float64)
    start = torch.randn(1, 1, 6, generator=generator, dtype=torch.float64)
    y = x @ start.mT + 0.1 * torch.randn(1, 400, 1, generator=generator, dtype=torch.float64)
    folds = [moments_of(x[:, part], y[:, part]) for part in (slice(8), slice(8, 16))]
    assert chosen(folds, (1e-9, 1e-6), start) is None
    assert chosen(folds, (1e-9, 1e-6), 0 * start) is not None


def test_the_chosen_ridge_is_the_best_on_fresh_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 40_000, 12, generator=generator, dtype=torch.float64)
    truth = torch.randn(1, 1, 12, generator=generator, dtype=torch.float64)
    y = x @ truth.mT + 3 * torch.randn(1, 40_000, 1, generator=generator, dtype=torch.float64)
    folds = [moments_of(x[:, part], y[:, part]) for part in (slice(30), slice(30, 60))]
    start = truth + 0.1
    ridge = chosen(folds, subject.RIDGES, start)
    assert ridge is not None
    assert ridge >= 1.0


def _compensated(rank: int, world: int) -> tuple[Compensation, list[Tensor]]:
    dense, images = inverted_residual()
    pruned, slices = narrowed(dense, [0, 2, 3, 5, 8, 9, 11])
    found = compensate(dense, pruned, slices, images[rank::world].split(10))
    return found, [parameter.detach() for parameter in pruned.parameters()]


def _run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        _, parameters = _compensated(rank, 2)
        np.savez(f"{folder}/{rank}.npz", *[parameter.numpy() for parameter in parameters])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.thorough
def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    _, alone = _compensated(0, 1)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_run, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(400)
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (list(np.load(tmp_path / f"{rank}.npz").values()) for rank in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(np.abs(a - b.numpy()).max() < RANK_TOLERANCE for a, b in zip(first, alone, strict=True))


@pytest.mark.slow
def test_resnet50_at_256_images_stays_under_6_gigabytes(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_resnet50, args=(str(tmp_path),))
    process.start()
    process.join(3000)
    assert torchvision is not None
    peak_bytes, cpu_s = np.loadtxt(tmp_path / "peak")
    assert peak_bytes < 6e9
    assert cpu_s < 2 * 600


def _resnet50(folder: str) -> None:
    from torchvision.models import resnet50

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    dense = trace(randomised(resnet50(weights=None)), torch.randn(2, 3, 224, 224))
    cuts: dict[str, dict[int, list[int]]] = {}
    for name, parameter in dense.named_parameters():
        block, layer = name.rsplit(".", 2)[0], name.split(".")[-2]
        if name.endswith(("conv1.weight", "conv2.weight")) and name.startswith("layer"):
            half = list(range(0, parameter.shape[0], 2))
            cuts.setdefault(name, {})[0] = half
            cuts.setdefault(f"{block}.conv{int(layer[-1]) + 1}.weight", {})[1] = half
            for kind in ("weight", "bias", "running_mean", "running_var"):
                cuts[f"{block}.bn{layer[-1]}.{kind}"] = {0: half}
    pruned, slices = sliced(dense, cuts)
    compensate(dense, pruned, slices, (torch.randn(32, 3, 224, 224) for _ in range(8)))
    used = resource.getrusage(resource.RUSAGE_SELF)
    np.savetxt(Path(folder) / "peak", [used.ru_maxrss * 1024, used.ru_utime + used.ru_stime])
