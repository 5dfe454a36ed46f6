"""What goes: groups of a traced graph, an order of removal, a plan under a budget, removal and repair."""

from ..budgets import Budget, parse_budget
from .budget import compose, make_plan
from .check import find_groups, find_structure, identity_error
from .compensation import CompensationOptions, compensate
from .groups import Structure, analyse
from .ranking import RankingOptions, importance
from .sensitivity import measure_scores
from .surgery import prune, slices_of

__all__ = [
    "Budget",
    "CompensationOptions",
    "RankingOptions",
    "Structure",
    "analyse",
    "compensate",
    "compose",
    "find_groups",
    "find_structure",
    "identity_error",
    "importance",
    "make_plan",
    "measure_scores",
    "parse_budget",
    "prune",
    "slices_of",
]
