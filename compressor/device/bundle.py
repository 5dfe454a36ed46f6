"""The folder that ships: model files, golden inputs and outputs, a manifest with a hash of every file.

Written whole or not at all. Reading checks before it trusts: nothing of a bundle is loaded into a runtime before
its hash was compared. Knows no torch and no format of a model beyond which runtime takes it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CompressorError, FolderError, GateError, InputError
from .builder import sha256_of
from .built import BuiltEngine, built_engines, check_built, engine_files, is_builders_file, read_built
from .golden import Golden, distance, read_golden
from .images import checked_outputs, load_inputs
from .manifest import BUILT, GOLDEN, MANIFEST, SCHEMA, Manifest, ModelFile, inside, manifest_text, read_bundle
from .parity import Parity, failures
from .runtimes import Session, available, kind_of, open_model, require_runtime

__all__ = [
    "BUILT",
    "GOLDEN",
    "MANIFEST",
    "BundleReport",
    "Check",
    "Manifest",
    "ModelFile",
    "answers",
    "built_engines",
    "choose_runtime",
    "open_bundle",
    "read_bundle",
    "run_bundle",
    "unchecked_engines",
    "verify_bundle",
    "verify_files",
    "write_bundle",
]

# Which runtimes take which file, in the order tried when none is named.
_RUNTIMES = {
    "engine": ("tensorrt", "tensorrt_rtx"),
    "onnx": ("onnxruntime", "openvino", "onnxruntime-cuda", "onnxruntime-tensorrt"),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a verification; `outcome` is `passed`, `failed` or `not run`."""

    what: str
    outcome: str
    detail: str
    parity: Parity | None = None


@dataclass(frozen=True, slots=True)
class BundleReport:
    bundle: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed and at least one model really ran."""
        ran = any(c.parity is not None and c.outcome == "passed" for c in self.checks)
        return ran and all(c.outcome != "failed" for c in self.checks)


def write_bundle(
    folder: Path | str,
    files: Mapping[str, Path],
    *,
    manifest: Manifest,
    golden_inputs: NDArray[np.float32],
    golden_outputs: NDArray[np.floating[Any]],
) -> Path:
    """Copies `files` (path inside the bundle -> source) and writes golden file and manifest.

    The golden outputs are the fp32 reference's for the inputs [N, C, H, W]. An earlier bundle in `folder` is
    replaced; raises FolderError when it holds anything else.
    """
    folder = Path(folder)
    _refuse_foreign(folder)
    missing = [m.path for m in manifest.models if m.path not in files]
    if missing:
        raise InputError(f"the bundle's manifest names {', '.join(missing)}, which is not among its files")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for name, source in files.items():
            target = scratch / inside(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        np.savez(scratch / GOLDEN, inputs=golden_inputs, outputs=golden_outputs)
        listed = {name: _listing(scratch / name) for name in sorted([*files, GOLDEN])}
        (scratch / MANIFEST).write_text(manifest_text(manifest, listed))
        read_golden(scratch, read_bundle(scratch))  # what is written can be read
        os.chmod(scratch, 0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise FolderError(f"can't write the bundle {folder}: {error}") from error
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return folder


def verify_bundle(folder: Path | str, runtime: str = "") -> BundleReport:
    """Checks every hash, then runs every model a runtime here takes on the golden inputs.

    A file that fails its hash is never opened. Raises GateError when the manifest itself is damaged or the bundle is
    replaced meanwhile, InputError when `folder` is no bundle or `runtime` unknown.
    """
    folder = Path(folder)
    if runtime:
        require_runtime(runtime)
    with _unchanging(folder):
        manifest = read_bundle(folder)
        checks = [_check_file(folder, name, listed) for name, listed in manifest.files.items()]
        checks += [Check(name, "failed", "is not in the manifest; remove it") for name in _unlisted(folder, manifest)]
        whole = {c.what for c in checks if c.outcome == "passed"}
        if GOLDEN in whole:
            checks += _check_models(folder, manifest, runtime, whole)
    return BundleReport(str(folder), tuple(checks))


def _check_models(folder: Path, manifest: Manifest, runtime: str, whole: set[str]) -> list[Check]:
    """One line for every model and built engine; where the golden file is no use, one that says why."""
    try:
        golden = read_golden(folder, manifest)
    except GateError as error:
        return [Check(GOLDEN, "failed", str(error).removeprefix(f"{GOLDEN} "))]
    checks = [_check_model(folder, m, runtime, golden) for m in manifest.models if m.path in whole]
    for path in engine_files(folder):
        try:
            engine = read_built(path, manifest)
        except CompressorError as error:
            checks.append(Check(f"{BUILT}/{path.name}", "failed", str(error)))
        else:
            checks.append(_check_model(folder, engine.model, runtime, golden, engine))
    return checks


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Raises GateError unless the bundle's files are those the manifest describes, all of them and no others."""
    with _unchanging(folder):
        for name in manifest.files:
            _require_whole(folder, manifest, name)
        _require_listed(folder, manifest)


