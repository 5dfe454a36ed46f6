"""What learned criteria go by, in closed forms: costs, prices, scores, judgements, and what is put aside between."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from compressor.errors import FolderError, ModelError, RecipeError
from compressor.graph import aten, trace
from compressor.inputs.images import Images, batches
from compressor.pruning import Structure, find_structure
from compressor.records import Scores
from compressor.steering import (
    GateOptions,
    SelectorOptions,
    read_selector,
    start_logits,
)
from compressor.steering import gates as gates_module
from compressor.steering.augmentation import Augmentation
from compressor.steering.checkpoints import Checkpoint, optimiser_state, restore_optimiser
from compressor.steering.costs import CostOfGates
from compressor.steering.explanation import both_lost, graph_spots
from compressor.steering.gates import chance_to_be_open, learn_gates, paid_at
from compressor.steering.gating import _WEIGHED, Gated, Gating, find_gates
from compressor.steering.lessons import image_count, lessons_from
from compressor.steering.objectives import answers_of, distance_of, spread_of
from compressor.steering.predictor import Stream, mean_over, require_images
from compressor.steering.saving import ABOUT, FILE, write_selector
from compressor.steering.selector import Scale, Selector, find_scales, make_selector, pass_of, question_of
from compressor.steering.training import TrainingOptions, train
from compressor.tasks import task_named

STILL = Augmentation(0)
UNITS, CLASSES = (6, 4), 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def two() -> tuple[fx.GraphModule, Structure, Tensor]:
    """Two convolutions of 6 and 4 channels, 6 x 6 and 4 x 4, and a linear layer on all of the second's positions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten())
        model.append(nn.Linear(4 * 16, CLASSES))
        images = torch.randn(10, 3, 8, 8)
    graph = trace(model.eval(), images[:2])
    return graph, find_structure(graph, images[:2]), images


@pytest.fixture(scope="module")
def gating(two: tuple[fx.GraphModule, Structure, Tensor]) -> Gating:
    return find_gates(two[0], two[1], ("channel", "stream"))


def sums(gating: Gating, gates: Tensor) -> tuple[float, float]:
    """Of the gates of the first and of the second convolution."""
    by_size = {units.stop - units.start: float(gates[units].double().sum()) for units in gating.units.values()}
    return by_size[UNITS[0]], by_size[UNITS[1]]


@pytest.mark.parametrize("kind", ["open", "half", "drawn", "shut"])
def test_a_cost_is_the_polynomial_of_sums_of_gates(gating: Gating, kind: str) -> None:
    gates = {
        "open": torch.ones(10),
        "half": torch.full((10,), 0.5),
        "drawn": torch.rand(10, generator=torch.Generator().manual_seed(0)),
        "shut": torch.zeros(10),
    }[kind]
    a, b = sums(gating, gates)
    macs = 36 * 27 * a + 16 * 9 * a * b + 16 * b * CLASSES
    parameters = (27 + 1) * a + (9 * a + 1) * b + 16 * b * CLASSES + CLASSES
    assert float(CostOfGates(gating)(gates)) == pytest.approx(macs, rel=1e-9)
    assert float(CostOfGates(gating, "parameters")(gates)) == pytest.approx(parameters, rel=1e-9)


def test_without_a_gate_there_is_nothing_to_press_down(two: tuple[fx.GraphModule, Structure, Tensor]) -> None:
    graph, structure, images = two
    none = find_gates(graph, structure, ("head",))
    assert (none.count, dict(none.units), dict(none.reads)) == (0, {}, {})
    cost = CostOfGates(none)
    assert float(cost(torch.ones(0))) == cost.dense
    assert torch.equal(
        *(run["output"] for run in (Gated(none).answers(images, torch.ones(0)), answers_of(graph, images)))
    )


