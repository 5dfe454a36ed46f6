"""From scores to the plan that meets the recipe's budgets: counted, or measured on the runtime that one names.

A measured budget costs time once (`baseline`): tables of the layers, then real networks until the budget holds. Without
one, only `multiple = 0` measures anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import fx

from ..budgets import Budget, Kind, parse_budgets, require_removal
from ..choices import ranking_of
from ..errors import BudgetError
from ..files import read_json, read_record, write_json, write_record
from ..graph.cost import measure_cost
from ..latency.correction import Met, Ratio, meet, met_from_json, met_to_json
from ..latency.model import group_steps, make_latency_meter
from ..planning import RankingOptions, make_plan
from ..planning.budget import least_share, out_of_reach
from ..pruning import Structure, prune
from ..pruning.surgery import removed_classes
from ..recipe import BY_WIDTH, Recipe
from ..records import Cost, Plan, Scores
from ..rounds import amount_of, budget_of
from .baseline import Tables, any_scores, drop_dense_file, find_steps, find_tables, measure_ratio, steps_here
from .checks import Checks, gate, require_passed
from .fingerprints import Known
from .stages import Keeper, Progress
from .work import Work

MET = "met/1"


@dataclass(frozen=True, slots=True)
class Aim:
    """The budget, the ranking that suits what it is measured on, and for a measured one what predicts it.

    `also` are the counted budgets that must hold too. All are shares of the dense network by now.
    """

    budget: Budget
    options: RankingOptions
    tables: Tables | None = None
    also: tuple[Budget, ...] = ()

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """All of them."""
        return (self.budget, *self.also)


@dataclass(frozen=True, slots=True)
class Step:
    """A round's plan, in units of the network as it is before that round.

    Where a measured budget was met, `facts` say how, for the summary, `checks` hold its gate, and `measured` is the
    share of the dense network's time.
    """

    plan: Plan
    checks: Checks = field(default_factory=Checks)
    facts: Mapping[str, object] = field(default_factory=dict)
    measured: float = 0.0


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays of what a budget is of: a share, as it asks for one."""

    budget: Budget
    share: float

    @property
    def of_allowed(self) -> float:
        """The share kept over the share asked for: 1 where nothing more could stay."""
        return self.share / self.budget.share


def shares_of(recipe: Recipe, dense: fx.GraphModule) -> tuple[Budget, ...]:
    """The recipe's budgets, the one that units are ordered for first: latency, then MACs, parameters, size.

    Counted ones are shares of the dense network; a latency in milliseconds is none before that was timed. Raises
    BudgetError where the dense network meets all of them.
    """
    cost = measure_cost(dense)
    budgets = [_as_share(budget, cost) for budget in parse_budgets(recipe.budget)]
    if all(budget.kind != "latency" for budget in budgets):
        require_removal(budgets)
    return tuple(sorted(budgets, key=lambda budget: _ORDER.index(budget.kind)))


_ORDER: tuple[Kind, ...] = ("latency", "macs", "parameters", "size")


def _as_share(budget: Budget, dense: Cost) -> Budget:
    """A counted budget as a share of the dense network; one of time as it is."""
    if budget.kind == "latency":
        return budget
    return budget.of(amount_of(dense, budget.kind))


_SPARE = 0.02  # of the least share: MaskFormer's is 0.600 before it is scored and 0.603 after


def require_reachable(graph: fx.GraphModule, structure: Structure, recipe: Recipe) -> None:
    """Raises BudgetError when no plan can meet a counted budget, whatever the scores are.

    Which unit of several must stay is the scores' to say, so that a little less may go than is found here.
    """
    options, scores = ranking_of(recipe), any_scores(graph, structure, recipe)
    counted = [budget for budget in shares_of(recipe, graph) if budget.kind != "latency"]  # which `set_aim` measures
    for index, budget in enumerate(counted):
        least = least_share(graph, structure, scores, budget.kind, options)
        if least > budget.share:
            raise BudgetError(out_of_reach(counted, index, least, structure, spare=_SPARE))


def kept_of(
    budgets: Sequence[Budget], dense: fx.GraphModule, small: fx.GraphModule, measured: float = 0.0
) -> tuple[Kept, ...]:
    """What stays of what each budget is of; `measured` is the share of the dense network's time."""
    before, after = measure_cost(dense), measure_cost(small)
    rows = []
    for budget in budgets:
        share = measured
        if budget.kind != "latency":
            share = amount_of(after, budget.kind) / amount_of(before, budget.kind)
        rows.append(Kept(budget, share))
    return tuple(rows)


def summary_of_budgets(rows: Sequence[Kept]) -> dict[str, object]:
    """Of each budget the share it asks for and the share kept, for the summary; `decided` is the one that bound."""
    entries = []
    for row in rows:
        shares = {"asked": round(row.budget.share, 4), "kept": round(row.share, 4)}
        entries.append({"budget": str(row.budget), **shares, "decided": row is deciding(rows)})
    return {"budgets": entries}


