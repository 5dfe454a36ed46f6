"""A measured budget: steps, tables and correction on clocks of known law, then the flow, then a real runtime."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

import compressor
from compressor import pipeline
from compressor.budgets import LATENCY_SLACK, Budget, parse_budget
from compressor.device.probes import steadied
from compressor.device.runtimes import available, layer_timers
from compressor.errors import BudgetError, EngineError, MissingPackageError, RecipeError
from compressor.export.layers import Layer, input_shape, layer_model
from compressor.graph import trace
from compressor.graph.neighbours import shape_of
from compressor.inputs.checkpoints import state_hash
from compressor.inputs.images import Images
from compressor.inputs.models import Model
from compressor.latency.clocks import Point, torch_clock
from compressor.latency.correction import NETWORKS, Met, Ratio, meet, ratio_of
from compressor.latency.model import (
    LatencyModel,
    Measuring,
    group_steps,
    make_latency_meter,
    measure_model,
    shapes_left,
)
from compressor.latency.staircase import find_step, probe_widths
from compressor.latency.tables import Kept, Table, levels, smoothed
from compressor.latency.uses import uses_of, widths
from compressor.planning import RankingOptions, make_plan
from compressor.planning.budget import everything_gone
from compressor.pruning import Structure, find_structure, prune
from compressor.pruning.surgery import removed_classes
from compressor.recipe import make_recipe
from compressor.records import Plan, Scores
from compressor.run import baseline as run_baseline
from compressor.run import plans
from compressor.run.tasking import make_task
from compressor.run.work import Request, prepare

EXACT = 1e-9  # float64 sums in another order
INTERPOLATED = 0.03  # between lattice points of a law with a square in it
BLOCK = 16  # of the runtime the fake clock stands for


def _ceil(width: int) -> int:
    return -(-width // BLOCK) * BLOCK


def _law_us(layer: Layer, inputs: int, outputs: int) -> float:
    """A runtime with blocks of 16: products of rounded widths, and 2 us for the call."""
    if layer.kind == "depthwise":
        return 2 + 1e-4 * _ceil(outputs) * prod(layer.sizes)
    return 2 + 1e-5 * _ceil(inputs) * _ceil(outputs) * max(1, prod(layer.sizes)) * prod(layer.kernel)


class FakeClock:
    """Times layers by the law, and counts what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Point] = []

    def __call__(self, points: Sequence[Point]) -> list[float]:
        self.asked += points
        return [_law_us(p.layer, p.inputs, p.outputs) for p in points]


def _true_us(graph: fx.GraphModule) -> float:
    """The law's time of a whole network, read off its own shapes."""
    return sum(_law_us(u.layer, *u.widths) for u in uses_of(graph))


