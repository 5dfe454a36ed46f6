"""The studies of benchmarks/ on the embedded networks: a table, pictures, one JSON line, and nothing measured twice."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = ("--seeds", "0", "--calibration", "40")
RESNET = ("--networks", "digits-resnet", *SMALL)
STUDIES = {
    "accuracy": (*RESNET, "--kept", "0.7", "--no-peer"),
    "criteria": (*RESNET, "--kept", "0.7", "--criteria", "lrp,l1"),
    "few_shot": (*RESNET, "--kept", "0.7", "--criteria", "l1", "--counts", "2"),
    "vit_units": ("--networks", "digits-vit", *SMALL, "--kept", "0.85"),
    "steered": (
        *(*RESNET, "--kept", "0.7", "--rankings", "gates,l1", "--repairs", "raw"),
        *("--gates-steps", "4"),
    ),
    "transfer": (*RESNET, "--kept", "0.85,0.7", "--criteria", "l1", "--per-class", "5", "--tunings", "no tuning"),
}
Study = Callable[..., dict[str, Any]]


@pytest.fixture
def run_study(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Study:
    def run(study: str, *flags: str) -> dict[str, Any]:
        """The command's last line."""
        monkeypatch.setattr(sys, "argv", [study, *flags])
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        runpy.run_path(str(BENCHMARKS / f"{study}.py"), run_name="__main__")
        return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))

    return run


QUICK = "accuracy"  # the others take minutes together


@pytest.mark.thorough
@pytest.mark.parametrize(
    "study", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STUDIES]
)
def test_a_study_ends_with_table_pictures_and_one_json_line_and_measures_nothing_twice(
    study: str, tmp_path: Path, run_study: Study
) -> None:
    flags = (*STUDIES[study], "--out", str(tmp_path))

    found = run_study(study, *flags)
    measured = (tmp_path / "points.jsonl").read_text()
    again = run_study(study, *flags)

    assert all(found.values())
    assert again == found
    assert (tmp_path / "points.jsonl").read_text() == measured
    assert (tmp_path / "points.csv").is_file()
    assert list(tmp_path.rglob("*.png"))


@pytest.mark.slow
def test_a_selectors_masks_are_judged_and_drawn_once(tmp_path: Path, run_study: Study) -> None:
    short = ("--vary", "predictor_steps=4", "--vary", "steps=4", "--vary", "images=60")
    flags = ("--networks", "digits-resnet", "--seeds", "0", "--judges", "20", *short, "--out", str(tmp_path))

    found = run_study("masks", *flags)
    measured = (tmp_path / "points.jsonl").read_text()
    assert run_study("masks", *flags) == found
    assert (tmp_path / "points.jsonl").read_text() == measured
    (row,) = found["masks"]
    assert row["judges"] == 20
    assert row["ends"]["everything"]["network"] == row["ends"]["nothing"]["hidden"] == 1
    assert set(row["kept"]["selector"]) == {"predictor", "network", "hidden"}
    assert (tmp_path / "digits-resnet.png").is_file()


@pytest.mark.slow
def test_what_a_search_found_ranks_beside_the_criteria_under_the_same_repair(tmp_path: Path, run_study: Study) -> None:
    flags = (*RESNET, "--kept", "0.5,0.35", "--repairs", "raw")
    few = ("--trials", "5", "--search-images", "100", "--trial-images", "50", "--multiple", "1")

    found = run_study("composites", *flags, *few, "--out", str(tmp_path / "searches"))
    searched = tmp_path / "searches" / "{network}-raw-0" / "best.toml"
    beside = run_study("criteria", *flags, "--searched", str(searched), "--out", str(tmp_path / "beside"))

    (alone,), (among,) = found["points"], beside["points"]
    assert among["area"]["searched"] == alone["area"]["searched"]
    assert among["searched_margin"]["over"] in {"gradient_x_input", "taylor", "activation", "l1", "random"}
    assert (tmp_path / "searches" / "composites.png").is_file()


def test_an_unknown_network_is_refused_with_those_there_are(run_study: Study) -> None:
    with pytest.raises(SystemExit, match=r"no network 'resnet1000'; it has .*digits-resnet"):
        run_study("criteria", "--networks", "resnet1000")