def deciding(rows: Sequence[Kept]) -> Kept:
    """The budget that was met most nearly: the others would have let more stay."""
    return max(rows, key=lambda row: row.of_allowed)


def words_of(rows: Sequence[Kept]) -> str:
    """The budgets as the report says them; of several which one decided."""
    text = ", ".join(str(row.budget) for row in rows)
    first = deciding(rows)
    if len(rows) > 1:
        kept = f"{first.share:.3f} kept where {first.budget.share:.4g} may stay"
        return f"{text}; of these '{first.budget}' decided ({kept})"
    if first.budget.amount:
        return f"{text} ({first.share:.3f} of the dense network's kept)"
    return text


def below_budget(rows: Sequence[Kept], multiple: int) -> str:
    """What to say of a plan that keeps far less than counted budgets allow; empty where it comes near to one."""
    first = deciding(rows)
    budget = first.budget
    if budget.kind == "latency" or first.of_allowed >= 1 - budget.slack:
        return ""
    steps = "no plan comes nearer"
    if multiple != 1:
        now = "by each layer's width" if multiple == BY_WIDTH else multiple
        steps = f"--multiple 1 (now {now}) may come nearer"
    quantity = "MACs" if budget.kind == "macs" else budget.kind
    return (
        f"the plan keeps {first.share:.3f} of the {quantity} where {budget.share:.4g} may stay: units go in steps too "
        f"large to come nearer; {steps}"
    )


def warn_below(rows: Sequence[Kept], multiple: int) -> Checks:
    """A warning where all counted budgets were beaten by far."""
    warning = below_budget(rows, multiple)
    return Checks(warnings=(warning,) if warning else ())


def ranking_here(graph: fx.GraphModule, structure: Structure, recipe: Recipe) -> RankingOptions:
    """The recipe's ranking; with `multiple = 0`, each group's widths keep to the steps measured now."""
    options = ranking_of(recipe)
    if recipe.multiple:
        return options
    return replace(options, steps=steps_here(graph, structure))


def set_aim(work: Work, structure: Structure) -> Aim:
    """What the plan is made with; a measured budget's tables are timed here, once. Raises BudgetError early."""
    budget, *also = shares_of(work.recipe, work.dense)
    if budget.kind == "latency":
        tables = find_tables(work, structure, budget, also)
        return Aim(budget.of(tables.dense_ms), tables.ranking, tables, tuple(also))
    options = ranking_of(work.recipe)
    if not work.recipe.multiple:
        options = replace(options, steps=find_steps(work, structure))
    return Aim(budget, options, also=tuple(also))


def aimed_at(graph: fx.GraphModule, units: Structure, aim: Aim) -> Aim:
    """The same aim once whole branches went: each group of what is left keeps to the widths that were measured."""
    if aim.tables is not None:
        steps = group_steps(graph, units, aim.tables.model.steps)
    elif aim.options.steps:
        steps = steps_here(graph, units)
    else:
        return aim
    return replace(aim, options=replace(aim.options, steps=steps))


def plan_without_branches(
    dense: fx.GraphModule, graph: fx.GraphModule, units: Structure, scores: Scores, aim: Aim
) -> Plan:
    """What of a network that lost branches may stay under the aim, by prediction where that is one of time.

    Raises BudgetError where no plan meets it, or the branches alone saved more time than was asked for.
    """
    aim = aimed_at(graph, units, aim)
    also = tuple(budget_of(dense, graph, budget) for budget in aim.also)
    if aim.tables is None:
        return make_plan(graph, units, scores, budget_of(dense, graph, aim.budget), aim.options, also=also)
    timed = Timed(graph, units, scores, aim, aim.tables, also)
    if timed.now < aim.budget.share:
        raise BudgetError(
            f"budget '{aim.budget}' asks for less than the blocks that went have saved; let more of them stay"
        )
    return timed.plan_at(aim.budget.share)[0]


def make_step(work: Work, r: int, graph: fx.GraphModule, units: Structure, scores: Scores, aim: Aim) -> Step:
    """Round r's plan; the last one meets the budgets. Raises GateError where a measured one could not be met."""
    exponent = r / work.recipe.rounds  # the same factor every round: to 0.25 in two, 0.5 stays after the first

    def on_the_way(budget: Budget) -> Budget:
        return budget_of(work.dense, graph, budget.at(budget.share**exponent))

    also = tuple(map(on_the_way, aim.also))
    if aim.tables is None:
        return Step(make_plan(graph, units, scores, on_the_way(aim.budget), aim.options, also=also))
    timed = Timed(graph, units, scores, aim, aim.tables, also)
    if r < work.recipe.rounds:
        return Step(timed.plan_at(aim.budget.share**exponent)[0])
    met = _stage_met(work, r, timed)
    facts = _facts_of(aim.budget, met, aim.tables.dense_ms)
    write_json(work.stages.folder / "latency-budget.json", {"schema": MET, **facts, **met_to_json(met)})
    checks = _budget_gate(aim.budget, met, aim.tables.dense_ms)
    require_passed(work.stages, checks)
    return Step(met.plan, checks, {"latency_budget": facts}, met.trial.measured.value)