class Net(nn.Module):
    """A stem, a separable block, plain blocks of several widths around one residual stream, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.expand = nn.Conv2d(64, 128, 1)
        self.each = nn.Conv2d(128, 128, 3, padding=1, groups=128)
        self.shrink = nn.Conv2d(128, 64, 1)
        self.mixes = nn.ModuleList(
            nn.Sequential(nn.Conv2d(64, n, 3, padding=1), nn.ReLU(), nn.Conv2d(n, 64, 1)) for n in (160, 128, 96, 80)
        )
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.shrink(self.each(self.expand(x).relu()).relu())
        for mix in self.mixes:
            x = x + mix(x)
        return self.head(x.mean((2, 3)))


Case = tuple[fx.GraphModule, Structure, Scores]


@pytest.fixture(scope="module")
def case() -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        example = torch.randn(2, 3, 12, 12)
        graph = trace(Net(), example)
    structure = find_structure(graph, example)
    generator = np.random.default_rng(0)
    values = {g.name: generator.random((len(g.sites), g.size)) for g in structure.groups.groups}
    return graph, structure, Scores("given", values, 1)


def _modelled(case: Case, clock: FakeClock, kept: Kept) -> LatencyModel:
    graph, structure, scores = case
    least = removed_classes(structure, everything_gone(structure, scores, RankingOptions(multiple=BLOCK)))
    measuring = Measuring(clock, kept, ("a machine",))
    return measure_model(graph, structure, least=least, dense_us=_true_us(graph), measuring=measuring)


# what is understood


def test_a_latency_budget_is_read_and_written() -> None:
    budget = parse_budget("latency 0.5 on onnxruntime-cpu batch 8 threads 2")
    assert budget == Budget("latency", 0.5, LATENCY_SLACK, "onnxruntime", 8, 2)
    assert parse_budget(str(budget)) == budget
    assert str(parse_budget("latency 0.5 on openvino")) == "latency 0.5 on openvino"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("latency 0.5", "write 'latency S on RUNTIME'"),
        ("latency 0.5 on onnxruntim", "Did you mean 'onnxruntime'"),
        ("latncy 0.5 on onnxruntime", "Did you mean 'latency'"),
        ("latency 1.5 on onnxruntime", "0 < S < 1"),
        ("latency 0.5 on onnxruntime batch none", "batch 'none' is not a whole number"),
        ("latency 0.5 on onnxruntime batch 0", "batch '0' is not a whole number"),
        ("latency 0.5 on onnxruntime batch", "write 'latency S on RUNTIME'"),
        ("latency 0.5 on onnxruntime bach 2", "write 'latency S on RUNTIME'"),
        ("latency 0.5 on tensorrt", "engines are built one by one"),
        ("latency 0.5 on pytorch-compile", "layers are timed on the processor and not compiled"),
        ("macs 0.5 on onnxruntime", "goes on after its share"),
        ("", "such as 'macs 0.5'"),
    ],
)
def test_what_is_not_understood_is_said(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(says)):
        parse_budget(text)


def test_a_runtime_that_is_not_here_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    missing = [name for name, reason in available().items() if reason and name in layer_timers()]
    if not missing:
        pytest.skip("every runtime a latency can be measured on is installed here")
    recipe = make_recipe({"budget": f"latency 0.5 on {missing[0]}", "out": str(tmp_path / "run")})
    with pytest.raises((EngineError, MissingPackageError), match=missing[0]):
        pipeline.run(recipe)
    assert not (tmp_path / "run").exists()


# steps


def _staircase(widths: Sequence[int], step: int, cliff: int = 1) -> list[float]:
    return [(-(-w // step) * step) * (2.0 if w % cliff else 1.0) + 20 for w in widths]


@pytest.mark.parametrize("step", [4, 8, 16, 32, 64])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_staircase_shows_its_step(step: int, noise: float) -> None:
    """Widths off the grid of 4 take twice as long, as they do where a runtime leaves its blocked layout."""
    chosen = probe_widths(192)
    for seed in range(5):
        factors = 1 + noise * np.random.default_rng(seed).standard_normal(len(chosen))
        times = np.array(_staircase(chosen, step, cliff=4)) * factors
        assert find_step(chosen, times.tolist()) == step or (noise and step == 4)


def test_a_runtime_without_steps_is_given_fine_ones() -> None:
    chosen = probe_widths(128)
    assert find_step(chosen, [float(w) for w in chosen]) <= 2


def test_what_cannot_be_told_is_the_usual_step() -> None:
    assert probe_widths(24) == []
    chosen = probe_widths(64)
    assert find_step(chosen, [5.0] * len(chosen)) == 8


# tables


def test_a_table_is_exact_for_products_and_counts_started_blocks_whole() -> None:
    inputs, outputs = (16, 32, 64), (32, 128)
    us = tuple(tuple(1.0 + i + 2 * j + i * j for j in outputs) for i in inputs)
    table = Table(inputs, outputs, (16, 16), us)
    assert table.at(48, 80) == pytest.approx(1 + 48 + 2 * 80 + 48 * 80, rel=EXACT)
    assert table.at(33, 65) == table.at(48, 80)
    assert table.at(4, 4) == us[0][0]
    assert table.at(640, 640) == us[-1][-1]
    assert Table((3,), (16, 32), (1, 16), ((4.0, 6.0),)).at(3, 20) == 6.0


def test_levels_are_halves_on_the_steps() -> None:
    assert levels(64, 7, 16) == (16, 32, 64)
    assert levels(24, 3, 16) == (16, 24)
    assert levels(1000, 1000, 16) == (1000,)


def test_noise_does_not_make_a_wider_layer_the_faster_one() -> None:
    rows = smoothed(np.array([[1.0, 3.0, 2.0], [2.0, 2.0, 9.0]]))
    assert (np.diff(rows, axis=0) >= 0).all()
    assert (np.diff(rows, axis=1) >= 0).all()
    assert smoothed(np.array([[1.0, 2.0], [3.0, 4.0]])).tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_busy_rounds_and_stray_turns_cancel() -> None:
    generator = np.random.default_rng(0)
    true = generator.uniform(5, 500, 20)
    busy = np.where(generator.random(12) < 0.6, 2.0, 1.0)
    turns = true[:, None] * busy
    turns[generator.random(turns.shape) < 0.1] *= 7
    assert steadied(turns) == pytest.approx(true, rel=EXACT)


# the model


def test_the_prediction_is_the_laws_time_of_the_pruned_network(case: Case) -> None:
    graph, structure, scores = case
    model = _modelled(case, FakeClock(), Kept(None))
    meter = make_latency_meter(graph, structure, model)
    assert meter(removed_classes(structure, {})) == pytest.approx(_true_us(graph), rel=EXACT)
    steps = group_steps(graph, structure, model.steps)
    assert set(steps.values()) == {BLOCK}
    for share in (0.8, 0.5, 0.35):
        options = RankingOptions(steps=steps)
        plan = make_plan(graph, structure, scores, Budget("latency", share, 1.0), options, cost=meter)
        assert all(len(units) % BLOCK == 0 for units in plan.kept.values())
        predicted, true = meter(removed_classes(structure, plan.kept)), _true_us(prune(graph, structure, plan)[0])
        assert predicted == pytest.approx(true, rel=INTERPOLATED)
        assert predicted <= share * model.dense_us


def test_hypothetical_widths_are_those_of_the_pruned_network(case: Case) -> None:
    graph, structure, scores = case
    plan = make_plan(graph, structure, scores, Budget("macs", 0.5, 1.0), RankingOptions())
    small = {u.node.name: u.widths for u in uses_of(prune(graph, structure, plan)[0])}
    shapes = shapes_left(structure, removed_classes(structure, plan.kept))
    assert {u.node.name: widths(u.node, u.layer, shapes) for u in uses_of(graph)} == small
    assert small != {u.node.name: widths(u.node, u.layer, shape_of) for u in uses_of(graph)}


def test_what_was_timed_is_not_timed_again(case: Case, tmp_path: Path) -> None:
    path, first, again = tmp_path / "latency-model.json", FakeClock(), FakeClock()
    model = _modelled(case, first, Kept(path))
    assert first.asked
    assert _modelled(case, again, Kept(path)) == model
    assert again.asked == []
    shared = Kept(tmp_path / "other.json", path)
    assert _modelled(case, again, shared) == model
    assert again.asked == []


def test_a_measurement_that_was_cut_off_goes_on(case: Case, tmp_path: Path) -> None:
    path, whole = tmp_path / "latency-model.json", FakeClock()
    model = _modelled(case, whole, Kept(None))

    class Stopped(FakeClock):
        def __call__(self, points: Sequence[Point]) -> list[float]:
            if len(self.asked) > len(whole.asked) // 2:
                raise KeyboardInterrupt
            return super().__call__(points)

    stopped, rest = Stopped(), FakeClock()
    with pytest.raises(KeyboardInterrupt):
        _modelled(case, stopped, Kept(path))
    assert _modelled(case, rest, Kept(path)) == model
    assert 0 < len(rest.asked) < len(whole.asked)


def test_a_damaged_file_is_measured_again(case: Case, tmp_path: Path) -> None:
    path, clock = tmp_path / "latency-model.json", FakeClock()
    path.write_text("{")
    _modelled(case, clock, Kept(path))
    assert clock.asked
    assert json.loads(path.read_text())["entries"]


# the files that are timed


LAYERS = [
    Layer("conv", (6, 6), (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    Layer("depthwise", (6, 6), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    Layer("grouped", (6, 6), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 4),
    Layer("transposed", (6, 6), (2, 2), (2, 2), (0, 0, 0, 0), (1, 1)),
    Layer("linear", (5,)),
    Layer("linear", (0,)),
    Layer("product", (3, 5, 32)),
    Layer("attention", (3, 5, 5)),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer.kind}{layer.sizes}")
def test_every_kind_of_layer_becomes_a_file_that_runs_it_as_often_as_asked(layer: Layer, tmp_path: Path) -> None:
    model = layer_model(layer, 32, 32, 3)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    shape = (2, *input_shape(layer, 32))
    result = session.run(None, {"input": np.ones(shape, dtype=np.float32)})[0]
    assert np.isfinite(result).all()
    work = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
    nodes = [n for n in onnx.load(tmp_path / "optimised.onnx").graph.node if n.op_type in work]
    assert len(nodes) == (6 if layer.kind == "attention" else 3), "the runtime merged copies, or dropped some"


def test_pytorch_is_a_clock_too() -> None:
    times = torch_clock(batch=1, threads=1)([Point(layer, 32, 32) for layer in LAYERS])
    assert len(times) == len(LAYERS)
    assert min(times) > 0


# correction


def _plans(fineness: float) -> Any:
    """Plans of a network that can be had at shares of the prediction `fineness` apart."""

    def plan_at(share: float) -> tuple[Plan, float]:
        n = int(share / fineness + EXACT)
        return Plan({"group": np.arange(n)}, 100, n, ""), n * fineness

    return plan_at


def _measured(law: Any, fineness: float, timed: list[float]) -> Any:
    def measure(plan: Plan) -> Ratio:
        value = law(len(plan.kept["group"]) * fineness)
        timed.append(value)
        return Ratio(value, value, value, 1)

    return measure


def _meet(budget: Budget, law: Any, *, fineness: float = 0.002, least: float = 0.1) -> tuple[Met, list[float]]:
    timed: list[float] = []
    return meet(budget, plan_at=_plans(fineness), measure=_measured(law, fineness, timed), least=least), timed


BUDGET = parse_budget("latency 0.5 on onnxruntime")


@pytest.mark.parametrize(
    "law",
    [
        lambda p: p,
        lambda p: 0.3 + 0.7 * p,
        lambda p: p**2.5,
        lambda p: p**0.4,
        lambda p: 0.05 + 0.95 * (0.9 if p > 0.62 else 0.4 + 0.1 * p / 0.62),
    ],
)
def test_corrected_until_the_budget_holds(law: Any) -> None:
    met, timed = _meet(BUDGET, law)
    assert abs(timed[-1] / 0.5 - 1) <= LATENCY_SLACK
    assert met.trial.measured.value == timed[-1] == law(len(met.plan.kept["group"]) * 0.002)
    assert len(timed) <= NETWORKS


def test_a_prediction_that_is_right_is_timed_once() -> None:
    assert len(_meet(BUDGET, lambda p: 1.01 * p)[1]) == 1


def test_what_cannot_be_reached_names_the_smallest_network_measured() -> None:
    with pytest.raises(BudgetError) as refused:
        _meet(BUDGET, lambda p: 0.6 + 0.4 * p, least=0.25)
    asked = re.search(r"at least '(latency .*)', allow", str(refused.value))
    assert asked
    assert parse_budget(asked[1]).share == pytest.approx(0.7, abs=1e-3)
    assert refused.value.exit_code == 3
    _meet(parse_budget(asked[1]), lambda p: 0.6 + 0.4 * p, least=0.25)


def test_between_two_networks_the_nearest_is_named() -> None:
    """Plans every 0.2: nothing between 0.4 and 0.6."""
    with pytest.raises(BudgetError, match=r"nearest of \d+ networks timed takes 0\.4") as refused:
        _meet(BUDGET, lambda p: p * 1.1, fineness=0.2)
    assert "latency 0.44 on onnxruntime" in str(refused.value)


def test_the_ratio_has_the_interval_of_its_turns() -> None:
    generator = np.random.default_rng(0)
    found = ratio_of((0.5 * np.exp(0.02 * generator.standard_normal(40))).tolist())
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.02
    assert ratio_of([0.5] * 8) == Ratio(0.5, 0.5, 0.5, 8)


# the whole flow


QUICK: dict[str, Any] = {
    "criterion": "l1",
    "targets": "",
    "latency_batches": "1",
    "latency_seconds": 0.0,
    "runtimes": "onnxruntime",
    "max_accuracy_loss": 100,
    "finetune_epochs": 0,
    "normalisation": "mean",
    "batch_size": 8,
}


@pytest.fixture
def ruled(short_runs: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The law in the runtime's place; what was timed is noted. The real network is slower than its tables say."""
    timed: list[str] = []
    clock = FakeClock()

    @contextlib.contextmanager
    def file_clock(*given: Any, **options: Any) -> Iterator[Any]:
        def noted(points: Sequence[Point]) -> list[float]:
            timed.append("table")
            return clock(points)

        yield noted

    def measure_ratio(baseline: Any, budget: Budget, small: fx.GraphModule) -> Ratio:
        timed.append("network")
        value = 0.1 + 0.9 * _true_us(small) / _true_us(baseline.dense)
        return Ratio(value, value - 0.004, value + 0.004, 8)

    monkeypatch.setattr(run_baseline, "file_clock", file_clock)
    for module in (plans, run_baseline):
        monkeypatch.setattr(module, "measure_ratio", measure_ratio)
    monkeypatch.setattr(run_baseline, "_time_dense", lambda baseline, budget, kept: _true_us(baseline.dense))
    monkeypatch.delenv("COMPRESSOR_CACHE", raising=False)
    return timed


