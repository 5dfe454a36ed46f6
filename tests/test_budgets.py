"""Budgets as text: every spelling read, written again the same, and anything else refused with the forms there are."""

from __future__ import annotations

import pytest

from compressor.budgets import (
    LATENCY_SLACK,
    SLACK,
    Budget,
    parse_budget,
    parse_budgets,
    points_of,
    require_removal,
)
from compressor.device.runtimes import layer_timers
from compressor.errors import BudgetError, RecipeError


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("macs 0.5", Budget("macs", 0.5)),
        ("  parameters   .25 ", Budget("parameters", 0.25)),
        ("latency 0.5 on onnxruntime", Budget("latency", 0.5, LATENCY_SLACK, "onnxruntime")),
        ("latency 0.5 on onnxruntime-cpu", Budget("latency", 0.5, LATENCY_SLACK, "onnxruntime")),
        ("latency 0.7 threads 2 batch 8 on openvino", Budget("latency", 0.7, LATENCY_SLACK, "openvino", 8, 2)),
        ("latency 0.7 on pytorch batch 3", Budget("latency", 0.7, LATENCY_SLACK, "pytorch", 3)),
        ("size 0.5", Budget("size", 0.5)),
        ("macs 50 %", Budget("macs", 0.5)),
        ("macs 120 M", Budget("macs", 1.0, amount=120e6, unit="M")),
        ("macs 1.2G", Budget("macs", 1.0, amount=1.2e9, unit="G")),
        ("parameters 3 m", Budget("parameters", 1.0, amount=3e6, unit="M")),
        ("size 2 MB", Budget("size", 1.0, amount=2e6, unit="MB")),
        ("500 kB", Budget("size", 1.0, amount=500e3, unit="kB")),
        ("latency 8 ms on onnxruntime", Budget("latency", 1.0, LATENCY_SLACK, "onnxruntime", amount=8, unit="ms")),
        ("30fps on openvino", Budget("latency", 1.0, LATENCY_SLACK, "openvino", amount=1000 / 30, unit="fps")),
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
        ("macs 120", "or an amount, such as 'macs 120 M'"),
        ("macs 3 MB", "macs is not counted in MB; there are k, M, G"),
        ("size 0 MB", "is not understood"),
        ("size 3 Mx", "is not understood"),
        ("size 3Mx", "there is no unit 'Mx'"),
        ("size 2 MB on disk", "goes on after its amount with 'on disk'"),
        ("8 ms", "write 'latency S on RUNTIME'"),
        ("30", "is not understood"),
        ("nonne", "Did you mean 'none'"),
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


def test_images_of_a_second_are_the_milliseconds_of_a_batch() -> None:
    assert parse_budget("30 fps on onnxruntime").amount == pytest.approx(1000 / 30)
    assert parse_budget("30 fps on onnxruntime batch 8").amount == pytest.approx(8 * 1000 / 30)


@pytest.mark.parametrize(
    ("text", "dense", "named"),
    [
        ("latency 8 ms on onnxruntime", 20.0, "latency 9.134 ms on onnxruntime"),  # 0.45666 of 20 ms: 9.1332, upwards
        ("30 fps on onnxruntime batch 2", 20.0, "218.9 fps on onnxruntime batch 2"),  # 2 / 9.1332 ms: 218.98, downwards
        ("size 2 MB", 3e6, "size 1.37 MB"),
        ("macs 120 M", 1e9, "macs 456.7 M"),
    ],
)
def test_what_is_named_in_an_amounts_place_is_an_amount_that_lets_more_stay(
    text: str, dense: float, named: str
) -> None:
    budget = parse_budget(text).of(dense)
    assert budget.asking(0.45666) == named
    assert budget.asking(budget.share) == str(budget) == text
    assert parse_budget(named).of(dense).share >= 0.45666


def test_an_amount_becomes_a_share_of_the_dense_networks_and_a_share_stays_one() -> None:
    assert parse_budget("size 2 MB").of(8e6).share == 0.25
    assert parse_budget("macs 0.5").of(8e6) == parse_budget("macs 0.5")
    assert parse_budget("size 2 MB").of(8e6).at(0.5) == Budget("size", 0.5, amount=4e6, unit="MB")


def test_what_the_dense_network_meets_is_refused_with_the_way_to_export_it() -> None:
    met, open_ = parse_budget("size 2 MB").of(1.8e6), parse_budget("macs 0.5")
    with pytest.raises(BudgetError, match=r"'size 2 MB' \(it takes 'size 1.8 MB'\).* --budget none"):
        require_removal([met])
    require_removal([met, open_])
    require_removal([])


def test_several_budgets_are_read_one_by_one_and_none_is_no_budget() -> None:
    assert parse_budgets("macs 0.5, size 2 MB") == (parse_budget("macs 0.5"), parse_budget("size 2 MB"))
    assert parse_budgets("30 fps on openvino, 500 kB")[1].kind == "size"
    assert parse_budgets("macs 0.5") == (parse_budget("macs 0.5"),)
    assert parse_budgets(" None ") == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("macs 0.5, macs 0.4", "asks for macs more than once"),
        ("latency 8 ms on onnxruntime, latency 0.5 on openvino", "asks for latency more than once"),
        ("macs 0.7,0.5", "is a sweep of 2 runs"),
        ("macs 0.7,0.5, size 2 MB", "half a sweep and half several"),
        ("macs 0.5,", "is not understood"),
        ("macs 0.5, none", r"'none' \(nothing is removed\) beside others; give one of the two"),
        ("none, latency 8 ms on onnxruntime", "beside others"),
        ("macs 0.5,0.50", "names one figure twice"),
        ("latency 0.7 on openvino, 0.5 on onnxruntime", "sweep on different runtimes"),
    ],
)
def test_what_is_not_one_run_is_refused(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_budgets(text)


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("macs 0.7,0.5,0.35", ("macs 0.7", "macs 0.5", "macs 0.35")),
        ("latency 0.7, 0.5 on openvino threads 1", tuple(f"latency {s} on openvino threads 1" for s in (0.7, 0.5))),
        ("30 fps, 60 fps on openvino", ("30 fps on openvino", "60 fps on openvino")),
        ("size 3 MB, 0.2", ("size 3 MB", "size 0.2")),
        ("macs 0.5, size 2 MB", ("macs 0.5, size 2 MB",)),
        ("macs 0.5, 2 MB", ("macs 0.5, 2 MB",)),
        ("macs 0.5", ("macs 0.5",)),
        ("none", ("none",)),
    ],
)
def test_a_sweep_is_figures_of_one_kind(text: str, points: tuple[str, ...]) -> None:
    assert points_of(text) == points
