"""The tables of a report, as rows of text without markup; what matters most stands furthest left.

In: `ReportInput`. Out: `Table`s. An empty one is left out by whoever prints it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..records import UNMET, Accuracy, Dropped, LayerRepair, Quality
from . import facts
from .contents import (
    AccuracyRow,
    EngineRow,
    FileRow,
    GateRow,
    GroupRow,
    LatencyRow,
    LayerRow,
    ParityRow,
    ReportInput,
    StageRow,
)
from .facts import ABSENT

TOO_FEW = "n too small"
Cells = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """`align` has a letter per column: `c` code, `l` text, `r` number. A row of one cell heads those below it."""

    title: str
    head: tuple[str, ...]
    align: str
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def stated(value: object) -> str:
    """A cell's text: the value, a dash where it is empty or 0."""
    return str(value or ABSENT)


def gate_table(run: ReportInput) -> Table:
    """Every gate; why one shows nothing stands in the note."""
    rows = tuple(map(_gate_cells, run.gates))
    doubts = "; ".join(dict.fromkeys(gate.doubt for gate in run.gates if gate.doubt))
    note = f"Not shown: {doubts}." if doubts else ""
    return Table("Gates", ("gate", "result", "found", "limit", "unit"), "llrrl", rows, note)


def _gate_cells(gate: GateRow) -> Cells:
    limit = f"{_relation(gate.relation)} {facts.number(gate.limit)}"
    return gate.name, gate.state, facts.number(gate.value), limit, gate.unit


def _relation(relation: str) -> str:
    return {"<=": "≤", ">=": "≥"}.get(relation, relation)


def conditions(row: AccuracyRow | LatencyRow | ParityRow) -> str:
    """The conditions of a measurement, as the heading over its rows."""
    place = f"{row.runtime}, {row.precision}"
    if isinstance(row, AccuracyRow):
        return place
    return f"{place}, batch {row.batch}"


def without_empty_column(table: Table, head: str) -> Table:
    """The table, without the column called `head` where no row has anything in it."""
    column = table.head.index(head)
    cells = {row[column] for row in table.rows if len(row) > 1}
    if cells <= {"", ABSENT}:
        return without_column(table, head)
    return table


def without_column(table: Table, head: str) -> Table:
    """The table without the column called `head`; headings over rows, which are one cell, stay."""
    column = table.head.index(head)

    def shortened(cells: Cells) -> Cells:
        if len(cells) == 1:
            return cells
        return cells[:column] + cells[column + 1 :]

    align = table.align[:column] + table.align[column + 1 :]
    return replace(table, head=shortened(table.head), align=align, rows=tuple(map(shortened, table.rows)))


def headed(rows: Iterable[tuple[str, Cells]]) -> tuple[Cells, ...]:
    """Rows in their order of first heading, each heading once as a row of its own."""
    by_heading: dict[str, list[Cells]] = {}
    for heading, cells in rows:
        by_heading.setdefault(heading, []).append(cells)

    lines: list[Cells] = []
    for heading, below in by_heading.items():
        lines += [(heading,), *below]
    return tuple(lines)


def group_table(run: ReportInput) -> Table:
    """Every group: what went of its units, and of what they count for."""
    score_name = facts.worth(run)
    rows = tuple(map(_group_cells, run.groups))
    head = ("group", "units", "removed", f"{score_name} removed", "kind", "layers")
    note = f"{score_name.capitalize()} removed: the removed units' share of the group's sum."
    return Table("Groups", head, "crrrlr", rows, note)


def _group_cells(group: GroupRow) -> Cells:
    return (
        group.name,
        f"{group.size:,} → {len(group.kept):,}",
        facts.percent(facts.removed_share(group.size, len(group.kept)), 0),
        _removed_score(group),
        group.kind,
        f"{len(group.layers):,}",
    )


def _removed_score(group: GroupRow) -> str:
    """The removed units' share of the sum of scores, sizes without signs; a dash for a group without scores."""
    kept, removed = facts.split_scores(group)
    if not kept.size + removed.size:
        return ABSENT
    removed_sum = float(abs(removed).sum())
    total = float(abs(kept).sum() + abs(removed).sum())
    return facts.percent(facts.share_of(removed_sum, total))