def _model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


@pytest.mark.thorough
def test_a_run_meets_its_latency_and_says_so(images: Images, tmp_path: Path, ruled: list[str]) -> None:
    budget = "latency 0.5 on onnxruntime"
    run = compressor.compress(_model(), images, out=tmp_path / "run", budget=budget, **QUICK)
    facts = run.summary["latency_budget"]
    assert facts["asked"] == 0.5
    assert abs(facts["measured"] / 0.5 - 1) <= LATENCY_SLACK
    assert facts["predicted"] < facts["measured"], "the law was slower than predicted, so less was asked for"
    true = 0.1 + 0.9 * _true_us(run.network(_model())) / _true_us(trace(_model(), torch.randn(2, 3, 12, 12)))
    assert true == pytest.approx(facts["measured"], abs=1e-3)
    assert json.loads((tmp_path / "run" / "latency-model.json").read_text())["model"]["steps"]
    assert "latency: share of the dense" in (tmp_path / "run" / "report.md").read_text()
    done = len(ruled)
    again = compressor.compress(_model(), images, out=tmp_path / "run", budget=budget, **QUICK)
    assert {**again.summary, "stages": 0} == {**run.summary, "stages": 0}
    assert all(stage["reused"] for stage in again.summary["stages"].values())
    assert len(ruled) == done, "nothing is timed twice"


