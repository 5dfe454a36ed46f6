"""What a device says of itself in, held to its kind; and why a bundle can't go there, each with what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..device import fields
from ..device.manifest import Manifest
from ..device.runtimes import kind_of, row_of, takers
from ..errors import HostError
from ..hosts.connection import Answer, Session, facts_of

_ROOM = 1.05  # of the bundle's bytes: folders, and blocks that are not full
_ROOM_BYTES = 1 << 24  # the device side, reports, a little more
_FAULT = "error: "
_CHECKS_SIGNATURES = "cryptography"
_MOST_TEXT = 300
_TEXTS = ("architecture", "system", "python", "board", "gpu", "rsync", "installed", "root", "current")


@dataclass(frozen=True, slots=True)
class Survey:
    """A device as it answered; `libraries` are versions by name, or why one can't be imported, after `error: `.

    `current` is the release that runs there, `state` what was last said of it; `installed` the digest of its own
    compressor. What is not there is empty.
    """

    architecture: str
    system: str
    python: str
    board: str
    gpu: str
    rsync: str
    libraries: Mapping[str, str]
    installed: str
    free_bytes: int
    root: str
    current: str
    releases: tuple[str, ...]
    state: Mapping[str, object]

    @property
    def has_rsync(self) -> bool:
        """One of version 3 or later, which says how far it is."""
        match self.rsync.split():
            case ["rsync", "version", version, *_]:
                return version.partition(".")[0] not in ("1", "2")
        return False

    def describe(self) -> str:
        """`aarch64, Python 3.11.2, numpy 2.1.0, onnxruntime 1.22.0, 12.1 GB free`."""
        libraries = [f"{name} {version}" for name, version in self.libraries.items() if not _is_fault(version)]
        facts = (
            self.architecture,
            f"Python {self.python}",
            *libraries,
            self.gpu,
            f"{self.free_bytes / 1e9:.1f} GB free",
        )
        return ", ".join(filter(None, facts))


def printed(content: fields.Object, key: str) -> str:
    """The field's text as it may be shown here: a device could send what a terminal obeys."""
    return fields.printable(fields.text(content, key))


def survey(session: Session, manifest: Manifest, *, signed: bool = False) -> Survey:
    """Asks the device, and for the libraries that the bundle's models may want; HostError for no such answer.

    `signed`: its signature is to be checked there too.
    """
    libraries = ["numpy", *_runtimes_for(manifest)]
    if signed:
        libraries.append(_CHECKS_SIGNATURES)
    return read_survey(session.ask("survey", root=session.device.root, libraries=libraries), session.device.name)


def read_survey(answer: Answer, name: str) -> Survey:
    """The answer as a record; raises HostError, with the device's name, for one that is none."""
    content = facts_of(answer)
    try:
        texts = {key: printed(content, key)[:_MOST_TEXT] for key in _TEXTS}
        libraries = fields.inner(content, "libraries")
        return Survey(
            **texts,
            libraries={library: printed(libraries, library)[:_MOST_TEXT] for library in libraries},
            free_bytes=fields.whole(content, "free_bytes"),
            releases=fields.texts(content, "releases"),
            state=fields.inner(content, "state"),
        )
    except ValueError as error:
        raise HostError(f"{name} answers with what is no survey: {error}") from error


def require_fit(device: str, surveyed: Survey, manifest: Manifest, needed_bytes: int, *, signed: bool = False) -> None:
    """Raises HostError, naming the remedy, where the bundle can't run on the device, or not lie there.

    `signed`: nor its signature be checked there.
    """
    if surveyed.system not in ("Linux", "Darwin"):
        raise HostError(
            f"{device} is a {surveyed.system} system; bundles ship to Linux and macOS, copy it there by hand"
        )
    _require_library(device, surveyed, ("numpy",), "numpy")
    wanted = _runtimes_for(manifest)
    _require_library(device, surveyed, tuple(wanted), "a runtime that takes the bundle's models")
    if signed:
        _require_library(device, surveyed, (_CHECKS_SIGNATURES,), "what checks a signature (--key)")
    room = int(_ROOM * needed_bytes) + _ROOM_BYTES
    if surveyed.free_bytes < room:
        raise HostError(
            f"{device} has {surveyed.free_bytes / 1e6:.0f} MB free at {surveyed.root}, {room / 1e6:.0f} MB are needed; "
            "free space there, or name a path on another disk: user@host:path"
        )


def _runtimes_for(manifest: Manifest) -> list[str]:
    """Libraries of which one is enough, the usual one first."""
    libraries: list[str] = []
    for model in manifest.models:
        names = (model.library,) if model.library else takers(kind_of(model.path))
        libraries += [row_of(name).library for name in names]
    return list(dict.fromkeys(libraries))


def _require_library(device: str, surveyed: Survey, names: tuple[str, ...], purpose: str) -> None:
    """One of them must be importable there."""
    versions = {name: surveyed.libraries[name] for name in names if name in surveyed.libraries}
    if not all(map(_is_fault, versions.values())):
        return
    faults = [f"{name} can't be imported ({version.removeprefix(_FAULT)})" for name, version in versions.items()]
    lacking = "; ".join(faults) or f"it has no {' and no '.join(names)}"
    raise HostError(
        f"{device} lacks {purpose}: {lacking}; there: {_python(surveyed)} -m pip install {names[0]}, or name another "
        'Python: --python, or python = "..." in the inventory'
    )


def _is_fault(version: str) -> bool:
    """Whether it is why a library can't be imported, in place of its version."""
    return version.startswith(_FAULT)


def _python(surveyed: Survey) -> str:
    return "python" + surveyed.python.rpartition(".")[0]
