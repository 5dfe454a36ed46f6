"""From scores to the plan that meets the recipe's budget: counted, or measured on the runtime it names.

A measured budget costs time once (`baseline`): tables of the layers, then real networks until the budget holds. Without
one, only `multiple = 0` measures anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import fx

from ..budgets import Budget, parse_budget
from ..choices import ranking_of
from ..files import read_json, read_record, write_json, write_record
from ..graph.cost import measure_cost
from ..latency.correction import Met, Ratio, meet, met_from_json, met_to_json
from ..latency.model import make_latency_meter
from ..planning import RankingOptions, make_plan
from ..planning.budget import least_share
from ..pruning import Structure, prune
from ..pruning.surgery import removed_classes
from ..recipe import Recipe
from ..records import Plan, Scores
from ..rounds import budget_of
from .baseline import Tables, any_scores, drop_dense_file, find_steps, find_tables, measure_ratio, steps_here
from .checks import Checks, gate, require_passed
from .fingerprints import Known
from .stages import Keeper, Progress
from .work import Work

MET = "met/1"


@dataclass(frozen=True, slots=True)
class Aim:
    """The budget, the ranking that suits what it is measured on, and for a measured one what predicts it."""

    budget: Budget
    options: RankingOptions
    tables: Tables | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A round's plan, in units of the network as it is before that round.

    Where a measured budget was met, `facts` say how, for the summary, and `checks` hold its gate.
    """

    plan: Plan
    checks: Checks = field(default_factory=Checks)
    facts: Mapping[str, object] = field(default_factory=dict)


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
    quantity = "MACs" if budget.kind == "macs" else budget.kind
    return (
        f"the plan keeps {share:.3f} of the {quantity} where {budget.share:g} may stay: units go in steps too large to "
        f"come nearer; {steps}"
    )


def below_budget_checks(work: Work, small: fx.GraphModule) -> Checks:
    """A warning where a counted budget was beaten by far."""
    budget = parse_budget(work.recipe.budget)
    warning = "" if budget.kind == "latency" else below_budget(work.recipe, share_kept(work.dense, small, budget))
    return Checks(warnings=(warning,) if warning else ())


def ranking_here(graph: fx.GraphModule, structure: Structure, recipe: Recipe) -> RankingOptions:
    """The recipe's ranking; with `multiple = 0`, each group's widths keep to the steps measured now."""
    options = ranking_of(recipe)
    return options if recipe.multiple else replace(options, steps=steps_here(graph, structure))


def set_aim(work: Work, structure: Structure) -> Aim:
    """What the plan is made with; a measured budget's tables are timed here, once. Raises BudgetError early."""
    budget = parse_budget(work.recipe.budget)
    if budget.kind == "latency":
        tables = find_tables(work, structure, budget)
        return Aim(budget, tables.ranking, tables)
    options = ranking_of(work.recipe)
    if work.recipe.multiple:
        return Aim(budget, options)
    return Aim(budget, replace(options, steps=find_steps(work, structure)))


def make_step(work: Work, r: int, graph: fx.GraphModule, units: Structure, scores: Scores, aim: Aim) -> Step:
    """Round r's plan; the last one meets the budget. Raises GateError where a measured one could not be met."""
    if aim.tables is None:
        on_the_way = replace(aim.budget, share=aim.budget.share ** (r / work.recipe.rounds))
        return Step(make_plan(graph, units, scores, budget_of(work.dense, graph, on_the_way), aim.options))
    timed = Timed(graph, units, scores, aim, aim.tables)
    if r < work.recipe.rounds:
        return Step(timed.plan_at(aim.budget.share ** (r / work.recipe.rounds))[0])
    met = _stage_met(work, r, timed)
    facts = _facts_of(aim.budget, met)
    write_json(work.stages.folder / "latency-budget.json", {"schema": MET, **facts, **met_to_json(met)})
    checks = _budget_gate(aim.budget, met)
    require_passed(work.stages, checks)
    return Step(met.plan, checks, {"latency_budget": facts})


class Timed:
    """A network that loses units until its real latency is right: planned on tables, tried on the runtime."""

    def __init__(self, graph: fx.GraphModule, units: Structure, scores: Scores, aim: Aim, tables: Tables) -> None:
        self.graph, self.units, self.scores, self.aim, self.baseline = graph, units, scores, aim, tables.baseline
        self.dense_us = tables.model.dense_us
        self.cost = make_latency_meter(graph, units, tables.model)
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
        return measure_ratio(self.baseline, self.aim.budget, prune(self.graph, self.units, plan)[0])


def _stage_met(work: Work, r: int, timed: Timed) -> Met:
    keys = work.stages.keys
    scores = keys.get(f"measured-{r}", keys[f"scores-{r}"])
    return work.stages.make(
        "budget",
        _met,
        Keeper(_write_met, _read_met),
        timed=Known(timed, [scores, keys["latency-model"]]),
        budget=timed.aim.budget,
    )


def _met(timed: Timed, budget: Budget, progress: Progress) -> Met:
    """Plans are tried on the runtime until one takes the share that is asked for."""

    def say(trial: str, share: float) -> None:
        progress(share, trial.partition(": ")[2])

    met = meet(budget, plan_at=timed.plan_at, measure=timed.measure, least=timed.least(), progress=say)
    drop_dense_file(timed.baseline.folder)
    return met


def _write_met(folder: Path, met: Met) -> None:
    write_record(folder / "stages" / "budget" / "plan.json", met.plan)
    write_json(folder / "stages" / "budget" / "met.json", {"schema": MET, **met_to_json(met)})


def _read_met(folder: Path) -> Met:
    plan = read_record(folder / "stages" / "budget" / "plan.json", Plan)
    return met_from_json(read_json(folder / "stages" / "budget" / "met.json", MET), plan)


def _facts_of(budget: Budget, met: Met) -> dict[str, object]:
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