def _planned(images: Images, out: Path, **options: Any) -> pipeline.Pruned:
    """A run as far as its plan."""
    module = _model()
    given = Model(module, "", "given", None, None, state_hash(module))
    work = prepare(
        Request(make_recipe({**QUICK, "out": str(out), **options}), given, images), lambda stage, share: None
    )
    structure, spent = pipeline.find_units(work)
    with work.stages.begun():
        pipeline.keep_units(work, structure, spent)
        origin = work.stages.keys["groups"]
        task = make_task(work.stages, work.chosen, work.dense, work.calibration_images, origin)
        return pipeline.remove_and_repair(work, structure, task, plans.set_aim(work, structure))


@pytest.mark.thorough
def test_rounds_end_at_the_same_budget(images: Images, tmp_path: Path, ruled: list[str]) -> None:
    pruned = _planned(images, tmp_path / "run", budget="latency 0.5 on onnxruntime", rounds=2, compensate=False)
    assert abs(pruned.budget_facts["latency_budget"]["measured"] / 0.5 - 1) <= LATENCY_SLACK


def test_a_latency_out_of_reach_is_refused_before_anything_is_scored(
    images: Images, tmp_path: Path, ruled: list[str]
) -> None:
    with pytest.raises(BudgetError, match="ask for at least 'latency 0"):
        _planned(images, tmp_path / "run", budget="latency 0.05 on onnxruntime")
    assert ruled.count("network") == 1
    assert not (tmp_path / "run" / "scores-1.json").exists()