def _require_whole(folder: Path, manifest: Manifest, name: str) -> None:
    check = _check_file(folder, name, manifest.files[name])
    if check.outcome == "failed":
        raise GateError(f"{name} {check.detail}; get the bundle again")


def _require_listed(folder: Path, manifest: Manifest) -> None:
    for name in _unlisted(folder, manifest):
        raise GateError(f"{folder / name} is not in the bundle's manifest; remove it, nobody vouches for it")


@contextmanager
def _unchanging(folder: Path) -> Iterator[None]:
    """A bundle that another process replaces while it is read is one line, not the error of the file it hit."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise GateError(
            f"{folder} changed while it was read: {error.filename or 'a file'} is gone; do it again"
        ) from error
    except OSError as error:
        raise GateError(f"{folder} can't be read: {error.strerror or error}") from error


def open_bundle(folder: Path | str, *, runtime: str = "", threads: int = 0) -> tuple[Manifest, Session]:
    """The first model that runs here, engines built on this device before all others.

    Its hash is checked first, and that nothing lies in the bundle that the manifest does not name. An engine is
    preferred only where it passed the golden outputs when it was built and passes them now.
    """
    folder = Path(folder)
    if runtime:
        require_runtime(runtime)
    with _unchanging(folder):
        manifest = read_bundle(folder)
        _require_listed(folder, manifest)
        built = {e.model.path: e for e in built_engines(folder, manifest) if not e.unchecked}
        reasons = []
        for model in (*(e.model for e in built.values()), *manifest.models):
            chosen, reason = choose_runtime(model, runtime)
            if not reason:
                return manifest, _opened(folder, manifest, model, (chosen, threads), built.get(model.path))
            reasons.append(f"{model.path}: {reason}")
    raise CompressorError(f"no model of {folder} runs here: {'; '.join(reasons)}")


def _opened(
    folder: Path, manifest: Manifest, model: ModelFile, how: tuple[str, int], engine: BuiltEngine | None
) -> Session:
    """The model's session on `how`, runtime and threads. What goes with it, such as weights aside, is checked too."""
    others = {m.path for m in manifest.models} - {model.path}
    for name in sorted(manifest.files.keys() - others):
        _require_whole(folder, manifest, name)
    runtime, threads = how
    session = open_model(folder / model.path, runtime=runtime, threads=threads)
    if engine is not None:
        try:
            check_built(session, read_golden(folder, manifest), model, engine.at_once)
        except GateError as error:
            raise GateError(f"{error}; remove it and run `compressor build` again") from error
    return session


