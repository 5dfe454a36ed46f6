"""From a finished network to what ships: files of every precision, gates, engines, timings, report and bundle.

Knows nothing of units and scores but what the report shows of them. What could not be run here is a line in
`not_checked`, never a silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ..cost import measure_cost
from ..errors import GateError
from ..export.onnx import export_onnx
from ..placement import CPU, placed, release
from ..pruning import Structure
from ..records import Accuracy, Plan
from ..recovery.choice import Choice
from ..report import GateRow, write_report
from ..work import Work
from .artifacts import DENSE, SHIPPED, Findings
from .bundling import bundle
from .contents import report_of
from .engines import build_engines
from .gates import gate_accuracy, measure_files, measure_parity, no_better_than_chance
from .latency import crowd_of, measure_latency, measure_layers
from .precisions import make_precisions
from .summary import summary_of


@dataclass(frozen=True, slots=True)
class Delivered:
    """`summary` is this part of the run's last line."""

    summary: dict[str, Any]
    gates: tuple[GateRow, ...]


def deliver(
    work: Work,
    structure: Structure,
    plan: Plan,
    final: fx.GraphModule,
    accuracy: Mapping[str, Accuracy],
    choice: Choice | None = None,
) -> Delivered:
    """Exports, checks, builds, measures, reports and bundles; a failed gate is raised once the report is written.

    `choice` says why `final` is what ships, where there was one.

    All from copies on the CPU, where the networks lie on a GPU: what runs on that is the engines.
    """
    work, final = replace(work, dense=placed(work.dense, CPU)), placed(final, CPU)
    release()
    found = Findings(work.stages.folder)
    failed: GateError | None = None
    doubt = no_better_than_chance(accuracy["dense"])
    if doubt:
        work.warn(doubt)
    try:
        _deliver_files(work, found, final, accuracy)
    except GateError as error:
        failed = error
    else:
        bundle(work, found, final, measure_cost(final))
    write_report(report_of(work, structure, plan, final, accuracy, found, choice), work.stages.folder)
    if failed is not None:
        raise failed
    summary = summary_of(work, found, measure_cost(work.dense), measure_cost(final), accuracy["dense"])
    return Delivered(summary, tuple(work.gates))


def _deliver_files(work: Work, found: Findings, final: fx.GraphModule, accuracy: Mapping[str, Accuracy]) -> None:
    """Cheap gates before dear work: a file that is not right is neither built nor timed."""
    networks = {"dense": work.dense, "shipped": final}
    gate_accuracy(work, accuracy)
    _export(work, found, networks)
    make_precisions(work, found)
    measure_parity(work, found, networks)
    measure_files(work, found, accuracy["dense"])
    build_engines(work, found)
    measure_latency(work, found, networks)
    if crowd_of(found.timings):
        work.warn(f"{crowd_of(found.timings)} when networks were timed: times and ratios may be off; time them again")
    measure_layers(work, found, networks)


def _export(work: Work, found: Findings, networks: Mapping[str, fx.GraphModule]) -> None:
    recipe = work.recipe
    metadata = {"compressor.model": recipe.model, "compressor.budget": recipe.budget}

    def write() -> None:
        for artifact in (DENSE, SHIPPED):
            about = {**metadata, "compressor.variant": artifact.variant}
            export_onnx(networks[artifact.variant], work.example, found.path(artifact), metadata=about)

    def read() -> None:
        for artifact in (DENSE, SHIPPED):
            found.path(artifact).stat()

    work.stages.do("onnx", [work.stages.keys["finetune"], metadata], write, read)