def _dense_ms() -> float:
    return _true_us(trace(_model(), torch.randn(2, 3, 12, 12))) / 1e3


@pytest.mark.slow
def test_milliseconds_are_met_as_a_share_of_the_dense_networks(
    images: Images, tmp_path: Path, ruled: list[str]
) -> None:
    asked_ms = round(0.5 * _dense_ms(), 4)
    budget = f"latency {asked_ms} ms on onnxruntime"
    run = compressor.compress(_model(), images, out=tmp_path / "run", budget=budget, **QUICK)
    facts = run.summary["latency_budget"]
    assert (facts["asked_ms"], facts["dense_ms"]) == (asked_ms, pytest.approx(_dense_ms(), abs=1e-4))
    assert abs(facts["measured_ms"] / asked_ms - 1) <= LATENCY_SLACK
    assert [row["budget"] for row in run.summary["budgets"]] == [budget]
    assert "latency: milliseconds on onnxruntime" in run.summary["gates"]
    assert budget in (run.folder / "report.md").read_text()


@pytest.mark.thorough
def test_milliseconds_that_the_dense_network_takes_are_told_before_layers_are_timed(
    images: Images, tmp_path: Path, ruled: list[str]
) -> None:
    with pytest.raises(BudgetError, match="--budget none"):
        _planned(images, tmp_path / "run", budget=f"latency {2 * _dense_ms():.4g} ms on onnxruntime")
    assert ruled == []


