"""What people hand over is taken as the network it stands for, or refused with the remedy; never changed."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao.quantization import FakeQuantize
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from compressor.errors import ModelError
from compressor.graph import trace
from compressor.graph.wrappers import plain
from compressor.inputs.checkpoints import state_hash
from compressor.inputs.models import Model
from compressor.pruning import find_structure
from compressor.recipe import make_recipe
from compressor.run.work import Request, prepare

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
    ).eval()


@pytest.mark.thorough
@pytest.mark.parametrize(
    "wrap",
    [torch.compile, nn.DataParallel, AveragedModel, lambda net: nn.DataParallel(torch.compile(net))],
    ids=["compiled", "data parallel", "averaged", "both"],
)
def test_a_wrapper_is_taken_off_and_said(wrap: Callable[[nn.Module], nn.Module]) -> None:
    bare = network()
    ready = plain(wrap(bare))
    assert type(ready.module) is nn.Sequential
    assert state_hash(ready.module) == state_hash(bare)
    assert any("taken off" in note for note in ready.notes)
    assert torch.allclose(trace(wrap(bare), EXAMPLE)(EXAMPLE), bare(EXAMPLE), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_converted_in_a_copy(dtype: torch.dtype) -> None:
    given = network().to(dtype)
    ready = plain(given)
    assert {p.dtype for p in ready.module.parameters()} == {torch.float32}
    assert {p.dtype for p in given.parameters()} == {dtype}
    assert any("float32" in note for note in ready.notes)


def masked(net: nn.Sequential) -> nn.Sequential:
    prune.l1_unstructured(net[2], "weight", 0.5)
    return net


@pytest.mark.parametrize(
    "compute",
    [
        lambda net: (nn.utils.weight_norm(net[0]), net)[1],
        lambda net: (nn.utils.spectral_norm(net[2]), net)[1],
        lambda net: (parametrizations.weight_norm(net[0]), net)[1],
        lambda net: (parametrizations.spectral_norm(net[2]), net)[1],
        lambda net: (parametrizations.orthogonal(net[2]), net)[1],
        masked,
    ],
    ids=["weight norm", "spectral norm", "new weight norm", "new spectral norm", "orthogonal", "mask"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_computed_from_others_are_folded(compute: Callable[[nn.Sequential], nn.Sequential]) -> None:
    given = compute(network())
    given.train()(EXAMPLE).sum().backward()  # what the hooks leave behind can't be copied as it is
    given.eval()
    expected, names = given(EXAMPLE), sorted(name for name, _ in given.named_parameters())
    ready = plain(given)
    assert torch.allclose(ready.module(EXAMPLE), expected, atol=1e-6)
    assert sorted(name for name, _ in ready.module.named_parameters()) == sorted(
        n for n, _ in network().named_parameters()
    )
    assert sorted(name for name, _ in given.named_parameters()) == names
    groups = find_structure(trace(given, EXAMPLE), EXAMPLE).groups.groups
    assert [group.name for group in groups] == ["0", "2"]


def fake_quantised() -> nn.Module:
    return nn.Sequential(network(), FakeQuantize())


def dynamically_quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(network(), {nn.Linear}, dtype=torch.qint8)


def with_a_lock(layers: nn.Module) -> nn.Module:
    layers.get_submodule("0").lock = threading.Lock()  # type: ignore[assignment]
    return layers


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (fake_quantised, "float network"),
        (dynamically_quantised, "float network"),
        (lambda: torch.jit.script(network()), "TorchScript"),
        (lambda: torch.jit.trace(network(), EXAMPLE), "TorchScript"),
        (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), "no shape yet"),
        (lambda: copy.deepcopy(network()).to("meta"), "meta device"),
        (lambda: torch.export.export(network(), (EXAMPLE,)).module(), "exported by torch.export"),
        (lambda: nn.ModuleDict({"global": network()}), "'global' can't be traced .* Python's own words"),
        (lambda: nn.ModuleDict({'the "best"': network()}), "quotation mark"),
        (lambda: with_a_lock(network().half()), "can't be copied for its attribute '0.lock'"),
    ],
    ids=[
        *("fake quantised", "quantised", "scripted", "traced", "lazy", "meta"),
        *("exported", "a word of Python's", "a quotation mark", "a lock"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_what_has_no_plain_form_is_refused_with_the_remedy(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        plain(make())


def test_a_plain_network_is_itself() -> None:
    bare = network()
    assert plain(bare).module is bare
    assert plain(bare).notes == ()


def test_what_was_done_to_the_model_is_said(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    recipe = make_recipe({"model": "wrapped", "size": 8, "mean": 0.5, "std": 0.25, "out": str(tmp_path / "run")})
    recipe = replace(recipe, mean=(0.5,) * 3, std=(0.25,) * 3)
    ready = plain(nn.DataParallel(network().half()))
    model = Model(ready.module, "", "given", None, None, state_hash(ready.module), ready.notes)
    work = prepare(Request(recipe, model, (pixels, np.arange(24) % 4)), lambda stage, share: None)
    assert [any(word in said for said in work.warnings) for word in ("DataParallel", "float32")] == [True, True]
