"""Predictor and selector: what they read, that they learn, on which images what counts is chosen, that they go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from compressor.errors import DataError, FolderError, RecipeError
from compressor.graph import trace
from compressor.inputs.images import Images, batches
from compressor.pruning import find_structure, prune
from compressor.pruning.surgery import removed_classes
from compressor.records import Scores
from compressor.rounds import Prunable
from compressor.steering import (
    GateOptions,
    SelectorOptions,
    SteeringOptions,
    hash_of_network,
    learn_scores,
    read_selector,
)
from compressor.steering.augmentation import Augmentation
from compressor.steering.checkpoints import Checkpoint
from compressor.steering.explanation import both_lost
from compressor.steering.gating import Gated, find_gates
from compressor.steering.masks import DISC
from compressor.steering.objectives import answers_of, distance_of
from compressor.steering.predictor import mask_numbers, train_predictor, widths_of
from compressor.steering.saving import write_selector
from compressor.steering.selector import (
    find_scales,
    find_spots,
    in_place,
    make_selector,
    pass_of,
    train_selector,
)
from compressor.steering.training import TrainingOptions, parted, train

from .conftest import subject_of

SHORT = SelectorOptions(predictor_steps=3, steps=3)
STILL = Augmentation(0)
QUICK = SteeringOptions(gates=GateOptions(steps=4), selector=SHORT, explanation=0.5)


class Corner(nn.Module):
    """Says whether the brightest of two corners is the upper left or the lower right one: the rest counts nothing."""

    def __init__(self, channels: int = 1, side: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 6, 3, padding=1)
        self.out = nn.Linear(6 * (side // 4) ** 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(self.stem(x).relu(), 2)
        answer: Tensor = self.out(nn.functional.avg_pool2d(self.inner(x).relu(), 2).flatten(1))
        return answer


def subject() -> tuple[Prunable, list[tuple[Tensor, Tensor]]]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Corner().eval()
        images = torch.rand(20, 1, 16, 16)
    graph = trace(model, images[:2])
    batched = [(part, torch.full((len(part),), -1)) for part in images.split(4)]
    return Prunable(graph, find_structure(graph, images[:2])), batched


def learned(folder: Path | None = None, options: SteeringOptions = QUICK, **others: object) -> Scores:
    of, lessons = subject()
    return learn_scores(of.network, of.structure, lessons, criterion="isp", options=options, folder=folder, **others)


@pytest.mark.parametrize("name", ["resnet", "depthwise", "vit", "swin"])
def test_three_scales_of_any_network_have_positions(name: str) -> None:
    of = subject_of(name)
    scales = find_scales(of.graph, of.structure)
    assert len(scales) == 3
    features, _ = pass_of(of.graph, of.images, [scale.node for scale in scales])
    for scale in scales:
        rows, columns = scale.grid
        positions = scale.positions(features[scale.node])
        assert positions.shape == (len(of.images), rows * columns, scale.features)
        places = scale.places((16, 16))
        assert places.shape == (rows * columns, 2)
        assert float(places.mean()) == pytest.approx(0, abs=1e-5)
        assert places.abs().max() < 8
    if name == "vit":
        assert {scale.skip for scale in scales} == {1}


def test_a_selector_begins_at_the_papers_width_within_the_image() -> None:
    of, lessons = subject()
    selector = make_selector(of.network, of.structure, lessons, SHORT, 0)
    images = lessons[0][0]
    spots, _ = find_spots(selector, of.network, images)
    assert spots.sigma.tolist() == pytest.approx([10 * 0.5 ** (np.log(10) / np.log(7))] * 4, rel=1e-4)
    assert bool(((spots.centre > 0) & (spots.centre < 16)).all())


def test_images_that_judge_are_none_that_teach(images: Images) -> None:
    learning, held = parted(batches(images.subset(np.arange(11)), 4))
    assert set(learning.images.names).isdisjoint(held.images.names)
    assert (len(learning.images), len(held.images)) == (9, 2)
    first, second = parted([(torch.arange(float(n), n + 3), None) for n in (0, 10, 20)])
    assert {float(x) for inputs, _ in first for x in inputs}.isdisjoint({float(x) for i, _ in second for x in i})
    one, other = parted([(torch.arange(5.0), None)])
    assert (one[0][0].tolist(), other[0][0].tolist()) == ([0, 1, 2, 3], [4])
    with pytest.raises(DataError, match="at least two"):
        parted([(torch.arange(1.0), None)])


def test_what_judges_best_is_kept_and_not_what_came_last() -> None:
    weight = torch.tensor([0.0])
    seen: list[float] = []

    def judge() -> float:
        seen.append(float(weight.detach()))
        return abs(float(weight.detach()) - 0.05)  # on other images than those that pull it on

    options = TrainingOptions(steps=16, rate=0.02, weight_decay=0.0, judgements=16)
    best = train(
        {"weight": weight}, lambda step: -weight.sum(), judge, options=options, checkpoint=Checkpoint(None, 0),
        also={}, progress=lambda share: None,
    )  # fmt: skip
    assert max(seen) > 0.2
    assert float(weight.detach()) == pytest.approx(0.05, abs=0.011)
    assert best == min(abs(value - 0.05) for value in seen)


def test_the_predictor_and_the_selector_are_judged_on_images_kept_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that teach go by `Stream`, those that judge by `mean_over`."""
    from compressor.steering import predictor, selector

    _, lessons = subject()
    learning, held = parted(lessons)
    seen: dict[str, set[float]] = {"taught": set(), "judged": set()}
    plain_at, plain_mean = predictor.Stream.at, predictor.mean_over

    def at(self: predictor.Stream, step: int) -> Tensor:
        inputs = plain_at(self, step)
        assert isinstance(inputs, Tensor)
        seen["taught"].add(float(inputs.sum()))
        return inputs

    def mean_over(held: list[tuple[Tensor, Tensor]], *rest: object) -> float:
        seen["judged"].update(float(inputs.sum()) for inputs, _ in held)
        return plain_mean(held, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(predictor.Stream, "at", at)
    monkeypatch.setattr(predictor, "mean_over", mean_over)
    monkeypatch.setattr(selector, "mean_over", mean_over)
    learned(options=replace(QUICK, augmentation=STILL))  # images that are moved have other sums
    assert seen["judged"] == {float(inputs.sum()) for inputs, _ in held}
    assert seen["taught"] <= {float(inputs.sum()) for inputs, _ in learning}


@pytest.mark.thorough
def test_the_predictor_comes_nearer_to_the_network_under_masks_and_the_network_stays() -> None:
    of, lessons = subject()
    before = {name: tensor.clone() for name, tensor in of.network.state_dict().items()}
    learning, held = parted(lessons)
    distance = distance_of(of.network, lessons, None)

    def trained(steps: int) -> tuple[fx.GraphModule, float]:
        options = replace(SHORT, predictor_steps=steps, predictor_rate=3e-3)
        judged: list[float] = []
        made = train_predictor(
            of.network, learning, held, distance, options=options, augmentation=STILL, seed=0,
            checkpoint=Checkpoint(None, 0),
            progress=judged.append,
        )  # fmt: skip
        masked = held[0][0] * 0
        return made, float(distance(answers_of(made, masked), answers_of(of.network, held[0][0])))

    (_, without), (_, with_training) = trained(0), trained(40)
    assert with_training < without
    assert all(torch.equal(before[name], tensor) for name, tensor in of.network.state_dict().items())


def test_an_explanation_is_kept_with_all_gates_open_and_lost_with_half_of_them() -> None:
    of, lessons = subject()
    selector = make_selector(of.network, of.structure, lessons, SHORT, 0)
    with torch.no_grad():
        selector.read.weight.normal_(generator=torch.Generator().manual_seed(0))
    gating = find_gates(of.network, of.structure, ("channel", "stream"))
    run = Gated(gating, [scale.node for scale in selector.scales])
    distance = distance_of(of.network, lessons, None)
    for as_paper in (False, True):
        lost = both_lost(run, selector, lessons, distance, share=1.0, as_paper=as_paper)
        gates = torch.ones(gating.count)
        assert float(lost(lessons[0][0], gates).detach()) < 1e-9
        gates[::2] = 0.3
        gates.requires_grad_()
        value = lost(lessons[0][0], gates)
        assert float(value.detach()) > 1e-6
        (slope,) = torch.autograd.grad(value, gates)
        assert bool(slope.abs().sum() > 0)


def test_a_smaller_networks_features_lie_where_the_dense_one_has_them() -> None:
    of, lessons = subject()
    images = lessons[0][0]
    scales = find_scales(of.network, of.structure)
    nodes = [scale.node for scale in scales]
    kept = {group.name: np.arange(1, group.size, 2) for group in of.structure.groups.groups}
    small, _ = prune(of.network, of.structure, kept)
    gone = removed_classes(of.structure, kept)
    gating = find_gates(of.network, of.structure, ("channel", "stream"))
    gates = torch.ones(gating.count)
    for name, units in gating.units.items():
        gates[units] = 0
        gates[units.start + torch.from_numpy(kept[name])] = 1
    run = Gated(gating, nodes)
    with torch.no_grad():
        run.answers(images, gates)
    placed = in_place(pass_of(small, images, nodes)[0], scales, of.structure, gone)
    for node in nodes:
        assert placed[node].shape == run.kept[node].shape
        assert (placed[node] - run.kept[node]).abs().max() < 1e-5


def test_a_selector_pays_for_width_until_it_loses_what_it_may() -> None:
    of, lessons = subject()
    learning, held = parted(lessons)
    selector = make_selector(of.network, of.structure, lessons, SHORT, 0)
    wide = SelectorOptions(steps=30, rate=1e-2, keeps=1e6)  # all may be lost
    train_selector(
        of.network, of.network, selector, learning, held, distance_of(of.network, lessons, None), options=wide,
        augmentation=STILL, seed=0, checkpoint=Checkpoint(None, 0), progress=lambda share: None,
    )  # fmt: skip
    images = held[0][0]
    spots, _ = find_spots(selector, of.network, images)
    assert float(spots.sigma.mean()) < 4.3  # began at 4.4


class Killed(Exception):
    """The process ends here."""


@pytest.mark.parametrize("stopped", [0.2, 0.5, 0.8])
def test_stopped_in_any_stage_and_gone_on_with_it_comes_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: float
) -> None:
    monkeypatch.setattr("compressor.steering.checkpoints.SECONDS", 0.0)
    whole = learned(tmp_path / "whole")

    def kill(share: float) -> None:
        if share > stopped:
            raise Killed

    with pytest.raises(Killed):
        learned(tmp_path / "cut", progress=kill)
    shares: list[float] = []
    again = learned(tmp_path / "cut", progress=shares.append)
    assert shares[0] > stopped
    assert all((whole.values[name] == again.values[name]).all() for name in whole.values)
    assert not list(tmp_path.rglob("learning-*"))
    first, second = (read_selector(tmp_path / name) for name in ("whole", "cut"))
    assert first is not None
    assert second is not None
    assert all(torch.equal(first.state_dict()[name], tensor) for name, tensor in second.state_dict().items())


