"""What `compressor run` does: samples in, a row for each out, as lines, JSON or CSV, and how good the answers are.

A row is written when its sample is answered, so that a camera's are seen at once; a file appears whole.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import DataError, InputError
from ..records import Figure, figure_fields
from . import feeds
from .answering import require_answer
from .answers import SEGMENTATION, answers_of, by_output, logits_of, maps_of
from .arrays import write_npz
from .destinations import replacing, require_destination, written
from .feeds import Array, Arrays
from .fields import printable
from .loading import Loaded, load
from .manifest import CLASSIFICATION, Manifest
from .sampling import Sample, samples_of
from .scoring import MEASURES, in_words
from .stated import stated_figure
from .summaries import Summary, summarise_answer

_ENDINGS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".txt": "text", "": "jsonl"}
COLUMNS = ("file", "sample", "ms", "rank", "index", "label", "share", "score", "x0", "y0", "x1", "y1", "truth")
"""Of a CSV: a line for each class, box or class of pixels, or one without a rank where there is none."""
_FIGURE_COLUMNS = ("file", "sample", "ms", "output", "dtype", "shape", "min", "mean", "max")


@dataclass(slots=True)
class _Tally:
    """What is kept of the samples that were answered."""

    count: int = 0
    times_ms: list[float] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)  # of those with labels, as the task's measure has them
    outputs: list[Arrays] = field(default_factory=list)  # where they are to be written


@dataclass(frozen=True, slots=True)
class _Result:
    """One file's or frame's answer and how long the model took for it."""

    sample: Sample
    summary: Summary
    ms: float

    @property
    def class_label(self) -> dict[str, int]:
        """`truth`, where the sample has the label of a class."""
        truth = self.sample.truth
        return {"truth": truth} if isinstance(truth, int) else {}


def run(options: argparse.Namespace) -> int:
    """Answers all inputs; returns the exit code 0. Raises what `load` raises, and DataError at the first bad input."""
    if options.serve:
        return _serve(options)
    output_format = _format(options)
    out = _array_file(options.out)
    kept = [options.given, *map(Path, filter(os.path.isfile, options.inputs))]
    for name, path in (("--out", out), ("--output", options.output)):
        if path is not None:
            require_destination(name, path, kept=kept)

    model = load(options.bundle, runtime=options.runtime, model=options.model, threads=options.threads)
    for line in model.unused:
        _say(f"note: {line}")

    samples = samples_of(options.inputs, model.manifest, most_frames=options.frames)
    tally = _Tally()
    is_told_apart = output_format != "json"  # an object holds what is said of all, other formats leave it to stderr
    with _written(options.output) as file:
        writer = _WRITERS[output_format](file)
        try:
            for result in _results(model, samples, tally, top=options.top, keeps=out is not None):
                if is_told_apart and len(tally.times_ms) == 1:
                    _say(f"runs {model.choice}")
                writer.add(result)
        except KeyboardInterrupt:  # how a camera is left; what was answered is whole
            if not tally.count:
                raise
            _say(f"interrupted after {tally.count} samples")
        figure = _figure(model.manifest, tally)
        writer.end(_closing(model, tally, figure))
    if out is not None:
        _write_outputs(out, model.manifest, tally.outputs)
    if is_told_apart and figure is not None:
        _say_figure(figure, model, tally)
    return 0


def _serve(options: argparse.Namespace) -> int:
    if options.inputs:
        raise InputError(f"--serve takes images from its page; leave {options.inputs[0]} out, or leave --serve out")
    from .serving import serve  # the library's servers take longer to import than an answer

    model = load(options.bundle, runtime=options.runtime, model=options.model, threads=options.threads)
    serve(model, host=options.host, port=options.port, top=options.top)
    return 0


def _format(options: argparse.Namespace) -> str:
    """What was asked for, else what the file's name says, else text."""
    if options.json and options.format not in ("", "json"):
        raise InputError(f"--json and --format {options.format} ask for two formats; give one")
    if options.json:
        return "json"
    if options.format:
        return str(options.format)
    if not options.output:
        return "text"
    ending = options.output.suffix.lower()
    if ending not in _ENDINGS:
        raise InputError(f"--output {options.output}: no format is called {ending}; give --format, or name it .csv")
    return _ENDINGS[ending]


def _results(model: Loaded, samples: Iterator[Sample], tally: _Tally, *, top: int, keeps: bool) -> Iterator[_Result]:
    for sample in samples:
        start_s = time.perf_counter()
        outputs = model.session.run(sample.inputs)
        ms = 1e3 * (time.perf_counter() - start_s)
        require_answer(outputs, sample.inputs, model.manifest, sample.name)

        tally.count += feeds.count(sample.inputs)
        tally.times_ms.append(ms)
        if keeps:
            tally.outputs.append(outputs)
        if sample.truth is not None:
            tally.rows.append(_row(model.manifest, outputs, sample))
        yield _Result(sample, summarise_answer(model.manifest, outputs, sample.name, top=top), ms)


def _row(manifest: Manifest, outputs: Arrays, sample: Sample) -> Any:
    """The answer to an only sample held to its label, by the task's measure. Raises DataError where they don't fit."""
    try:
        return MEASURES[manifest.task].row(_judged(manifest, outputs), sample.truth)
    except DataError as error:
        raise DataError(f"{sample.name}: {error}") from error


def _judged(manifest: Manifest, outputs: Arrays) -> Any:
    """What of the first sample's answer its task's measure takes."""
    judged = _judged_outputs(manifest, outputs)
    if judged is None or judged[0] is None:
        raise DataError(f"labels can't be compared: no output is what the task {manifest.task} is judged by")
    return judged[0]


