"""The folder that ships: model files, golden inputs and outputs, a manifest with a hash of every file.

Written whole or not at all. Reading checks before it trusts: nothing of a bundle is loaded into a runtime before
its hash was compared. Knows no torch and no format of a model beyond which runtime takes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CompressorError, FolderError, GateError, InputError
from .builder import read_sidecar, sha256_of
from .images import Preprocessing, load_inputs
from .parity import Limits, Parity, compare, failures
from .runtimes import Session, available, kind_of, open_model

SCHEMA = "compressor.bundle/1"
MANIFEST = "manifest.json"
GOLDEN = "golden.npz"
BUILT = "built"  # engines made on the device: outside the manifest, each with a sidecar of its own
# Which runtimes take which file, in the order tried when none is named.
_RUNTIMES = {
    "engine": ("tensorrt", "tensorrt_rtx"),
    "onnx": ("onnxruntime", "openvino", "onnxruntime-cuda", "onnxruntime-tensorrt"),
}


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One model of the bundle. `library` names an engine's; `limits` bound its distance from the golden outputs.

    `made_for` names the library that builds from an ONNX file; other runtimes compute it, but slowly.
    """

    path: str
    precision: str = "fp32"
    library: str = ""
    target: str = ""
    limits: Limits = field(default_factory=Limits)
    made_for: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle says of itself. `files[path]` = {sha256, bytes}; `build` are the recipes of engines to be built."""

    name: str
    models: tuple[ModelFile, ...]
    preprocessing: Preprocessing
    labels: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()
    build: tuple[Mapping[str, Any], ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


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
            target = scratch / _inside(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        np.savez(scratch / GOLDEN, inputs=golden_inputs, outputs=golden_outputs)
        listed = {name: _listing(scratch / name) for name in sorted([*files, GOLDEN])}
        (scratch / MANIFEST).write_text(_manifest_text(manifest, listed))
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


def read_bundle(folder: Path | str) -> Manifest:
    """The manifest; raises GateError when it is missing, damaged or was changed by hand."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} is no bundle: it has no {MANIFEST}")
    try:
        content = json.loads(path.read_text())
        schema, digest = content.pop("schema"), content.pop("digest")
        if schema != SCHEMA:
            raise InputError(f"{path} has schema {schema!r}, this version reads {SCHEMA!r}")
        if digest != _digest(content):
            raise GateError(f"{path} was changed after it was written (digest differs); get the bundle again")
        return _manifest_of(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GateError(f"{path} is damaged ({error}); get the bundle again") from error


def verify_bundle(folder: Path | str, runtime: str = "") -> BundleReport:
    """Checks every hash, then runs every model a runtime here takes on the golden inputs.

    A file that fails its hash is never opened. Raises GateError when the manifest itself is damaged, InputError
    when `folder` is no bundle or `runtime` unknown.
    """
    folder = Path(folder)
    manifest = read_bundle(folder)
    if runtime and runtime not in available():
        raise InputError(f"no runtime {runtime!r}; there are {', '.join(available())}")
    checks = [_check_file(folder, name, listed) for name, listed in manifest.files.items()]
    checks += [Check(name, "failed", "is not in the manifest; remove it") for name in _unlisted(folder, manifest)]
    whole = {c.what for c in checks if c.outcome == "passed"}
    if GOLDEN in whole:
        with np.load(folder / GOLDEN, allow_pickle=False) as golden:
            inputs, outputs = golden["inputs"], golden["outputs"]
        for model in (*manifest.models, *built_engines(folder, manifest)):
            if model.path in whole or model.path.startswith(f"{BUILT}/"):
                checks.append(_check_model(folder, model, runtime, (inputs, outputs)))
    return BundleReport(str(folder), tuple(checks))


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Raises GateError unless every file of the bundle is the one the manifest describes."""
    for name, listed in manifest.files.items():
        check = _check_file(folder, name, listed)
        if check.outcome == "failed":
            raise GateError(f"{name} {check.detail}; get the bundle again")


def open_bundle(folder: Path | str, *, runtime: str = "", threads: int = 0) -> tuple[Manifest, Session]:
    """The first model that runs here, engines built on this device before all others; its hash is checked first."""
    folder = Path(folder)
    manifest = read_bundle(folder)
    reasons = []
    for model in (*built_engines(folder, manifest), *manifest.models):
        chosen, reason = choose_runtime(model, runtime)
        if reason:
            reasons.append(f"{model.path}: {reason}")
            continue
        if model.path in manifest.files:
            check = _check_file(folder, model.path, manifest.files[model.path])
            if check.outcome == "failed":
                raise GateError(f"{check.what} {check.detail}")
        return manifest, open_model(folder / _inside(model.path), runtime=chosen, threads=threads)
    raise CompressorError(f"no model of {folder} runs here: {'; '.join(reasons)}")


def built_engines(folder: Path, manifest: Manifest) -> tuple[ModelFile, ...]:
    """Engines made here from this bundle's models; raises EngineError for one that is not what its sidecar says."""
    hashes = {manifest.files[m.path]["sha256"]: m for m in manifest.models}
    found = []
    for path in sorted((folder / BUILT).glob("*.plan")):
        record = read_sidecar(path)
        source = hashes.get(record.onnx_sha256)
        if source is not None:
            found.append(
                replace(source, path=f"{BUILT}/{path.name}", library=record.library, target="this-gpu", made_for="")
            )
    return tuple(found)


def run_bundle(
    folder: Path | str, inputs: Sequence[Path], *, runtime: str = "", threads: int = 0
) -> list[NDArray[Any]]:
    """The model's output for each input file: .npy, .npz, or an image where Pillow is installed."""
    manifest, session = open_bundle(folder, runtime=runtime, threads=threads)
    return [session.run(load_inputs(Path(path), manifest.preprocessing)) for path in inputs]


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
    path = folder / _inside(name)
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
    folder: Path, model: ModelFile, runtime: str, golden: tuple[NDArray[np.float32], NDArray[Any]]
) -> Check:
    chosen, reason = choose_runtime(model, runtime)
    if reason:
        prefix = "built, not run: " if kind_of(model.path) == "engine" else ""
        return Check(model.path, "not run", prefix + reason)
    try:
        session = open_model(folder / _inside(model.path), runtime=chosen, fused=not model.made_for)
        distance = compare(golden[1], session.run(golden[0]))
    except CompressorError as error:
        return Check(model.path, "failed", f"in {chosen}: {error}")
    wrong = failures(distance, model.limits)
    detail = (
        f"in {chosen} {session.version}: max |difference| {distance.max_abs:.3g} of {distance.reference_max_abs:.3g}"
    )
    if wrong:
        return Check(model.path, "failed", f"in {chosen}: {'; '.join(wrong)}", distance)
    return Check(model.path, "passed", detail, distance)


