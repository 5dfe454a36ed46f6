"""From scores to the plan that meets the recipe's budget: counted, or measured on the runtime it names.

A measured budget costs time once: steps and tables of the layers, then real networks timed until the budget
holds. All of it is kept in the run's folder. Without one, only `multiple = 0` measures anything.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import fx

from ..budgets import Budget, parse_budget
from ..choices import ranking_of
from ..device.environment import read_environment
from ..device.probes import ON_THE_PROCESSOR
from ..device.runtimes import version_of
from ..files import content_hash, file_sha256, read_json, read_record, recorded, write_json, write_record, write_text
from ..graph.cost import measure_cost
from ..latency.clocks import Remember, file_clock, is_busy, time_file, time_network, torch_clock
from ..latency.correction import Met, Ratio, meet, met_from_json, met_to_json, unreachable
from ..latency.model import (
    LatencyModel,
    Measuring,
    group_steps,
    make_latency_meter,
    measure_model,
    measure_steps,
    model_to_json,
)
from ..latency.tables import Kept, shared_place
from ..latency.trial import export_for, time_ratio, time_ratio_eager
from ..latency.uses import uses_of
from ..placement import code_of, release
from ..planning import RankingOptions, make_plan
from ..planning.budget import everything_gone, least_share
from ..pruning import Structure, prune
from ..pruning.surgery import removed_classes
from ..recipe import Recipe
from ..records import Plan, Scores
from ..relevance import ScoreOptions, score
from ..rounds import budget_of
from .checks import Checks, gate, require_passed
from .stages import Notify
from .work import Work

MET, STEPS = "met/1", "steps/1"
ANY_RUNTIME = "onnxruntime"  # whose widths a counted budget keeps to when they are to be measured


@dataclass(frozen=True, slots=True)
class Aim:
    """The budget, the ranking that suits what it is measured on, and for a measured one what predicts it."""

    budget: Budget
    options: RankingOptions
    model: LatencyModel | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A round's plan, in units of the network as it is before that round.

    Where a measured budget was met, `facts` say how, for the summary, and `checks` hold its gate.
    """

    plan: Plan
    checks: Checks = field(default_factory=Checks)
    facts: Mapping[str, Any] = field(default_factory=dict)


def require_reachable(graph: fx.GraphModule, structure: Structure, recipe: Recipe) -> None:
    """Raises BudgetError when no plan can meet a counted budget, whatever the scores are."""
    budget, options = parse_budget(recipe.budget), ranking_of(recipe)
    if budget.kind == "latency":
        return  # `set_aim` finds out, by measuring
    scores = any_scores(graph, structure, recipe)
    if least_share(graph, structure, scores, budget.kind, options) > budget.share:
        make_plan(graph, structure, scores, budget, options)  # raises, naming what can be reached


def share_kept(dense: fx.GraphModule, small: fx.GraphModule, budget: Budget) -> float:
    """Of the MACs or parameters, as a counted budget asks."""
    before, after = measure_cost(dense), measure_cost(small)
    return after.parameters / before.parameters if budget.kind == "parameters" else after.macs / before.macs


def below_budget(recipe: Recipe, share: float) -> str:
    """What to say of a plan that keeps far less than a counted budget allows; empty where it comes near."""
    budget = parse_budget(recipe.budget)
    if budget.kind == "latency" or share >= (1 - budget.slack) * budget.share:
        return ""
    steps = f"--multiple 1 (now {recipe.multiple}) may come nearer" if recipe.multiple != 1 else "no plan comes nearer"
    what = "MACs" if budget.kind == "macs" else budget.kind
    return (
        f"the plan keeps {share:.3f} of the {what} where {budget.share:g} may stay: units go in steps too large to "
        f"come nearer; {steps}"
    )


def below_budget_checks(work: Work, small: fx.GraphModule) -> Checks:
    """A warning where a counted budget was beaten by far."""
    budget = parse_budget(work.recipe.budget)
    warning = "" if budget.kind == "latency" else below_budget(work.recipe, share_kept(work.dense, small, budget))
    return Checks(warnings=(warning,) if warning else ())


def any_scores(graph: fx.GraphModule, structure: Structure, recipe: Recipe) -> Scores:
    return score(graph, structure.groups, [], criterion="random", options=ScoreOptions(seed=recipe.seed))


def ranking_here(graph: fx.GraphModule, structure: Structure, recipe: Recipe) -> RankingOptions:
    """The recipe's ranking; with `multiple = 0`, each group's widths keep to the steps measured now."""
    options = ranking_of(recipe)
    return options if recipe.multiple else replace(options, steps=_steps(graph, structure))


def set_aim(work: Work, structure: Structure) -> Aim:
    """What the plan is made with; a measured budget's tables are timed here, once. Raises BudgetError early."""
    budget = parse_budget(work.recipe.budget)
    if budget.kind == "latency":
        return _timed_aim(work, structure, budget)
    options = ranking_of(work.recipe)
    if work.recipe.multiple:
        return Aim(budget, options)
    path = work.stages.folder / "steps.json"
    steps = work.stages.do(
        "steps",
        [work.stages.keys["groups"], _place(_probing())],
        lambda: write_json(path, {"schema": STEPS, "steps": _steps(work.dense, structure)}),
        lambda: dict(read_json(path, STEPS)["steps"]),
    )
    return Aim(budget, replace(options, steps=steps))