def branch_table(run: ReportInput) -> Table:
    """The residual branches that went whole, in that order."""
    rows = tuple(map(_branch_cells, run.depth.gone))
    head = ("begins at", "its sum", "MACs of the network", "error with it and those above gone")
    note = "Errors are of the outputs, relative, before anything is thinned or repaired."
    return Table("Blocks that went whole", head, "ccrr", rows, note)


def _branch_cells(branch: Dropped) -> Cells:
    return branch.layer, branch.name, facts.percent(branch.macs), facts.number(branch.loss)


def depth_table(run: ReportInput) -> Table:
    """The networks that were made to find how many blocks may go; empty where one alone was tried."""
    depth = run.depth
    rows: list[Cells] = []
    for number, error in zip(depth.tried, depth.errors, strict=True):
        mark = "taken" if number == depth.taken else ""
        rows.append((f"{number}", _depth_error(error), mark))
    if len(rows) == 1:
        rows = []

    title = "Blocks gone, and what the network is off by at the budget, repaired"
    return Table(title, ("blocks", "error", ""), "rrl", tuple(rows))


def _depth_error(error: float) -> str:
    if error >= UNMET:
        return "no plan meets the budget"
    return facts.number(error)


def layer_table(run: ReportInput) -> Table:
    """Widths and MACs of every layer that has units."""
    rows = tuple(_layer_cells(layer) for layer in run.layers if layer.width_dense)
    head = ("layer", "width", "MACs", "MACs removed", "operation")
    return Table("Layers", head, "crrrl", rows)


def _layer_cells(layer: LayerRow) -> Cells:
    return (
        facts.layer_name(layer.layer),
        f"{layer.width_dense:,} → {layer.width_shipped:,}",
        f"{facts.count(layer.macs_dense)} → {facts.count(layer.macs_shipped)}",
        facts.percent(facts.removed_share(layer.macs_dense, layer.macs_shipped), 0),
        layer.operation,
    )


def left_alone_table(run: ReportInput) -> Table:
    """The layers whose units could not go, with the operation in the way and the reason."""
    rows = tuple((facts.layer_name(layer.layer), layer.operation, layer.reason) for layer in run.left_alone)
    return Table("Left alone", ("layer", "operation in the way", "reason"), "ccl", rows)


def repair_table(run: ReportInput) -> Table:
    """The layers refitted by least squares, with their errors before and after."""
    rows = tuple(map(_repaired_cells, run.repair.repaired))
    note = "Squared error of the layer's outputs against the dense network's, of their variance."
    return Table("Repaired layers", ("layer", "error before", "error after", "rows"), "crrr", rows, note)


def _repaired_cells(layer: LayerRepair) -> Cells:
    return (
        facts.layer_name(layer.layer),
        facts.percent(layer.error_before),
        facts.percent(layer.error_after),
        f"{layer.rows:,}",
    )


def accuracy_table(run: ReportInput) -> Table:
    """Accuracy of every network and file, headed by where it was run and on which images."""
    rows = []
    for row in run.accuracy:
        heading = f"{conditions(row)}, {row.accuracy.n:,} {row.images} images"
        rows.append((heading, _accuracy_cells(run, row)))
    head = ("network", facts.metric_of(run), _lost_head(run), "95 % interval", "top-5")
    note = (
        f"{_difference_note(run)} Removed: units gone, nothing else done; repaired: by least squares; tuned: "
        f"taught by the dense network after the repair; {_trained_note(run)}shipped: what is in the files."
    )
    return without_empty_column(Table(accuracy_title(run), head, "lrrrr", headed(rows), note), "top-5")


def _trained_note(run: ReportInput) -> str:
    return "trained: by you, afterwards; " if run.shipped == "trained" else ""


def accuracy_title(run: ReportInput) -> str:
    """`Accuracy` where right answers are counted, else by the measure."""
    metric = facts.metric_of(run)
    if metric == "top-1":
        return "Accuracy"
    return facts.metric_title(metric)


def _lost_head(run: ReportInput) -> str:
    return "points" if all(row.accuracy.is_share for row in run.accuracy) else "change"


