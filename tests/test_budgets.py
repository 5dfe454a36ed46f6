"""Budgets as text: every spelling read, written again the same, and anything else refused with the forms there are."""

from __future__ import annotations

import pytest

from compressor.budgets import LATENCY_SLACK, SLACK, Budget, parse_budget
from compressor.device.runtimes import layer_timers
from compressor.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("macs 0.5", Budget("macs", 0.5)),
        ("  parameters   .25 ", Budget("parameters", 0.25)),
        ("latency 0.5 on onnxruntime", Budget("latency", 0.5, LATENCY_SLACK, "onnxruntime")),
        ("latency 0.5 on onnxruntime-cpu", Budget("latency", 0.5, LATENCY_SLACK, "onnxruntime")),
        ("latency 0.7 threads 2 batch 8 on openvino", Budget("latency", 0.7, LATENCY_SLACK, "openvino", 8, 2)),
        ("latency 0.7 on pytorch batch 3", Budget("latency", 0.7, LATENCY_SLACK, "pytorch", 3)),
    ],
)
def test_a_budget_is_read_and_written_again_the_same(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget
    assert parse_budget(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not understood; write 'macs S'"),
        ("macs", "is not understood"),
        ("macs half", "is not understood"),
        ("macs 0", "0 < S < 1"),
        ("macs 1", "0 < S < 1"),
        ("macs nan", "0 < S < 1"),
        ("macs -0.5", "0 < S < 1"),
        ("mac 0.5", "Did you mean 'macs'"),
        ("macs 0.5 on onnxruntime", "goes on after its share with 'on onnxruntime'"),
        ("latency 0.5", "write 'latency S on RUNTIME'"),
        ("latency 0.5 on", "write 'latency S on RUNTIME'"),
        ("latency 0.5 on onnxruntime batch", "write 'latency S on RUNTIME'"),
        ("latency 0.5 on onnxruntime speed 3", "write 'latency S on RUNTIME'"),
        ("latency 0.5 on onnxruntme", "no runtime of that name.*Did you mean 'onnxruntime'"),
        ("latency 0.5 on tensorrt", "its engines are built one by one"),
        ("latency 0.5 on onnxruntime batch 0", "batch '0' is not a whole number above 0"),
        ("latency 0.5 on onnxruntime batch 1.5", "batch '1.5' is not a whole number"),
        ("latency 0.5 on onnxruntime threads -1", "threads '-1' is not a whole number"),
    ],
)
def test_what_is_no_budget_is_refused_with_the_forms_there_are(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_budget(text)


@pytest.mark.parametrize("runtime", sorted(layer_timers()))
def test_every_target_can_be_asked_for(runtime: str) -> None:
    assert parse_budget(f"latency 0.5 on {runtime}").runtime == runtime


def test_the_same_budget_for_another_share_keeps_all_else() -> None:
    budget = parse_budget("latency 0.5 on openvino batch 8 threads 2")
    assert budget.asking(0.43217) == "latency 0.4322 on openvino batch 8 threads 2"
    assert Budget("macs", 0.5).asking(0.25) == "macs 0.25"
    assert Budget("macs", 0.5).slack == SLACK
