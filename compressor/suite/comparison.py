"""Two benchmarks in, how subjects changed between them out; refused when they were not taken alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ..device.environment import Environment
from ..device.timing import Speedup, compare
from ..errors import GateError
from .records import Measured, Options

_OF_ALL = ("threads", "cores", "offline_batch", "rate_hz", "seconds", "runs", "repeats")


@dataclass(frozen=True, slots=True)
class Change:
    """`speedup.ratio` above 1: the later benchmark is faster."""

    subject: str
    runtime: str
    scenario: str
    before_ms: float
    after_ms: float
    speedup: Speedup


def compare_benchmarks(before: Measured, after: Measured) -> tuple[Change, ...]:
    """Every subject that both timed on the same runtime in the same scenario.

    Raises GateError when machine, libraries or the way of measuring differ, or when nothing is in both.
    """
    require_alike(before, after.environment, after.options)
    earlier = {(t.timing.name, t.timing.runtime, t.scenario): t.timing for t in before.timings}
    changes = []
    for later in after.timings:
        timing = earlier.get((later.timing.name, later.timing.runtime, later.scenario))
        if timing is not None:
            changes.append(
                Change(
                    later.timing.name,
                    later.timing.runtime,
                    later.scenario,
                    timing.p50_ms,
                    later.timing.p50_ms,
                    compare(timing, later.timing),
                )
            )
    if not changes:
        raise GateError("the two benchmarks have no subject, runtime and scenario in common; nothing is compared")
    return tuple(changes)


def require_alike(before: Measured, environment: Environment, options: Options) -> None:
    """Raises GateError naming what differs, before anything is measured for nothing."""
    found = _differences(before.environment, environment) + _other_ways(before.options, options)
    if found:
        raise GateError(
            f"the two benchmarks can't be compared: {'; '.join(found)}; measure both again in one environment and way"
        )


def _differences(before: Environment, after: Environment) -> list[str]:
    if before.fingerprint == after.fingerprint:
        return []
    parts: tuple[tuple[Mapping[str, str], Mapping[str, str]], ...] = (
        (before.machine, after.machine),
        (before.libraries, after.libraries),
    )
    found = [
        f"{name} was {a.get(name) or 'absent'!s} and is {b.get(name) or 'absent'!s}"
        for a, b in parts
        for name in dict.fromkeys((*a, *b))
        if a.get(name) != b.get(name)
    ]
    return found or [f"the environment was {before.fingerprint} and is {after.fingerprint}"]


def _other_ways(before: Options, after: Options) -> list[str]:
    a, b = asdict(before), asdict(after)
    return [f"{name} was {_shown(a[name])} and is {_shown(b[name])}" for name in _OF_ALL if a[name] != b[name]]


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