KEPT = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
X = torch.randn(2, 6, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ROWS = X.movedim(1, 3)  # units last
BIAS = torch.linspace(-1, 1, 6, dtype=torch.float64)
WEIGHT = BIAS + 2
NORMS: dict[str, tuple[Any, Tensor, int, dict[str, Any], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "layer": (
        aten.layer_norm.default, ROWS, 3, {"normalized_shape": [6], "eps": 1e-5},
        lambda x, w, b: functional.layer_norm(x, [4], w, b),
    ),
    "rms": (
        aten.rms_norm.default, ROWS, 3, {"normalized_shape": [6], "eps": None},
        lambda x, w, b: functional.rms_norm(x, [4], w),
    ),
    "group": (
        aten.group_norm.default, X, 1, {"num_groups": 2, "eps": 1e-5},
        lambda x, w, b: functional.group_norm(x, 2, w, b),
    ),
    "mean": (aten.mean.dim, X, 1, {"dim": [1, -1], "keepdim": True}, lambda x, w, b: x.mean([1, -1], keepdim=True)),
    "mean of one": (aten.mean.dim, X[:1], 1, {"dim": 1, "keepdim": False}, lambda x, w, b: x.mean(1)),
    "mean of all": (aten.mean.dim, X, 1, {"dim": [], "keepdim": False}, lambda x, w, b: x.mean()),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_a_normalisation_with_shut_gates_is_that_of_what_remains(name: str) -> None:
    """Four of six units, two in each of the groups."""
    target, x, axis, named, plain = NORMS[name]
    shape = [1] * 4
    shape[axis] = 6
    kept = KEPT.nonzero()[:, 0]
    answer = _WEIGHED[target](x, KEPT.double().view(shape), {**named, "weight": WEIGHT, "bias": BIAS})
    expected = plain(x.index_select(axis, kept), WEIGHT[kept], BIAS[kept])
    remaining = answer if answer.shape == expected.shape else answer.index_select(axis, kept)
    torch.testing.assert_close(remaining, expected, atol=1e-12, rtol=1e-12)


def learned(gating: Gating, images: list[tuple[Tensor, None]], lost: Any, **others: Any) -> np.ndarray:
    start = others.pop("start", torch.zeros(gating.count))
    checkpoint = others.pop("checkpoint", Checkpoint(None, 0))
    return learn_gates(
        gating, images, lost, options=GateOptions(**{"steps": 6, **others}), augmentation=STILL, seed=0, start=start,
        checkpoint=checkpoint, progress=lambda share: None,
    )  # fmt: skip


def test_a_score_is_the_mean_chance_to_be_open_on_the_way(gating: Gating, two: tuple[Any, Any, Tensor]) -> None:
    """A slope that is always the same takes Adam one rate farther in each step, whatever its size."""
    lessons, start = [(two[2], None)], torch.linspace(-4, 0, 10)
    steady = learned(gating, lessons, lambda inputs, gates: gates.sum() * 0, start=start, pressure=0.0, weight_decay=0)
    assert np.allclose(steady, chance_to_be_open(start).numpy())
    rate = 3.0 / 6

    def shut(inputs: Tensor, gates: Tensor) -> Tensor:
        return (gates - gates.detach() + 1).log().sum()  # and through a gate that is never quite open or shut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates_module, "drawn_gates", lambda logits, numbers: logits)
        falling = learned(gating, lessons, shut, start=start, pressure=0.0, weight_decay=0, travel=3.0)
    logits = torch.stack([start - rate * (step + 1) for step in range(6)])
    assert np.allclose(falling, chance_to_be_open(logits).mean(0).numpy(), atol=1e-5)


def test_a_loss_in_parts_of_a_batch_has_the_gradient_of_the_whole(
    gating: Gating, two: tuple[Any, Any, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, images = Gated(gating), two[2]

    def lost(inputs: Tensor, gates: Tensor) -> Tensor:
        (answer,) = run.answers(inputs, gates).values()
        return answer.square().sum(1).mean()

    whole = learned(gating, [(images, None)], lost, travel=30.0)
    plain, parts = gates_module.within_memory, list[int]()

    def in_threes(batch: Any, graph: fx.GraphModule) -> Any:
        ((inputs, _),) = batch
        parts.extend(map(len, inputs.split(3)))
        return plain([(part, None) for part in inputs.split(3)], graph)

    monkeypatch.setattr(gates_module, "within_memory", in_threes)
    assert np.allclose(learned(gating, [(images, None)], lost, travel=30.0), whole, atol=1e-4)
    assert parts[:4] == [3, 3, 3, 1]  # the last counts a third of the others


def test_what_is_paid_is_the_pressure_on_the_share_above_the_steps(gating: Gating) -> None:
    cost = CostOfGates(gating)
    gates = torch.where(torch.arange(10) % 2 == 0, 0.9, 0.2)  # as good as open and shut
    share = float(cost((gates > 0.5).float())) / cost.dense
    paid = paid_at(7, cost, GateOptions(steps=8, least=0.05, pressure=2.0))
    assert float(paid(gates)) == pytest.approx(2 * math.log(share / 0.05), rel=1e-6)
    assert float(paid_at(0, cost, GateOptions(steps=8))(gates)) == 0  # 0.8875 are free


def test_scores_that_are_equal_start_in_the_order_of_units_and_one_unit_at_0(gating: Gating) -> None:
    name, units = next((name, units) for name, units in gating.units.items() if units.stop - units.start == 4)
    logits = start_logits(gating, Scores("l1", {name: np.array([[2.0, 1.0, 1.0, 0.0]]), "none": np.ones((1, 1))}, 1))
    assert logits[units].tolist() == pytest.approx([1.5, -0.5, 0.5, -1.5])
    assert not logits[[i for i in range(10) if not units.start <= i < units.stop]].any()


def test_images_alike_have_no_spread_and_answers_all_the_same_still_have_a_distance(
    two: tuple[Any, Any, Tensor],
) -> None:
    graph, _, images = two
    alike = [(images[:1].repeat(4, 1, 1, 1), None)]
    assert 1e-12 <= spread_of(graph, alike) < 1e-9  # something to divide by
    distance = distance_of(graph, alike, None)
    dense = answers_of(graph, images)
    assert float(distance(dense, dense)) == 0
    assert math.isfinite(float(distance({"output": dense["output"].flip(1)}, dense)))


def test_a_task_that_is_no_classifiers_is_asked_for_its_own_distance(two: tuple[Any, Any, Tensor]) -> None:
    graph, _, images = two
    dense = answers_of(graph, images)
    task, other = task_named("regression"), {"output": dense["output"] * 0.5}
    by_task = distance_of(graph, [(images, None)], task)(other, dense)
    assert float(by_task) == pytest.approx(float(task.distance(other, dense).mean()))
    by_class = distance_of(graph, [(images, None)], task_named("classification"))(other, dense)
    assert float(by_class) == pytest.approx(float(distance_of(graph, [(images, None)], None)(other, dense)))


def test_a_mean_over_uneven_batches_counts_every_image_alike() -> None:
    held = [(torch.arange(6.0), None), (torch.tensor([30.0]), None)]
    assert mean_over(held, CPU, lambda inputs, step: inputs.mean()) == pytest.approx((15 + 30) / 7)
    assert mean_over(held, CPU, lambda inputs, step: torch.tensor(float(step))) == pytest.approx(1 / 7)
    several = [((torch.zeros(3, 1), torch.zeros(3)), None), ((torch.ones(1, 1), torch.ones(1)), None)]
    assert mean_over(several, CPU, lambda inputs, step: inputs[0].mean()) == pytest.approx(1 / 4)
    assert image_count(several) == 4


@pytest.mark.parametrize("as_batches", [True, False])
def test_lessons_show_every_image_once_a_pass_and_go_on_at_any_step(as_batches: bool, images: Images) -> None:
    few = batches(images.subset(np.arange(7)), 3)
    lessons = few if as_batches else list(few)
    stream = lessons_from(lessons, 0, 0)
    passes = [[next(stream) for _ in range(3)] for _ in range(4)]
    shown = [torch.cat(one).flatten(1).sum(1).tolist() for one in passes]
    assert all(sorted(sums) == sorted(shown[0]) for sums in shown)
    assert len(set(map(tuple, shown))) > 1  # each pass has an order of its own
    assert torch.equal(next(lessons_from(lessons, 0, 4)), passes[1][1])
    late = Stream(lessons, 0, CPU, STILL)
    assert torch.equal(late.at(4), passes[1][1])
    assert torch.equal(late.at(5), passes[1][2])
    assert image_count(lessons) == 7


def follow(
    tmp: Path | None, steps: int, judged: list[float], target: float = 1.0, **others: Any
) -> tuple[float, Tensor]:
    """One weight on its way to a target by Adam, judged by what is given in turn; the loss counts its own steps."""
    weight, calls = torch.tensor([0.0]), {"calls": torch.tensor(0.0)}

    def loss(step: int) -> Tensor:
        calls["calls"].add_(1)
        return (weight - target).square().sum() * (1 + calls["calls"])

    judgements = iter(judged)
    best = train(
        {"weight": weight}, loss, lambda: next(judgements), options=TrainingOptions(steps, 0.1, judgements=4),
        checkpoint=Checkpoint(tmp, "one", seconds=0.0), also=calls, progress=others.get("progress", lambda share: None),
    )  # fmt: skip
    assert not weight.requires_grad
    return best, weight


def test_judgements_are_even_and_of_equal_ones_the_first_is_kept() -> None:
    assert float(follow(None, 8, [9.0] * 5)[1]) == 0  # nothing is better than the start
    best, weight = follow(None, 8, [9.0, 3.0, 3.0, 5.0, 4.0])  # the start and after 2, 4, 6 and 8 steps
    assert best == 3
    assert torch.equal(weight, follow(None, 2, [9.0, 8.0, 3.0])[1])
    with pytest.raises(StopIteration):
        follow(None, 8, [9.0] * 4)


def test_what_is_no_number_is_worse_than_any() -> None:
    best, weight = follow(None, 8, [math.nan, math.nan, 7.0, math.nan, 8.0])
    assert best == 7
    assert float(weight) > 0
    assert float(follow(None, 0, [math.nan])[1]) == 0


def test_a_training_that_was_ended_goes_on_with_its_best_its_moments_and_its_counts(tmp_path: Path) -> None:
    judged = [9.0, 3.0, 4.0, 2.0, 5.0]
    whole = follow(None, 8, judged)

    def stop(share: float) -> None:
        if share == 5 / 8:
            raise KeyboardInterrupt

    path = tmp_path / "training.safetensors"
    with pytest.raises(KeyboardInterrupt):
        follow(path, 8, judged, progress=stop)
    again = follow(path, 8, judged[3:])  # those after 6 and 8 steps are left to make
    assert (again[0], float(again[1])) == (whole[0], float(whole[1])) == (2.0, float(whole[1]))
    finished = follow(path, 8, [])  # its end is put aside, too
    assert torch.equal(finished[1], whole[1])


def test_an_optimiser_comes_back_with_the_moments_of_every_parameter() -> None:
    def made(number: int) -> tuple[list[Tensor], torch.optim.Adam]:
        weights = [torch.ones(2, requires_grad=True) for _ in range(number)]
        return weights, torch.optim.Adam([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.1}])

    def step(weights: list[Tensor], optimiser: torch.optim.Adam) -> None:
        optimiser.zero_grad()
        sum((i + 1) * weight.square().sum() for i, weight in enumerate(weights)).backward()  # type: ignore[union-attr]
        optimiser.step()

    weights, optimiser = made(12)  # parameter 1 is not parameter 11
    step(weights, optimiser)
    others, other = made(12)
    for mine, theirs in zip(others, weights, strict=True):
        mine.data.copy_(theirs.data)
    restore_optimiser(other, optimiser_state(optimiser))
    step(weights, optimiser)
    step(others, other)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert optimiser_state(made(2)[1]) == {}


def test_nothing_is_written_before_it_is_due_and_nothing_stays_when_it_is_done(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    late = Checkpoint(path, "a", seconds=3600)
    late.write(1, {"x": torch.ones(1)})
    assert not late.is_due
    assert not path.exists()
    late.write(2, {"x": torch.ones(1)}, due=True)
    assert late.read() == (2, {"x": torch.ones(1)})
    late.close()
    late.close()
    assert not path.exists()
    assert not Checkpoint(None, "a", seconds=0).is_due


def test_positions_and_places_are_those_of_the_grid_whatever_lies_last() -> None:
    maps = torch.arange(2 * 3 * 2 * 4.0).reshape(2, 3, 2, 4)
    scale = Scale("maps", 1, 3, (2, 4))
    assert torch.equal(scale.positions(maps)[1, 5], maps[1, :, 1, 1])  # 5 of rows of 4
    tokens = torch.cat([torch.full((2, 1, 3), -1.0), scale.positions(maps)], 1)
    assert torch.equal(Scale("tokens", 2, 3, (2, 4), skip=1).positions(tokens), scale.positions(maps))
    places = scale.places((8, 8))
    assert places[0].tolist() == pytest.approx([-2, -3])
    assert places[5].tolist() == pytest.approx([2, -1])


def test_a_question_is_the_classes_probabilities_or_none() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])
    assert question_of({"output": logits, "index": torch.tensor([1])}).tolist() == [[0.25, pytest.approx(0.75)]]
    for leaves in ({"a": logits, "b": logits}, {"score": logits[:, :1]}, {"map": logits[..., None]}):
        assert question_of(leaves).tolist() == [[1.0]]


def test_a_network_without_positions_has_no_selector_and_one_grid_is_taken_thrice() -> None:
    images = torch.randn(4, 3, 8, 8)
    flat = trace(nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), images[:2])
    with pytest.raises(ModelError, match=r"no layer of this network has units at the positions .* --criterion gates"):
        find_scales(flat, find_structure(flat, images[:2]))
    maps = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 3)).eval(), images[:2])
    scales = find_scales(maps, find_structure(maps, images[:2]))
    assert [scale.grid for scale in scales] == [(8, 8)] * 3


