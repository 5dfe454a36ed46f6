"""Tracing leaves the caller's model as it was, whatever happens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.graph import trace
from compressor.pruning import find_structure


class Failing(nn.Module):
    def __init__(self, error: BaseException | None) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.error = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2), error

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x))
        if self.error is not None:
            raise self.error
        return self.b(x.mean((2, 3)))


def observed(model: Failing) -> tuple[dict[str, Tensor], list[object]]:
    state = {n: t.clone() for n, t in model.state_dict().items()}
    modes: list[object] = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return state, [
        *modes,
        *(p.requires_grad for p in model.parameters()),
        *(p.grad is None for p in model.parameters()),
    ]


@pytest.mark.parametrize(
    ("error", "expected"),
    [(None, None), (ValueError("no"), ModelError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["inspect", "exception", "interrupt"],
)
def test_the_model_is_as_it_was(error: BaseException | None, expected: type[BaseException] | None) -> None:
    model, x = Failing(error).train(), torch.randn(2, 3, 8, 8)
    model.norm.eval()
    model.a.weight.requires_grad_(False)
    model.a.register_forward_hook(lambda *_: None)
    before, facts = observed(model)
    identities = [id(p) for p in model.parameters()]

    def inspect() -> None:
        find_structure(trace(model, x), x)

    _ends(inspect, expected)
    after, facts_after = observed(model)
    assert facts_after == facts
    assert [id(p) for p in model.parameters()] == identities
    assert all(torch.equal(after[n], before[n]) for n in before)


def _ends(act: Callable[[], None], expected: type[BaseException] | None) -> None:
    if expected is None:
        act()
    else:
        with pytest.raises(expected):
            act()


class Caching(nn.Module):
    """Keeps a table computed from a parameter in a plain attribute, as LeViT's attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cache = nn.Parameter(torch.randn(4)), {}
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if "t" not in self.cache:
            self.cache["t"] = self.table * 2
        return self.b(self.a(x.mean((2, 3))) * self.cache["t"])


def test_a_cached_tensor_is_state() -> None:
    model, x = Caching(), torch.randn(2, 3, 4, 4)
    model(x)
    graph = trace(model, x)
    torch.testing.assert_close(graph(x), model(x))
    attributes = [str(n.target) for n in graph.graph.nodes if n.op == "get_attr"]
    assert set(attributes) <= set(graph.state_dict())
