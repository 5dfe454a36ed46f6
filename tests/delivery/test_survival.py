"""How well an explanation survived: ranks against scipy's, a network against itself, what can't be compared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, fx, nn

from compressor.delivery import survival
from compressor.delivery.results import Outcome, Survival
from compressor.graph import trace
from compressor.inputs.images import Images, batches
from compressor.relevance.lrp import LrpOptions
from compressor.run.task_choice import Chosen, UserParts
from compressor.run.tasking import NetworkTask
from compressor.run.work import Work

ROUNDING = 1e-9


def classifier(seed: int) -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)]
        return trace(nn.Sequential(*layers).eval(), torch.randn(2, 3, 12, 12))


def measured(networks: dict[str, fx.GraphModule], some: Any) -> Survival:
    chosen = Chosen("classification", "", UserParts({}), labelled=False)
    task = NetworkTask(chosen, None, networks["dense"], "classes")
    return survival._measured(networks, some, task, None, LrpOptions(), lambda *_: None)


def test_ranks_are_correlated_as_scipy_does() -> None:
    generator = np.random.default_rng(0)
    dense, other = generator.normal(size=(5, 40)), generator.integers(0, 6, (5, 40)).astype(float)
    expected = [spearmanr(a, b).statistic for a, b in zip(dense, other, strict=True)]
    assert np.abs(survival.rank_correlations(dense, other) - expected).max() < ROUNDING


def test_a_map_without_an_order_has_no_correlation_and_where_the_dense_one_has_none_nothing_is_said() -> None:
    rising, flat = np.arange(6.0)[None], np.ones((1, 6))
    assert survival.rank_correlations(rising, flat).tolist() == [0]
    assert np.isnan(survival.rank_correlations(flat, rising)).all()
    assert survival.figure_of_images([float("nan")]) is None


def test_the_figure_is_the_mean_over_images_with_its_interval() -> None:
    figure = survival.figure_of_images([0.5, 0.7, float("nan")])
    assert figure is not None
    assert (figure.n, figure.value) == (2, pytest.approx(0.6))
    assert figure.high - figure.value == pytest.approx(1.96 * np.std([0.5, 0.7], ddof=1) / np.sqrt(2))


def test_a_network_explains_as_itself_and_another_one_does_less(images: Images) -> None:
    some = batches(images.subset(np.arange(10)), 4)
    same = measured({"dense": classifier(0), "shipped": classifier(0)}, some).figure
    other = measured({"dense": classifier(0), "shipped": classifier(1)}, some).figure
    assert same is not None
    assert other is not None
    assert (same.value, same.n) == (pytest.approx(1, abs=1e-6), 10)
    assert other.value < 0.9


def test_inputs_without_real_numbers_are_said_to_have_no_explanation() -> None:
    embed = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 3)).eval()
    tokens = torch.randint(0, 5, (4, 3))
    graph = trace(embed, tokens[:2])
    found = measured({"dense": graph, "shipped": graph}, [(tokens, torch.full((4,), -1))])
    assert found.figure is None
    assert "no input of real numbers" in found.checks.not_checked[0]


def test_what_fails_is_a_line_and_ends_nothing(monkeypatch: pytest.MonkeyPatch, images: Images) -> None:
    class Stages:
        keys: ClassVar[dict[str, str]] = {}

        def make(self, *_: object, **__: object) -> Survival:
            raise RuntimeError("no rule\nand more")

    recipe = SimpleNamespace(batch_size=4, composite="", accept=())
    splits = SimpleNamespace(evaluation=images)
    work = SimpleNamespace(stages=Stages(), recipe=recipe, splits=splits, dense=None)
    work.recipe.criterion = "lrp"
    work.first_evaluation_images = lambda most: None
    outcome = SimpleNamespace(is_dense=False, network=None, task=SimpleNamespace(itself=None))
    found = survival.measure_survival(cast(Work, work), cast(Outcome, outcome))
    assert found.figure is None
    assert found.checks.not_checked == ("how well the explanation survived: RuntimeError: no rule",)


def test_relevance_of_an_image_is_summed_over_its_channels() -> None:
    relevance: Tensor = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert survival.maps_of(relevance).tolist() == relevance.sum(1).flatten(1).tolist()
    assert survival.maps_of(relevance[:, :, 0]).shape == (1, 8)
