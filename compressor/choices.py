"""A recipe in, what it means to each family out: one record of options a family, made and checked once.

Below this door nobody sees a recipe: scoring, ranking, repair and tuning take the records made here, and so can be
used without one. Knows no images and no folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from .budgets import Budget, parse_budgets, points_of
from .criteria import LEARNED
from .device.runtimes import unavailable_error
from .latency.places import place_of
from .placement import resolve
from .planning import RankingOptions
from .recipe import Recipe
from .recovery.options import RecoveryOptions
from .relevance import ScoreOptions
from .relevance.lrp import LrpOptions
from .relevance.spelling import composite_of
from .repair import CompensationOptions
from .steering import GATES, SELECTORS, Counted, SteeringOptions

READING = ("criterion", "composite", "start", "start_class", "sign", "per", "place")
"""The fields of a recipe that say how units are scored: a search keeps what it found under them."""
LARGEST_STEP = 1 / 8
"""Of a layer's width, that its kept count moves by where nobody says a multiple."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """How units are scored: a criterion and how it is read, and whether what each layer may lose is measured then."""

    criterion: str = "lrp"
    options: ScoreOptions = field(default_factory=ScoreOptions)
    measured: bool = True
    steering: SteeringOptions = field(default_factory=SteeringOptions)  # of a learned criterion


@dataclass(frozen=True, slots=True)
class Repairing:
    """How what is left is put right: by least squares with these options or not at all, and batch norm's statistics."""

    compensation: CompensationOptions | None = field(default_factory=CompensationOptions)
    reestimate: bool = False


@dataclass(frozen=True, slots=True)
class Choices:
    """What a round of pruning goes by."""

    scoring: Scoring = field(default_factory=Scoring)
    ranking: RankingOptions = field(
        default_factory=lambda: RankingOptions(normalisation="none", per_cost=1.0, largest_step=LARGEST_STEP)
    )
    repairing: Repairing = field(default_factory=Repairing)


def choices_of(recipe: Recipe) -> Choices:
    """All that a round needs of a recipe. Raises RecipeError for a composite that is not understood."""
    return Choices(scoring_of(recipe), ranking_of(recipe), repairing_of(recipe))


def scoring_of(recipe: Recipe) -> Scoring:
    """How a recipe's criterion is read off a network; a field that is left empty is the criterion's own choice."""
    readings = {name: getattr(recipe, name) for name in ("start", "sign", "per", "place")}
    chosen = {name: value for name, value in readings.items() if value}
    lrp = LrpOptions(composite=composite_of(recipe.composite), accept=recipe.accept, strict=recipe.strict)
    options = ScoreOptions(seed=recipe.seed, target=recipe.start_class, lrp=lrp, **chosen)
    return Scoring(recipe.criterion, options, recipe.normalisation == "measured", steering_of(recipe))


def steering_of(recipe: Recipe) -> SteeringOptions:
    """How a learned criterion learns; the same for every other one, so that nothing of it is in their keys."""
    if recipe.criterion not in LEARNED:
        return SteeringOptions()
    gates, selector = GATES[recipe.gates_schedule], SELECTORS[recipe.gates_schedule]
    if recipe.selector_steps:
        steps = recipe.selector_steps
        selector = replace(selector, steps=steps, predictor_steps=max(1, steps // 2))
    return SteeringOptions(
        gates=replace(gates, steps=recipe.gates_steps or gates.steps, counted=counted_by(recipe)),
        selector=selector,
        schedule=recipe.gates_schedule,
        explanation=recipe.explanation if recipe.criterion == "isp" else 0.0,
        start=recipe.gates_start,
        kinds=recipe.units,
        seed=recipe.seed,
    )


def counted_by(recipe: Recipe) -> Counted:
    """What gates are pressed by: parameters where the first budget is of them or of their bytes, and else MACs."""
    if recipe.as_it_is:
        return "macs"
    first, *_ = parse_budgets(points_of(recipe.budget)[0])
    return "parameters" if first.kind in ("parameters", "size") else "macs"


def ranking_of(recipe: Recipe) -> RankingOptions:
    """How scores become an order; measured ones are comparable as they are, and count per MAC."""
    options = RankingOptions(
        reduction=recipe.reduction,
        scope=recipe.scope,
        kinds=recipe.units,
        least=recipe.least,
        largest_step=LARGEST_STEP,
    )
    if recipe.multiple > 0:
        options = replace(options, multiple=recipe.multiple, largest_step=1.0)
    if recipe.normalisation == "measured":
        return replace(options, normalisation="none", per_cost=1.0)
    return replace(options, normalisation=recipe.normalisation, per_cost=recipe.per_cost)


def measuring_of(recipe: Recipe) -> RankingOptions:
    """What of the ranking tells how far each group is cut when its loss is measured; the rest changes nothing there."""
    unmeasured = RankingOptions(normalisation="none", per_cost=1.0)
    return replace(unmeasured, kinds=recipe.units, least=recipe.least, reduction=recipe.reduction)


def repairing_of(recipe: Recipe) -> Repairing:
    """What the recipe repairs by, with a run's full options."""
    options = CompensationOptions(seed=recipe.seed) if recipe.compensate else None
    return Repairing(options, recipe.reestimate)


def recovering_of(recipe: Recipe) -> RecoveryOptions:
    """How the dense network teaches the repaired one."""
    return RecoveryOptions(
        minutes=recipe.recovery_minutes,
        passes=recipe.finetune_epochs,
        rate=recipe.learning_rate,
        labels=1 - recipe.distillation,
        seed=recipe.seed,
    )


def given_preprocessing(recipe: Recipe) -> dict[str, Any]:
    """What the recipe says of pre-processing, None where it says nothing: arguments of `images.overridden`."""
    return {
        "size": recipe.size[0] if len(recipe.size) == 1 else recipe.size or None,
        "resize": recipe.resize or None,
        "interpolation": recipe.interpolation or None,
        "mean": recipe.mean or None,
        "std": recipe.std or None,
    }


def require_known(recipe: Recipe) -> None:
    """Raises RecipeError for a composite or a device that a later stage would refuse; the recipe has checked the rest.

    MissingPackageError or EngineError where the runtime whose latency is asked for can't run here.
    """
    resolve(recipe.device)
    for point in points_of(recipe.budget):
        for budget in parse_budgets(point):
            _require_runtime(budget)
    composite_of(recipe.composite)


def _require_runtime(budget: Budget) -> None:
    if budget.kind != "latency":
        return
    place = place_of(budget)
    reason = place.lacks(budget.runtime)
    if reason:
        message = f"budget '{budget}' can't be measured {place.where}: {budget.runtime} {reason}"
        raise unavailable_error(message, [reason])