def _difference_note(run: ReportInput) -> str:
    """How interval and difference are to be read."""
    intervals = "Wilson interval. " if all(isinstance(row.accuracy, Accuracy) for row in run.accuracy) else ""
    if _lost_head(run) == "points":
        return f"{intervals}Points: difference from the dense network on the same images."
    return f"{intervals}Change: from the dense network on the same images, in per cent of its figure."


def _accuracy_cells(run: ReportInput, row: AccuracyRow) -> Cells:
    return (
        network(run, row),
        facts.value_of(row.accuracy),
        _lost_cell(run, row),
        facts.interval_of(row.accuracy),
        stated(top5_of(row.accuracy)),
    )


def _lost_cell(run: ReportInput, row: AccuracyRow) -> str:
    """The change from the dense network; empty for that itself, and where there is none on these images."""
    lost = facts.lost_points(run, row)
    if row.variant == "dense" or lost is None:
        return ""
    return facts.loss_of(row.accuracy, lost)


def top5_of(figure: Accuracy | Quality) -> str:
    """The share of images whose class is among the first five; empty where that was not counted."""
    if not isinstance(figure, Accuracy) or figure.correct_top5 < 0:
        return ""
    return facts.percent(figure.correct_top5 / figure.n)


def fidelity_table(run: ReportInput) -> Table:
    """How near each smaller network's answers are to the dense one's; empty where that is the measure itself."""
    rows = []
    for variant, figure in facts.fidelities(run).items():
        name = facts.reached(run, variant)
        rows.append((name, f"{figure.value:.3f}", f"{figure.low:.3f}–{figure.high:.3f}", f"{figure.n:,}"))
    note = f"{facts.MEANING_OF_FIDELITY}. It is of the whole answer, not only of what is decided by it."
    head = ("network", "fidelity", "95 % interval", "images")
    return Table("Fidelity to the dense network", head, "lrrr", tuple(rows), note)


def recovery_table(run: ReportInput) -> Table:
    """How near the network was to the dense one, on held-out images, while it was taught; empty without a recovery."""
    metrics = {row.metric for row in run.recovery} - {facts.FIDELITY}
    rows = []
    for row in run.recovery:
        after = f"{row.seconds:,.0f} s" if row.shown else "repaired"
        quality = (f"{row.quality:.4f}",) if metrics else ()
        rows.append((after, f"{row.shown:,}", f"{row.fidelity:.4f}", *quality, "kept" if row.kept else ""))
    head = ("after", "images shown", "fidelity", *sorted(metrics), "")
    note = "On images that served nothing but to tell when to end."
    return Table("Recovery over its time", head, "l" + "r" * (len(head) - 2) + "l", tuple(rows), note)


def network(run: ReportInput, row: AccuracyRow) -> str:
    """The network's name; in PyTorch, of the shipped one also which it is."""
    if row.runtime == "pytorch":
        return facts.reached(run, row.variant)
    return row.variant


def parity_table(run: ReportInput) -> Table:
    """Distances of every file's outputs, headed by what was compared with what."""
    rows = [(f"{row.reference} → {conditions(row)}", _parity_cells(row)) for row in run.parity]
    head = ("network", "result", "max. abs.", "limit", "max. rel.")
    note = "Largest distance of any output on the same images; the limit is for the absolute one."
    return Table("Parity", head, "llrrr", headed(rows), note)


def _parity_cells(row: ParityRow) -> Cells:
    result = "passed" if row.passed else "FAILED"
    return row.variant, result, f"{row.max_abs:.1e}", f"{row.limit:.0e}", f"{row.max_rel:.1e}"


def latency_table(run: ReportInput) -> Table:
    """Latencies headed by runtime, batch and threads; without the column of notes where there is none."""
    # rows hold arrays, so that they can't be keys themselves
    ratios = {id(row): facts.speed_up(dense, row) for dense, row in facts.latency_pairs(run)}
    rows = [(_latency_heading(row), _latency_cells(row, ratios.get(id(row)))) for row in run.latency]
    head = ("network", "p50 ms", "speed-up", "p90 ms", "p99 ms", "n", "note")
    note = (
        "Dense and shipped interleaved. Speed-up: dense p50 over this p50. "
        f"'{TOO_FEW}': too few runs for the percentile to stand."
    )
    return without_empty_column(Table("Latency", head, "lrrrrrl", headed(rows), note), "note")


