"""What is said beside a stage's result: gates, what could not be checked, warnings. Values that add up in order.

Nothing is raised where a gate is noted: `require_passed` does that, once what was measured can be reported.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import GateError
from ..report import GateRow
from .stages import Stages


@dataclass(frozen=True, slots=True)
class Checks:
    """`warnings` are said first in the report, on the terminal and in the summary.

    `refusal` says in words why a gate could not even be measured; its row's value is NaN.
    """

    gates: tuple[GateRow, ...] = ()
    not_checked: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    refusal: str = ""

    def __add__(self, other: Checks) -> Checks:
        """One after the other; a warning is said once, however many gates give it."""
        return Checks(
            (*self.gates, *other.gates),
            (*self.not_checked, *other.not_checked),
            tuple(dict.fromkeys((*self.warnings, *other.warnings))),
            self.refusal or other.refusal,
        )

    @property
    def failure(self) -> str:
        """What to say of the first gate that failed; empty where none did."""
        failed = next((gate for gate in self.gates if gate.failed), None)
        if failed is None or self.refusal:
            return self.refusal
        figure = f"{failed.value:.4g} {failed.unit or 'found'}"
        return f"gate '{failed.name}' failed: {figure}, at most {failed.limit:g} allowed; {failed.remedy}"


def gate(name: str, value: float, *, limit: float, remedy: str, unit: str = "", doubt: str = "") -> Checks:
    """One gate, which a value above the limit fails.

    With a `doubt`, which says why, a value within the limit shows nothing: not passed, but the run goes on.
    """
    is_within = bool(value <= limit)  # NaN is not
    row = GateRow(
        name=name,
        limit=limit,
        value=float(value),
        passed=is_within and not doubt,
        unit=unit,
        remedy=remedy,
        doubt=doubt if is_within else "",
    )
    return Checks((row,), warnings=(doubt,) if doubt else ())


def until_failed(checks: Iterable[Checks]) -> Checks:
    """All of them added up, or those up to the first that failed: the rest is not looked at."""
    total = Checks()
    for noted in checks:
        total += noted
        if total.failure:
            break
    return total


def require_passed(stages: Stages, checks: Checks) -> None:
    """Raises GateError for the first gate that failed, and takes away what ships."""
    if checks.failure:
        stages.retract()
        raise GateError(checks.failure)
