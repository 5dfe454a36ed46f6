"""Sums over ranks: no-ops alone, and two processes that get the scores of one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from compressor import distributed
from compressor.criteria import CRITERIA, OnWeights
from compressor.graph import trace
from compressor.records import FloatArray, Group, Groups, Site
from compressor.relevance import score, weights
from compressor.relevance.starts import CLASSES, Objective
from compressor.tasks import Targets
from compressor.tensors import Inputs

# Two halves are added in another order than one whole.
ORDER_TOLERANCE = 1e-6
SAMPLES = 8


def test_alone_everything_is_as_it_was() -> None:
    values = {"a": np.arange(6.0).reshape(2, 3)}
    assert (distributed.rank(), distributed.world()) == (0, 1)
    assert (distributed.sum_over_ranks(values)["a"] == values["a"]).all()
    assert distributed.sum_count(7) == 7


@dataclass(frozen=True)
class Work:
    """Criteria without autograd, whose threads do not survive a fork."""

    graph: fx.GraphModule
    groups: Groups
    images: Tensor
    labels: Tensor
    criteria: tuple[str, ...] = ("lrp", "activation", "weighted_by_pixels")

    def scores(self, criterion: str, rank: int, world: int) -> tuple[FloatArray, int]:
        mine = [(self.images[rank::world], self.labels[rank::world])]
        found = score(self.graph, self.groups, mine, criterion=criterion)
        return found.values["g"], found.samples


def pixels(
    graph: fx.GraphModule, images: Inputs, targets: Targets, weights: Sequence[str], objective: Objective = CLASSES
) -> Mapping[str, Tensor]:
    assert isinstance(images, Tensor)
    return {name: images.double().abs().sum() * torch.ones(4, 3, 3, 3, dtype=torch.float64) for name in weights}


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setattr(weights, "sums", lambda rows, sums: torch.stack([s.sum() for s in sums]), raising=False)
    monkeypatch.setattr(weights, "pixels", pixels, raising=False)
    row = OnWeights("pixels", "weights.sums", collect="weights.pixels")
    monkeypatch.setitem(CRITERIA, "weighted_by_pixels", row)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    images, labels = torch.randn(SAMPLES, 3, 4, 4), torch.randint(0, 3, (SAMPLES,))
    groups = Groups((Group("g", "channel", 4, (Site("conv2d", "0", (1,), np.arange(4)),), np.zeros(4, np.int64)),))
    return Work(trace(model, images[:2]), groups, images, labels)


def _run(work: Work, rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        found = {name: work.scores(name, rank, 2) for name in work.criteria}
        sums = distributed.sum_over_ranks({"b": np.full((2,), rank + 1.0), "a": np.array([[10.0 * rank]])})
        np.savez(
            f"{folder}/{rank}.npz",
            **{name: values for name, (values, _) in found.items()},
            samples=np.array([samples for _, samples in found.values()]),
            sums=np.concatenate([sums["b"], sums["a"].ravel()]),
            world=np.array([distributed.rank(), distributed.world()]),
        )
    finally:
        torch.distributed.destroy_process_group()


def test_two_ranks_get_the_scores_of_one(work: Work, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_run, args=(work, rank, str(tmp_path))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in range(2))
    assert first["sums"].tolist() == second["sums"].tolist() == [3, 3, 10]
    assert (first["world"].tolist(), second["world"].tolist()) == ([0, 2], [1, 2])
    assert first["samples"].tolist() == [SAMPLES] * len(work.criteria)
    for criterion in work.criteria:
        whole, samples = work.scores(criterion, 0, 1)
        assert samples == SAMPLES
        assert (first[criterion] == second[criterion]).all()
        assert np.abs(first[criterion] - whole).max() <= ORDER_TOLERANCE * np.abs(whole).max()
        half, _ = work.scores(criterion, 0, 2)
        assert np.abs(half - whole).max() > ORDER_TOLERANCE * np.abs(whole).max()