def _judged_outputs(manifest: Manifest, outputs: Arrays) -> Any:
    """The same of every sample."""
    if manifest.task == CLASSIFICATION:
        return logits_of(manifest, by_output(manifest, outputs))
    if manifest.task == SEGMENTATION:
        return maps_of(manifest, by_output(manifest, outputs))
    return [answer.detections for answer in answers_of(manifest, outputs)]


def _figure(manifest: Manifest, tally: _Tally) -> Figure | None:
    return MEASURES[manifest.task].figure(tally.rows) if tally.rows else None


def _closing(model: Loaded, tally: _Tally, figure: Figure | None) -> dict[str, Any]:
    """What is said of all samples, for JSON."""
    closing: dict[str, Any] = {
        "model": model.session.path,
        "runtime": model.session.runtime,
        "choice": model.choice,
        "task": model.manifest.task,
        "samples": tally.count,
        "p50_ms": statistics.median(tally.times_ms) if tally.times_ms else None,
    }
    if figure is not None:
        stated = stated_figure(model.manifest, model.session.path)
        closing["quality"] = figure_fields(figure) | {"value": figure.value, "low": figure.low, "high": figure.high}
        closing["stated"] = None if stated is None else figure_fields(stated)
    return closing


def _say_figure(figure: Figure, model: Loaded, tally: _Tally) -> None:
    stated = stated_figure(model.manifest, model.session.path)
    stated_words = "no figure" if stated is None else in_words(stated)
    clauses = [in_words(figure), f"the manifest states {stated_words}"]
    unlabelled = tally.count - figure.n
    if unlabelled:
        clauses.append(f"{unlabelled} samples have no label")
    _say("; ".join(clauses))


def _say(line: str) -> None:
    """On stderr: stdout is the answers'."""
    print(printable(line), file=sys.stderr, flush=True)


def _written(path: Path | None) -> AbstractContextManager[IO[str]]:
    """stdout, or a file that appears when the context ends without an error."""
    if path is None:
        return nullcontext(sys.stdout)
    return written(path)


class _Text:
    """A line or more for each sample, as a person reads it."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def add(self, result: _Result) -> None:
        """Writes one result."""
        for line in result.summary.lines:
            print(printable(line), file=self.file, flush=True)

    def end(self, closing: Mapping[str, Any]) -> None:
        """What is said of all is on stderr."""


class _Json:
    """One object of everything, when all is answered."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.results: dict[str, Any] = {}

    def add(self, result: _Result) -> None:
        """Keeps one result."""
        self.results[result.sample.name] = result.summary.values

    def end(self, closing: Mapping[str, Any]) -> None:
        """Writes all."""
        print(json.dumps({**closing, "results": self.results}, allow_nan=False), file=self.file)


class _JsonLines:
    """An object for each file or frame, as soon as it is answered."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def add(self, result: _Result) -> None:
        """Writes one result."""
        row = {"file": result.sample.name, "ms": result.ms, "results": result.summary.values, **result.class_label}
        print(json.dumps(row, allow_nan=False), file=self.file, flush=True)

    def end(self, closing: Mapping[str, Any]) -> None:
        """What is said of all is on stderr."""


class _Csv:
    """A table with a line for each class, box or output."""

    def __init__(self, file: IO[str]) -> None:
        self.writer: Any = None
        self.file = file

    def add(self, result: _Result) -> None:
        """Writes one result's lines, and a header before the first."""
        rows = list(_csv_rows(result))
        if self.writer is None:
            columns = _FIGURE_COLUMNS if "output" in rows[0] else COLUMNS
            self.writer = csv.DictWriter(self.file, columns, lineterminator="\n")
            self.writer.writeheader()
        self.writer.writerows(rows)
        self.file.flush()

    def end(self, closing: Mapping[str, Any]) -> None:
        """What is said of all is on stderr."""


def _csv_rows(result: _Result) -> Iterator[dict[str, Any]]:
    base: dict[str, Any] = {"file": result.sample.name, "ms": f"{result.ms:.4f}"}
    for index, entries in enumerate(result.summary.values):
        if isinstance(entries, Mapping):  # figures, a line an output
            yield {**base, "sample": 0, **entries}
            continue
        sample = {**base, "sample": index, **result.class_label}
        ranked = [_cells(rank, entry) for rank, entry in enumerate(entries, 1)]
        for cells in ranked or [{}]:  # a line also where nothing was detected
            yield {**sample, **cells}


def _cells(rank: int, entry: Mapping[str, Any]) -> dict[str, Any]:
    cells = {"rank": rank, **entry}
    if "box" in entry:
        cells |= zip(("x0", "y0", "x1", "y1"), cells.pop("box"), strict=True)
    return cells


_WRITERS: Mapping[str, Callable[[IO[str]], Any]] = {
    "text": _Text,
    "json": _Json,
    "jsonl": _JsonLines,
    "csv": _Csv,
}


def _array_file(path: Path | None) -> Path | None:
    """The file that arrays are written to, called as np.savez would call it; a folder stays one, to be refused."""
    if path is None or path.suffix == ".npz" or path.is_dir():
        return path
    return path.with_name(f"{path.name}.npz")


def _write_outputs(path: Path, manifest: Manifest, outputs: Sequence[Arrays]) -> None:
    """The arrays of every file, in order, which goes by its position, since two files may share a name.

    Of a classifier's one output that is all a name says; else outputs have theirs, alone where there is one file.
    """
    arrays: dict[str, Array] = {}
    for index, output in enumerate(outputs):
        if manifest.task == CLASSIFICATION and not isinstance(output, tuple):
            arrays[f"output_{index}"] = output
            continue
        prefix = "" if len(outputs) == 1 else f"output_{index}."
        arrays |= {f"{prefix}{name}": array for name, array in by_output(manifest, output).items()}
    with replacing(path) as scratch:
        write_npz(scratch, arrays)
