"""What a network's answer means: a record of four functions, presets by name, and the choice among them.

Leaves of an answer and targets in; a scalar a sample that relevance starts at, a loss, a distance between two answers,
or one figure for a whole network. Whoever computes the answers (PyTorch, an ONNX file, a device) is judged alike.
"""

from .comparison import agreement, fidelity
from .detection import average_precision, matched_f1
from .distances import relative_error
from .presets import TASKS, any_task, judged, task_named
from .recognition import choose_task
from .record import Boxes, Data, Decode, Leaves, Predict, Targets, Task, class_leaf, is_labelled
from .reference import LeafReference, Reference, reference_of
from .user_parts import with_user_parts

__all__ = [
    "TASKS",
    "Boxes",
    "Data",
    "Decode",
    "LeafReference",
    "Leaves",
    "Predict",
    "Reference",
    "Targets",
    "Task",
    "agreement",
    "any_task",
    "average_precision",
    "choose_task",
    "class_leaf",
    "fidelity",
    "is_labelled",
    "judged",
    "matched_f1",
    "reference_of",
    "relative_error",
    "task_named",
    "with_user_parts",
]
