"""What an edge box does with a bundle, a verb each: its results as lines or as one JSON object on stdout.

Exit codes are those of the error tree; every error is one line on stderr.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ..errors import CompressorError, GateError, InputError
from .archive import as_folder, pack_bundle, unpack_bundle
from .builder import EngineRecord, sha256_of
from .bundle import (
    BundleReport,
    Manifest,
    checked_engines,
    choose_runtime,
    read_bundle,
    require_signed,
    unchecked_engines,
    verify_bundle,
    verify_files,
)
from .destinations import require_destination, written
from .engines import build_bundle
from .environment import affinity
from .feeds import sample_bytes
from .fields import printable
from .folders import reason_of
from .golden import read_golden
from .images import MOST_BYTES
from .manifest import SIGNATURE
from .options import SERVE, Verb, make_parser
from .running import run
from .runtimes import require_runtime, unavailable_error
from .timing import Schedule, Timing, summarise, to_json
from .worker import time_files

_TIMING_LINE = "{model} on {runtime}: p50 {p50_ms:.3f} ms, p90 {p90}, p99 {p99}, {images_per_s:.1f} images/s, n {n}"


def run_command(arguments: Sequence[str] | None) -> int:
    """Runs one verb and returns its exit code; without arguments, the help and 0."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verbs: dict[str, Verb] = {
        "verify": partial(_on_folder, _verify),
        "run": partial(_on_folder, run),
        "build": partial(_on_folder, _build),
        "benchmark": partial(_on_folder, _benchmark),
        "pack": _pack,
        "unpack": _unpack,
    }
    parser = make_parser(verbs, serves=SERVE in words)
    if not words:
        parser.print_help()
        return 0

    options = parser.parse_args(words)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names and labels may hold what a terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return int(options.verb(options))
    except BrokenPipeError:
        raise  # an OSError that `guarded` answers in another way
    except OSError as error:
        raise InputError(f"{error.filename or options.bundle}: {reason_of(error)}") from error
    except MemoryError as error:
        raise CompressorError("there is not memory enough for this; give fewer or smaller inputs at once") from error


def _on_folder(verb: Verb, options: argparse.Namespace) -> int:
    """The verb's exit code on the bundle's folder, which is its archive's while the verb lasts.

    Where there is a key, nothing is done with what its owner did not sign. `options.given` is what was typed.
    """
    options.given = options.bundle
    with as_folder(options.given, keep=verb is _build) as options.bundle:  # what is built is to stay
        if options.key is not None and verb is not _verify:  # which says more of it
            require_signed(options.bundle, options.key)
        return verb(options)


def guarded(action: Callable[[], int]) -> int:
    """The action's exit code, with our errors as `error: ...` on stderr and Ctrl-C as 130."""
    try:
        return action()
    except CompressorError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; so has its interest in the rest
        return 141


def _verify(options: argparse.Namespace) -> int:
    report = verify_bundle(options.bundle, options.runtime, key=options.key)
    trust = _trust(report, options.bundle)
    content = {**asdict(report), "bundle": str(options.given), "passed": report.passed, "trust": trust}
    lines = [f"{check.outcome:8} {check.what}: {check.detail}" for check in report.checks]
    _print(options, content, [*lines, trust])
    if report.passed:
        return 0

    failed = report.having("failed")
    if failed:
        raise GateError(f"{failed[0].what} {failed[0].detail}")
    not_run = [f"{check.what}: {check.detail}" for check in report.having("not run")]
    raise unavailable_error(f"no model of {options.given} could be run: {'; '.join(not_run)}", not_run)


def _trust(report: BundleReport, folder: Path) -> str:
    """What is known of who made the bundle: the hashes in it show that it is whole, and a signature whose it is."""
    if report.signed_by:
        return f"signed by the owner of the key {report.signed_by}"
    if (folder / SIGNATURE).is_file():
        return "integrity only: the bundle is signed, and its signature was not checked (--key FILE does)"
    return "integrity only: the bundle is not signed, so who made it is not known"


def _build(options: argparse.Namespace) -> int:
    def show(phase: str, share: float) -> None:
        end = "" if share < 1 else "\n"
        print(f"\r{printable(phase)}: {100 * share:3.0f} %", end=end, file=sys.stderr, flush=True)

    records = build_bundle(options.bundle, progress=None if options.json else show)
    _print(options, {"engines": list(map(asdict, records))}, map(_engine_line, records))
    return 0


