"""One bundle onto one device, step by step: looked over, copied, tried there, and only then switched to.

What ran there before goes on running until the last step, and after any failure. The same call goes on where an
earlier one stopped.
"""

from __future__ import annotations

import getpass
import hashlib
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal

from ..device.manifest import MANIFEST
from ..errors import CompressorError, FolderError, GateError
from ..hosts.address import Device
from ..hosts.carrying import DeviceSide, carry
from ..hosts.connection import Opened, Session, connected
from ..hosts.copying import CopyPlan, copy_files
from .acceptance import Acceptance, Timing, accept
from .cargo import Cargo
from .preflight import Survey, require_fit, survey
from .reports import Content, Latency, now, read_accepted, write_report

Result = Literal["shipped", "already there", "failed", "not begun"]
Say = Callable[[str, float], None]  # what happens, and the share of it that is done
_TOLD = ("release", "bundle", "when", "by", "latency", "signed")  # to a device, of what runs on it


@dataclass(frozen=True, slots=True)
class Options:
    """How a bundle ships. `key` is a public key's file for the signature; `again` tries what already runs there."""

    timing: Timing = field(default_factory=Timing)
    key: bytes = b""
    again: bool = False
    at_once: int = 4
    canary: int = 0

    @property
    def key_sha256(self) -> str:
        """What the key is told by; empty where there is none."""
        return hashlib.sha256(self.key).hexdigest() if self.key else ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it for one device. `current` is what runs there now as far as it was seen, `error` why it failed."""

    device: Device
    result: Result
    release: str
    current: str = ""
    latency: tuple[Latency, ...] = ()
    copied_bytes: int = 0
    seconds: float = 0.0
    error: CompressorError | None = None
    survey: str = ""

    @property
    def has_it(self) -> bool:
        """Whether the device runs the bundle now."""
        return self.result in ("shipped", "already there")

    def to_json(self) -> Content:
        """The outcome in plain values."""
        return {
            "device": self.device.name,
            "address": self.device.address,
            "result": self.result,
            "release": self.release,
            "current": self.current,
            "latency": [dict(row) for row in self.latency],
            "copied_bytes": self.copied_bytes,
            "seconds": round(self.seconds, 2),
            "failure": "" if self.error is None else str(self.error),
        }


@dataclass(slots=True)
class _Course:
    """What is known so far, for an outcome at any moment."""

    current: str = ""
    described: str = ""
    copied_bytes: int = 0


def ship_to(cargo: Cargo, device: Device, options: Options, say: Say, opened: Opened) -> Outcome:
    """Ships to a device and writes its report; a failure is an outcome, and what ran there runs on."""
    start, course = time.monotonic(), _Course()
    try:
        with connected(device, opened) as session:
            outcome = _ship(cargo, session, options, say, course)
    except (CompressorError, OSError) as caught:
        outcome = Outcome(
            device=device,
            result="failed",
            release=cargo.release,
            current=course.current,
            copied_bytes=course.copied_bytes,
            seconds=time.monotonic() - start,
            error=caught if isinstance(caught, CompressorError) else _of_bundle(caught, cargo),
            survey=course.described,
        )
        write_report(cargo.reports, device.name, attempt=_attempt(outcome), accepted=None)
    return outcome


def _ship(cargo: Cargo, session: Session, options: Options, say: Say, course: _Course) -> Outcome:
    start = time.monotonic()
    device = session.device
    say("looking it over", 0.0)
    surveyed = survey(session, cargo.manifest, signed=bool(options.key))
    course.current, course.described = surveyed.current, surveyed.describe()
    needed_bytes = 0 if cargo.release in surveyed.releases else cargo.bytes
    require_fit(device.name, surveyed, cargo.manifest, needed_bytes, signed=bool(options.key))
    side = carry(session, surveyed.installed)

    plan = CopyPlan(cargo.release, _whoami(), surveyed.has_rsync)
    say("copying", 0.0)
    course.copied_bytes = copy_files(session, cargo.folder, cargo.files, plan, lambda share: say("copying", share))
    latency = None if options.again else _latency_before(cargo, device, surveyed, options.key_sha256)
    if latency is not None:
        return _outcome(cargo, device, "already there", course, latency, start)

    folder = f"{surveyed.root}/releases/{cargo.release}"
    acceptance = _accepted(side, cargo, folder, surveyed, options, say)
    say("switching", 0.0)
    outcome = _outcome(cargo, device, "shipped", course, acceptance.latency, start)
    record = _record(cargo, device, surveyed, acceptance, outcome, signed=options.key_sha256)
    _switch(session, cargo, surveyed, record)
    course.current = cargo.release
    write_report(cargo.reports, device.name, attempt=_attempt(outcome), accepted=record)
    return outcome


def _accepted(side: DeviceSide, cargo: Cargo, folder: str, surveyed: Survey, options: Options, say: Say) -> Acceptance:
    """The release's acceptance; one that a gate refuses is taken away again, unless it is what runs there."""
    try:
        return accept(side, cargo, folder, key=options.key, timing=options.timing, say=lambda text: say(text, 0.0))
    except GateError:
        if surveyed.current != cargo.release:
            side.session.ask("discard", keep=[name for name in surveyed.releases if name != cargo.release])
        raise


