"""Pictures of the images where two networks differ most: which are chosen, what is drawn, what a failure does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from compressor.delivery import pictures, views
from compressor.delivery.results import Outcome, Pictures
from compressor.delivery.spots import Spotter
from compressor.delivery.views import Pair, views_of
from compressor.graph import trace
from compressor.inputs.images import Batches, Images, Preprocessing, batches
from compressor.pruning import find_structure, prune
from compressor.pruning.surgery import removed_classes
from compressor.recipe import make_recipe
from compressor.relevance.lrp import LrpOptions
from compressor.report.views import Bars, Boxes, Comparison, Curve, Heat, Masks, Shown
from compressor.run.fingerprints import Known
from compressor.run.stages import open_run
from compressor.run.task_choice import Chosen, UserParts
from compressor.run.tasking import NetworkTask, predict_of
from compressor.run.work import Work
from compressor.steering import SelectorOptions
from compressor.steering.selector import make_selector
from compressor.tasks import reference_of

ROUNDING = 1e-5  # float32 sums of a few hundred terms


class Segmenter(nn.Module):
    """Three classes a pixel, as large as the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.head(self.second(self.first(x).relu()).relu())}


def traced(seed: int) -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return trace(Segmenter().eval(), torch.randn(2, 3, 12, 12))


@pytest.fixture(scope="module")
def networks() -> dict[str, fx.GraphModule]:
    return {"dense": traced(0), "shipped": traced(1)}


@pytest.fixture
def some(images: Images) -> Batches:
    return batches(images.subset(np.arange(20)), 8)


def task_of(dense: fx.GraphModule, some: Batches, name: str = "segmentation", **parts: Any) -> NetworkTask:
    chosen = Chosen(name, f"{name}, as asked for", UserParts(parts), labelled=False)
    return NetworkTask(chosen, reference_of(predict_of(dense), some), dense, name)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Comparison]:
    """What would be drawn, in order."""
    from compressor.report import pictures as drawing

    seen: list[Comparison] = []

    def note(comparison: Comparison) -> bytes:
        seen.append(comparison)
        return f"picture {len(seen)}".encode()

    monkeypatch.setattr(drawing, "draw_comparison", note)
    return seen


def draw(networks: dict[str, fx.GraphModule], some: Batches, task: NetworkTask, **more: Any) -> Pictures:
    given: dict[str, Any] = {
        "spots": None,
        "lrp": LrpOptions(),
        "preprocessing": some.images.preprocessing,
        "names": ("a", "b"),
    }
    return pictures._drawn(networks, some, task, progress=lambda share, phase="": None, **{**given, **more})


def test_the_four_images_that_differ_most_are_drawn_the_farthest_first(
    networks: dict[str, fx.GraphModule], some: Batches, drawn: list[Comparison]
) -> None:
    task = task_of(networks["dense"], some)
    made = draw(networks, some, task)
    judge, (dense, shipped) = task.against(predict_of(networks["dense"])), map(predict_of, networks.values())
    (everything,) = [torch.cat([inputs for inputs, _ in some])]
    distances = judge.distance(shipped(everything), dense(everything))
    order = distances.argsort(descending=True)[:4]
    assert [row.image for row in made.rows] == [some.images.names[int(index)] for index in order]
    assert [row.distance for row in made.rows] == pytest.approx(distances[order].tolist(), rel=ROUNDING)
    assert (made.looked_at, made.checks.not_checked) == (20, ())
    assert made.images == {f"seen-{number}": f"picture {number}".encode() for number in (1, 2, 3, 4)}

    first = drawn[0]
    assert first.image is not None
    assert np.allclose(first.image, some.images.pixels(int(order[0])).permute(1, 2, 0) / 255, atol=ROUNDING)
    logits = dense(everything[order[:1]])["out"]
    assert isinstance(first.dense, Masks)
    assert np.array_equal(first.dense.classes, logits[0].argmax(0))
    assert first.dense.names == ("a", "b")


