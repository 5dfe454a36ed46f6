"""The report of a run: what was removed and why, what it cost, what it bought, what was not done.

In: `ReportInput`. Out: `report.md`, `report.json`, `report.html` (self-contained) and `plots/*.png`.
Knows nothing of models or runtimes.
"""

from .contents import (
    AccuracyRow,
    EngineRow,
    FileRow,
    GateRow,
    GroupRow,
    LatencyRow,
    LayerRow,
    ParetoPoint,
    ParityRow,
    PictureRow,
    RecoveryRow,
    ReportInput,
    StageRow,
    TradePoint,
)
from .write import ReportPaths, write_report

__all__ = [
    "AccuracyRow",
    "EngineRow",
    "FileRow",
    "GateRow",
    "GroupRow",
    "LatencyRow",
    "LayerRow",
    "ParetoPoint",
    "ParityRow",
    "PictureRow",
    "RecoveryRow",
    "ReportInput",
    "ReportPaths",
    "StageRow",
    "TradePoint",
    "write_report",
]