def _switch(session: Session, cargo: Cargo, surveyed: Survey, record: Content) -> None:
    """The last step; the release before stays as the last good one, older ones go."""
    previous = surveyed.current
    if previous == cargo.release:  # tried again: what was before it still is
        previous = str(surveyed.state.get("previous", ""))
    state = {**{key: record[key] for key in _TOLD}, "previous": previous}
    session.ask("switch", release=cargo.release, witness=MANIFEST, sha256=cargo.manifest_file.sha256, state=state)
    session.ask("discard", keep=[cargo.release, previous])


def _latency_before(cargo: Cargo, device: Device, surveyed: Survey, signed: str) -> tuple[Latency, ...] | None:
    """As it was accepted of this very release, where the device runs it and both sides say so.

    Where a key is given, `signed` is its hash, and only what was verified with that one counts.
    """
    accepted = read_accepted(cargo.reports / f"{device.name}.json") or {}
    releases = (surveyed.current, surveyed.state.get("release"), accepted.get("release"))
    is_this_release = all(release == cargo.release for release in releases)
    is_verified = signed in ("", accepted.get("signed"))
    if not is_this_release or not is_verified or "latency" not in accepted:
        return None
    return tuple(accepted["latency"])


def _outcome(
    cargo: Cargo,
    device: Device,
    result: Result,
    course: _Course,
    latency: tuple[Latency, ...],
    start: float,
) -> Outcome:
    return Outcome(
        device=device,
        result=result,
        release=cargo.release,
        current=cargo.release,
        latency=latency,
        copied_bytes=course.copied_bytes,
        seconds=time.monotonic() - start,
        survey=course.described,
    )


def _record(
    cargo: Cargo, device: Device, surveyed: Survey, acceptance: Acceptance, outcome: Outcome, *, signed: str
) -> Content:
    """All that is told of what runs on a device now."""
    facts = asdict(surveyed)
    del facts["state"], facts["releases"], facts["current"]
    return {
        "release": cargo.release,
        "bundle": cargo.manifest.name,
        "when": now(),
        "by": _whoami(),
        "address": device.address,
        "signed": signed,
        "previous": surveyed.current,
        "device": facts,
        "copied_bytes": outcome.copied_bytes,
        **asdict(acceptance),
    }


def _of_bundle(error: OSError, cargo: Cargo) -> FolderError:
    """A file of the bundle that went while it was read."""
    return FolderError(f"{error.filename or cargo.folder}: {error.strerror or error}; the bundle changed meanwhile")


def _attempt(outcome: Outcome) -> Content:
    row = outcome.to_json()
    return {key: row[key] for key in ("release", "result", "failure", "seconds", "copied_bytes")} | {"when": now()}


def _whoami() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no name for the user's number
        user = "somebody"
    return f"{user} from {socket.gethostname()}"
