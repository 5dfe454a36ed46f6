"""Whose trial is whose, and what becomes of one whose worker died: stopped once, queued again once.

What is queued twice by two workers at once is told apart by its key when it begins, so nothing here needs a lock; a
worker that dies between stopping a trial and queueing it again leaves that to the next. Knows nothing of points.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ..files import content_hash
from .storage import GRACE_S

DEATHS = 3
"""A point whose workers died so often in a row is a failed trial: it may be what they died of."""


def name_of_worker() -> str:
    """`host:process:run:machine`, for this process and this moment; what follows the process is to tell namesakes."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}:{_machine()}"


def short_name(worker: str) -> str:
    """`host:process`."""
    return ":".join(worker.split(":")[:2])


def _machine() -> str:
    """Where process numbers mean the same: containers share a host's name, boots of one machine its numbers."""
    marks = [socket.gethostname()]
    with suppress(OSError):  # no Linux
        marks.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        marks.append(os.readlink("/proc/self/ns/pid"))
    return content_hash(marks)[:8]


@dataclass(frozen=True, slots=True)
class Lookout:
    """What one worker needs to see others die. `nameless` holds since when (monotonic s) trials run for nobody."""

    worker: str
    nameless: dict[int, float] = field(default_factory=dict)


def take_back(study: Study, lookout: Lookout) -> None:
    """Trials that were stopped half-way are queued again; those of dead workers are stopped first."""
    optuna.storages.fail_stale_trials(study)  # other machines' by their heartbeat
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_abandoned(trial, lookout):
            _stop(study, trial)

    trials = study.get_trials(deepcopy=False)
    retried = {trial.user_attrs.get("retries") for trial in trials}
    for trial in trials:
        if _is_broken_off(trial) and trial.number not in retried:
            _queue_again(study, trial)


def _is_broken_off(trial: FrozenTrial) -> bool:
    """Whether it was stopped half-way; what is skipped was another trial's point and needs no trial."""
    return trial.state == TrialState.FAIL and "skipped" not in trial.user_attrs


def _stop(study: Study, trial: FrozenTrial) -> None:
    """Of several workers that see it dead one stops it."""
    with suppress(UpdateFinishedTrialError):
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _queue_again(study: Study, trial: FrozenTrial) -> None:
    died = "interrupted" not in trial.user_attrs
    attributes = {"retries": trial.number, "deaths": trial.user_attrs.get("deaths", 0) + died}
    if "preset" in trial.user_attrs:
        attributes["preset"] = trial.user_attrs["preset"]
    point = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    study.enqueue_trial(point, user_attrs=attributes)


def _is_abandoned(trial: FrozenTrial, lookout: Lookout) -> bool:
    """Whether its worker is known to be dead, here or because it never said who it is.

    Between a trial's beginning and its first heartbeat there is a moment in which its worker can die unnoticed. How
    long that is ago is taken by our own clock, as another machine's may be wrong.
    """
    worker = str(trial.user_attrs.get("worker", ""))
    if worker:
        lookout.nameless.pop(trial.number, None)
        return is_dead(worker, lookout.worker)
    since_s = lookout.nameless.setdefault(trial.number, time.monotonic())
    return time.monotonic() - since_s > GRACE_S


def is_dead(worker: str, asking: str) -> bool:
    """Whether a worker of this machine does not run any more; of other machines its heartbeat tells.

    `asking` is the worker of this process.
    """
    machine = _machine_of(worker)
    if worker == asking or not machine or machine != _machine_of(asking):
        return False
    pid = int(worker.split(":")[1])
    if pid == os.getpid():  # an earlier search of this very process, or one whose number came again
        return True
    try:
        os.kill(pid, 0)  # signal 0 only asks whether it is there
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _is_zombie(pid)


def _machine_of(worker: str) -> str:
    """The last part of `name_of_worker`; empty for a name of another form."""
    parts = worker.split(":")
    return parts[3] if len(parts) == 4 else ""


def _is_zombie(pid: int) -> bool:
    """Whether it ended, and whoever started it has not asked how; such a process still has its number."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # no Linux, or gone this moment
        return False
    return status.rpartition(")")[2].split()[:1] == ["Z"]  # `123 (a name) Z 1 ...`


def twin_in_queue(trial: FrozenTrial, earlier: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """The earlier one of two that were queued for the same reason, by two workers that did not see each other."""
    key = _key_of(trial)
    if key is None:
        return None
    rivals = (rival for rival in earlier if rival.number < trial.number and "skipped" not in rival.user_attrs)
    return next((rival for rival in rivals if _key_of(rival) == key), None)


def _key_of(trial: FrozenTrial) -> tuple[str, object] | None:
    """What a trial was queued for: another's retry, a preset; None of one that was drawn."""
    for reason in ("retries", "preset"):
        if reason in trial.user_attrs:
            return reason, trial.user_attrs[reason]
    return None
