"""Two benchmarks in, how subjects changed between them out; refused when they were not taken alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ..device.environment import Environment
from ..device.timing import Speedup, Timing, compare
from ..errors import GateError
from .records import Measured, Options, ScenarioTiming

# of `Options` what both must share; `on` may differ, since only what was timed on the same runtime is compared
_SHARED = ("threads", "cores", "offline_batch", "rate_hz", "seconds", "runs", "repeats")


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
    earlier_timings = {_key(timed): timed.timing for timed in before.timings}
    changes = []
    for timed in after.timings:
        earlier = earlier_timings.get(_key(timed))
        if earlier is not None:
            changes.append(_change(earlier, timed.timing, timed.scenario))
    if not changes:
        raise GateError("the two benchmarks have no subject, runtime and scenario in common; nothing is compared")
    return tuple(changes)


def _key(timed: ScenarioTiming) -> tuple[str, str, str]:
    return timed.timing.name, timed.timing.runtime, timed.scenario


def _change(earlier: Timing, later: Timing, scenario: str) -> Change:
    speedup = compare(earlier, later)
    return Change(later.name, later.runtime, scenario, earlier.p50_ms, later.p50_ms, speedup)


def require_alike(before: Measured, environment: Environment, options: Options) -> None:
    """Raises GateError naming what differs, before anything is measured for nothing."""
    differences = _other_environment(before.environment, environment) + _other_options(before.options, options)
    if differences:
        raise GateError(
            f"the two benchmarks can't be compared: {'; '.join(differences)}; "
            "measure both again in one environment and way"
        )


def _other_environment(before: Environment, after: Environment) -> list[str]:
    if before.fingerprint == after.fingerprint:
        return []
    differences = _differences(before.machine, after.machine) + _differences(before.libraries, after.libraries)
    # a fingerprint made by another version of this program may differ where nothing else does
    return differences or [f"the environment was {before.fingerprint} and is {after.fingerprint}"]


def _differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    differences = []
    for name in dict.fromkeys((*before, *after)):
        earlier, later = before.get(name), after.get(name)
        if earlier != later:
            differences.append(f"{name} was {earlier or 'absent'} and is {later or 'absent'}")
    return differences


def _other_options(before: Options, after: Options) -> list[str]:
    earlier, later = asdict(before), asdict(after)
    differences = []
    for name in _SHARED:
        if earlier[name] != later[name]:
            differences.append(f"{name} was {_shown(earlier[name])} and is {_shown(later[name])}")
    return differences


def _shown(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return str(value)
