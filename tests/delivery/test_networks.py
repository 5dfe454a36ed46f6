"""PyTorch's ways to run a network: one contract, and a reason where one is not here."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from compressor.delivery.networks import WAYS, caller, unavailable
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
