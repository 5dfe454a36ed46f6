"""The tables of a report, as rows of text without markup; what matters most stands furthest left.

In: `ReportInput`. Out: `Table`s. An empty one is left out by whoever prints it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from . import facts
from .contents import AccuracyRow, LatencyRow, ParityRow, ReportInput

TOO_FEW = "n too small"


@dataclass(frozen=True, slots=True)
class Table:
    """`align` has a letter per column: `c` code, `l` text, `r` number. A row of one cell heads those below it."""

    title: str
    head: tuple[str, ...]
    align: str
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def gate_table(run: ReportInput) -> Table:
    rows = tuple(
        (
            g.name,
            g.state,
            facts.number(g.value),
            f"{_relation(g.relation)} {facts.number(g.limit)}",
            g.unit,
        )
        for g in run.gates
    )
    doubts = "; ".join(dict.fromkeys(g.doubt for g in run.gates if g.doubt))
    note = f"Not shown: {doubts}." if doubts else ""
    return Table("Gates", ("gate", "result", "found", "limit", "unit"), "llrrl", rows, note)


def conditions(row: AccuracyRow | LatencyRow | ParityRow) -> str:
    """The conditions of a measurement, as the heading over its rows."""
    place = f"{row.runtime}, {row.precision}"
    return place if isinstance(row, AccuracyRow) else f"{place}, batch {row.batch}"


def _headed(rows: Iterable[tuple[str, tuple[str, ...]]]) -> tuple[tuple[str, ...], ...]:
    """Rows in their order of first heading, each heading once as a row of its own."""
    by_heading: dict[str, list[tuple[str, ...]]] = {}
    for heading, row in rows:
        by_heading.setdefault(heading, []).append(row)
    return tuple(row for heading, below in by_heading.items() for row in ((heading,), *below))


def _relation(relation: str) -> str:
    return {"<=": "≤", ">=": "≥"}.get(relation, relation)


def group_table(run: ReportInput) -> Table:
    rows = []
    for g in run.groups:
        kept, removed = facts.split_scores(g)
        removed_share_of_sum = "–"
        if kept.size + removed.size:
            total = float(abs(kept).sum() + abs(removed).sum())
            removed_share_of_sum = facts.percent(float(abs(removed).sum()) / total if total else 0.0)
        rows.append(
            (
                g.name,
                f"{g.size:,} → {len(g.kept):,}",
                facts.percent(facts.removed_share(g.size, len(g.kept)), 0),
                removed_share_of_sum,
                g.kind,
                f"{len(g.layers):,}",
            )
        )
    head = ("group", "units", "removed", f"{facts.worth(run)} removed", "kind", "layers")
    what = facts.worth(run)
    note = f"{what.capitalize()} removed: the removed units' share of the group's sum."
    return Table("Groups", head, "crrrlr", tuple(rows), note)


def layer_table(run: ReportInput) -> Table:
    rows = tuple(
        (
            row.layer or "(top level)",
            f"{row.width_dense:,} → {row.width_shipped:,}",
            f"{facts.count(row.macs_dense)} → {facts.count(row.macs_shipped)}",
            facts.percent(facts.removed_share(row.macs_dense, row.macs_shipped), 0),
            row.operation,
        )
        for row in run.layers
        if row.width_dense
    )
    head = ("layer", "width", "MACs", "MACs removed", "operation")
    return Table("Layers", head, "crrrl", rows)


def left_alone_table(run: ReportInput) -> Table:
    rows = tuple((row.layer or "(top level)", row.operation, row.reason) for row in run.left_alone)
    return Table("Left alone", ("layer", "operation in the way", "reason"), "ccl", rows)


def repair_table(run: ReportInput) -> Table:
    rows = tuple(
        (row.layer or "(top level)", facts.percent(row.error_before), facts.percent(row.error_after), f"{row.rows:,}")
        for row in run.repair.repaired
    )
    note = "Squared error of the layer's outputs against the dense network's, of their variance."
    return Table("Repaired layers", ("layer", "error before", "error after", "rows"), "crrr", rows, note)


def accuracy_table(run: ReportInput) -> Table:
    rows = []
    for row in run.accuracy:
        low, high = row.accuracy.interval
        lost = facts.lost_points(run, row)
        top5 = row.accuracy.correct_top5
        cells = (
            network(run, row),
            facts.percent(row.accuracy.top1),
            "" if row.variant == "dense" or lost is None else facts.points(lost),
            f"{100 * low:.1f}–{100 * high:.1f}",
            facts.percent(top5 / row.accuracy.n) if top5 >= 0 else "–",
        )
        rows.append((f"{conditions(row)}, {row.accuracy.n:,} {row.images} images", cells))
    note = (
        "Wilson interval. Points: difference from the dense network on the same images. Removed: units gone, nothing "
        "else done; repaired: by least squares; tuned: fine-tuned after the repair; shipped: what is in the files."
    )
    return Table("Accuracy", ("network", "top-1", "points", "95 % interval", "top-5"), "lrrrr", _headed(rows), note)


def network(run: ReportInput, row: AccuracyRow) -> str:
    """The network's name; in PyTorch, of the shipped one also which it is."""
    return (
        f"shipped: {run.shipped}"
        if row.variant == "shipped" and row.runtime == "pytorch" and run.shipped
        else row.variant
    )


