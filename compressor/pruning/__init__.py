"""Before scoring, what can go: units in groups, each checked in float64; after planning, its removal (`surgery`)."""

from .check import find_structure
from .groups import analyse
from .identity import identity_error
from .structure import Structure
from .surgery import prune, slices_of

__all__ = ["Structure", "analyse", "find_structure", "identity_error", "prune", "slices_of"]