def _engine_line(record: EngineRecord) -> str:
    origin = "from cache" if record.cached else f"in {record.build_s:.1f} s"
    library = f"{record.library} {record.library_version}"
    return f"{record.path}: {record.size_bytes} bytes, {library}, {origin}, {record.status}"


def _benchmark(options: argparse.Namespace) -> int:
    require_runtime(options.runtime)
    if options.samples:
        require_destination("--samples", options.samples, kept=[options.given])
    manifest = read_bundle(options.bundle)
    verify_files(options.bundle, manifest)

    images = read_golden(options.bundle, manifest).inputs
    schedule = _schedule(options, sample_bytes(images))
    files_by_runtime, not_run = _timeable(options, manifest)
    timings: list[Timing] = []
    for runtime, files in files_by_runtime.items():
        timings += time_files(files, images, schedule=schedule, runtime=runtime).values()

    if options.samples:
        with written(options.samples) as file:
            file.write(json.dumps(list(map(to_json, timings))))
    rows = [{"model": timing.name, "runtime": timing.runtime, **summarise(timing)} for timing in timings]
    lines = list(map(_TIMING_LINE.format_map, rows))
    lines += [f"{name}: not run, {reason}" for name, reason in not_run.items()]
    _print(options, {"timings": rows, "not_run": not_run}, lines)
    if not timings:
        reasons = [f"{name}: {reason}" for name, reason in not_run.items()]
        raise unavailable_error(f"no model of {options.given} could be timed: {'; '.join(reasons)}", reasons)
    return 0


def _schedule(options: argparse.Namespace, one_bytes: int) -> Schedule:
    """The options as a schedule; InputError for cores this process lacks, or a batch that memory would not hold."""
    allowed_cores = affinity() or options.cores  # where the system can't say
    for core in options.cores:
        if core not in allowed_cores:
            listed = ", ".join(map(str, allowed_cores))
            raise InputError(f"--cores: this process has no core {core}; it has {listed}")
    if options.batch * one_bytes > MOST_BYTES:
        raise InputError(f"--batch {options.batch} takes more than {MOST_BYTES} bytes of input; choose a smaller one")
    return Schedule(
        batch=options.batch,
        rounds=options.rounds,
        seconds=options.seconds,
        runs=options.runs,
        rate_hz=options.rate_hz,
        threads=options.threads,
        cores=options.cores,
    )


def _timeable(options: argparse.Namespace, manifest: Manifest) -> tuple[dict[str, dict[str, Path]], dict[str, str]]:
    """Model files by runtime and name, and what is not timed with the reason."""
    files_by_runtime: dict[str, dict[str, Path]] = {}
    not_run = unchecked_engines(options.bundle, manifest)
    checked = [engine.model for engine in checked_engines(options.bundle, manifest)]
    for model in (*manifest.models, *checked):
        chosen, reason = choose_runtime(model, options.runtime)
        if model.made_for:
            not_run[model.path] = f"made for {model.made_for}, which builds from it: compressor build {options.given}"
        elif reason:
            not_run[model.path] = reason
        else:
            files_by_runtime.setdefault(chosen, {})[model.path] = options.bundle / model.path
    return files_by_runtime, not_run


def _pack(options: argparse.Namespace) -> int:
    archive = pack_bundle(options.bundle, options.out)
    _print_place(options, archive=archive, sha256=sha256_of(archive))
    return 0


def _unpack(options: argparse.Namespace) -> int:
    _print_place(options, bundle=unpack_bundle(options.bundle, options.out))
    return 0


def _print_place(options: argparse.Namespace, **places: object) -> None:
    """Where something was written: one word a line, or one object."""
    words = {name: str(place) for name, place in places.items()}
    _print(options, words, words.values())


def _print(options: argparse.Namespace, content: Mapping[str, object], lines: Iterable[str]) -> None:
    """A verb's result: one object where that is asked for, else the lines."""
    if options.json:
        print(json.dumps(_finite(content), allow_nan=False))  # ASCII alone
        return
    for line in lines:
        print(printable(line))


def _finite(value: object) -> object:
    """The value with null in place of NaN and infinity, which JSON does not know."""
    match value:
        case Mapping():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return list(map(_finite, value))
        case float() if not math.isfinite(value):
            return None
    return value