def test_the_same_network_twice_sees_the_same(
    networks: dict[str, fx.GraphModule], some: Batches, drawn: list[Comparison]
) -> None:
    draw({"dense": networks["dense"], "shipped": networks["dense"]}, some, task_of(networks["dense"], some))
    for one in drawn:
        assert one.relevance_dense is not None
        assert one.relevance_dense.shape == (12, 12)
        assert np.array_equal(one.relevance_dense, cast(np.ndarray, one.relevance_shipped))
        assert np.abs(one.relevance_dense).sum() > 0


def test_both_networks_are_asked_for_the_dense_ones_answer_unless_a_user_says_otherwise(
    networks: dict[str, fx.GraphModule], some: Batches
) -> None:
    inputs, targets = next(iter(some))
    answer = predict_of(networks["dense"])(inputs)
    task = task_of(networks["dense"], some)
    asked = pictures.asked_of(task, answer, targets)
    assert isinstance(asked, Tensor)
    assert torch.equal(asked, answer["out"].argmax(1))
    assert pictures.asked_of(task_of(networks["dense"], some, "regression"), answer, targets) is targets
    assert pictures.asked_of(task_of(networks["dense"], some, says=lambda *given: None), answer, targets) is targets


def test_a_classifier_needs_no_reference_made_before(small: nn.Module, some: Batches, drawn: list[Comparison]) -> None:
    dense = trace(small, torch.randn(2, 3, 12, 12))
    other = trace(nn.Sequential(small, nn.Linear(4, 4)).eval(), torch.randn(2, 3, 12, 12))
    task = NetworkTask(Chosen("classification", ""), None, dense, "classes")
    made = draw({"dense": dense, "shipped": other}, some, task)
    assert len(made.rows) == 4
    assert isinstance(drawn[0].dense, Bars)
    assert sum(drawn[0].dense.shares) <= 1 + ROUNDING
    assert drawn[0].relevance_shipped is not None


def test_an_answer_is_drawn_without_relevance_where_that_fails_and_it_is_said(
    networks: dict[str, fx.GraphModule], some: Batches, drawn: list[Comparison]
) -> None:
    def says(leaves: Any, targets: Any) -> Tensor:
        raise ValueError("not today")

    made = draw(networks, some, task_of(networks["dense"], some, says=says))
    assert len(made.rows) == 4
    assert drawn[0].relevance_dense is None
    (line,) = made.checks.not_checked
    assert line.startswith("which pixels the networks see was not drawn: ")
    assert "not today" in line


def test_a_selectors_masks_are_drawn_of_both_networks(small: nn.Module, some: Batches, drawn: list[Comparison]) -> None:
    example = torch.stack([some.images[0], some.images[1]])
    dense = trace(small, example)
    structure = find_structure(dense, example)
    kept = {group.name: np.arange(1, group.size) for group in structure.groups.groups}
    shipped, _ = prune(dense, structure, kept)
    selector = make_selector(dense, structure, some, SelectorOptions(), 0)
    with torch.no_grad():
        selector.read.weight.normal_(generator=torch.Generator().manual_seed(0))
    spots = Spotter(selector, structure, removed_classes(structure, kept))
    draw({"dense": dense, "shipped": shipped}, some, task_of(dense, some, "classification"), spots=spots)
    assert len(drawn) == 4
    for comparison in drawn:
        masks = (comparison.mask_dense, comparison.mask_shipped)
        for mask in masks:
            assert mask is not None
            assert mask.shape == tuple(example.shape[2:])
            assert mask.max() <= 1
        assert not np.array_equal(*masks)

    broken = Spotter(selector, structure, removed_classes(structure, {}))  # as if nothing were gone
    made = draw({"dense": dense, "shipped": shipped}, some, task_of(dense, some, "classification"), spots=broken)
    assert len(made.rows) == 4
    assert drawn[-1].mask_dense is None
    assert made.checks.not_checked[0].startswith("the selector's masks were not drawn: ")

    twice = prune(dense, structure, {})[0]
    same = Spotter(selector, structure, removed_classes(structure, {})).masks(dense, twice, example)
    assert torch.allclose(*same)


