"""The device's command line: its verbs, their flags and the values those take. A wrong one is an InputError."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from ..errors import InputError
from .runtimes import FILES, runtime_names

Verb = Callable[[argparse.Namespace], int]

_MOST = 1 << 20
_DAY_S = 86_400.0
_LARGEST_PORT = 65_535
_CORE = re.compile(r"[0-9]{1,5}")
SERVE = "--serve"
RUN_FORMATS = ("text", "json", "jsonl", "csv")
_INPUT = (
    "an image or an array; a folder of them, also labelled (class folders, labels.csv, masks, COCO), which is judged; "
    "a video, or a camera by its number"
)
_REST = (
    "`compressor list` names runtimes, targets and criteria. Everything else, such as `compressor compress`, needs "
    "more: pip install 'compressor[compress]'"
)


class OneLineParser(argparse.ArgumentParser):
    """argparse prints its usage and ends the process; ours is one line, as all errors are."""

    def error(self, message: str) -> NoReturn:
        """What argparse calls for words it can't read."""
        raise InputError(f"{message}; see {self.prog} --help")


def make_parser(verbs: Mapping[str, Verb], *, serves: bool = False) -> argparse.ArgumentParser:
    """The parser of the device's verbs, whose actions `verbs` holds by name.

    Where it `serves`, `run` needs no inputs. (Were they always optional, argparse would take none behind a flag.)
    """
    parser = OneLineParser(prog="compressor", description="Verify, run, build and time a bundle.", epilog=_REST)
    subparsers = parser.add_subparsers(required=True, metavar="VERB")

    def plain_verb(name: str, help_text: str, bundle_help: str) -> argparse.ArgumentParser:
        subparser = subparsers.add_parser(name, help=help_text, description=help_text)
        subparser.add_argument("bundle", type=Path, metavar="BUNDLE", help=bundle_help)
        subparser.add_argument("--json", action="store_true", help="print one JSON object")
        subparser.set_defaults(verb=verbs[name], runtime="", key=None)
        return subparser

    def verb(name: str, help_text: str) -> argparse.ArgumentParser:
        subparser = plain_verb(name, help_text, "its folder, or its archive")
        key_help = "a public key in PEM: go on only if its owner signed the bundle as it is"
        subparser.add_argument("--key", type=Path, metavar="FILE", help=key_help)
        return subparser

    verify = verb("verify", "check every hash, run every model on the golden inputs")
    run = verb("run", "run the bundle's model on images or arrays, as it takes them")
    verb("build", "build the bundle's TensorRT engines for this device")
    benchmark = verb("benchmark", "time the bundle's models on this device")
    pack = plain_verb("pack", "make one file of a bundle's folder, the same bytes every time", "its folder")
    unpack = plain_verb("unpack", "make a bundle's folder of its archive, whole or not at all", "its archive")
    pack.add_argument("--out", type=Path, metavar="FILE", help="BUNDLE.tar by default")
    unpack.add_argument("--out", type=Path, metavar="FOLDER", help="the archive's name without .tar by default")
    listed = ", ".join(runtime_names(*FILES))
    for subparser in (verify, run, benchmark):
        subparser.add_argument("--runtime", default="", metavar="NAME", help=f"one of {listed}")
    _add_run_options(run, serves=serves)
    _add_benchmark_options(benchmark)
    return parser


def _add_run_options(run: argparse.ArgumentParser, *, serves: bool) -> None:
    run.add_argument("inputs", nargs="*" if serves else "+", metavar="INPUT", help=_INPUT)
    run.add_argument("--top", type=_whole(1), default=5, help="how many classes to print per image of a classifier")
    run.add_argument("--format", default="", choices=RUN_FORMATS, help="of what is said; by --output's ending else")
    run.add_argument("--output", type=Path, metavar="FILE", help="write that there, whole or not at all")
    run.add_argument("--out", type=Path, metavar="FILE", help="write the raw outputs to this .npz")
    run.add_argument("--frames", type=_whole(0), default=0, help="of a camera or video, at most (0: all)")
    run.add_argument("--model", default="", help="a file of the bundle, or a precision; else the fastest here")
    run.add_argument("--threads", type=_whole(0), default=0)
    run.add_argument(SERVE, action="store_true", help="answer on a page to images that are dropped on it")
    run.add_argument("--host", default="127.0.0.1", help="where --serve listens; this machine alone by default")
    run.add_argument("--port", type=_port, default=8765, help="0: any that is free")


def _add_benchmark_options(benchmark: argparse.ArgumentParser) -> None:
    benchmark.add_argument("--batch", type=_whole(1), default=1)
    benchmark.add_argument("--seconds", type=_number(_DAY_S), default=10.0, help="per model")
    # a compressor with all extras calls it --least-runs
    benchmark.add_argument(
        "--runs", "--least-runs", type=_whole(1), default=662, help="least runs per model; a p99 needs 662"
    )
    benchmark.add_argument("--rounds", type=_whole(1), default=10, help="turns per model, alternating")
    benchmark.add_argument("--threads", type=_whole(0), default=0)
    benchmark.add_argument("--cores", type=_cores, default=(), help="pin to these cores, such as 0,1")
    benchmark.add_argument("--rate-hz", type=_number(1e6), default=0.0, help="start runs at a camera's rate")
    benchmark.add_argument("--samples", type=Path, help="write the raw samples to this .json")


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1  # no number is out of range too
        if not least <= value <= _MOST:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {_MOST}")
        return value

    return parse


def _port(text: str) -> int:
    number = _whole(0)(text)
    if number > _LARGEST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; they end with {_LARGEST_PORT}")
    return number


def _number(most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= most:  # NaN lies nowhere
            raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to {most:g}")
        return value

    return parse


def _cores(text: str) -> tuple[int, ...]:
    numbers = list(map(str.strip, text.split(",")))
    if not all(map(_CORE.fullmatch, numbers)):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of cores; write their numbers, such as 0,1")
    return tuple(map(int, numbers))