def _manifest_text(manifest: Manifest, files: Mapping[str, Mapping[str, Any]]) -> str:
    content = json.loads(json.dumps({**asdict(manifest), "files": files}))
    return json.dumps({"schema": SCHEMA, "digest": _digest(content), **content}, indent=1) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _manifest_of(content: Mapping[str, Any]) -> Manifest:
    models = tuple(ModelFile(**{**m, "limits": Limits(**m["limits"])}) for m in content["models"])
    given = content["preprocessing"]
    lists = {key: tuple(given[key]) for key in ("size", "resize", "mean", "std")}
    for name in (*content["files"], *(m.path for m in models)):
        _inside(name)
    if any(m.path not in content["files"] for m in models):
        raise ValueError("a model has no entry among the files")
    return Manifest(
        name=content["name"],
        models=models,
        preprocessing=Preprocessing(**{**given, **lists}),
        labels=tuple(content["labels"]),
        licences=tuple(content["licences"]),
        build=tuple(content["build"]),
        provenance=content["provenance"],
        files=content["files"],
    )


def _listing(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}


def _inside(name: str) -> PurePosixPath:
    """The name as a path that stays in the bundle; a manifest from elsewhere must not reach out of it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
        raise GateError(f"the manifest names {name!r}, which lies outside the bundle; don't use it")
    return path


def _unlisted(folder: Path, manifest: Manifest) -> list[str]:
    """Files nobody vouches for, but for engines and their sidecars, which are built here."""
    known = {MANIFEST, *manifest.files}
    present = (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if not p.is_dir() or p.is_symlink())
    return [name for name in present if name not in known and not name.startswith(f"{BUILT}/")]


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
    return str(content.get("schema")) if isinstance(content, dict) else ""
