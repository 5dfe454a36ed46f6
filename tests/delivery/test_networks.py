"""PyTorch's ways to run a network: one contract, and a reason where one is not here."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.delivery import networks
from compressor.delivery.latency import crowd_of
from compressor.delivery.networks import WAYS, caller, unavailable
from compressor.device.environment import Environment
from compressor.device.timing import Schedule, Timing
from compressor.errors import EngineError, InputError

SAME = 1e-4  # float32 in another order, and fused


@pytest.mark.parametrize("way", [pytest.param(w, marks=[pytest.mark.slow] * ("compile" in w)) for w in WAYS])
def test_every_way_computes_the_network(way: str, small: nn.Module) -> None:
    if unavailable(way):
        pytest.skip(f"{way}: {unavailable(way)}")
    x = np.random.default_rng(0).standard_normal((3, 3, 12, 12), dtype=np.float32)
    with torch.no_grad():
        expected = small(torch.from_numpy(x)).numpy()
    call = caller(copy.deepcopy(small), way)
    np.testing.assert_allclose(call(x), expected, atol=SAME)
    np.testing.assert_allclose(call(x[:1]), expected[:1], atol=SAME)  # another shape


def test_what_is_not_here_says_why() -> None:
    with pytest.raises(InputError, match="Did you mean 'pytorch-compile'"):
        unavailable("pytorch-compiled")
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match=r"can't run pytorch-cuda-graph: no GPU"):
            caller(nn.Identity(), "pytorch-cuda-graph")


@pytest.mark.parametrize("compiler", ["g++", "c++", "clang++", ""])
def test_compiling_needs_any_one_compiler(monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    monkeypatch.setattr(networks.shutil, "which", lambda name: f"/bin/{name}" if name == compiler else None)
    reason = unavailable("pytorch-compile")
    assert ("install g++" in reason) == (not compiler)
    assert unavailable("pytorch") == ""


class Counting(nn.Module):
    """Says of each call whether gradients were recorded, and how many images came."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[bool, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((torch.is_grad_enabled(), len(x)))
        return x.flatten(1)


def test_a_call_runs_the_network_once_on_all_images_and_records_no_gradient() -> None:
    network = Counting()
    call = caller(network, "pytorch")
    images = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    outputs = call(images)
    assert network.calls == [(False, 2)]
    np.testing.assert_array_equal(outputs, images.reshape(2, 12))


def timing(load: str, cores: str = "2") -> Timing:
    environment = Environment({"cores": cores}, {}, {"load_average": load}, "f")
    return Timing("dense", "onnxruntime", Schedule(), (1.0,), (0,), 1, True, environment)


def test_the_busiest_beginning_of_a_timing_is_the_one_that_is_said() -> None:
    assert crowd_of([timing("0.5 0 0"), timing("7.2 0 0"), timing("3.1 0 0")]) == "busy machine: load 7.2 on 2 cores"
    assert crowd_of([timing("2.4 9 9"), timing("")]) == ""
    assert crowd_of([]) == ""
    unknown = replace(timing("9 9 9"), environment=Environment({}, {}, {"load_average": "9 9 9"}, "f"))
    assert crowd_of([unknown]) == ""
