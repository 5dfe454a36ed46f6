"""`python -m compressor.device verify | run | build | benchmark BUNDLE`: what an edge box does with a bundle.

Standard library and numpy only. Exit codes are those of the error tree; `--json` prints one object on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CompressorError, FolderError, GateError
from .builder import EngineRecord
from .bundle import (
    GOLDEN,
    BundleReport,
    built_engines,
    choose_runtime,
    open_bundle,
    read_bundle,
    verify_bundle,
    verify_files,
)
from .engines import build_bundle
from .images import load_inputs, top_classes
from .runtimes import RUNTIMES
from .timing import Schedule, summarise, to_json
from .worker import time_files

VERBS = ("verify", "run", "build")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code; every error of the tree is one line on stderr."""
    options = _parser().parse_args(arguments)
    verb: Callable[[argparse.Namespace], int] = options.verb
    return guarded(lambda: verb(options))


def guarded(action: Callable[[], int]) -> int:
    """The action's exit code, with our errors as `error: ...` on stderr and Ctrl-C as 130."""
    try:
        return action()
    except CompressorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; so has its interest in the rest
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="compressor", description="Verify, run, build and time a bundle.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verify = _verb(verbs, "verify", _verify, "check every hash, run every model on the golden inputs")
    run = _verb(verbs, "run", _run, "run the bundle's model on images, .npy or .npz files")
    build = _verb(verbs, "build", _build, "build the bundle's TensorRT engines for this device")
    benchmark = _verb(verbs, "benchmark", _benchmark, "time the bundle's models on this device")
    for verb in (verify, run, benchmark):
        verb.add_argument("--runtime", default="", metavar="NAME", help=f"one of {', '.join(RUNTIMES)}")
    run.add_argument("inputs", nargs="+", type=Path, metavar="INPUT")
    run.add_argument("--top", type=int, default=5, help="how many classes to print per image")
    run.add_argument("--out", type=Path, help="write the raw outputs to this .npz")
    run.add_argument("--threads", type=int, default=0)
    benchmark.add_argument("--batch", type=int, default=1)
    benchmark.add_argument("--seconds", type=float, default=10.0, help="per model")
    benchmark.add_argument("--runs", type=int, default=662, help="least runs per model; a p99 needs 662")
    benchmark.add_argument("--rounds", type=int, default=10, help="turns per model, alternating")
    benchmark.add_argument("--threads", type=int, default=0)
    benchmark.add_argument("--cores", default="", help="pin to these cores, such as 0,1")
    benchmark.add_argument("--rate-hz", type=float, default=0.0, help="start runs at a camera's rate")
    benchmark.add_argument("--samples", type=Path, help="write the raw samples to this .json")
    build.set_defaults(runtime="")
    return parser


def _verb(
    verbs: Any, name: str, action: Callable[[argparse.Namespace], int], help_text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=help_text, description=help_text)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(verb=action)
    return parser


def _verify(options: argparse.Namespace) -> int:
    report = verify_bundle(options.bundle, options.runtime)
    if options.json:
        print(json.dumps({**asdict(report), "passed": report.passed}))
    else:
        _print_report(report)
    if report.passed:
        return 0
    failed = [f"{c.what} {c.detail}" for c in report.checks if c.outcome == "failed"]
    not_run = [f"{c.what}: {c.detail}" for c in report.checks if c.outcome == "not run"]
    raise GateError(failed[0] if failed else f"no model of {options.bundle} could be run: {'; '.join(not_run)}")


def _print_report(report: BundleReport) -> None:
    for check in report.checks:
        print(f"{check.outcome:8} {check.what}: {check.detail}")


def _run(options: argparse.Namespace) -> int:
    manifest, session = open_bundle(options.bundle, runtime=options.runtime, threads=options.threads)
    results = {str(path): session.run(load_inputs(path, manifest.preprocessing)) for path in options.inputs}
    if options.out:
        _write_outputs(options.out, results)
    answers = {
        name: [top_classes(row, manifest.labels, options.top) for row in output] for name, output in results.items()
    }
    if options.json:
        print(json.dumps({"model": session.path, "runtime": session.runtime, "results": answers}))
        return 0
    for name, rows in answers.items():
        for index, row in enumerate(rows):
            where = name if len(rows) == 1 else f"{name}[{index}]"
            answer = ", ".join(f"{c['label']} {c['share']:.3f}" for c in row)
            print(f"{where}: {answer}")
    return 0


def _write_outputs(path: Path, results: dict[str, Any]) -> None:
    """One array per input, in order; named by position, since two inputs may share a name."""
    arrays: dict[str, Any] = {f"output_{i}": output for i, output in enumerate(results.values())}
    try:
        np.savez(path, **arrays)
    except OSError as error:
        raise FolderError(f"can't write {path}: {error.strerror}") from error


def _build(options: argparse.Namespace) -> int:
    def show(phase: str, share: float) -> None:
        print(f"\r{phase}: {100 * share:3.0f} %", end="" if share < 1 else "\n", file=sys.stderr, flush=True)

    records = build_bundle(options.bundle, progress=None if options.json else show)
    if options.json:
        print(json.dumps({"engines": [asdict(r) for r in records]}))
    else:
        for record in records:
            print(_engine_line(record))
    return 0


def _engine_line(record: EngineRecord) -> str:
    how = "from cache" if record.cached else f"in {record.build_s:.1f} s"
    return (
        f"{record.path}: {record.size_bytes} bytes, {record.library} {record.library_version}, {how}, {record.status}"
    )


def _benchmark(options: argparse.Namespace) -> int:
    manifest = read_bundle(options.bundle)
    verify_files(options.bundle, manifest)
    cores = tuple(int(core) for core in options.cores.split(",") if core)
    schedule = Schedule(
        batch=options.batch,
        rounds=options.rounds,
        seconds=options.seconds,
        runs=options.runs,
        rate_hz=options.rate_hz,
        threads=options.threads,
        cores=cores,
    )
    with np.load(options.bundle / GOLDEN, allow_pickle=False) as golden:
        images = golden["inputs"]
    groups: dict[str, dict[str, Path]] = {}
    not_run = {}
    for model in (*manifest.models, *built_engines(options.bundle, manifest)):
        chosen, reason = choose_runtime(model, options.runtime)
        if model.made_for:
            not_run[model.path] = f"made for {model.made_for}, which builds from it: compressor build {options.bundle}"
        elif reason:
            not_run[model.path] = reason
        else:
            groups.setdefault(chosen, {})[model.path] = options.bundle / model.path
    timings = [
        t for name, files in groups.items() for t in time_files(files, images, schedule=schedule, runtime=name).values()
    ]
    if options.samples:
        options.samples.write_text(json.dumps([to_json(t) for t in timings]))
    rows = [{"model": t.name, "runtime": t.runtime, **summarise(t)} for t in timings]
    if options.json:
        print(json.dumps({"timings": rows, "not_run": not_run}))
        return 0
    for row in rows:
        print(_timing_line(row))
    for name, reason in not_run.items():
        print(f"{name}: not run, {reason}")
    return 0


def _timing_line(row: dict[str, Any]) -> str:
    return (
        f"{row['model']} on {row['runtime']}: p50 {row['p50_ms']:.3f} ms, p90 {row['p90']}, p99 {row['p99']}, "
        f"{row['images_per_s']:.1f} images/s, n {row['n']}"
    )


if __name__ == "__main__":
    sys.exit(main())
