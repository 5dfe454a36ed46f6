"""One step of a recovery and what it follows, by hand: rates, gradients, losses, judgements, trials, what is shown."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from compressor.graph import trace
from compressor.inputs.images import Batches, batches
from compressor.recovery import (
    Moment,
    Recovery,
    RecoveryOptions,
    Setting,
    judging,
    pupil,
    recover,
    recovering,
    text_of,
    trials,
)
from compressor.recovery.augmentation import augmented
from compressor.recovery.heads import features_of, watched
from compressor.recovery.judging import FARTHEST, Judge, Judgement
from compressor.recovery.lessons import images_in
from compressor.recovery.pupil import WARM_UP, Pupil, rate_factor
from compressor.recovery.record import Trial
from compressor.recovery.standing import Standing
from compressor.recovery.teaching import Teaching
from compressor.recovery.trials import choose_setting, seconds_per_step
from compressor.steering.lessons import generator_at
from compressor.tasks import fidelity, reference_of, task_named

from .conftest import pair, pool

ROUNDING = 1e-5  # of float32, in numbers of about one
IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def teaching_of(options: RecoveryOptions, *, places: bool = False) -> tuple[Teaching, fx.GraphModule, fx.GraphModule]:
    """A classifier's, or a segmenter's, with its dense network and the one that learns; exact on any machine."""
    options = replace(options, precision="float32")
    dense, small, slices = pair(places=places)
    reference = reference_of(lambda inputs: {"output": dense(inputs)}, [(IMAGES, None)])
    task = task_named("segmentation" if places else "classification", reference=reference)
    return Teaching(dense, small, task, pool(20), slices=slices, options=options), dense, small


def pupil_of() -> Pupil:
    teaching, _, small = teaching_of(RecoveryOptions())
    return Pupil(small, teaching, pool(20), seed=0)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_rate_rises_in_a_line_and_falls_in_half_a_cosine() -> None:
    assert rate_factor(0.0) == pytest.approx(0.1)  # the first step moves, too
    assert rate_factor(WARM_UP / 2) == pytest.approx(0.6)
    assert rate_factor(WARM_UP) == 1
    assert rate_factor((1 + WARM_UP) / 2) == pytest.approx(0.5)
    assert rate_factor(1.0) == pytest.approx(0)
    falling = [rate_factor(way) for way in np.linspace(WARM_UP, 1, 20)]
    assert falling == sorted(falling, reverse=True)


def test_a_step_follows_the_gradient_and_never_farther_than_its_greatest_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pupil, "augmented", lambda inputs, generator: inputs)
    learner, batch = pupil_of(), (IMAGES, None)
    before = learner.state()
    names, parameters = zip(*learner.network.named_parameters(), strict=True)
    slopes = torch.autograd.grad(learner.teaching.loss(IMAGES, None), parameters)
    norm = float(torch.cat([slope.flatten() for slope in slopes]).norm())
    for most in (2 * norm, norm / 3):
        monkeypatch.setattr(pupil, "MAX_GRADIENT_NORM", most)
        learner.restore(before)
        learner.learn(batch, 0, torch.optim.SGD(parameters, lr=1.0), rate=0.5)
        share = 0.5 * min(1.0, most / norm)
        for name, slope in zip(names, slopes, strict=True):
            torch.testing.assert_close(before[name] - learner.tensors[name], share * slope, atol=ROUNDING, rtol=1e-3)


def test_what_is_kept_of_a_pupil_is_a_copy_and_what_is_put_back_is_seen_by_all() -> None:
    learner = pupil_of()
    start, answer = learner.state(), learner.network(IMAGES)
    learner.learn((IMAGES, None), 0, learner.begin(Setting(1e-2)), 1e-2)
    watched_pupil = learner.teaching.pupil  # shares the tensors
    assert not equal(start, learner.state())
    learner.restore(start)
    assert torch.equal(watched_pupil(IMAGES)[0][0], answer)


@pytest.mark.parametrize(("norms", "moves"), [("frozen", False), ("batch", True)])
def test_running_statistics_move_where_the_setting_says(norms: Any, moves: bool) -> None:
    learner = pupil_of()
    mean = learner.tensors["norm.running_mean"].clone()
    optimiser = learner.begin(Setting(1e-3, norms))
    learner.learn((IMAGES, None), 0, optimiser, 0.0)
    assert torch.equal(learner.tensors["norm.running_mean"], mean) != moves


class Scripted:
    """A judge that says what it is told, one distance after another."""

    def __init__(self, *distances: float) -> None:
        self.distances = iter(distances)

    def judge(self, network: fx.GraphModule) -> Judgement:
        return Judgement(next(self.distances), 0.5, 0.5)


def test_the_nearest_setting_is_taken_with_its_state_and_the_pupil_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "LEAST_STEPS", 2)
    learner = pupil_of()
    start, options = learner.state(), RecoveryOptions().settings
    said: list[str] = []
    tried = choose_setting(learner, Scripted(0.5, 0.2, FARTHEST, 0.2), options, 40, said.append)  # type: ignore[arg-type]
    assert (tried.setting, tried.distance, tried.steps) == (options[1], 0.2, 2)  # of equals the first
    assert [trial.distance for trial in tried.trials] == [0.5, 0.2, FARTHEST, 0.2]
    assert said[3] == "trying rate 0.001, statistics of each batch"
    assert equal(start, learner.state())
    assert not equal(start, tried.state)


@pytest.mark.parametrize(("steps", "settings"), [(39, 4), (400, 1)])
def test_too_few_steps_or_settings_are_no_trial(steps: int, settings: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "LEAST_STEPS", 2)
    learner = pupil_of()
    tried = choose_setting(learner, Scripted(), RecoveryOptions().settings[:settings], steps, print)  # type: ignore[arg-type]
    assert (tried.setting, tried.steps, tried.trials, tried.distance) == (Setting(1e-3 / 3), 0, (), math.inf)
    assert equal(tried.state, learner.state())


def test_a_step_is_timed_by_the_second_of_two_which_are_taken_back() -> None:
    learner = pupil_of()
    start = learner.state()
    times = iter([0.0, 9.0, 10.0, 12.0])
    assert seconds_per_step(learner, Setting(1e-3, "batch"), lambda: next(times)) == 2
    assert equal(start, learner.state())
    assert seconds_per_step(learner, Setting(1e-3), lambda: 0.0) > 0  # a clock that stands is divided by


@torch.no_grad()
def test_the_loss_is_the_answers_distance_and_the_features_over_their_spread() -> None:
    options = RecoveryOptions(features=0.5)
    teaching, dense, small = teaching_of(options)
    small.get_parameter("second.bias").add_(0.1)  # else features are alike
    (feature,) = features_of(dense, small, pair()[2])
    (theirs,), (taught,) = watched(dense, [feature])(IMAGES)
    (ours,), (own,) = watched(small, [feature])(IMAGES)
    answers = teaching.task.distance({"output": ours}, {"output": theirs}).mean()
    lessons = torch.cat([inputs for inputs, _ in pool(20)])  # both batches of it
    rows = feature.of_dense(watched(dense, [feature])(lessons)[1][0]).double()
    spread = float((rows - rows.mean(0)).square().sum(1).mean())
    off = (own - feature.of_dense(taught)).square().sum(1).mean()
    assert float(teaching.loss(IMAGES, None)) == pytest.approx(float(answers + 0.5 * off / spread), rel=1e-4)
    plain = Teaching(dense, small, teaching.task, pool(20), slices=None, options=RecoveryOptions(features=0))
    assert float(plain.loss(IMAGES, None)) == pytest.approx(float(answers), rel=1e-4)


@torch.no_grad()
def test_labels_are_their_share_of_the_loss_where_there_are_any() -> None:
    labels, none = torch.tensor([0, 1, 2, 1, 0]), torch.full((5,), -1)
    teaching, _, small = teaching_of(RecoveryOptions(labels=0.25))
    without = teaching_of(RecoveryOptions())[0].loss(IMAGES, labels)
    right = nn.functional.cross_entropy(small(IMAGES), labels)
    assert float(teaching.loss(IMAGES, labels)) == pytest.approx(float(0.75 * without + 0.25 * right), rel=1e-4)
    assert float(teaching.loss(IMAGES, none)) == pytest.approx(float(without), rel=1e-4)


@pytest.mark.parametrize(
    ("labels", "places", "targets", "allowed"),
    [
        (0.5, False, torch.zeros(5, dtype=torch.int64), True),  # a class stays where an image moves
        (0.5, True, torch.zeros(5, 8, 8, dtype=torch.int64), False),  # a mask would lie elsewhere
        (0.0, True, torch.zeros(5, 8, 8, dtype=torch.int64), True),
        (0.5, True, None, True),
    ],
)
def test_images_are_moved_unless_labels_of_places_are_followed(
    labels: float, places: bool, targets: Tensor | None, allowed: bool
) -> None:
    teaching = teaching_of(RecoveryOptions(labels=labels), places=places)[0]
    assert teaching.allows_views(targets) is allowed


@torch.no_grad()
def test_a_judgement_is_the_mean_over_images_of_uneven_batches(held: Batches) -> None:
    dense, small, _ = pair()
    uneven = batches(held.images.subset(np.arange(21)), 16)  # 16 and 5
    judge = Judge(dense, uneven, None)
    judgement = judge.judge(small)
    images = torch.cat([inputs for inputs, _ in uneven])
    ours, theirs = (values - values.mean(1, keepdim=True) for values in (small(images), dense(images)))
    assert judgement.distance == pytest.approx(float((ours - theirs).square().sum() / theirs.square().sum()), rel=1e-4)
    assert judgement.quality == pytest.approx(float((ours.argmax(1) == theirs.argmax(1)).double().mean()))
    predict = [lambda inputs, net=net: {"output": net(inputs)} for net in (small, dense)]
    assert judgement.fidelity == pytest.approx(fidelity(*predict, uneven).value, rel=1e-6)
    same = judge.judge(dense)
    assert (same.distance, same.fidelity, same.quality) == (0, 1, 1)


@pytest.mark.parametrize(("most_bytes", "asked"), [(1 << 20, 2), (0, 6), (16 * 3 * 4, 4)])
def test_small_answers_of_the_dense_network_are_asked_for_once(
    most_bytes: int, asked: int, held: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, small, _ = pair(norm=False)
    task = task_named("regression", dense=lambda inputs: {"output": dense(inputs)})
    judge = Judge(dense, batches(held.images.subset(np.arange(20)), 16), task)
    counted = itertools.count()
    plain = judge._answered_by_dense
    monkeypatch.setattr(judging, "MOST_BYTES", most_bytes)
    monkeypatch.setattr(judge, "_answered_by_dense", lambda inputs: (next(counted), plain(inputs))[1])
    judgements = {judge.judge(small) for _ in range(3)}
    assert next(counted) == asked
    (judgement,) = judgements
    assert (judge.metric, judgement.quality) == ("fidelity", judgement.fidelity)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e12])
def test_nothing_is_farther_than_what_is_not_finite(factor: float, held: Batches) -> None:
    """A start that is very far off must not be beaten by a training that broke."""
    dense, _, _ = pair(norm=False)
    broken = copy.deepcopy(dense)
    with torch.no_grad():
        broken.get_parameter("head.weight").mul_(factor)
    assert Judge(dense, held, None).judge(broken).distance == FARTHEST


def test_one_held_image_and_fewer_images_than_a_batch_are_enough(held: Batches) -> None:
    dense, small, slices = pair()
    one, five = batches(held.images.subset([0]), 16), batches(held.images.subset(np.arange(5)), 16)
    _, recovery = recover(dense, small, five, one, slices=slices, options=RecoveryOptions(minutes=5, passes=3))
    assert (recovery.images, recovery.held, recovery.ended) == (5, 1, "passes")
    assert [moment.shown for moment in recovery.moments] == [0, 5, 10, 15]


def test_images_are_counted_as_they_are_shown_and_progress_ends_at_one(
    held: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "LEAST_STEPS", 1)
    monkeypatch.setattr(recovering, "seconds_per_step", lambda *_: 1e-3)
    lessons, shares = pool(20), list[float]()
    assert [images_in(lessons, steps) for steps in range(5)] == [0, 16, 20, 36, 40]
    ticks = itertools.count()
    _, recovery = recover(
        *pair()[:2],
        lessons,
        held,
        options=RecoveryOptions(minutes=1, passes=20, rate=3e-3),
        progress=lambda share, phase="": shares.append(share),
        clock=lambda: 20.0 * next(ticks),  # trials alone take longer than all the time there is
    )
    assert recovery.moments[1].shown == 20  # of a trial of two steps
    assert recovery.moments[-1].shown - 20 in (16, 20)
    assert recovery.ended == "time"
    assert (max(shares), shares) == (1, sorted(shares))


def test_a_recovery_of_another_beginning_is_not_gone_on_with(
    held: Batches, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovering, "CHECKPOINT_S", 0.0)
    dense, small, slices = pair()

    def run(rate: float, progress: Any = lambda share, phase="": None) -> list[float]:
        options = RecoveryOptions(minutes=5, passes=2, rate=rate)
        _, recovery = recover(
            dense, small, pool(20), held, slices=slices, options=options, folder=tmp_path, progress=progress
        )
        return [moment.distance for moment in recovery.moments]

    def stop(share: float, phase: str = "") -> None:
        raise KeyboardInterrupt

    whole = run(1e-3)
    with pytest.raises(KeyboardInterrupt):
        run(1e-2, stop)
    assert list(tmp_path.iterdir()) != []
    assert run(1e-3) == whole
    assert list(tmp_path.iterdir()) == []


def test_the_callers_draws_and_what_learns_stay_as_they_were(held: Batches) -> None:
    dense, small, slices = pair()
    small.get_parameter("first.weight").requires_grad_(False)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    network, _ = recover(dense, small, pool(20), held, slices=slices, options=RecoveryOptions(passes=1))
    assert torch.equal(torch.rand(1), expected)
    assert not network.get_parameter("first.weight").requires_grad
    assert network.get_parameter("second.weight").requires_grad


def test_standing_comes_back_from_its_tensors_and_its_way_ends_at_one() -> None:
    moments = [Moment(0.0, 0, 0.5, 0.4, 0.3), Moment(1.5, 32, FARTHEST, -1.0, 0.0)]
    trialled = (Trial(Setting(1e-3), 0.5), Trial(Setting(3e-3, "batch"), 0.0))
    for tried in ((), trialled):
        standing = Standing(Setting(3e-3, "batch"), 8, 2.0, list(moments), tried, best=1, shown=32)
        assert (standing.begun_s, standing.first_steps, standing.before) == (2.0, 8, 2)
        standing.advance(16, 3.0)
        assert standing.way == pytest.approx(1 / 8)
        standing.shorten(20)  # never longer
        assert standing.steps == 8
        standing.hurry(3)  # a quarter of seven would be one
        assert standing.steps == 4
        assert Standing.read(standing.tensors()) == standing
        while standing.step < standing.steps:
            standing.advance(16, 3.0)
        assert standing.way == pytest.approx(1)
        assert (standing.shown, standing.seconds) == (32 + 4 * 16, 3.0)


def test_every_view_is_a_window_of_the_image_and_its_reflection() -> None:
    grey = torch.arange(6 * 16 * 24, dtype=torch.float32).reshape(6, 1, 16, 24)
    view = augmented(grey, generator_at(0, 3))
    assert isinstance(view, Tensor)
    offsets = set()
    for image, before in zip(view[:, 0].numpy(), grey[:, 0].numpy(), strict=True):
        wide = np.pad(before, ((2, 2), (3, 3)), mode="reflect")
        windows = itertools.product(range(5), range(7))
        (place,) = [(y, x) for y, x in windows if np.array_equal(wide[y : y + 16, x : x + 24], image)]
        offsets.add(place)
    assert len(offsets) > 3


def test_a_small_colour_image_is_mirrored_alone() -> None:
    images = torch.randn(400, 3, 7, 7, generator=torch.Generator().manual_seed(0))  # an eighth is no pixel
    view = augmented(images, generator_at(0, 0))
    assert isinstance(view, Tensor)
    mirrored = (view == images.flip(3)).flatten(1).all(1)
    assert 150 < int(mirrored.sum()) < 250  # 10 a standard deviation
    assert torch.equal(view[~mirrored], images[~mirrored])


class Heads(nn.Module):
    """Two heads that read one feature, one that reads it in groups and one that reads the images."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, padding=1)
        self.first, self.second = nn.Conv2d(4, 2, 1), nn.ConvTranspose2d(4, 3, 2, 2)
        self.grouped, self.images = nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.body(x).relu()
        return self.first(y), self.second(y), self.grouped(y), self.images(x)


