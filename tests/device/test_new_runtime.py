"""A runtime that takes ONNX is one module and one row: those of `docs/extending.md`, which all the rest then serves."""

from __future__ import annotations

import json
import os
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from compressor import listing
from compressor.benchmarking import measurement, open_place
from compressor.benchmarking.records import Options
from compressor.budgets import parse_budget
from compressor.device import child, runtimes
from compressor.device.bundle import open_bundle, verify_bundle
from compressor.device.commands import run_command
from compressor.device.environment import read_environment
from compressor.device.probes import ROUNDS, time_probes
from compressor.device.runtimes import open_model
from compressor.errors import RecipeError
from compressor.recipe import make_recipe

from .conftest import SIZE, small_model, small_outputs

ROOT = Path(__file__).resolve().parents[2]
FP32_ABS = 1e-5  # fp32 sums of 27 to 256 terms in another order than the float64 oracle's
QUICK = ("--runs", "1", "--seconds", "0", "--rounds", "1")
# What a reader of the page types into the package, done from outside.
REGISTER = """
import importlib.util
from compressor.device import runtimes
spec = importlib.util.spec_from_file_location("compressor.device.evaluator", {module!r})
evaluator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(evaluator)
runtimes.RUNTIMES += (eval({row!r}, {{**vars(runtimes), "evaluator": evaluator}}),)
"""


@pytest.fixture(autouse=True)
def evaluator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's runtime in the table, here and in the processes that are started."""
    section = (ROOT / "docs" / "extending.md").read_text().partition("## A runtime")[2].partition("\n## ")[0]
    module, row = (textwrap.dedent(block) for block in re.findall(r" *```python\n(.*?) *```", section, re.DOTALL))
    place = tmp_path / "site"
    place.mkdir()
    (place / "evaluator.py").write_text(module)
    register = REGISTER.format(module=str(place / "evaluator.py"), row=row.strip())
    (place / "sitecustomize.py").write_text(register)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")]))

    monkeypatch.setattr(runtimes, "RUNTIMES", runtimes.RUNTIMES)  # taken back at the end
    exec(register, {})


def test_it_opens_a_file_and_answers_as_the_oracle(model_file: Path, images: NDArray[np.float32]) -> None:
    session = open_model(model_file, runtime="evaluator")
    assert session.shape == (-1, 3, SIZE, SIZE)
    assert session.version == runtimes.version_of("evaluator") != ""
    np.testing.assert_allclose(session.run(images), small_outputs(small_model(), images), atol=FP32_ABS)


def test_it_is_listed_and_among_the_libraries_of_a_measurement() -> None:
    assert ("evaluator", "runs here") in listing.runtimes()
    assert read_environment().libraries["onnx"] == runtimes.version_of("evaluator")


def test_a_recipe_asks_for_it_by_its_name_and_by_its_synonym() -> None:
    recipe = make_recipe({"runtimes": "evaluator,pytorch", "budget": "latency 0.5 on onnx-reference threads 1"})
    assert recipe.runtimes == ("evaluator", "pytorch")
    assert parse_budget(recipe.budget).runtime == "evaluator"
    for wrong in ({"runtimes": "evaluatr"}, {"budget": "latency 0.5 on evaluatr"}):
        with pytest.raises(RecipeError, match=r"onnxruntime, .*evaluator.*Did you mean 'evaluator'"):
            make_recipe(wrong)


def test_it_verifies_a_bundle_and_answers_for_it(bundle: Path) -> None:
    report = verify_bundle(bundle, "evaluator")
    assert report.passed
    assert report.checks[-1].detail.startswith("in evaluator ")
    assert open_bundle(bundle, runtime="evaluator")[1].runtime == "evaluator"


def test_it_answers_where_no_other_runtime_is(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "RUNTIMES", (runtimes.row_of("evaluator"),))
    assert verify_bundle(bundle).passed
    assert open_bundle(bundle)[1].runtime == "evaluator"


def test_a_device_times_a_bundle_on_it(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["benchmark", str(bundle), "--runtime", "evaluator", *QUICK, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["timings"]
    assert (row["runtime"], row["n"]) == ("evaluator", 1)


@pytest.mark.thorough
def test_a_benchmark_measures_it(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "_POOL_LIMIT_BYTES", 2**14)
    options = Options(seconds=0.0, runs=1, offline_batch=2, repeats=1, threads=1, on=("evaluator",))
    measured = measurement.measure([open_place(bundle)], options, tmp_path / "out", lambda stage, share: None)
    assert {timed.timing.runtime for timed in measured.timings} == {"evaluator"}
    assert [start.runtime for start in measured.cold] == ["evaluator"]
    assert not [line for line in measured.not_run if line.startswith("evaluator")]


def test_layers_are_timed_on_it(model_file: Path) -> None:
    with child.start("compressor.device.probes", name="the timing of a layer") as ask:
        turns = time_probes(ask, [model_file], [(1, 3, SIZE, SIZE)], runtime="evaluator", threads=1)
    assert turns.shape == (1, ROUNDS)
    assert (turns > 0).all()