def test_a_folder_without_a_selector_has_none(tmp_path: Path) -> None:
    assert read_selector(tmp_path) is None


def test_a_selector_is_read_back_for_its_own_network_alone(tmp_path: Path) -> None:
    of, lessons = subject()
    selector = make_selector(of.network, of.structure, lessons, SHORT, 0)
    network = hash_of_network(of.network)
    write_selector(tmp_path, selector, network)
    again = read_selector(tmp_path, network)
    assert again is not None
    images = lessons[0][0]
    drawn, drawn_before = (find_spots(each, of.network, images)[0].parameters for each in (again, selector))
    assert torch.equal(drawn, drawn_before)
    assert again.least == pytest.approx(16 / 12)
    with torch.no_grad():
        next(iter(of.network.parameters())).add_(1)
    with pytest.raises(FolderError, match="another network or other weights"):
        read_selector(tmp_path, hash_of_network(of.network))


def test_no_spot_is_narrower_than_what_the_predictor_learned_from() -> None:
    of, lessons = subject()
    images = lessons[0][0]
    for widths, least in (((0.25, 0.5), 4.0), (None, 0.0)):
        selector = make_selector(of.network, of.structure, lessons, replace(SHORT, widths=widths), 0)
        with torch.no_grad():
            selector.read.bias[2] = -100
        spots, _ = find_spots(selector, of.network, images)
        assert spots.sigma.tolist() == pytest.approx([least] * 4, abs=1e-6)


def test_the_predictor_learns_from_the_widths_that_are_asked_for_or_from_the_papers() -> None:
    assert widths_of(replace(SHORT, widths=(0.25, 0.5)), (16, 16)) == (4, 8)
    assert widths_of(replace(SHORT, widths=None), (32, 32)) == pytest.approx((5, 11))


def test_masks_are_discs_or_each_pixel_by_itself() -> None:
    images = torch.zeros(3, 1, 8, 8)
    assert bool((mask_numbers(0, 1, images, SHORT) == DISC).all())
    drawn = mask_numbers(0, 1, images, replace(SHORT, discs=False))
    assert drawn.shape == (3, 1, 8, 8)
    assert len(drawn.unique()) == drawn.numel()
    assert not torch.equal(drawn, mask_numbers(0, 2, images, replace(SHORT, discs=False)))


def test_what_is_no_image_gets_one_line() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    rows = torch.randn(6, 6)
    graph = trace(model, rows[:2])
    with pytest.raises(RecipeError, match=r"masks images.*the network takes \[N, 6\]; use --criterion gates"):
        learn_scores(graph, find_structure(graph, rows[:2]), [(rows, None)], criterion="isp", options=QUICK)
