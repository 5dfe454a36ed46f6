"""Statistics are the images' own, layer after layer, on graphs and on modules."""

from __future__ import annotations

import copy
import functools

import numpy as np
import torch
from torch import Tensor, fx, nn

from compressor.graph import fetch, store, trace
from compressor.records import Slices
from compressor.repair.batchnorm import reestimate

# The statistics are float64 sums stored in float32.
FLOAT32_TOLERANCE = 2e-5


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(64, 5), nn.BatchNorm1d(5)).eval()
    for module in model:
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def images() -> Tensor:
    return 2 + 3 * torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def worst(found: nn.Module) -> float:
    """How far the stored statistics are from those of what each normalisation is given, in float64, all at once."""
    model = network().double()
    model.load_state_dict(
        {name: found.state_dict()[name] for name in model.state_dict() if name in found.state_dict()}, strict=False
    )
    differences = []

    def compare(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        flat = given[0].transpose(0, 1).flatten(1)
        differences.extend([flat.mean(1) - norm.running_mean, flat.var(1) - norm.running_var])

    for module in model:
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.register_forward_pre_hook(compare)
    with torch.no_grad():
        model(images().double())
    assert len(differences) == 6
    return max(float(difference.abs().max()) for difference in differences)


@functools.cache
def traced() -> fx.GraphModule:
    return trace(network(), images()[:2])


def test_a_graph_gets_the_pooled_statistics_whatever_the_batches() -> None:
    graph = copy.deepcopy(traced())
    assert reestimate(graph, images().split(7)) == ("1", "4", "7")
    assert worst(graph) < FLOAT32_TOLERANCE


def test_a_module_gets_them_too_and_keeps_its_mode() -> None:
    model = network().train()
    model[3].eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    reestimate(model, [(part, torch.zeros(len(part))) for part in images().split(16)])
    assert worst(model) < FLOAT32_TOLERANCE
    assert [model.training, model[3].training, model[4].training] == [True, False, True]
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_against_a_reference_outputs_get_the_reference_mean_and_variance() -> None:
    """Statistics that never were the data's, as in a folded network: half the channels go, the rest is disturbed."""
    dense, kept = traced(), [0, 2, 5]
    pruned, slices = copy.deepcopy(dense), {}
    for name, axis in (("0.weight", 0), ("0.bias", 0), ("3.weight", 1), *((f"1.{t}", 0) for t in NORM)):
        whole = fetch(dense, name).detach()
        index = [np.arange(size) for size in whole.shape]
        index[axis] = np.array(kept)
        slices[name] = tuple(index)
        store(pruned, name, whole[np.ix_(*index)].clone())
    changed = reestimate(pruned, images().split(7), reference=dense, slices=Slices(slices))
    assert changed == ("1", "4", "7")
    with torch.no_grad():
        out, expected = (graph(images()) for graph in (pruned, dense))
        out, expected = (value if isinstance(value, Tensor) else value[0] for value in (out, expected))
    assert float((out.mean(0) - expected.mean(0)).abs().max()) < 50 * FLOAT32_TOLERANCE
    assert float((out.std(0) - expected.std(0)).abs().max()) < 50 * FLOAT32_TOLERANCE


def test_against_itself_nothing_moves() -> None:
    graph = copy.deepcopy(traced())
    reestimate(graph, images().split(7), reference=traced())
    pairs = zip(graph.buffers(), traced().buffers(), strict=True)
    assert max(float((own - other).abs().max()) for own, other in pairs) < FLOAT32_TOLERANCE


NORM = ("weight", "bias", "running_mean", "running_var")