@pytest.mark.thorough
def test_a_latency_out_of_reach_in_milliseconds_is_refused_in_milliseconds(
    images: Images, tmp_path: Path, ruled: list[str]
) -> None:
    with pytest.raises(BudgetError, match=r"ask for at least 'latency [\d.]+ us on onnxruntime'"):
        _planned(images, tmp_path / "run", budget=f"latency {50 * _dense_ms():.4g} us on onnxruntime")


@pytest.mark.thorough
@pytest.mark.parametrize(("size", "decides"), [(0.25, "size 0.25"), (0.95, "latency 0.5 on onnxruntime")])
def test_a_latency_and_a_size_are_both_met(
    images: Images, tmp_path: Path, ruled: list[str], size: float, decides: str
) -> None:
    budget = f"size {size}, latency 0.5 on onnxruntime"
    pruned = _planned(images, tmp_path / "run", budget=budget, compensate=False, multiple=1)
    rows = {row["budget"]: row for row in pruned.budget_facts["budgets"]}
    assert rows[f"size {size}"]["kept"] <= size
    assert rows["latency 0.5 on onnxruntime"]["kept"] <= 0.5 * (1 + LATENCY_SLACK)
    assert [name for name, row in rows.items() if row["decided"]] == [decides]


def test_a_mac_budget_keeps_to_measured_widths(images: Images, tmp_path: Path, ruled: list[str]) -> None:
    plan = _planned(images, tmp_path / "run", budget="macs 0.585", multiple=0, compensate=False).plan
    assert plan.kept
    assert all(len(units) % BLOCK == 0 for units in plan.kept.values())
    assert "network" not in ruled


@pytest.mark.slow
def test_digits_meets_a_latency_on_the_real_runtime(tmp_path: Path) -> None:
    """One thread, so that what else the machine does is mostly not part of it; a wide interval is allowed for."""
    options: dict[str, Any] = {**QUICK, "budget": "latency 0.6 on onnxruntime threads 1", "calibration": 64}
    run = compressor.compress("digits-resnet", out=tmp_path / "run", **{**options, "batch_size": 32})
    facts = run.summary["latency_budget"]
    assert abs(facts["measured"] / 0.6 - 1) <= LATENCY_SLACK
    assert facts["interval"][0] <= facts["measured"] <= facts["interval"][1]