def work_of(folder: Path, some: Batches, dense: fx.GraphModule) -> Work:
    stages = open_run(folder, {}, lambda stage, share: None)
    with stages.begun():
        pass
    stages.keys.update(groups="groups", finetune="finetune")
    return cast(
        Work,
        SimpleNamespace(
            recipe=make_recipe({"model": "net", "batch_size": 8}),
            stages=stages,
            splits=SimpleNamespace(evaluation=some.images),
            dense=dense,
            model=SimpleNamespace(class_names=None),
            first_evaluation_images=lambda most: Known(some, ["e", most]),
            preprocessing=some.images.preprocessing,
        ),
    )


def outcome_of(networks: dict[str, fx.GraphModule], some: Batches, **parts: Any) -> Outcome:
    nothing: Any = None
    task = task_of(networks["dense"], some, **parts)
    return Outcome(nothing, nothing, networks["shipped"], {}, {}, task)


def test_pictures_are_drawn_once_and_read_back(
    networks: dict[str, fx.GraphModule], some: Batches, drawn: list[Comparison], tmp_path: Path
) -> None:
    outcome = outcome_of(networks, some)
    made = pictures.make_pictures(work_of(tmp_path / "run", some, networks["dense"]), outcome)
    assert (tmp_path / "run" / "plots" / "seen-1.png").read_bytes() == made.images["seen-1"] == b"picture 1"
    work = work_of(tmp_path / "run", some, networks["dense"])
    assert pictures.make_pictures(work, outcome) == made
    assert (work.stages.reused, len(drawn)) == (["pictures"], 4)


def test_what_fails_is_a_line_and_ends_no_run(
    networks: dict[str, fx.GraphModule], some: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object) -> None:
        raise RuntimeError("no canvas\nand more")

    monkeypatch.setattr(pictures, "distances_between", broken)
    made = pictures.make_pictures(work_of(tmp_path / "run", some, networks["dense"]), outcome_of(networks, some))
    assert made == Pictures(checks=made.checks)
    assert made.checks.not_checked == ("what the networks see was not drawn: RuntimeError: no canvas",)


def test_a_full_disk_ends_the_run_as_everywhere(
    networks: dict[str, fx.GraphModule], some: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "distances_between", full)
    with pytest.raises(OSError, match="No space"):
        pictures.make_pictures(work_of(tmp_path / "run", some, networks["dense"]), outcome_of(networks, some))


def test_an_answer_that_is_not_finite_is_the_farthest_and_goes_to_disk(tmp_path: Path) -> None:
    distances = np.array([0.5, np.inf, 0.5, 0.7])
    assert pictures.farthest(distances, 3) == [1, 3, 0]
    row = pictures.PictureRow("seen-1", "a", float("inf"), "words")
    (tmp_path / "plots").mkdir()
    pictures._write(tmp_path, Pictures((row,), {"seen-1": b"x"}, 4))
    assert pictures._read(tmp_path).rows[0].distance == 1e30


@pytest.mark.parametrize(
    ("inputs", "preprocessing", "shape"),
    [
        (torch.rand(1, 3, 4, 5), Preprocessing((4, 5), (4,), "bilinear", (0.5,) * 3, (0.5,) * 3), (4, 5, 3)),
        (torch.rand(1, 8, 4, 5), None, (4, 5, 3)),
        ((torch.zeros(1, 7, dtype=torch.int64), torch.rand(1, 1, 4, 5)), None, (4, 5, 3)),
        (torch.rand(1, 7), None, None),
    ],
    ids=["rgb", "eight bands", "second input", "vector"],
)
def test_an_input_is_shown_as_the_image_that_it_is(
    inputs: Any, preprocessing: Preprocessing | None, shape: tuple[int, ...] | None
) -> None:
    image = pictures.visible_of(inputs, preprocessing)
    if shape is None:
        assert image is None
    else:
        assert image is not None
        assert image.shape == shape
        assert 0 <= image.min() <= image.max() <= 1