def _latency_heading(row: LatencyRow) -> str:
    threads = f", {row.threads} threads" if row.threads else ""
    return f"{row.runtime}, batch {row.batch}{threads}"


def _latency_cells(row: LatencyRow, ratio: float | None) -> Cells:
    """`ratio` is the dense p50 over the row's; None where there is no dense one, or this is it."""
    return (
        subject(row),
        _percentile(row, "p50"),
        facts.written(ratio, "{:.2f}×".format, unknown=""),
        _percentile(row, "p90"),
        _percentile(row, "p99"),
        f"{row.samples_ms.size:,}",
        row.note,
    )


def subject(row: LatencyRow) -> str:
    """`shipped`, or `shipped, int8` where the precision is not fp32."""
    if row.precision == "fp32":
        return row.variant
    return f"{row.variant}, {row.precision}"


def _percentile(row: LatencyRow, name: str) -> str:
    if name not in row.percentiles:
        return ABSENT
    return facts.written(row.percentiles[name], facts.milliseconds, unknown=TOO_FEW)


def cost_table(run: ReportInput) -> Table:
    """What one image costs in both networks, and what that saves."""
    dense, shipped = run.cost_dense, run.cost_shipped
    pairs = (
        ("MACs", dense.macs, shipped.macs),
        ("FLOPs (2 per MAC)", dense.flops, shipped.flops),
        ("parameters", dense.parameters, shipped.parameters),
        ("activations", dense.activations, shipped.activations),
    )
    rows = []
    for name, before, after in pairs:
        saved = facts.percent(facts.removed_share(before, after))
        rows.append((name, facts.count(before), facts.count(after), saved))
    return Table("Arithmetic, one image", ("", "dense", "shipped", "saved"), "lrrr", tuple(rows))


def file_table(run: ReportInput) -> Table:
    """The exported files, with what each is for."""
    rows = tuple(map(_file_cells, run.files))
    return Table("Files", ("file", "size", "network", "precision", "for"), "crlll", rows)


def _file_cells(file: FileRow) -> Cells:
    return file.name, facts.size(file.bytes), file.variant, file.precision, file.role


def precision_table(run: ReportInput) -> Table:
    """What the files of lower precision took; empty where there is only fp32."""
    rows = tuple(_precision_cells(file) for file in run.files if file.precision != "fp32")
    head = ("file", "precision", "ranges by", "bits of a weight", "the rest in", "layers in higher precision")
    note = "Layers stay in float where int8 would lose more than the recipe allows, or where fp16 would overflow."
    if any(0 < file.bits < 8 for file in run.files):
        note += (
            " Weights have 7 bits where this processor would add the products of 8 in 16 bits (x86 without VNNI) "
            "and so cut large sums off."
        )
    return Table("Lower precisions", head, "cllrll", rows, note)


def _precision_cells(file: FileRow) -> Cells:
    layers = "none"
    if file.kept:
        layers = f"{len(file.kept)}: {', '.join(file.kept)}"
    return file.name, file.precision, stated(file.method), stated(file.bits), stated(file.rest), layers


def engine_table(run: ReportInput) -> Table:
    """The engines, with what was really done with each."""
    rows = tuple(map(_engine_cells, run.engines))
    head = ("engine", "status", "size", "target", "precision", "network", "runtime", "kernels", "build s")
    return Table("Engines", head, "clrllllrr", rows)


def _engine_cells(engine: EngineRow) -> Cells:
    return (
        engine.name,
        engine.status,
        facts.written(engine.bytes or None, facts.size),
        engine.target,
        engine.precision,
        engine.variant,
        engine.runtime,
        facts.written(engine.kernels, "{:,}".format),
        facts.written(engine.build_s, "{:.1f}".format),
    )