def test_a_feature_of_several_heads_counts_once_and_images_and_groups_are_none() -> None:
    model = Heads().eval()
    graph = trace(model, IMAGES[:2])
    (feature,) = features_of(graph, graph)
    assert (feature.axis, feature.kept) == (1, None)
    answers, features = watched(graph, [feature])(IMAGES)
    assert [len(answers), len(features)] == [4, 1]
    torch.testing.assert_close(features[0], model.body(IMAGES).relu())
    assert torch.equal(answers[0], graph(IMAGES)[0])


def test_what_happened_is_told_with_its_figures() -> None:
    moments = (Moment(0, 0, 0.5, 0.9, 0.8), Moment(90, 2000, 0.2, 0.95, 0.85), Moment(180, 4000, 0.3, 0.94, 0.9))
    tried = (Trial(Setting(1e-3), 0.4), Trial(Setting(3e-3, "batch"), 0.3))
    recovery = Recovery(moments, 1, Setting(3e-3, "batch"), tried, "no better", 1000, 64, "agreement")
    text = text_of(recovery)
    assert "1,000 images taught (4,000 were shown" in text
    assert "after 3.0 min, as fidelity on held-out images had stopped rising" in text
    assert "from 0.9000 to 0.9500, agreement with the dense network from 0.8000 to 0.8500." in text
    assert "Of rate 0.003, statistics of each batch (distance 0.3); rate 0.001, statistics kept (distance 0.4)" in text
    plain = text_of(Recovery(moments[:2], 1, Setting(1e-3), tried[:1], "time", 1000, 64, "fidelity"))
    assert plain.count("from") == 1
    assert "after 90 s, as the time was over" in plain
    assert plain.endswith("0.9500.")  # one trial is no choice
