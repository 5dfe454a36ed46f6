"""Whatever stops a stage, and wherever in it, what came in is bit-equal afterwards and torch is set as before."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.budgets import Budget
from compressor.graph import trace
from compressor.planning import RankingOptions, make_plan, measure_scores
from compressor.pruning import find_structure, identity_error, prune
from compressor.relevance import score
from compressor.repair import compensate
from compressor.repair.batchnorm import reestimate

WHERE = (0.0, 0.5, 1.0)  # share of a stage's operations that run before it is stopped
ERRORS = (KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError)
CRITERIA = ("lrp", "gradient_x_input", "hessian", "integrated_gradients", "activation", "l1")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(16)
        self.inner, self.outer = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.outer(torch.relu(self.norm(self.inner(x))))
        return self.head(x.mean((2, 3)))


class StoppedAt(TorchDispatchMode):
    """Raises instead of running the operation with that number; counts them all where it has none."""

    def __init__(self, number: int = -1, error: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__()
        self.number, self.error, self.seen = number, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.seen == self.number:
            raise self.error("stopped by the test")
        self.seen += 1
        return func(*args, **(kwargs or {}))


def frozen(module: nn.Module) -> list[Any]:
    """All that a stage must leave alone: values, gradients, modes, hooks; of a graph its code too."""
    tensors = [t.detach().clone() for t in (*module.parameters(), *module.buffers())]
    modes = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
    flags = [(p.requires_grad, p.grad is None) for p in module.parameters()]
    return [tensors, modes, flags, module.code if isinstance(module, fx.GraphModule) else ""]


def setting() -> tuple[Any, ...]:
    """Torch's process-wide state."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.random.get_rng_state().tolist(),
        nn.functional.conv2d,
        nn.functional.scaled_dot_product_attention,
    )


def same(before: list[Any], after: list[Any]) -> bool:
    tensors = all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    return tensors and before[1:] == after[1:]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    module = Net().train()
    module.norm.eval()
    module.stem.weight.requires_grad_(False)
    module.inner.register_forward_hook(lambda *_: None)
    return module


@pytest.fixture
def stages(model: nn.Module) -> dict[str, tuple[nn.Module, Callable[[], object]]]:
    """Of every stage what it is given, and a call of it."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 8, 8, generator=generator)
    data = [(x, torch.tensor([0, 1, 2, 3])), (x.flip(0), torch.tensor([3, 2, 1, 0]))]
    graph = trace(copy.deepcopy(model), x)
    structure = find_structure(graph, x)
    scores = score(graph, structure.groups, data, criterion="l1")
    options = RankingOptions(multiple=1)
    plan = make_plan(graph, structure, scores, Budget("macs", 0.6, slack=0.1), options)
    small, slices = prune(graph, structure, plan)
    calls: dict[str, tuple[nn.Module, Callable[[], object]]] = {
        "trace": (model, lambda: trace(model, x)),
        "groups": (graph, lambda: find_structure(graph, x)),
        "plan": (graph, lambda: make_plan(graph, structure, scores, Budget("macs", 0.6, slack=0.1), options)),
        "measure": (graph, lambda: measure_scores(graph, structure, scores, data, options)),
        "prune": (graph, lambda: prune(graph, structure, plan)),
        "identity": (graph, lambda: identity_error(graph, small, structure, plan.kept, x)),
        "compensate": (graph, lambda: compensate(graph, copy.deepcopy(small), slices, data)),
        "reestimate": (graph, lambda: reestimate(copy.deepcopy(small), data, reference=graph, slices=slices)),
    }
    for name in CRITERIA:
        calls[f"score by {name}"] = (graph, lambda c=name: score(graph, structure.groups, data, criterion=c))
    return calls


STAGES = (
    *("trace", "groups", "measure", "plan", "prune", "identity", "compensate", "reestimate"),
    *(f"score by {name}" for name in CRITERIA),
)


@contextlib.contextmanager
def kept_alike(given: nn.Module) -> Iterator[None]:
    before, was = frozen(given), setting()
    yield
    assert same(before, frozen(given))
    assert setting() == was


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_stopped_anywhere_leaves_what_it_was_given(
    stages: dict[str, tuple[nn.Module, Callable[[], object]]], stage: str
) -> None:
    given, call = stages[stage]
    with kept_alike(given), StoppedAt() as whole:
        call()
    assert whole.seen > 0
    for share, error in zip(WHERE, ERRORS, strict=True):
        stopped = pytest.raises(BaseException, match="stopped by the test")
        with kept_alike(given), stopped, StoppedAt(int(share * (whole.seen - 1)), error):
            call()