def job_table(run: ReportInput) -> Table:
    """What the job cost, stage by stage; memory of a GPU has a column where one was used."""
    total_s = sum(row.seconds for row in run.stages)
    rows = [_stage_cells(run, row, total_s) for row in run.stages]
    if rows:
        rows.append(_sum_cells(run.stages, total_s))
    head = ("stage", "seconds", "share", "peak memory", _GPU_HEAD, "when")
    note = (
        "A re-used stage was done by an earlier start in this folder; its figures are from then. Memory is the most "
        "that the process held, libraries included; processes that time a file have their own."
    )
    table = Table("What the job cost", head, "lrrrrl", tuple(rows), note)
    if _largest(row.gpu_peak_bytes for row in run.stages) is None:
        return without_column(table, _GPU_HEAD)
    return table


_GPU_HEAD = "peak on the GPU"


def _stage_cells(run: ReportInput, row: StageRow, total_s: float) -> Cells:
    return (
        facts.stage_title(run, row.name),
        f"{row.seconds:.1f}",
        facts.percent(facts.share_of(row.seconds, total_s), 0),
        _peak(row.peak_bytes),
        _peak(row.gpu_peak_bytes),
        "re-used" if row.reused else "done now",
    )


def _sum_cells(stages: Sequence[StageRow], total_s: float) -> Cells:
    """The last row: seconds add up, of memory the largest peak counts."""
    reused = sum(row.reused for row in stages)
    return (
        "all",
        f"{total_s:.1f}",
        "100 %",
        _peak(_largest(row.peak_bytes for row in stages)),
        _peak(_largest(row.gpu_peak_bytes for row in stages)),
        f"{reused} of {len(stages)} re-used",
    )


def _peak(peak_bytes: int | None) -> str:
    return facts.written(peak_bytes, facts.size, unknown="unknown")


def _largest(peaks: Iterable[int | None]) -> int | None:
    return max((peak for peak in peaks if peak is not None), default=None)


def pairs_table(title: str, fields: Mapping[str, object]) -> Table:
    """A record's fields by name, a dash for what is empty."""
    rows = tuple((name, stated(facts.number(value))) for name, value in fields.items())
    return Table(title, ("field", "value"), "cl", rows)


def lines_table(title: str, head: str, lines: Iterable[str]) -> Table:
    """One column, a line in each row."""
    return Table(title, (head,), "l", tuple((line,) for line in lines))


SLOWEST = 15


def slowest_table(run: ReportInput) -> Table:
    """The layers that take longest after pruning; empty where layers were not timed."""
    timed = facts.timed_layers(run)
    total_ms = sum(ms for ms, _ in timed)
    rows = tuple(_timed_cells(layer, ms, total_ms) for ms, layer in timed[:SLOWEST])
    head = ("layer", "dense ms", "shipped ms", "share", "operation")
    note = (
        "Medians of each kernel while profiled, which slows small kernels down: shares count, sums are not the "
        "latency. A kernel that fuses several layers counts for the one with weights."
    )
    return Table("Slowest layers", head, "crrrl", rows, note + _untouched(run))


def _timed_cells(layer: LayerRow, ms: float, total_ms: float) -> Cells:
    return (
        facts.layer_name(layer.layer),
        facts.written(layer.ms_dense, facts.milliseconds),
        facts.milliseconds(ms),
        facts.percent(facts.share_of(ms, total_ms)),
        layer.operation,
    )


NOTABLE = 0.1  # by which whole layers may differ before it is said that they do


def _untouched(run: ReportInput) -> str:
    """What layers that lost nothing differ by: so much of every other difference is not the pruning's."""
    dense_ms: list[float] = []
    shipped_ms: list[float] = []
    for layer in run.layers:
        lost_nothing = layer.macs_dense > 0 and layer.macs_dense == layer.macs_shipped
        if lost_nothing and layer.ms_dense and layer.ms_shipped is not None:
            dense_ms.append(layer.ms_dense)
            shipped_ms.append(layer.ms_shipped)
    if not dense_ms:
        return ""
    ratio = sum(shipped_ms) / sum(dense_ms)
    if abs(ratio - 1) < NOTABLE:
        return ""
    taken = f"{facts.counted(len(dense_ms), 'layer')} that lost nothing took {facts.percent(ratio, 0)} of their time"
    return (
        f" {taken} in the dense file: the two files are profiled one after the other, and caches, clocks and what runs "
        "beside them differ. So much of any difference here is not the pruning's."
    )
