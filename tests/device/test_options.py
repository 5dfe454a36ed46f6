"""The device's command line: every flag as the type it has, every wrong one as one line of ours."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from compressor.device.options import make_parser
from compressor.errors import InputError

NAMES = ("verify", "run", "build", "benchmark", "pack", "unpack")
VERBS = {name: lambda arguments, name=name: len(name) for name in NAMES}


def parsed(line: str) -> Namespace:
    return make_parser(VERBS).parse_args(line.split())


@pytest.mark.parametrize("name", VERBS)
def test_each_verb_leads_to_its_own_function(name: str) -> None:
    inputs = " a.png" if name == "run" else ""
    arguments = parsed(f"{name} a.bundle{inputs}")
    assert arguments.verb(arguments) == len(name)
    assert (arguments.bundle, arguments.json, arguments.runtime) == (Path("a.bundle"), False, "")


def test_what_reads_a_bundle_takes_a_key_and_what_moves_one_a_place() -> None:
    assert all(parsed(f"{name} b --key k.pem{' a' * (name == 'run')}").key == Path("k.pem") for name in NAMES[:4])
    assert all(parsed(f"{name} b --out place").out == Path("place") for name in NAMES[4:])


def test_flags_become_numbers_paths_and_cores() -> None:
    line = (
        "benchmark b --batch 8 --seconds 0.5 --runs 3 --rounds 2 --threads 4 --cores 0,3 --rate-hz 30 --samples s.json"
    )
    arguments = parsed(line)
    assert (arguments.batch, arguments.runs, arguments.rounds, arguments.threads) == (8, 3, 2, 4)
    assert (arguments.seconds, arguments.rate_hz, arguments.cores) == (0.5, 30.0, (0, 3))
    assert arguments.samples == Path("s.json")


def test_a_benchmark_says_enough_runs_for_a_p99_unless_told_otherwise() -> None:
    arguments = parsed("benchmark b")
    assert (arguments.batch, arguments.runs, arguments.threads, arguments.rate_hz) == (1, 662, 0, 0.0)


def test_least_runs_has_the_hosts_name_too() -> None:
    assert parsed("benchmark b --least-runs 7").runs == parsed("benchmark b --runs 7").runs == 7


def test_a_run_takes_several_inputs() -> None:
    arguments = parsed("run b one.png two.npy --top 3 --runtime onnxruntime --json")
    assert arguments.inputs == ["one.png", "two.npy"]
    assert (arguments.top, arguments.runtime, arguments.json) == (3, "onnxruntime", True)
    assert parsed("run b --top 3 one.png").inputs == ["one.png"]  # behind a flag too


def test_a_page_needs_no_inputs() -> None:
    arguments = make_parser(VERBS, serves=True).parse_args(["run", "b", "--serve", "--port", "0"])
    assert (arguments.serve, arguments.inputs, arguments.port) == (True, [], 0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("run b a.png --top 0", "'0' is no whole number from 1 to 1048576"),
        ("run b a.png --top 1.5", "'1.5' is no whole number from 1"),
        ("run b a.png --threads -1", "'-1' is no whole number from 0"),
        ("benchmark b --batch 1048577", "'1048577' is no whole number"),
        ("benchmark b --seconds nan", "'nan' is no number from 0 to 86400"),
        ("benchmark b --seconds -0.1", "'-0.1' is no number from 0"),
        ("benchmark b --seconds 86401", "'86401' is no number"),
        ("benchmark b --rate-hz fast", "'fast' is no number from 0 to 1e"),
        ("benchmark b --cores 0,,1", "'0,,1' is no list of cores"),
        ("benchmark b --cores 1-3", "'1-3' is no list of cores"),
        ("benchmark b --cores ²", "'²' is no list of cores"),
        ("benchmark b --cores 123456", "'123456' is no list of cores"),
        ("run b", "the following arguments are required: INPUT; see compressor run --help"),
        ("build b --runtime onnxruntime", "unrecognized arguments: --runtime"),
        ("", "the following arguments are required: VERB"),
    ],
)
def test_a_wrong_line_is_an_input_error_and_ends_no_process(line: str, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        parsed(line)
