"""From a finished network to what ships: files of every precision, gates, engines, timings, report and bundle.

Knows nothing of units and scores but what the report shows of them. What could not be run here is a line in
`not_checked`, never a silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ..errors import GateError
from ..export.onnx import export_onnx
from ..graph.cost import measure_cost
from ..placement import CPU, placed, release
from ..pruning import Structure
from ..records import Accuracy, Plan
from ..repair.choice import Choice
from ..report import GateRow, write_report
from ..run.work import Work
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
    """What was delivered. `summary` is this part of the run's last line."""

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
    findings = Findings(work.stages.folder)

    doubt = no_better_than_chance(accuracy["dense"])
    if doubt:
        work.warn(doubt)

    failed: GateError | None = None
    try:
        _deliver_files(work, findings, final, accuracy)
    except GateError as error:
        failed = error
    else:
        bundle(work, findings, final, measure_cost(final))

    report = report_of(work, structure, plan, final, accuracy, findings, choice)
    write_report(report, work.stages.folder)
    if failed is not None:
        raise failed

    summary = summary_of(work, findings, measure_cost(work.dense), measure_cost(final), accuracy["dense"])
    return Delivered(summary, tuple(work.gates))


def _deliver_files(work: Work, findings: Findings, final: fx.GraphModule, accuracy: Mapping[str, Accuracy]) -> None:
    """Cheap gates before dear work: a file that is not right is neither built nor timed."""
    networks = {"dense": work.dense, "shipped": final}
    gate_accuracy(work, accuracy)

    _export(work, findings, networks)
    make_precisions(work, findings)
    measure_parity(work, findings, networks)
    measure_files(work, findings, accuracy["dense"])

    build_engines(work, findings)
    measure_latency(work, findings, networks)
    crowd = crowd_of(findings.timings)
    if crowd:
        work.warn(f"{crowd} when networks were timed: times and ratios may be off; time them again")
    measure_layers(work, findings, networks)


def _export(work: Work, findings: Findings, networks: Mapping[str, fx.GraphModule]) -> None:
    """The dense and the shipped network as fp32 ONNX files; `networks` by variant."""
    recipe = work.recipe
    metadata = {"compressor.model": recipe.model, "compressor.budget": recipe.budget}

    def write() -> None:
        for artifact in (DENSE, SHIPPED):
            named = {**metadata, "compressor.variant": artifact.variant}
            export_onnx(networks[artifact.variant], work.example, findings.path(artifact), metadata=named)

    def read() -> None:
        for artifact in (DENSE, SHIPPED):
            findings.path(artifact).stat()  # raises where it is gone: the stage is done again

    work.stages.do("onnx", [work.stages.keys["finetune"], metadata], write, read)
