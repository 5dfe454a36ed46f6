"""The repaired network taught to answer as the dense one, over all images; labels, where there are any, only add.

Knows neither where images come from, nor which units went, nor what ships: that is judged by others.
"""

from .options import RecoveryOptions, Setting
from .record import Moment, Recovery, Trial, text_of
from .recovering import recover

__all__ = ["Moment", "Recovery", "RecoveryOptions", "Setting", "Trial", "recover", "text_of"]