def test_two_inputs_are_no_image_to_mask() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.mean((2, 3)) + y

    graph = trace(Two().eval(), (torch.randn(2, 3, 8, 8), torch.randn(2, 3)))
    with pytest.raises(RecipeError, match=r"the network takes \[N, 3, 8, 8\], \[N, 3\]; use --criterion gates"):
        require_images(graph)


@pytest.fixture(scope="module")
def selector(two: tuple[fx.GraphModule, Structure, Tensor]) -> Selector:
    """Not trained, but no more in the middle of what it found."""
    graph, structure, images = two
    made = make_selector(graph, structure, [(images, None)], SelectorOptions(), 0)
    with torch.no_grad():
        made.read.weight.normal_(generator=torch.Generator().manual_seed(0))
    return made


def test_a_selector_reads_features_by_their_mean_and_spread(selector: Selector, two: tuple[Any, Any, Tensor]) -> None:
    graph, _, images = two
    features, answers = pass_of(graph, images, [scale.node for scale in selector.scales])
    assert torch.equal(answers["output"], answers_of(graph, images)["output"])
    for index, scale in enumerate(selector.scales):
        rows = scale.positions(features[scale.node]).flatten(0, 1)
        torch.testing.assert_close(selector.of("mean", index), rows.mean(0))
        torch.testing.assert_close(selector.of("spread", index), rows.std(0).clamp_min(1e-3))


