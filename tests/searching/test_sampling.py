"""When a trial is given up, in studies written by hand: the median, the chance of so many images, the presets."""

from __future__ import annotations

import math

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from compressor.searching.sampling import JUDGES, Hopeless, Seeded

IMAGES = 100
CHOICE = CategoricalDistribution(("a", "b", "c", "d"))


def trial(accuracies: list[float], *, preset: str = "", state: TrialState = TrialState.COMPLETE) -> FrozenTrial:
    value = accuracies[-1] if state == TrialState.COMPLETE else None
    return create_trial(
        state=state,
        value=value,
        intermediate_values=dict(enumerate(accuracies)),
        user_attrs={"preset": preset} if preset else {},
    )


def study_of(*trials: FrozenTrial) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    study.add_trials(trials)
    return study


def is_stopped(accuracy: float, *, others: list[list[float]], step: int = 0, preset: str = "") -> bool:
    running = create_trial(
        state=TrialState.RUNNING,
        intermediate_values={step: accuracy},
        user_attrs={"preset": preset} if preset else {},
    )
    return Hopeless(IMAGES).prune(study_of(*map(trial, others)), running)


@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_trial_is_stopped_below_the_median_by_more_than_one_standard_error(step: int) -> None:
    """Median 0.8 on 100 images a budget: the error is sqrt(0.8 x 0.2 / images so far)."""
    error = math.sqrt(0.8 * 0.2 / (IMAGES * (step + 1)))
    others = [[accuracy] * (step + 1) for accuracy in (0.1, 0.2, 0.79, 0.81, 0.9, 1.0)]
    assert is_stopped(0.8 - error - 1e-6, others=others, step=step)
    assert not is_stopped(0.8 - error + 1e-6, others=others, step=step)


def test_a_preset_is_never_stopped() -> None:
    assert not is_stopped(0.0, others=[[0.9]] * JUDGES, preset="epsilon")
    assert is_stopped(0.0, others=[[0.9]] * JUDGES)


def test_too_few_judges_stop_nobody_and_only_those_who_got_so_far_count() -> None:
    assert not is_stopped(0.0, others=[[0.9]] * (JUDGES - 1))
    assert not is_stopped(0.0, others=[[0.9]] * JUDGES, step=1)
    assert is_stopped(0.0, others=[[0.9, 0.9]] * JUDGES, step=1)


def test_a_trial_that_reported_nothing_goes_on_and_failed_ones_judge_nobody() -> None:
    silent = create_trial(state=TrialState.RUNNING)
    assert not Hopeless(IMAGES).prune(study_of(*[trial([0.9])] * JUDGES), silent)
    failed = [trial([0.9], state=TrialState.FAIL)] * JUDGES
    running = create_trial(state=TrialState.RUNNING, intermediate_values={0: 0.0})
    assert not Hopeless(IMAGES).prune(study_of(*failed), running)


def drawn(seed: int, number: int, study: optuna.Study) -> list[str]:
    sampler, running = Seeded(seed), create_trial(state=TrialState.RUNNING)
    running.number = number
    sampler.before_trial(study, running)
    return [sampler.sample_independent(study, running, f"axis{i}", CHOICE) for i in range(40)]


def best_study() -> optuna.Study:
    params = {f"axis{i}": "a" for i in range(40)}
    best = create_trial(value=0.9, params=params, distributions=dict.fromkeys(params, CHOICE))
    return study_of(best)


def test_a_trials_draws_depend_on_seed_and_number_alone() -> None:
    study = study_of()
    assert drawn(0, 3, study) == drawn(0, 3, study)
    assert drawn(0, 3, study) != drawn(0, 5, study)
    assert drawn(0, 3, study) != drawn(1, 3, study)


def test_every_other_trial_keeps_seven_tenths_of_the_best_ones_values() -> None:
    """Of forty axes with four values: 28 stay and three of the rest are drawn alike, 31 in all; else 10."""
    varied = [drawn(seed, 2, best_study()).count("a") for seed in range(6)]
    free = [drawn(seed, 3, best_study()).count("a") for seed in range(6)]
    assert 26 <= sum(varied) / 6 <= 36
    assert 5 <= sum(free) / 6 <= 15


def test_what_was_taken_over_moves_no_other_draw() -> None:
    without, taken = drawn(0, 2, study_of()), drawn(0, 2, best_study())
    assert all(kept == "a" or kept == own for own, kept in zip(without, taken, strict=True))
    assert without != taken
