"""From a finished network to what ships, by `export` for files, `device` for engines and times, `report` for pages.

Files of every precision, gates, engines, timings, pictures, report and bundle, each a stage of the run.
Knows nothing of units and scores but what the report shows of them. What could not be run here is a line in
`not_checked`, never a silence.
"""

from .flow import Delivered, deliver
from .results import Outcome

__all__ = ["Delivered", "Outcome", "deliver"]