# what is drawn of each task's answer

LEAF = torch.tensor([[2.0, -1.0, 0.0, 4.0]])
MAP = torch.arange(24.0).view(1, 2, 3, 4)


def pair(leaf: Tensor, shipped: Tensor | None = None, **more: Any) -> Pair:
    return Pair({"output": leaf}, {"output": leaf if shipped is None else shipped}, **more)


def test_classes_are_shares_of_the_three_likeliest() -> None:
    (dense, _), shows = views_of("classification", pair(LEAF, names=("a", "b")))
    assert isinstance(dense, Bars)
    assert dense.names == ("3", "a", "2")
    assert dense.shares == pytest.approx(LEAF[0].softmax(0)[[3, 0, 2]].tolist())
    assert shows == views.SHOWS["classification"]


def test_labels_are_probabilities_each_for_itself() -> None:
    (dense, _), _ = views_of("multi-label", pair(LEAF))
    assert isinstance(dense, Bars)
    assert dense.shares == pytest.approx(LEAF[0].sigmoid()[[3, 0, 2]].tolist())
    (certain, _), _ = views_of("multi-label", pair(LEAF.sigmoid()))
    assert isinstance(certain, Bars)
    assert certain.shares == pytest.approx(dense.shares)


def test_boxes_are_those_that_are_sure_enough_and_without_a_decoder_the_leaf_is_shown() -> None:
    corners = torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 9.0, 9.0]])

    def decode(leaves: Any) -> list[dict[str, Tensor]]:
        scores = torch.tensor([0.3, 0.1, 0.9])
        return [{"boxes": corners, "scores": scores, "labels": torch.tensor([0, 1, 5])}]

    (dense, _), _ = views_of("detection", pair(LEAF, names=("cat",), decode=decode))
    assert isinstance(dense, Boxes)
    assert dense.labels == ("5 90%", "cat 30%")
    assert dense.corners.tolist() == corners[[2, 0]].tolist()
    (dense, _), shows = views_of("detection", pair(LEAF))
    assert isinstance(dense, Curve)
    assert shows == views.ELSE


def test_images_are_on_the_dense_ones_scale() -> None:
    leaf = torch.linspace(-1, 3, 48).view(1, 3, 4, 4)
    (dense, shipped), _ = views_of("image-to-image", pair(leaf, leaf + 2))
    assert isinstance(dense, Shown)
    assert isinstance(shipped, Shown)
    assert (dense.pixels.min(), dense.pixels.max()) == (0, 1)
    assert shipped.pixels.min() == pytest.approx(0.5, abs=ROUNDING)
    (many, _), _ = views_of("image-to-image", pair(MAP))  # two channels are no image
    assert isinstance(many, Heat)


def test_anything_else_is_its_largest_leaf_a_map_as_the_mean_over_channels() -> None:
    leaves = {"small": LEAF, "map": MAP}
    (dense, shipped), _ = views_of("any", Pair(leaves, {**leaves, "map": MAP + 1}))
    assert isinstance(dense, Heat)
    assert isinstance(shipped, Heat)
    assert np.array_equal(dense.values, MAP[0].mean(0))
    assert (shipped.low, shipped.high) == (dense.low, dense.high) == (6.0, 17.0)
    (one, other), _ = views_of("regression", pair(LEAF, LEAF + 1))
    assert isinstance(one, Curve)
    assert isinstance(other, Curve)
    assert other.dense is not None
    assert np.array_equal(other.dense, LEAF[0])


@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 3, 4), (1, 2, 3, 4, 5)])
def test_a_leaf_of_any_shape_is_drawn(shape: tuple[int, ...]) -> None:
    (dense, _), _ = views_of("any", pair(torch.ones(shape)))
    assert isinstance(dense, Curve if len(shape) < 3 else Heat)
