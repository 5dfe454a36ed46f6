"""The whole flow: a recipe in, a smaller verified network, its files, report and bundle out.

`flow.run` reads as the README does: trace, group (`units`), score, plan, remove, repair (`removal`), recover
(`recovery`), measure (`quality`), export, gate and ship (`delivery`). `sweeps` makes several such runs, `shipping` what
ships with its owner's training, `api` takes what a Python caller has in hand.
"""

from ..choices import READING
from ..rounds import Progress
from ..run.saved import load_saved as load
from .api import compress, replay, require_name, ship
from .flow import VARIANTS, Run, finish, run
from .own_training import FIGURE_NOISE, Asked
from .quality import FIDELITY_IMAGES, measure_accuracy, measure_fidelity
from .recovery import Recovered, name_of_shipped, recover
from .removal import IDENTITY_IMAGES, Pruned, Repaired, find_scores, remove_and_repair
from .sweeps import Sweep, Watch, sweep
from .units import find_units, keep_units
from .weights import keep_network

__all__ = [
    "FIDELITY_IMAGES",
    "FIGURE_NOISE",
    "IDENTITY_IMAGES",
    "READING",
    "VARIANTS",
    "Asked",
    "Progress",
    "Pruned",
    "Recovered",
    "Repaired",
    "Run",
    "Sweep",
    "Watch",
    "compress",
    "find_scores",
    "find_units",
    "finish",
    "keep_network",
    "keep_units",
    "load",
    "measure_accuracy",
    "measure_fidelity",
    "name_of_shipped",
    "recover",
    "remove_and_repair",
    "replay",
    "require_name",
    "run",
    "ship",
    "sweep",
]
