"""Operations with several names come out of tracing under one, and what changes nothing comes out as nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.graph import trace
from compressor.pruning import find_structure

aten = torch.ops.aten
TOLERANCE = 1e-6  # the same operations under other names; a wrong axis or row shows as O(1)


class Renamed(nn.Module):
    """The same operations as plain code has them, by other names."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.concat([x, torch.absolute(x)], 1)  # [N, 8, 6]
        y = torch.hstack([y, torch.multiply(x, 2.0)]).swapaxes(1, 2).tile(2, 1)  # [N, 12, 12]
        return torch.clip(torch.subtract(y, 0.1), -1.0, 1.0)


class Written(nn.Module):
    """Writes to parts of a tensor, by index and by slice, and to all of it."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, 0] = x[:, 1]
        y[:, -1] = 3 * x[:, 2]
        y[:, 1:3, 2:] = x[:, :2, 2:] + 1
        z = torch.empty_like(x)
        z[:] = y
        return z


class Cast(nn.Module):
    """A table that takes its type from the input, and casts to the type that is there already."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = torch.meshgrid(torch.arange(4).type_as(x), torch.arange(6).to(x.dtype), indexing="ij")
        return (x.float().type_as(rows) + rows * columns).to(torch.float32)


def _targets(model: nn.Module) -> set[object]:
    """The operations of the trace, which must compute what the model does at another batch size."""
    graph = trace(model, torch.randn(2, 4, 6))
    images = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(graph(images), model(images), atol=TOLERANCE)
    assert all("val" in node.meta for node in graph.graph.nodes if node.op != "output")
    return {node.target for node in graph.graph.nodes if node.op == "call_function"}


def test_other_names_become_the_first() -> None:
    expected = {aten.cat.default, aten.abs.default, aten.mul.Tensor, aten.transpose.int, aten.repeat.default}
    assert _targets(Renamed()) == expected | {aten.sub.Tensor, aten.clamp.default}


def test_writes_to_parts_are_joined_and_to_the_whole_none() -> None:
    targets = _targets(Written())
    assert aten.cat.default in targets
    assert targets.isdisjoint({aten.copy.default, aten.select_scatter.default, aten.slice_scatter.default})


def test_writes_in_strides_and_of_a_number_in_memory_nobody_wrote() -> None:
    class Striding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.empty(x.shape, device=x.device)
            y[:, ::2], y[:, 1::2] = x[:, 1::2], x[:, ::2]
            y[:, :, 0] = 2
            return y

    targets = _targets(Striding())
    assert aten.slice_scatter.default in targets
    assert targets.isdisjoint({aten.empty.memory_format, aten.fill.Scalar})


class PartlyMixed(nn.Module):
    """A quarter of the channels goes through a layer of its own and is written back, as in FasterNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(2, 2, 3, 1, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x.clone()
        y[:, :2] = self.mix(y[:, :2])
        return self.head(x + y)  # type: ignore[no-any-return]


def test_channels_that_are_partly_written_over_may_go() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8)
    groups = find_structure(trace(PartlyMixed().eval(), images), images).groups
    assert sum(group.size for group in groups.groups) == 8
    assert not [layer for layer in groups.left_alone if layer.operation != "output"]


def test_a_cast_to_the_same_type_is_dropped_and_a_table_of_the_inputs_type_is_a_constant() -> None:
    assert _targets(Cast()) == {aten.add.Tensor}


def test_a_cast_to_another_type_stays() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x > 0).type_as(x) * x.half().float()

    targets = _targets(Halves())
    assert aten.to.dtype in targets or aten._to_copy.default in targets
    assert aten.type_as.default not in targets


class Normalised(nn.Module):
    """Stretched to what it divides, twice; to what is stretched too; to be read as it is."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        norm = x.norm(dim=1, keepdim=True)
        match self.way:
            case "divides":
                stretched = norm.expand_as(x)
                return x / stretched + stretched * x
            case "both":
                return norm.expand_as(x) / x.mean(2, keepdim=True).expand_as(x)
        return torch.cat([x, norm.expand_as(x)], 1)


@pytest.mark.parametrize(("way", "is_gone"), [("divides", True), ("both", False), ("joins", False)])
def test_what_is_stretched_by_its_reader_is_not_stretched_before(way: str, is_gone: bool) -> None:
    assert (aten.expand.default not in _targets(Normalised(way))) is is_gone


def test_channels_behind_a_normalisation_over_them_may_go() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), _Unit(), nn.Conv2d(8, 4, 3))
    images = torch.randn(2, 3, 8, 8)
    groups = find_structure(trace(layers.eval(), images), images).groups
    assert [(group.name, group.size) for group in groups.groups] == [("0", 8)]


class _Unit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=1)


class Standardised(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=(1, 2), keepdim=True, correction=0)
        deviation, _ = torch.var_mean(x, (1,), unbiased=True)
        return (x - mean) / (var + 1e-5).sqrt() + deviation.unsqueeze(1)


def test_variance_and_mean_in_one_are_two() -> None:
    targets = _targets(Standardised())
    assert {aten.var_mean.dim, aten.var_mean.correction}.isdisjoint(targets)
    assert aten.mean.dim in targets
    assert targets & {aten.var.dim, aten.var.correction}


class Distances(nn.Module):
    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, x[:, :3].flip(1) * 2, **self.settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{}, {"p": 1}, {"compute_mode": "donot_use_mm_for_euclid_dist"}], ids=str)
def test_distances_between_few_rows_are_spelled(settings: dict[str, object]) -> None:
    assert aten.cdist.default not in _targets(Distances(**settings))


@pytest.mark.parametrize("settings", [{"p": 3}, {"compute_mode": "use_mm_for_euclid_dist"}], ids=str)
def test_other_distances_stay(settings: dict[str, object]) -> None:
    assert aten.cdist.default in _targets(Distances(**settings))


def test_the_gradient_of_a_distance_of_nothing_is_a_number() -> None:
    x = torch.randn(2, 4, 6)
    graph = trace(Distances(), x)
    x = x[:, :1].expand(-1, 4, -1).clone().requires_grad_()
    graph(x * torch.tensor([0.0, 1.0]).view(2, 1, 1)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
