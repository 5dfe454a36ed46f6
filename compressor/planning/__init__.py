"""How much of each group goes: the loss measured, an order of removal, a plan under a budget."""

from .budget import compose, make_plan
from .ranking import RankingOptions, importance
from .sensitivity import measure_scores

__all__ = ["RankingOptions", "compose", "importance", "make_plan", "measure_scores"]