@pytest.mark.parametrize("as_paper", [True, False])
def test_what_is_lost_is_the_shares_of_spots_and_of_answers(
    as_paper: bool, selector: Selector, gating: Gating, two: tuple[fx.GraphModule, Any, Tensor]
) -> None:
    graph, _, images = two
    lessons, run = [(images, None)], Gated(gating, [scale.node for scale in selector.scales])
    gates, distance = torch.linspace(0.2, 1, 10), distance_of(graph, lessons, None)
    with torch.no_grad():
        leaves, question = run.answers(images, gates), question_of(answers_of(graph, images))
        drawn, expected = selector(run.kept, question).parameters, graph_spots(run, selector, lessons)
        kept = distance(leaves, answers_of(graph, images))
        order = [int((images == image).flatten(1).all(1).nonzero()) for image in next(lessons_from(lessons, 0, 0))]
        expected = expected[np.argsort(order)]
        scale = 10**0.5 * 32 / 8 if as_paper else 1 / expected.std(0, unbiased=False).clamp_min(0.01 * 8)
        explained = ((drawn - expected) * scale).square().mean()
        for share in (0.25, 1.0):
            asked: Any = None if share == 1 else distance  # nobody asks where the answers have no share
            lost = both_lost(run, selector, lessons, asked, share=share, as_paper=as_paper)
            assert float(lost(images, gates)) == pytest.approx(float(share * explained + (1 - share) * kept), rel=1e-4)


@pytest.mark.parametrize(("file", "words"), [(FILE, "selector.safetensors"), (ABOUT, "selector.json")])
def test_a_damaged_selector_is_refused_by_its_file(file: str, words: str, selector: Selector, tmp_path: Path) -> None:
    write_selector(tmp_path, selector, "hash")
    assert read_selector(tmp_path, "hash") is not None
    assert read_selector(tmp_path) is not None  # whoever names no network takes any
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FolderError, match=words):
        read_selector(tmp_path)