def _timed_aim(work: Work, structure: Structure, budget: Budget) -> Aim:
    folder, options = work.stages.folder, ranking_of(work.recipe)
    kept = Kept(folder / "latency-model.json", shared_place())
    timed = folder / "stages" / "latency-model" / "timed.json"

    def aim_on(tabled: Budget, notify: Notify = lambda stage, share: None) -> Aim:
        """Times what is not kept yet, so nothing the second time."""
        model = _measure_model(work, structure, tabled, kept, notify)
        return Aim(budget, replace(options, steps=group_steps(work.dense, structure, model.steps)), model)

    def measure() -> None:
        crowded = budget.runtime in ON_THE_PROCESSOR and budget.threads != 1 and is_busy()
        tabled = replace(budget, threads=1) if crowded else budget
        aim = aim_on(tabled, work.stages.notify)
        assert aim.model is not None
        kept.write(budget=str(budget), tables_on=str(tabled), model=model_to_json(aim.model))
        _refuse_early(work, structure, aim)
        write_json(timed, {"schema": "timed/1", "threads": tabled.threads})

    def read() -> Aim:
        return aim_on(replace(budget, threads=read_json(timed, "timed/1")["threads"]))

    inputs = [work.stages.keys["groups"], str(budget), _place(budget), asdict(options)]
    return work.stages.do("latency-model", inputs, measure, read)


def _probing() -> Budget:
    return Budget("latency", 0.5, runtime=ANY_RUNTIME, threads=1)


def _place(budget: Budget) -> tuple[Any, ...]:
    """What a time stands for."""
    fingerprint = read_environment().fingerprint
    return fingerprint, budget.runtime, version_of(_package(budget)), budget.batch, budget.threads


def _package(budget: Budget) -> str:
    return "torch" if budget.runtime == "pytorch" else budget.runtime


def _steps(graph: fx.GraphModule, structure: Structure) -> dict[str, int]:
    with _measuring(_probing(), Kept(None, shared_place())) as measuring:
        return group_steps(graph, structure, measure_steps(uses_of(graph), measuring))


@contextlib.contextmanager
def _measuring(budget: Budget, kept: Kept, notify: Notify = lambda stage, share: None) -> Iterator[Measuring]:
    if budget.runtime == "pytorch":
        yield Measuring(torch_clock(batch=budget.batch, threads=budget.threads), kept, _place(budget), notify)
        return
    how: dict[str, Any] = {"threads": budget.threads, "remember": _remember(budget, kept)}
    with file_clock(budget.runtime, batch=budget.batch, **how) as clock:
        yield Measuring(clock, kept, _place(budget), notify)


def _remember(budget: Budget, kept: Kept) -> Remember:
    measuring = Measuring(lambda points: [], kept, _place(budget))
    return lambda name, measure: float(measuring.entry(content_hash(name, measuring.place), measure))


def _measure_model(work: Work, structure: Structure, budget: Budget, kept: Kept, notify: Notify) -> LatencyModel:
    release()
    with _measuring(budget, kept, notify) as measuring:
        steps = measure_steps(uses_of(work.dense), measuring)
        options = replace(ranking_of(work.recipe), steps=group_steps(work.dense, structure, steps))
        scores = any_scores(work.dense, structure, work.recipe)
        least = removed_classes(structure, everything_gone(structure, scores, options))
        key = content_hash("dense", measuring.place, work.model.sha256, code_of(work.dense), list(work.example.shape))
        dense_us = measuring.entry(key, lambda: _time_dense(work, budget, kept))
        return measure_model(work.dense, structure, least=least, dense_us=dense_us, measuring=measuring)


def _time_dense(work: Work, budget: Budget, kept: Kept) -> float:
    shape = (budget.batch, *work.preprocessing.shape)
    if budget.runtime == "pytorch":
        return time_network(work.dense, shape, threads=budget.threads)
    how: dict[str, Any] = {"runtime": budget.runtime, "threads": budget.threads, "remember": _remember(budget, kept)}
    return time_file(_dense_file(work), shape, **how)


def _dense_file(work: Work) -> Path:
    """The dense network as it is timed; there while plans are tried."""
    path = _dense_path(work)
    mark = path.with_suffix(".sha256")
    if path.is_file() and mark.is_file() and mark.read_text(errors="replace") == file_sha256(path):
        return path
    with recorded():  # scratch: no stage's result
        export_for(work.dense, work.example, path)
        write_text(mark, file_sha256(path))
    return path


def _dense_path(work: Work) -> Path:
    return work.stages.folder / "stages" / "latency-model" / "dense.onnx"


