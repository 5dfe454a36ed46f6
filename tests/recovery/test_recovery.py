"""A recovery comes nearer to the dense network, never farther; ends as it says; goes on where it was killed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from compressor.accuracy import batch_norms
from compressor.errors import DataError
from compressor.inputs.images import Batches, batches
from compressor.recovery import Moment, Recovery, RecoveryOptions, Setting, recover, text_of
from compressor.recovery.augmentation import augmented
from compressor.recovery.heads import features_of, watched
from compressor.recovery.lessons import batches_from
from compressor.recovery.recovering import FILE, _is_stuck, _leads_away
from compressor.recovery.standing import Standing
from compressor.steering.lessons import generator_at

from .conftest import pair

QUICK = RecoveryOptions(minutes=5, passes=10, rate=3e-3)
LONG_S = 1e6


@pytest.fixture(scope="module")
def recovered(lessons: Batches, held: Batches) -> tuple[fx.GraphModule, fx.GraphModule, Recovery]:
    dense, small, slices = pair()
    network, recovery = recover(dense, small, lessons, held, slices=slices, options=QUICK)
    return small, network, recovery


def distance(recovery: Recovery) -> float:
    return recovery.moments[recovery.best].distance


def test_it_comes_nearer_and_leaves_what_it_was_given(
    recovered: tuple[fx.GraphModule, fx.GraphModule, Recovery],
) -> None:
    small, network, recovery = recovered
    _, untouched, _ = pair()
    assert distance(recovery) < 0.5 * recovery.moments[0].distance
    assert recovery.moments[recovery.best].fidelity > recovery.moments[0].fidelity
    assert all(
        torch.equal(a, b) for a, b in zip(small.state_dict().values(), untouched.state_dict().values(), strict=False)
    )
    assert not any(node.args[5] for node in batch_norms(network))
    assert all(parameter.grad is None for parameter in network.parameters())


def test_what_is_said_is_what_was_done(recovered: tuple[fx.GraphModule, fx.GraphModule, Recovery]) -> None:
    recovery = recovered[2]
    assert (recovery.images, recovery.held, recovery.metric) == (160, 64, "agreement")
    assert recovery.ended in ("passes", "no better")
    assert "160 images taught" in text_of(recovery)
    assert [moment.shown for moment in recovery.moments] == sorted(moment.shown for moment in recovery.moments)


def test_labels_are_not_needed_and_change_nothing_unless_asked_for(lessons: Batches, held: Batches) -> None:
    dense, small, slices = pair()
    options = RecoveryOptions(minutes=5, passes=1, rate=3e-3)
    unlabelled = batches(lessons.images.labelled(np.full(160, -1)), 16)
    states = []
    for images in (lessons, unlabelled):
        network, _ = recover(dense, small, images, held, slices=slices, options=options)
        states.append(network.state_dict()["head.weight"])
    assert torch.equal(*states)


@pytest.mark.parametrize("places", [True, False])
def test_without_normalisation_and_with_answers_at_places(places: bool, lessons: Batches, held: Batches) -> None:
    from compressor.tasks import task_named

    dense, small, slices = pair(places=places, norm=False)
    task = task_named("segmentation" if places else "regression", dense=lambda x: {"output": dense(x)})
    unlabelled = batches(held.images.labelled(np.full(64, -1)), 16)
    options = RecoveryOptions(minutes=5, passes=4, rate=3e-3)
    _, recovery = recover(dense, small, lessons, unlabelled, slices=slices, task=task, options=options)
    assert distance(recovery) < recovery.moments[0].distance


def test_what_is_no_better_is_the_repaired_network_itself(lessons: Batches, held: Batches) -> None:
    dense, _, _ = pair()
    network, recovery = recover(dense, dense, lessons, held, options=RecoveryOptions(minutes=5, passes=1, rate=1.0))
    assert not recovery.gained
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), dense.state_dict().values(), strict=False)
    )
    assert "Nothing came nearer" in text_of(recovery)


def ticking(step_s: float) -> Callable[[], float]:
    times = itertools.count()
    return lambda: step_s * next(times)


def test_the_time_ends_it_and_the_rate_has_come_down_by_then(lessons: Batches, held: Batches) -> None:
    dense, small, slices = pair()
    options = RecoveryOptions(minutes=1, passes=1000, rate=3e-3)
    _, recovery = recover(dense, small, lessons, held, slices=slices, options=options, clock=ticking(0.5))
    assert recovery.ended == "time"
    assert recovery.moments[-1].seconds <= 60 + 1


def test_what_gets_no_nearer_comes_to_its_end_sooner() -> None:
    near = [Moment(0.0, 0, 0.1, 0.9, 0.9), *(Moment(1.0, 1, 0.2, 0.8, 0.8) for _ in range(6))]
    standing = Standing(Setting(1e-3), 1200, 0.0, near[:1])
    for _ in range(600):
        standing.advance(16, 1.0)
    standing.moments += near[1:5]
    assert not _is_stuck(standing)  # one judgement is there to be better than, and three more
    standing.moments += near[5:6]
    assert _is_stuck(standing)
    standing.hurry(100)
    assert (standing.steps, standing.hurried) == (600 + 150, True)
    before = standing.way
    standing.advance(16, 1.0)
    assert standing.way - before == pytest.approx((1 - before) / 150)
    assert Standing.read(standing.tensors()) == standing


def _standing(*distances: float, before: int = 1) -> Standing:
    return Standing(
        Setting(1e-3), 1200, 0.0, [Moment(0.0, 0, far, 0.9, 0.9) for far in distances], before=before, begun_s=0
    )


@pytest.mark.parametrize(
    ("distances", "leads"),
    [
        ((0.1, 0.11, 0.12), True),
        ((0.1, 0.4, 0.3), True),
        ((0.1, 0.12, 0.11), False),
        ((0.1, 0.2), False),
        ((0.1, 0.2, 0.3, 0.4), False),
    ],
)
def test_a_rate_leads_away_where_the_second_judgement_is_farther_still(
    distances: tuple[float, ...], leads: bool
) -> None:
    assert _leads_away(_standing(*distances)) == leads


def test_what_came_nearer_once_does_not_lead_away() -> None:
    standing = _standing(0.3, 0.1, 0.2)
    standing.best = 1
    assert not _leads_away(standing)


def test_a_lowered_rate_begins_its_own_cosine_and_is_judged_by_itself() -> None:
    standing = _standing(0.1, 0.2, 0.3)
    standing.first_steps = standing.steps
    for _ in range(200):
        standing.advance(16, 1.0)
    standing.lower(1e-5)
    assert (standing.setting, standing.way, standing.before) == (Setting(1e-3 / 3), 0.0, 3)
    standing.advance(16, 1.0)
    assert standing.way == pytest.approx(1 / 1000)
    standing.lower(2e-4)
    assert standing.setting == Setting(2e-4)
    assert Standing.read(standing.tensors()) == standing


@pytest.fixture
def wild(monkeypatch: pytest.MonkeyPatch) -> RecoveryOptions:
    """A rate that leads away, and no trial that would tell."""
    monkeypatch.setattr("compressor.recovery.trials.LEAST_STEPS", 10**6)
    return RecoveryOptions(minutes=5, passes=20, rate=1.0, precision="float32")


def test_a_rate_that_leads_away_is_lowered_until_it_comes_nearer(
    wild: RecoveryOptions, lessons: Batches, held: Batches
) -> None:
    dense, small, slices = pair()
    _, recovery = recover(dense, small, lessons, held, slices=slices, options=wild)
    assert wild.rate / 100 <= recovery.setting.rate < wild.rate / 3
    assert recovery.moments[recovery.best].distance < 0.9 * recovery.moments[0].distance


class Killed(BaseException):
    """A process that ends in the middle."""


def killing(at: int) -> Callable[..., None]:
    """A progress whose process ends when it is told something for the `at`-th time."""
    said = itertools.count()

    def kill(share: float, phase: str = "") -> None:
        if next(said) == at:
            raise Killed

    return kill


def test_killed_after_its_rate_was_lowered_it_comes_to_the_same(
    wild: RecoveryOptions, lessons: Batches, held: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.recovery.recovering.CHECKPOINT_S", 0.0)
    dense, small, slices = pair()
    whole, alone = recover(dense, small, lessons, held, slices=slices, options=wild)
    with pytest.raises(Killed):
        recover(dense, small, lessons, held, slices=slices, options=wild, folder=tmp_path, progress=killing(60))
    network, recovery = recover(dense, small, lessons, held, slices=slices, options=wild, folder=tmp_path)
    pairs = zip(whole.parameters(), network.parameters(), strict=True)
    assert all(torch.equal(once, again) for once, again in pairs)
    assert recovery.setting == alone.setting


def test_killed_and_continued_it_comes_to_the_same(
    lessons: Batches,
    held: Batches,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recovered: tuple[fx.GraphModule, fx.GraphModule, Recovery],
) -> None:
    monkeypatch.setattr("compressor.recovery.recovering.CHECKPOINT_S", 0.0)
    dense, small, slices = pair()
    with pytest.raises(Killed):
        recover(dense, small, lessons, held, slices=slices, options=QUICK, folder=tmp_path, progress=killing(40))
    assert (tmp_path / FILE).is_file()
    network, recovery = recover(dense, small, lessons, held, slices=slices, options=QUICK, folder=tmp_path)
    once = recovered[1].state_dict()
    assert all(torch.equal(once[name], tensor) for name, tensor in network.state_dict().items())
    assert [m.distance for m in recovery.moments] == [m.distance for m in recovered[2].moments]
    assert recovery.trials == recovered[2].trials
    assert not (tmp_path / FILE).exists()


def test_features_are_compared_by_the_channels_that_are_left() -> None:
    dense, small, slices = pair()
    (feature,) = features_of(dense, small, slices)
    images = torch.randn(5, 3, 8, 8)
    (_, (theirs,)), (_, (ours,)) = watched(dense, [feature])(images), watched(small, [feature])(images)
    torch.testing.assert_close(feature.of_dense(theirs), ours)  # nothing was repaired: the channels are the same
    assert features_of(dense, small) == ()  # nobody says which are left
    assert len(features_of(dense, copy.deepcopy(dense))) == 1


def test_without_images_there_is_nothing_to_learn_from(lessons: Batches, held: Batches) -> None:
    dense, small, _ = pair()
    none = batches(held.images.subset([]), 16)
    with pytest.raises(DataError, match="held-out"):
        recover(dense, small, lessons, none)
    with pytest.raises(DataError, match="images to recover from"):
        next(batches_from(none, 0, 0))


def test_batches_follow_from_the_step_alone(lessons: Batches) -> None:
    through = [inputs for inputs, _ in itertools.islice(batches_from(lessons, 3, 0), 25)]
    later = [inputs for inputs, _ in itertools.islice(batches_from(lessons, 3, 13), 12)]
    assert all(torch.equal(a, b) for a, b in zip(through[13:], later, strict=True))
    assert not torch.equal(through[0], through[10])  # the second pass has an order of its own


def test_views_of_images_and_of_nothing_else() -> None:
    images = torch.randn(6, 3, 16, 16)
    view = augmented(images, generator_at(0, 1))
    assert isinstance(view, Tensor)
    assert view.shape == images.shape
    assert not torch.equal(view, images)
    again = augmented(images, generator_at(0, 1))
    assert isinstance(again, Tensor)
    assert torch.equal(view, again)
    for other in (torch.randn(4, 9), torch.zeros(2, 3, 8, 8, dtype=torch.long), (images, images)):
        assert augmented(other, generator_at(0, 1)) is other


def test_grey_images_are_not_mirrored() -> None:
    ramp = torch.arange(16.0).repeat(8, 1, 16, 1)  # [8, 1, 16, 16], brighter to the right
    view = augmented(ramp, generator_at(0, 0))
    assert isinstance(view, Tensor)
    assert bool((view[..., 12] > view[..., 4]).all())
