"""What one of several processes computes; each of `test_ranks.py` starts this file as `torchrun` would."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from compressor import distributed
from compressor.accuracy import evaluate
from compressor.budgets import Budget
from compressor.criteria import CRITERIA, LEARNED
from compressor.errors import CompressorError
from compressor.graph import trace
from compressor.inputs.examples import examples_in_memory
from compressor.inputs.images import Batches, batches
from compressor.inputs.samples import Sample
from compressor.planning import RankingOptions, make_plan, measure_scores
from compressor.pruning import find_structure, prune, slices_of
from compressor.recovery import RecoveryOptions, recover
from compressor.relevance import score
from compressor.repair import compensate
from compressor.repair.batchnorm import reestimate

COUNT, BATCH = 44, 8  # five batches and a smaller one
MEASURED = RankingOptions(normalisation="none", per_cost=1)


class Net(nn.Module):
    """A stem, a residual block and a head, with normalisations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.outer = nn.Conv2d(16, 12, 3, padding=1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        answer: Tensor = self.head(torch.relu(x + self.outer(self.inner(x))).mean((2, 3)))
        return answer


def pool(count: int, seed: int) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    samples = [Sample(torch.randn(3, 10, 10, generator=generator), torch.tensor(i % 4)) for i in range(count)]
    return batches(examples_in_memory("noise", samples, [f"{seed}-{i:03d}" for i in range(count)]), BATCH)


def everything() -> dict[str, np.ndarray]:
    """Scores of every criterion, what was measured, the repaired and the recovered network, as arrays."""
    torch.manual_seed(0)
    graph = trace(Net().eval(), torch.randn(2, 3, 10, 10))
    structure = find_structure(graph, torch.randn(2, 3, 10, 10))
    images = pool(COUNT, seed=1)
    share = images.share(distributed.rank(), distributed.world())

    found: dict[str, np.ndarray] = {}
    for criterion in sorted(set(CRITERIA) - set(LEARNED)):
        scores = score(graph, structure.groups, share, criterion=criterion)
        found |= {f"{criterion}|{name}": values for name, values in scores.values.items()}
    scores = score(graph, structure.groups, share, criterion="lrp")
    scores = measure_scores(graph, structure, scores, list(images), MEASURED)
    found |= {f"measured|{name}": values for name, values in scores.values.items()}

    plan = make_plan(graph, structure, scores, Budget("macs", 0.5), MEASURED)
    found |= {f"plan|{name}": kept for name, kept in plan.kept.items()}
    small, _ = prune(graph, structure, plan)
    slices = slices_of(graph, structure, plan.kept)
    compensate(graph, small, slices, share)
    reestimate(small, share, reference=graph, slices=slices)
    found |= _weights("repaired", small)

    options = RecoveryOptions(minutes=10, passes=3, precision="float32")  # sums of parts round as the whole does
    network, recovery = recover(graph, small, images, pool(20, seed=2), slices=slices, options=options)
    found |= _weights("recovered", network)
    found["distances"] = np.array([moment.distance for moment in recovery.moments])
    found["correct"] = np.array(evaluate(network, share).correct)
    found["sent"] = np.array(distributed.sent_bytes())
    return found


def _weights(name: str, network: nn.Module) -> dict[str, np.ndarray]:
    return {f"{name}|{key}": tensor.numpy() for key, tensor in network.state_dict().items()}


def longer_than_the_time_out() -> dict[str, np.ndarray]:
    """The first works alone for longer than others wait for a sum."""

    def work() -> int:
        time.sleep(1.5 * float(os.environ[distributed.TIMEOUT_VARIABLE]))
        return 7

    value = distributed.by_first(work)
    return {"value": np.array(value), "squares": np.array(distributed.each([1, 2, 3, 4, 5], lambda x: x * x))}


def failing() -> dict[str, np.ndarray]:
    """The first fails, and says why."""

    def work() -> int:
        raise CompressorError("the first can't")

    return {"value": np.array(distributed.by_first(work))}


def silent() -> dict[str, np.ndarray]:
    """One process says nothing any more."""
    if distributed.rank() == 1:
        time.sleep(60)
    return {"sum": distributed.sum_over_ranks({"x": np.ones(3)})["x"]}


def main(arguments: Sequence[str]) -> int:
    name, folder = arguments
    torch.set_num_threads(1)
    try:
        with distributed.process_group():
            rank = distributed.rank()
            np.savez(Path(folder, f"{rank}.npz"), **globals()[name]())
    except CompressorError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
