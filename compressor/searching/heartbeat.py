"""A running trial's sign of life in its storage, which is also how a worker learns that the storage went away.

Optuna's own heart stops at the first beat that fails, with a traceback, and beats only under `Study.optimize`, which
hides a trial that was taken over meanwhile. Knows nothing of what a trial does.
"""

from __future__ import annotations

import _thread
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from optuna.study import Study
from optuna.trial import Trial

from .storage import HEARTBEAT_S, LOST

PATIENCE_S = 30.0
"""A storage that was silent for so long ends the trial; a restart of a server is shorter."""


@contextmanager
def beating(study: Study, trial: Trial) -> Iterator[None]:
    """A beat every HEARTBEAT_S while the block runs, the first before it.

    Raises the storage's own error in the block once it has been silent for PATIENCE_S; only the main thread can be
    interrupted so, in another the trial's next word to the storage fails instead.
    """
    _beat(study, trial)
    errors: list[Exception] = []
    ended = threading.Event()
    interrupts = threading.current_thread() is threading.main_thread()
    arguments = (study, trial, ended, errors, interrupts)
    heart = threading.Thread(target=_beat_on, args=arguments, name="heartbeat", daemon=True)
    heart.start()
    try:
        with _heard_by(errors, in_main=interrupts):
            yield
    except KeyboardInterrupt:
        if errors:
            raise errors[0] from errors[0].__cause__  # which says what the driver met
        raise
    finally:
        ended.set()
        heart.join(timeout=1.0)  # a beat to a server that went away may take longer; nobody waits for it


@contextmanager
def _heard_by(errors: list[Exception], *, in_main: bool) -> Iterator[None]:
    """Where Ctrl-C is ignored, as in a shell's background jobs, it stays so inside, but not the heart's own."""
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        if errors:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _beat(study: Study, trial: Trial) -> None:
    # Optuna has no public way from a study to the beats of its storage
    study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]


def _beat_on(study: Study, trial: Trial, ended: threading.Event, errors: list[Exception], interrupts: bool) -> None:
    """Until `ended`, or until the storage was silent for too long, which goes into `errors`."""
    answered_s = time.monotonic()
    while not ended.wait(HEARTBEAT_S):
        try:
            _beat(study, trial)
            answered_s = time.monotonic()
        except LOST as error:
            silent_s = time.monotonic() - answered_s
            if silent_s < PATIENCE_S or ended.is_set():
                continue
            errors.append(error)
            if interrupts:
                _thread.interrupt_main()
            return
