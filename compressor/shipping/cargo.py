"""A bundle's folder, or a run's, in; what is carried to a device out: files with hashes, and a name for the whole.

Everything is checked here before anything is sent: a bundle that is damaged ships nowhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..device.archive import as_folder
from ..device.bundle import BUILT, MANIFEST, Manifest, read_bundle, verify_files
from ..errors import InputError
from ..hosts.copying import File, Files, read_files

SHIPPED = "shipped"


@dataclass(frozen=True, slots=True)
class Cargo:
    """`release` names these very files, whatever the bundle is called; `reports` is where devices' reports lie."""

    folder: Path
    manifest: Manifest
    files: Files
    release: str
    reports: Path

    @property
    def is_of_run(self) -> bool:
        """Whether it lies in the folder of the run that made it."""
        return _is_of_run(self.folder.resolve())

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files.values())

    @property
    def manifest_file(self) -> File:
        """The manifest's own."""
        return self.files[MANIFEST]


@contextmanager
def opened_cargo(place: Path) -> Iterator[Cargo]:
    """`read_cargo` of a folder, or of a bundle's archive, which is unpacked for as long as the block lasts."""
    with as_folder(place) as folder:
        cargo = read_cargo(folder)
        if place.is_file():  # reports lie beside the archive: what was unpacked will be gone
            cargo = replace(cargo, reports=place.resolve().with_suffix(f".{SHIPPED}"))
        yield cargo


def read_cargo(folder: Path) -> Cargo:
    """The bundle in a folder, or of the run in it; raises InputError for neither, GateError for one that is damaged.

    Engines that were built here stay here: a device builds its own.
    """
    bundle = folder if (folder / MANIFEST).is_file() else folder / "bundle"
    if not (bundle / MANIFEST).is_file():
        raise InputError(f"{folder} is no bundle and no finished run with one; give the folder that `compress` wrote")
    manifest = read_bundle(bundle)
    verify_files(bundle, manifest)
    paths = (path.relative_to(bundle) for path in sorted(bundle.rglob("*")) if path.is_file())
    files = read_files(bundle, [path.as_posix() for path in paths if path.parts[0] != BUILT])
    return Cargo(bundle, manifest, files, _release(manifest.name, files), _reports(bundle))


def _release(name: str, files: Files) -> str:
    """`digits-resnet-1f0c52b9e07a`: the second part is of every file's path and bytes."""
    lines = (f"{path} {file.sha256}\n" for path, file in sorted(files.items()))
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()[:12]
    words = re.findall(r"[A-Za-z0-9]+", name)
    return "-".join([*words, digest])[-80:].lstrip("-")


def _reports(bundle: Path) -> Path:
    """In the run's folder, where the bundle is one's; else beside the bundle, in which nothing foreign may lie."""
    resolved = bundle.resolve()
    if _is_of_run(resolved):
        return resolved.parent / SHIPPED
    return resolved.parent / f"{resolved.name}.{SHIPPED}"


def _is_of_run(bundle: Path) -> bool:
    return bundle.name == "bundle" and (bundle.parent / "run.json").is_file()