def parity_table(run: ReportInput) -> Table:
    rows = [
        (
            f"{r.reference} → {conditions(r)}",
            (r.variant, "passed" if r.passed else "FAILED", f"{r.max_abs:.1e}", f"{r.limit:.0e}", f"{r.max_rel:.1e}"),
        )
        for r in run.parity
    ]
    head = ("network", "result", "max. abs.", "limit", "max. rel.")
    note = "Largest distance of any output on the same images; the limit is for the absolute one."
    return Table("Parity", head, "llrrr", _headed(rows), note)


def latency_table(run: ReportInput) -> Table:
    ratios = {id(row): facts.speed_up(dense, row) for dense, row in facts.latency_pairs(run)}
    rows = [
        (
            f"{r.runtime}, batch {r.batch}" + (f", {r.threads} threads" if r.threads else ""),
            (
                subject(r),
                _percentile(r, "p50"),
                f"{ratios[id(r)]:.2f}×" if id(r) in ratios else "",
                _percentile(r, "p90"),
                _percentile(r, "p99"),
                f"{r.samples_ms.size:,}",
                r.note,
            ),
        )
        for r in run.latency
    ]
    head = ("network", "p50 ms", "speed-up", "p90 ms", "p99 ms", "n", "note")
    note = (
        "Dense and shipped interleaved. Speed-up: dense p50 over this p50. "
        f"'{TOO_FEW}': too few runs for the percentile to stand."
    )
    if not any(r.note for r in run.latency):
        return Table("Latency", head[:-1], "lrrrrr", _headed((h, r[:-1]) for h, r in rows), note)
    return Table("Latency", head, "lrrrrrl", _headed(rows), note)


def subject(row: LatencyRow) -> str:
    return row.variant if row.precision == "fp32" else f"{row.variant}, {row.precision}"


def _percentile(row: LatencyRow, name: str) -> str:
    if name not in row.percentiles:
        return "–"
    value = row.percentiles[name]
    return TOO_FEW if value is None else facts.milliseconds(value)


def cost_table(run: ReportInput) -> Table:
    dense, shipped = run.cost_dense, run.cost_shipped
    pairs = (
        ("MACs", dense.macs, shipped.macs),
        ("FLOPs (2 per MAC)", dense.flops, shipped.flops),
        ("parameters", dense.parameters, shipped.parameters),
        ("activations", dense.activations, shipped.activations),
    )
    rows = tuple(
        (name, facts.count(a), facts.count(b), facts.percent(facts.removed_share(a, b))) for name, a, b in pairs
    )
    return Table("Arithmetic, one image", ("", "dense", "shipped", "saved"), "lrrr", rows)


def file_table(run: ReportInput) -> Table:
    rows = tuple((f.name, facts.size(f.bytes), f.variant, f.precision, f.role) for f in run.files)
    return Table("Files", ("file", "size", "network", "precision", "for"), "crlll", rows)


def precision_table(run: ReportInput) -> Table:
    """What the files of lower precision took; empty where there is only fp32."""
    rows = []
    for f in run.files:
        if f.precision == "fp32":
            continue
        kept = f"{len(f.kept)}: {', '.join(f.kept)}" if f.kept else "none"
        rows.append((f.name, f.precision, f.method or "–", str(f.bits or "–"), f.rest or "–", kept))
    head = ("file", "precision", "ranges by", "bits of a weight", "the rest in", "layers in higher precision")
    note = "Layers stay in float where int8 would lose more than the recipe allows, or where fp16 would overflow."
    if any(0 < f.bits < 8 for f in run.files):
        note += (
            " Weights have 7 bits where this processor would add the products of 8 in 16 bits (x86 without VNNI) "
            "and so cut large sums off."
        )
    return Table("Lower precisions", head, "cllrll", tuple(rows), note)


