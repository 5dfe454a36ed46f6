"""Which setting pays, by trying: each trains for a few steps from the same start, held-out images judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .judging import Judge
from .lessons import batches_from
from .options import Setting
from .pupil import Pupil, State, rate_factor
from .record import Trial

SHARE = 20  # a trial takes one step of so many
LEAST_STEPS, MOST_STEPS = 20, 60  # fewer tell nothing, more tell no more

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, eq=False)
class Tried:
    """`state` is what the chosen setting came to after `steps` steps; none were made where there was no trial."""

    setting: Setting
    state: State
    distance: float = math.inf
    steps: int = 0
    trials: tuple[Trial, ...] = ()


def choose_setting(
    pupil: Pupil, judge: Judge, settings: Sequence[Setting], steps: int, say: Callable[[str], None]
) -> Tried:
    """The setting that came nearest; the first one where `steps`, of the whole recovery, are too few for trials.

    The pupil is left as it was.
    """
    start, short = pupil.state(), min(steps // SHARE, MOST_STEPS)
    if short < LEAST_STEPS or len(settings) < 2:
        return Tried(settings[0], start)
    trials: list[Trial] = []
    best = Tried(settings[0], start)
    for setting in settings:
        say(f"trying {setting}")
        _train(pupil, setting, short)
        distance = judge.judge(pupil.network).distance
        trials.append(Trial(setting, distance))
        if distance < best.distance:
            best = Tried(setting, pupil.state(), distance, short)
        pupil.restore(start)
    return Tried(best.setting, best.state, best.distance, best.steps, tuple(trials))


def _train(pupil: Pupil, setting: Setting, steps: int) -> None:
    optimiser = pupil.begin(setting)
    batches = batches_from(pupil.lessons, pupil.seed, 0)
    for step in range(steps):
        pupil.learn(next(batches), step, optimiser, setting.rate * rate_factor(step / steps))


def seconds_per_step(pupil: Pupil, setting: Setting, clock: Clock) -> float:
    """Of the second of two steps, which are taken back: the first one brings memory and caches along."""
    start, optimiser = pupil.state(), pupil.begin(setting)
    batches = batches_from(pupil.lessons, pupil.seed, 0)
    seconds = 0.0
    for step in range(2):
        begin = clock()
        pupil.learn(next(batches), step, optimiser, 0.0)
        seconds = clock() - begin
    pupil.restore(start)
    return max(seconds, 1e-9)