def unchecked_engines(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Built engines that are not preferred, and why."""
    return {e.model.path: e.unchecked for e in built_engines(folder, manifest) if e.unchecked}


def run_bundle(
    folder: Path | str, inputs: Sequence[Path], *, runtime: str = "", threads: int = 0
) -> list[NDArray[Any]]:
    """The model's output for each input file: .npy, .npz, or an image where Pillow is installed."""
    manifest, session = open_bundle(folder, runtime=runtime, threads=threads)
    return [answers(session, manifest, Path(path)) for path in inputs]


def answers(session: Session, manifest: Manifest, path: Path) -> NDArray[Any]:
    """[N, classes] for the images of one file; raises GateError when the model answers with anything else."""
    images = load_inputs(path, manifest.preprocessing)
    return checked_outputs(session.run(images), images, str(path))


def choose_runtime(model: ModelFile, runtime: str) -> tuple[str, str]:
    """The runtime for a model and an empty string, or an empty name and the reason why none is there."""
    takers = (model.library,) if model.library else _RUNTIMES[kind_of(model.path)]
    if runtime and runtime not in takers:
        return "", f"{runtime} does not take it ({' or '.join(takers)} does)"
    reasons = available()
    candidates = [runtime] if runtime else list(takers)
    for name in candidates:
        if not reasons[name]:
            return name, ""
    return "", reasons[candidates[0]]


def _check_file(folder: Path, name: str, listed: Mapping[str, Any]) -> Check:
    path = folder / inside(name)
    if path.is_symlink() or not path.is_file():
        return Check(name, "failed", "is missing")
    size = path.stat().st_size
    if size != listed["bytes"]:
        how = "truncated" if size < listed["bytes"] else "too long"
        return Check(name, "failed", f"is {how}: {size} bytes, the manifest says {listed['bytes']}")
    if sha256_of(path) != listed["sha256"]:
        return Check(name, "failed", "was changed: its sha256 differs from the manifest's")
    return Check(name, "passed", "sha256 as in the manifest")


def _check_model(
    folder: Path, model: ModelFile, runtime: str, golden: Golden, engine: BuiltEngine | None = None
) -> Check:
    chosen, reason = choose_runtime(model, runtime)
    if reason:
        prefix = "built, not run: " if kind_of(model.path) == "engine" else ""
        return Check(model.path, "not run", prefix + reason)
    at_once = engine.at_once if engine else len(golden.inputs)
    try:
        session = open_model(folder / model.path, runtime=chosen, fused=not model.made_for)
        parity = distance(session, golden, at_once)
    except CompressorError as error:
        return Check(model.path, "failed", f"in {chosen}: {error}")
    wrong = failures(parity, model.limits)
    if wrong:
        return Check(model.path, "failed", f"in {chosen}: {'; '.join(wrong)}", parity)
    detail = f"in {chosen} {session.version}: max |difference| {parity.max_abs:.3g} of {parity.reference_max_abs:.3g}"
    unused = f"; not used: {engine.unchecked}" if engine and engine.unchecked else ""
    return Check(model.path, "passed", detail + unused, parity)


def _listing(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}


def _unlisted(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Files nobody vouches for, but for what `compressor build` leaves; links and unreadable folders are such."""
    for name in _files_below(folder):
        link = (folder / name).is_symlink()
        if name not in (MANIFEST, *manifest.files) and (link or not is_builders_file(name)):
            yield name


def _files_below(folder: Path) -> Iterator[str]:
    """Paths in the bundle by name, whatever is no folder; a linked folder counts as one file."""

    def stop(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=stop):
        linked = [name for name in folders if (Path(place) / name).is_symlink()]
        folders.sort()
        for name in sorted([*names, *linked]):
            yield (Path(place) / name).relative_to(folder).as_posix()


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"{folder} is a file; choose another folder for the bundle")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise FolderError(f"{folder} holds something else than a bundle; choose another folder")
    if folder.is_dir() and (folder / MANIFEST).is_file():
        schema = _schema_of(folder / MANIFEST)
        if schema != SCHEMA:
            raise FolderError(f"{folder} holds a {MANIFEST} of something else; choose another folder")


def _schema_of(path: Path) -> str:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return SCHEMA  # a damaged bundle may be replaced by a whole one
    except RecursionError:
        return ""
    return str(content.get("schema")) if isinstance(content, dict) else ""