def engine_table(run: ReportInput) -> Table:
    rows = tuple(
        (
            e.name,
            e.status,
            facts.size(e.bytes) if e.bytes else "–",
            e.target,
            e.precision,
            e.variant,
            e.runtime,
            "–" if e.kernels is None else f"{e.kernels:,}",
            "–" if e.build_s is None else f"{e.build_s:.1f}",
        )
        for e in run.engines
    )
    head = ("engine", "status", "size", "target", "precision", "network", "runtime", "kernels", "build s")
    return Table("Engines", head, "clrllllrr", rows)


def job_table(run: ReportInput) -> Table:
    """What the job cost, stage by stage; memory of a GPU has a column where one was used."""
    total = sum(row.seconds for row in run.stages)
    on_gpu = any(row.gpu_peak_bytes is not None for row in run.stages)
    rows = [
        (
            facts.stage_title(run, row.name),
            f"{row.seconds:.1f}",
            facts.percent(row.seconds / total if total else 0.0, 0),
            _peak(row.peak_bytes),
            *((_peak(row.gpu_peak_bytes),) if on_gpu else ()),
            "re-used" if row.reused else "done now",
        )
        for row in run.stages
    ]
    if rows:
        host, gpu = (row.peak_bytes for row in run.stages), (row.gpu_peak_bytes for row in run.stages)
        peaks = (_peak(_largest(host)), *((_peak(_largest(gpu)),) if on_gpu else ()))
        reused = sum(row.reused for row in run.stages)
        rows.append(("all", f"{total:.1f}", "100 %", *peaks, f"{reused} of {len(run.stages)} re-used"))
    head = ("stage", "seconds", "share", "peak memory", *(("peak on the GPU",) if on_gpu else ()), "when")
    note = (
        "A re-used stage was done by an earlier start in this folder; its figures are from then. Memory is the most "
        "that the process held, libraries included; processes that time a file have their own."
    )
    return Table("What the job cost", head, "lrrr" + "r" * on_gpu + "l", tuple(rows), note)


def _peak(peak_bytes: int | None) -> str:
    return "unknown" if peak_bytes is None else facts.size(peak_bytes)


def _largest(peaks: Iterable[int | None]) -> int | None:
    return max((peak for peak in peaks if peak is not None), default=None)


def pairs_table(title: str, values: Mapping[str, object]) -> Table:
    rows = tuple((name, facts.number(value) or "–") for name, value in values.items())
    return Table(title, ("field", "value"), "cl", rows)


SLOWEST = 15


def slowest_table(run: ReportInput) -> Table:
    """The layers that take longest after pruning; empty where layers were not timed."""
    timed = facts.timed_layers(run)
    total = sum(ms for ms, _ in timed)
    rows = tuple(
        (
            row.layer or "(top level)",
            "–" if row.ms_dense is None else facts.milliseconds(row.ms_dense),
            facts.milliseconds(ms),
            facts.percent(ms / total if total else 0.0),
            row.operation,
        )
        for ms, row in timed[:SLOWEST]
    )
    head = ("layer", "dense ms", "shipped ms", "share", "operation")
    note = (
        "Medians of each kernel while profiled, which slows small kernels down: shares count, sums are not the "
        "latency. A kernel that fuses several layers counts for the one with weights."
    )
    return Table("Slowest layers", head, "crrrl", rows, note + _untouched(run))


NOTABLE = 0.1  # by which whole layers may differ before it is said that they do


def _untouched(run: ReportInput) -> str:
    """What layers that lost nothing differ by: so much of every other difference is not the pruning's."""
    same = [row for row in run.layers if row.macs_dense and row.macs_dense == row.macs_shipped]
    pairs = [(row.ms_dense, row.ms_shipped) for row in same if row.ms_dense and row.ms_shipped is not None]
    if not pairs:
        return ""
    ratio = sum(after for _, after in pairs) / sum(before for before, _ in pairs)
    if abs(ratio - 1) < NOTABLE:
        return ""
    taken = f"{facts.counted(len(pairs), 'layer')} that lost nothing took {facts.percent(ratio, 0)} of their time"
    return (
        f" {taken} in the dense file: the two files are profiled one after the other, and caches, clocks and what runs "
        "beside them differ. So much of any difference here is not the pruning's."
    )
