"""How much of each group goes: scores and a budget in, the `Plan` of the units that stay out, by measured loss."""

from .budget import compose, make_plan
from .ranking import RankingOptions, importance
from .sensitivity import measure_scores

__all__ = ["RankingOptions", "compose", "importance", "make_plan", "measure_scores"]
