"""What can go: units of a traced graph, tied into groups, each checked in float64; and its removal."""

from .check import find_structure
from .groups import analyse
from .identity import identity_error
from .structure import Structure
from .surgery import prune, slices_of

__all__ = ["Structure", "analyse", "find_structure", "identity_error", "prune", "slices_of"]
