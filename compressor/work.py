"""What the stages of one run share: recipe, folder, dense network, images, and the gates passed so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, fx

from .errors import GateError
from .images import Batches, Preprocessing
from .models import Model
from .pruning import RankingOptions
from .recipe import Recipe
from .report import GateRow
from .saved import example_of
from .splits import Splits
from .stages import Stages


@dataclass
class Work:
    """What the stages of one run share."""

    recipe: Recipe
    stages: Stages
    model: Model
    splits: Splits
    dense: fx.GraphModule
    calibration: Batches
    evaluation: Batches
    preprocessing: Preprocessing
    gates: list[GateRow] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    @property
    def example(self) -> Tensor:
        how = self.preprocessing
        return example_of((len(how.mean), *how.size))

    def gate(self, name: str, value: float, limit: float, remedy: str, unit: str = "") -> None:
        """Notes a gate; raises GateError when the value is above the limit."""
        passed = bool(value <= limit)
        self.gates.append(GateRow(name, limit, float(value), passed, "<=", unit, remedy))
        if not passed:
            raise GateError(f"gate '{name}' failed: {value:.4g} {unit or 'found'}, at most {limit:g} allowed; {remedy}")


def ranking_of(recipe: Recipe) -> RankingOptions:
    return RankingOptions(
        reduction=recipe.reduction,  # type: ignore[arg-type]
        normalisation=recipe.normalisation,  # type: ignore[arg-type]
        scope=recipe.scope,  # type: ignore[arg-type]
        per_cost=recipe.per_cost,
        kinds=recipe.units,  # type: ignore[arg-type]
        least=recipe.least,
        multiple=recipe.multiple,
    )