def _refuse_early(work: Work, structure: Structure, aim: Aim) -> None:
    """Before anything is scored: the smallest network there is, timed, where the tables say that it is too slow."""
    assert aim.model is not None
    scores = any_scores(work.dense, structure, work.recipe)
    cost = make_latency_meter(work.dense, structure, aim.model)
    least = least_share(work.dense, structure, scores, "latency", aim.options, cost=cost)
    if least <= aim.budget.share:
        return
    kept = everything_gone(structure, scores, aim.options)
    found = measure_ratio(work, aim.budget, prune(work.dense, structure, kept)[0])
    if found.low > (1 + aim.budget.slack) * aim.budget.share:
        raise unreachable(aim.budget, found)


def measure_ratio(work: Work, budget: Budget, small: fx.GraphModule) -> Ratio:
    release()
    images = work.sample(max(16, budget.batch))
    if budget.runtime == "pytorch":
        return time_ratio_eager((work.dense, small), images, budget)
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        path = export_for(small, work.example, Path(folder) / "pruned.onnx")
        return time_ratio((_dense_file(work), path), images, budget)


def make_step(work: Work, r: int, graph: fx.GraphModule, units: Structure, scores: Scores, aim: Aim) -> Step:
    """Round r's plan; the last one meets the budget. Raises GateError where a measured one could not be met."""
    if aim.model is None:
        on_the_way = replace(aim.budget, share=aim.budget.share ** (r / work.recipe.rounds))
        return Step(make_plan(graph, units, scores, budget_of(work.dense, graph, on_the_way), aim.options))
    timed = Timed(work, graph, units, scores, aim)
    if r < work.recipe.rounds:
        return Step(timed.plan_at(aim.budget.share ** (r / work.recipe.rounds))[0])
    met = _stage_met(timed, r)
    facts = _facts_of(aim.budget, met)
    write_json(work.stages.folder / "latency-budget.json", {"schema": MET, **facts, **met_to_json(met)})
    checks = _budget_gate(aim.budget, met)
    require_passed(work.stages, checks)
    return Step(met.plan, checks, {"latency_budget": facts})


class Timed:
    """A network that loses units until its real latency is right: planned on tables, tried on the runtime."""

    def __init__(self, work: Work, graph: fx.GraphModule, units: Structure, scores: Scores, aim: Aim) -> None:
        assert aim.model is not None
        self.work, self.graph, self.units, self.scores, self.aim = work, graph, units, scores, aim
        self.dense_us = aim.model.dense_us
        self.cost = make_latency_meter(graph, units, aim.model)
        self.now = self.cost(removed_classes(units, {})) / self.dense_us

    def plan_at(self, share: float) -> tuple[Plan, float]:
        """The plan predicted to take at most that share of the dense network's time, and its prediction."""
        budget = replace(self.aim.budget, share=share / self.now, slack=1.0)
        plan = make_plan(self.graph, self.units, self.scores, budget, self.aim.options, cost=self.cost)
        return plan, self.cost(removed_classes(self.units, plan.kept)) / self.dense_us

    def least(self) -> float:
        """The smallest share that can be asked for."""
        share = least_share(self.graph, self.units, self.scores, "latency", self.aim.options, cost=self.cost)
        return share * self.now * (1 + 1e-9)

    def measure(self, plan: Plan) -> Ratio:
        return measure_ratio(self.work, self.aim.budget, prune(self.graph, self.units, plan)[0])


def _stage_met(timed: Timed, r: int) -> Met:
    work, budget = timed.work, timed.aim.budget
    folder = work.stages.folder / "stages" / "budget"

    def write() -> None:
        met = meet(
            budget, plan_at=timed.plan_at, measure=timed.measure, least=timed.least(), progress=work.stages.notify
        )
        for scratch in (_dense_path(work), _dense_path(work).with_suffix(".sha256")):
            scratch.unlink(missing_ok=True)
        write_record(folder / "plan.json", met.plan)
        write_json(folder / "met.json", {"schema": MET, **met_to_json(met)})

    def read() -> Met:
        return met_from_json(read_json(folder / "met.json", MET), read_record(folder / "plan.json", Plan))

    keys = work.stages.keys
    scores = keys.get(f"measured-{r}", keys[f"scores-{r}"])
    return work.stages.do("budget", [scores, keys["latency-model"], str(budget)], write, read)


def _facts_of(budget: Budget, met: Met) -> dict[str, Any]:
    """A measured budget's figures, for the summary and for a reader of the folder."""
    measured = met.trial.measured
    return {
        "asked": budget.share,
        "runtime": budget.runtime,
        "batch": budget.batch,
        "threads": budget.threads,
        "predicted": round(met.trial.predicted, 4),
        "measured": round(measured.value, 4),
        "interval": [round(measured.low, 4), round(measured.high, 4)],
        "clock": measured.clock,
        "networks_timed": len({trial.measured for trial in met.trials}),
    }


def _budget_gate(budget: Budget, met: Met) -> Checks:
    return gate(
        f"latency: share of the dense network's on {str(budget).partition(' on ')[2]}",
        met.trial.measured.value,
        limit=round((1 + budget.slack) * budget.share, 6),
        remedy="run again when the machine is quieter",
    )
