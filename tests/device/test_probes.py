"""Turns of many files: a median polish against times of known make, and rounds on a clock that stands still."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from compressor.device import probes
from compressor.device.probes import ROUNDS, steadied, take_rounds

# Products and their logarithms in float64.
EXACT = 1e-9


def test_files_times_a_slow_round_come_apart_exactly() -> None:
    """Turn = file's time x round's slowness: ratios between files are exact, and the level is a quick round's."""
    files_us = np.array([1.0, 3.0, 700.0])
    slowness = np.linspace(1.0, 2.1, 12)
    steady = steadied(np.outer(files_us, slowness))
    np.testing.assert_allclose(steady / steady[0], files_us, rtol=EXACT)
    assert slowness[0] <= steady[0] <= slowness[3]


def test_a_busy_moment_in_some_turns_moves_no_file() -> None:
    files_us = np.array([2.0, 5.0, 11.0, 4.0])
    turns_us = np.outer(files_us, np.ones(12))
    turns_us[1, 0] *= 40
    turns_us[2, 1:4] *= 40
    turns_us[3, 4:9] *= 40  # five of its twelve turns; no other file's
    np.testing.assert_allclose(steadied(turns_us), files_us, rtol=EXACT)


def test_a_round_that_slows_all_slows_none_against_another() -> None:
    turns_us = np.outer([2.0, 5.0], np.ones(12))
    turns_us[:, 4:9] *= 8
    np.testing.assert_allclose(steadied(turns_us), [2.0, 5.0], rtol=EXACT)


def test_the_unit_of_time_goes_through() -> None:
    turns_us = np.random.default_rng(1).uniform(1, 5, (6, 12))
    np.testing.assert_allclose(steadied(1000 * turns_us), 1000 * steadied(turns_us), rtol=EXACT)


def test_a_turn_below_the_clocks_tick_is_small_and_not_infinite() -> None:
    steady = steadied(np.array([[0.0] * 12, [10.0] * 12]))
    assert np.isfinite(steady).all()
    assert 0 < steady[0] < steady[1]


class Clock:
    """Time that passes only while a call runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall_ns = self.processor_ns = 0
        monkeypatch.setattr(probes.time, "perf_counter", lambda: self.wall_ns / 1e9)
        monkeypatch.setattr(probes.time, "perf_counter_ns", lambda: self.wall_ns)
        monkeypatch.setattr(probes.time, "process_time_ns", lambda: self.processor_ns)

    def taking(self, *durations_us: int, processor_share: float = 0.5) -> Callable[[], None]:
        durations = itertools.cycle(durations_us)

        def call() -> None:
            ns = 1000 * next(durations)
            self.wall_ns += ns
            self.processor_ns += int(ns * processor_share)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_each_call_has_a_turn_in_every_round_in_microseconds(clock: Clock) -> None:
    turns_us = take_rounds([clock.taking(5000), clock.taking(3)], by_processor=False)
    assert [len(turns) for turns in turns_us] == [ROUNDS, ROUNDS]
    assert set(turns_us[0]) == {5000.0}
    assert set(turns_us[1]) == {3.0}


def test_the_processors_time_is_taken_where_it_is_asked_for(clock: Clock) -> None:
    assert set(take_rounds([clock.taking(5000)], by_processor=True)[0]) == {2500.0}


def test_calls_take_turns_and_short_ones_run_more_often(clock: Clock) -> None:
    order: list[str] = []

    def named(name: str, call: Callable[[], None]) -> Callable[[], None]:
        return lambda: (order.append(name), call())[1]

    take_rounds([named("a", clock.taking(3000)), named("b", clock.taking(1))], by_processor=False)
    assert order[:4] == ["a", "b", "a", "b"]  # the warm-up
    assert order[4:] == (["a"] + ["b"] * probes._MOST_RUNS) * ROUNDS


def test_a_turn_is_the_median_of_its_runs(clock: Clock) -> None:
    turns_us = take_rounds([clock.taking(100, 100, 100, 100, 900)], by_processor=False)
    assert set(turns_us[0]) == {100.0}
