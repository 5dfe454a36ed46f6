"""Where relevance lies, and that a selector's spots begin there and are let go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from compressor.graph import trace
from compressor.pruning import find_structure
from compressor.steering import SelectorOptions, centres
from compressor.steering.augmentation import Augmentation
from compressor.steering.centres import distance_between, mean_place, relevant_centres
from compressor.steering.checkpoints import Checkpoint
from compressor.steering.objectives import answers_of, distance_of
from compressor.steering.selector import _lead_at, find_spots, make_selector, train_selector
from compressor.steering.training import parted
from compressor.tasks import Leaves, task_named


class Brightness(nn.Module):
    """Two classes that both read how bright each part of an image is: relevance lies where the light is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.out = nn.Linear(4 * 16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(self.stem(x).relu(), 2)
        x = nn.functional.avg_pool2d(self.inner(x).relu(), 2)
        return cast(Tensor, self.out(x.flatten(1)))


def bright_spots(places: Tensor) -> Tensor:
    """[N, 1, 16, 16] 1 on four by four pixels, whose first one is at places [N, 2]."""
    images = torch.zeros(len(places), 1, 16, 16)
    for image, (top, left) in zip(images, places.tolist(), strict=True):
        image[:, top : top + 4, left : left + 4] = 1
    return images


@pytest.fixture(scope="module")
def places() -> Tensor:
    return torch.randint(0, 13, (40, 2), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def graph(places: Tensor) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = Brightness().eval()
    for parameter in model.parameters():
        parameter.data.abs_()
    nn.init.zeros_(model.stem.bias)
    nn.init.zeros_(model.inner.bias)
    return trace(model, bright_spots(places[:2]))


def test_the_mean_place_is_that_of_the_weights_and_of_none_the_middle() -> None:
    weights = torch.zeros(3, 4, 6)
    weights[0, 1, 5] = 2
    weights[1, 0, 0], weights[1, 3, 3] = 1, 2
    assert mean_place(weights).tolist() == [[1, 5], [2, 2], [1.5, 2.5]]


def test_the_mean_place_is_one_off_and_places_that_are_all_alike_still_have_a_distance() -> None:
    places = torch.tensor([[1.0, 2.0], [3.0, 8.0], [5.0, 5.0]])
    mean = places.mean(0, keepdim=True).expand_as(places)
    assert float(distance_between(mean, places, (16, 16))) == pytest.approx(1)
    assert float(distance_between(places, places, (16, 16))) == 0
    alike = torch.ones(1, 2)
    assert float(distance_between(alike + 0.16, alike, (16, 16))) == pytest.approx(1, rel=1e-5)


def test_relevance_lies_where_the_light_is(graph: Any, places: Tensor) -> None:
    images = bright_spots(places)
    locate = relevant_centres(graph, None)
    assert locate is not None
    found = locate(images, answers_of(graph, images))
    assert found.shape == (40, 2)
    assert (found - (places + 1.5)).abs().max() < 1.5  # the kernels reach over the edge


def test_a_task_without_a_class_has_no_such_centres(graph: Any) -> None:
    assert relevant_centres(graph, task_named("classification")) is not None
    assert relevant_centres(graph, cast(Any, SimpleNamespace(classifies=False))) is None


def test_answers_beside_the_classes_leave_a_network_without_them(graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(centres, "output_names", lambda graph: ("classes", "boxes"))
    assert relevant_centres(graph, None) is None


def test_relevance_that_is_no_number_draws_to_the_middle(graph: Any, places: Tensor) -> None:
    images = bright_spots(places[:2])
    found = relevant_centres(graph, None)
    assert found is not None
    assert found(images * torch.nan, answers_of(graph, images)).tolist() == [[7.5, 7.5]] * 2


def test_what_leads_fades_to_nothing_and_the_papers_schedule_is_not_led() -> None:
    options = SelectorOptions(steps=8, led=0.5)
    assert [_lead_at(step, options) for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert _lead_at(0, SelectorOptions(led=0.0)) == 0


def test_spots_are_drawn_to_the_places_and_asked_for_none_after_the_lead(graph: Any, places: Tensor) -> None:
    images = bright_spots(places)
    lessons = [(part, torch.full((len(part),), -1)) for part in images.split(8)]
    structure, (learning, held) = find_structure(graph, images[:2]), parted(lessons)
    asked: list[int] = []

    def corner(shown: Tensor, dense: Leaves) -> Tensor:
        asked.append(len(shown))
        return torch.full((len(shown), 2), 4.0) + torch.rand(len(shown), 2, generator=torch.Generator().manual_seed(0))

    def offset(led: float) -> float:
        options = SelectorOptions(steps=20, rate=1e-2, led=led, keeps=1e6)
        selector = make_selector(graph, structure, lessons, options, 0)
        train_selector(
            graph, graph, selector, learning, held, distance_of(graph, lessons, None), options=options,
            augmentation=Augmentation(0), seed=0, centres=corner, checkpoint=Checkpoint(None, 0),
            progress=lambda share: None,
        )  # fmt: skip
        return float((find_spots(selector, graph, images)[0].centre - 4.5).abs().mean())

    free = offset(0.0)
    assert asked == []
    assert offset(0.5) < free
    assert len(asked) == 10