class Timed:
    """A network that loses units until its real latency is right: planned on tables, tried on the runtime.

    Every plan meets the counted budgets `also`, which are of the network as it is.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        units: Structure,
        scores: Scores,
        aim: Aim,
        tables: Tables,
        also: tuple[Budget, ...] = (),
    ) -> None:
        self.graph, self.units, self.scores, self.aim, self.baseline = graph, units, scores, aim, tables.baseline
        self.also = also
        self.dense_us = tables.model.dense_us
        self.cost = make_latency_meter(graph, units, tables.model)
        self.now = self.cost(removed_classes(units, {})) / self.dense_us

    def plan_at(self, share: float) -> tuple[Plan, float]:
        """The plan predicted to take at most that share of the dense network's time, and its prediction."""
        budget = replace(self.aim.budget, share=share / self.now, slack=1.0)
        plan = make_plan(self.graph, self.units, self.scores, budget, self.aim.options, cost=self.cost, also=self.also)
        return plan, self.cost(removed_classes(self.units, plan.kept)) / self.dense_us

    def least(self) -> float:
        """The smallest share that can be asked for."""
        share = least_share(self.graph, self.units, self.scores, "latency", self.aim.options, cost=self.cost)
        return share * self.now * (1 + 1e-9)

    def most(self) -> float:
        """The largest share that can be asked for: with more, a counted budget would not hold; 1 without any."""
        if not self.also:
            return 1.0
        _, predicted = self.plan_at(self.now * (1 + 1e-9))
        return predicted * (1 + 1e-9)

    def measure(self, plan: Plan) -> Ratio:
        """The share of the dense network's time that the planned one takes, as timed."""
        return measure_ratio(self.baseline, self.aim.budget, prune(self.graph, self.units, plan)[0])


def _stage_met(work: Work, r: int, timed: Timed) -> Met:
    keys = work.stages.keys
    scores = keys.get(f"measured-{r}", keys[f"scores-{r}"])
    return work.stages.make(
        "budget",
        _met,
        Keeper(_write_met, _read_met),
        timed=Known(timed, [scores, keys["latency-model"], list(timed.also)]),
        budget=timed.aim.budget,
    )


def _met(timed: Timed, budget: Budget, progress: Progress) -> Met:
    """Plans are tried on the runtime until one takes the share that is asked for."""

    def say(trial: str, share: float) -> None:
        progress(share, trial.partition(": ")[2])

    least, most = timed.least(), timed.most()
    met = meet(budget, plan_at=timed.plan_at, measure=timed.measure, least=least, most=most, progress=say)
    drop_dense_file(timed.baseline.folder)
    return met


def _write_met(folder: Path, met: Met) -> None:
    write_record(folder / "stages" / "budget" / "plan.json", met.plan)
    write_json(folder / "stages" / "budget" / "met.json", {"schema": MET, **met_to_json(met)})


def _read_met(folder: Path) -> Met:
    plan = read_record(folder / "stages" / "budget" / "plan.json", Plan)
    return met_from_json(read_json(folder / "stages" / "budget" / "met.json", MET), plan)


def _facts_of(budget: Budget, met: Met, dense_ms: float) -> dict[str, object]:
    """A measured budget's figures, for the summary and for a reader of the folder; milliseconds where it names some."""
    measured = met.trial.measured
    facts: dict[str, object] = {"asked": round(budget.share, 6)}
    if budget.amount:
        facts["asked_ms"] = round(budget.amount, 4)
        facts["dense_ms"] = round(dense_ms, 4)
        facts["measured_ms"] = round(measured.value * dense_ms, 4)
    facts["runtime"] = budget.runtime
    if budget.host:
        facts["host"] = budget.host
    return {
        **facts,
        "batch": budget.batch,
        "threads": budget.threads,
        "predicted": round(met.trial.predicted, 4),
        "measured": round(measured.value, 4),
        "interval": [round(measured.low, 4), round(measured.high, 4)],
        "clock": measured.clock,
        "networks_timed": len({trial.measured for trial in met.trials}),
    }


def _budget_gate(budget: Budget, met: Met, dense_ms: float) -> Checks:
    """In milliseconds where those were asked for, else as a share of the dense network's."""
    place = str(budget).partition(" on ")[2]
    if budget.amount:
        name, scale, unit = f"latency: milliseconds on {place}", dense_ms, "ms"
    else:
        name, scale, unit = f"latency: share of the dense network's on {place}", 1.0, ""
    return gate(
        name,
        met.trial.measured.value * scale,
        limit=round((1 + budget.slack) * budget.share * scale, 6),
        remedy="run again when the machine is quieter",
        unit=unit,
    )
