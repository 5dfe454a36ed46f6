"""What a person reads while waiting: stages counted, in plain words."""

from __future__ import annotations

import re

import pytest

from compressor.cli.progress import Log, course_after_training, course_of
from compressor.recipe import make_recipe
from compressor.report import facts


def test_a_stage_is_counted_and_named() -> None:
    course = course_of(make_recipe({}))
    said = [str(course.read(f"{name}-1")) for name in ("scores", "measured", "repair")]
    assert said == [
        "2 of 15: scoring every unit",
        "3 of 15: measuring what each layer may lose",
        "4 of 15: removing units and repairing what is left",
    ]
    assert str(course.read("scores-1 (done before)")) == "2 of 15: scoring every unit (done before)"
    again = course.read("scores-1 (again: 'scores-1.json' has schema 'x', expected 'y'; odd)")
    assert str(again).startswith("2 of 15: scoring every unit (again: 'scores-1.json' has")


def test_what_happens_within_a_stage_belongs_to_it() -> None:
    course = course_of(make_recipe({"precisions": "fp32,int8", "budget": "latency 0.5 on onnxruntime"}))
    for name, title in (
        ("latency: onnxruntime, batch 1", "timing networks and files (onnxruntime, batch 1)"),
        ("latency budget: 0.53 measured, 0.5 asked for", "meeting the latency budget (0.53 measured, 0.5 asked for)"),
        ("int8: what the layers read", "making the int8 files (what the layers read)"),
        ("precisions: ranges of the activations", "making the int8 files (ranges of the activations)"),
        ("engines: fp32, building", "building engines (fp32, building)"),
    ):
        assert str(course.read(name)).partition(": ")[2] == title


def test_every_stage_of_the_course_has_words() -> None:
    recipe = {"rounds": 2, "precisions": "fp32,int8", "budget": "latency 0.5 on onnxruntime"}
    course = course_of(make_recipe(recipe))
    said = [str(course.read(name)) for name in course.stages]
    assert [line.partition(": ")[0] for line in said] == [f"{i} of {len(said)}" for i in range(1, len(said) + 1)]
    assert [line for line in said if "-" in line.partition(": ")[2].replace("fine-tuning", "")] == []
    assert "scoring every unit, round 2" in said[5]
    assert [name for name in course.stages if re.sub(r"-\d$", "", name) not in facts.STAGES] == []


@pytest.mark.parametrize(("field", "value", "name"), [("finetune_epochs", 0, "finetune"), ("targets", "", "engines")])
def test_a_stage_that_does_nothing_is_not_named(field: str, value: object, name: str) -> None:
    course = course_of(make_recipe({field: value}))
    assert course.read(name) is None
    assert len(course.stages) == 14


def test_a_log_is_told_the_quarters_of_what_takes_long() -> None:
    """(seconds, share) of one stage, and the lines: none within 20 s of the last, none for the end."""
    clock = [0.0]
    log = Log(clock=lambda: clock[0])
    lines = []
    for seconds, share in ((0, 0.0), (5, 0.3), (15, 0.5), (30, 0.6), (50, 0.8), (55, 0.9), (90, 1.0)):
        clock[0] = seconds
        lines.append(log.line("scoring", share))
    assert lines == ["scoring", "", "", "scoring: 60 %", "scoring: 80 %", "", ""]
    assert log.line("repairing", 1.0) == "repairing"


def test_a_network_that_ships_as_it_is_goes_through_delivery_alone() -> None:
    course = course_of(make_recipe({"budget": "none", "targets": ""}))
    assert str(course.read("network")) == "1 of 10: keeping the network as it is"
    assert list(course.stages)[1:] == [
        *(
            "accuracy",
            "fidelity",
            "onnx",
            "parity",
            "accuracy of the files",
            "latency",
            "layers",
            "explanation",
            "pictures",
        )
    ]


def test_what_follows_on_a_training_is_counted_too() -> None:
    course = course_after_training(make_recipe({"precisions": "fp32", "targets": ""}))
    assert str(course.read("trained")) == "1 of 10: keeping the weights of your training"
    assert str(course.read("parity (done before)")) == "5 of 10: comparing the files with PyTorch (done before)"
    assert str(course.read("pictures")).startswith("10 of 10: ")


def test_what_is_no_stage_is_said_as_it_is() -> None:
    assert str(course_of(make_recipe({})).read("cold start, onnxruntime")) == "cold start, onnxruntime"
