"""An outcome in, what ships out: exported, checked, built, timed, reported and bundled, cheap gates first.

Each stage is a function of values; nothing behind a failed gate is done, and the report is written all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import fx

from ..errors import GateError
from ..export.onnx import export_onnx
from ..graph.cost import measure_cost
from ..placement import CPU, placed, release
from ..records import InputSpec
from ..report import write_report
from ..report.shipped import devices_in, show_devices
from ..run.checks import Checks
from ..run.fingerprints import Known
from ..run.stages import Keeper, Progress
from ..run.work import Work
from ..tensors import noise_like
from .artifacts import DENSE, SHIPPED, Artifact
from .bundling import bundle
from .contents import report_of
from .engines import build_engines
from .gates import accuracy_checks, measure_files, measure_parity
from .latency import measure_latency, measure_layers
from .pictures import make_pictures
from .precisions import make_precisions
from .results import Delivery, Files, Outcome, stands_for
from .summary import summary_of
from .survival import measure_survival


@dataclass(frozen=True, slots=True)
class Delivered:
    """What was delivered. `summary` is this part of the run's last line, `checks` are those of the whole run."""

    summary: Mapping[str, object]
    checks: Checks


def deliver(work: Work, outcome: Outcome) -> Delivered:
    """Exports, checks, builds, measures, reports and bundles; a failed gate is raised once the report is written.

    All from copies on the CPU, where the networks lie on a GPU: what runs on that is the engines.
    """
    work = replace(work, dense=placed(work.dense, CPU))
    task = replace(outcome.task, dense=work.dense)
    outcome = replace(outcome, network=placed(outcome.network, CPU), task=task)
    release()
    delivery, failure = _delivered(work, outcome)
    # a failed gate is a reason to look; before the bundle, since a stage that is made takes away what shipped
    delivery = replace(delivery, survival=measure_survival(work, outcome), pictures=make_pictures(work, outcome))
    if failure is None:
        bundle(work, outcome, delivery)
    else:
        work.stages.retract()

    folder = work.stages.folder
    devices = devices_in(folder)  # of this very bundle: another one has taken the earlier report away
    write_report(report_of(work, outcome, delivery), folder, delivery.pictures.images)
    if devices:
        show_devices(folder, devices)
    if failure is not None:
        raise failure

    costs = measure_cost(work.dense), measure_cost(outcome.network)
    return Delivered(summary_of(delivery, *costs, outcome.accuracy["dense"]), delivery.checks)


def _delivered(work: Work, outcome: Outcome) -> tuple[Delivery, GateError | None]:
    """All there is to deliver, or what there is of it and the error that stopped it."""
    delivery = Delivery(outcome.checks)
    try:
        for delivery in _steps(work, outcome):
            if delivery.checks.failure:
                return delivery, GateError(delivery.checks.failure)
    except GateError as error:
        return delivery, error
    return delivery, None


def _steps(work: Work, outcome: Outcome) -> Iterator[Delivery]:
    """Cheap gates before dear work: a file that is not right is neither built nor timed.

    Every result is handed out, so that a reader who stops at one has what came before.
    """
    networks = {"dense": work.dense, "shipped": outcome.network}
    dense = outcome.accuracy["dense"]
    if outcome.is_dense:  # one network, so one file
        networks = {"shipped": outcome.network}
    inputs = Known(networks, stands_for(work.stages.keys))

    delivery = Delivery(outcome.checks + accuracy_checks(outcome.accuracy, work.recipe.max_accuracy_loss))
    yield delivery

    delivery = replace(delivery, files=export_files(work, inputs))
    yield delivery

    for made in make_precisions(work, delivery.files, outcome.task):
        delivery = replace(delivery, files=delivery.files + made)
        yield delivery

    delivery = replace(delivery, parity=measure_parity(work, delivery.files, inputs))
    yield delivery

    delivery = replace(delivery, accuracy=measure_files(work, delivery.files, dense, outcome.task))
    yield delivery

    delivery = replace(delivery, engines=build_engines(work, delivery.files))
    yield delivery

    delivery = replace(delivery, latency=measure_latency(work, delivery.files, delivery.engines, inputs))
    yield delivery

    yield replace(delivery, layer_ms=measure_layers(work, delivery.files, networks))


def export_files(work: Work, networks: Known) -> Files:
    """The dense and the shipped network, by variant, as fp32 ONNX files."""
    recipe = work.recipe
    paths = work.stages.make(
        "onnx",
        _exported,
        Keeper(_written_already, lambda folder: _exported_paths(folder, networks.value)),
        networks=networks,
        inputs=work.inputs,
        metadata={"compressor.model": recipe.model, "compressor.budget": recipe.budget},
        folder=work.stages.output,
    )
    return Files(paths)


def _exported(
    networks: Mapping[str, fx.GraphModule],
    inputs: Sequence[InputSpec],
    metadata: Mapping[str, str],
    folder: Path,
    progress: Progress,
) -> dict[Artifact, Path]:
    paths = _exported_paths(folder, networks)
    for artifact, path in paths.items():
        named = {**metadata, "compressor.variant": artifact.variant}
        export_onnx(networks[artifact.variant], noise_like(inputs), path, metadata=named)
    return paths


def _exported_paths(folder: Path, variants: Collection[str]) -> dict[Artifact, Path]:
    return {artifact: folder / artifact.name for artifact in (DENSE, SHIPPED) if artifact.variant in variants}


def _written_already(folder: Path, paths: Mapping[Artifact, Path]) -> None:
    """The exporter wrote the files itself, as they are too large to hold."""
