"""Numbers derived from a report's records, and how numbers are written.

In: `ReportInput`. Out: the headline facts (which variant is final, differences, speed-ups) and strings.
Knows neither Markdown nor HTML nor plots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath

import numpy as np

from ..device.metrics import Metric
from ..records import Accuracy, FloatArray, Quality
from .contents import AccuracyRow, GroupRow, LatencyRow, LayerRow, ParetoPoint, ReportInput, TradePoint

ABSENT = "–"
"""A cell's or figure's text where there is nothing to say."""
ORDER = ("dense", "removed", "repaired", "tuned", "trained", "shipped")
STAGES = {
    "groups": "finding the units that hang together, and checking them",
    "latency-model": "timing single layers, for the latency budget",
    "steps": "timing single layers, for the widths that pay",
    "depth": "trying which blocks may go whole",
    "scores": "scoring every unit",
    "measured": "measuring what each layer may lose",
    "budget": "meeting the latency budget",
    "repair": "removing units and repairing what is left",
    "finetune": "recovery",
    "mean answer": "what an ordinary answer of the dense network is",
    "accuracy": "judging the networks",
    "network": "keeping the network as it is",
    "trained": "keeping the weights of your training",
    "fidelity": "comparing the networks' answers with the dense one's",
    "onnx": "exporting to ONNX",
    "fp16": "making the fp16 file",
    "int8": "making the int8 files",
    "parity": "comparing the files with PyTorch",
    "accuracy of the files": "judging the files",
    "engines": "building engines",
    "latency": "timing networks and files",
    "layers": "timing layer by layer",
    "explanation": "comparing what the networks find relevant",
    "pictures": "drawing what the networks see",
}
FIDELITY = "fidelity"
MEANING_OF_FIDELITY = "1: the same answers; 0: as far off as the mean answer"
ROOM_FOR_OURS = 0.5  # a run's own work is in the load average too, and must not look like a crowd


def model_name(model: str) -> str:
    """A model as the command line took it, without the folder its file lies in."""
    file, ending, factory = model.partition(".py:")
    if not ending:
        return model
    return f"{PurePath(file).name}{ending}{factory}"


def worth(run: ReportInput) -> str:
    """What a unit's number is called: the criterion's own, or what losing it was measured to cost."""
    return "measured loss" if run.criterion.endswith("measured") else "relevance"


def reached(run: ReportInput, variant: str) -> str:
    """`shipped: tuned`, so that the name stands for one network and it is said which."""
    if variant == "shipped" and run.shipped:
        return f"shipped: {run.shipped}"
    return variant


def final_accuracy(run: ReportInput) -> AccuracyRow | None:
    """The accuracy of the last network reached, the shipped one's where it is there, on the dense row's images."""
    dense = dense_accuracy(run)
    rows = [row for row in run.accuracy if row.variant != "dense"]
    if dense is not None:
        rows = [row for row in rows if same_conditions(row, dense)]
    return max(rows, key=lambda row: ORDER.index(row.variant), default=None)


def dense_accuracy(run: ReportInput) -> AccuracyRow | None:
    """The dense network's first row: as PyTorch runs it, since files come after networks."""
    return next((row for row in run.accuracy if row.variant == "dense"), None)


def same_conditions(a: AccuracyRow, b: AccuracyRow) -> bool:
    """Whether the two may be compared: on the same images, runtime and precision."""
    return (a.images, a.runtime, a.precision) == (b.images, b.runtime, b.precision)


def metric_in_words(metric: str) -> str:
    """A measure's name in a sentence: some have nothing but the dense network to be one with."""
    if metric.endswith("agreement"):
        return f"{metric} with the dense network"
    if metric in (FIDELITY, "mean cosine"):
        return f"{metric} to the dense network"
    return metric


def metric_title(metric: str) -> str:
    """A measure's name where a sentence or a heading begins with it."""
    return capitalised(metric_in_words(metric))


def capitalised(metric: str) -> str:
    """`top-1` is Top-1, `mIoU` stays."""
    if metric.islower():
        return metric[:1].upper() + metric[1:]
    return metric


def metric_of(run: ReportInput) -> str:
    """What the run's networks are judged by."""
    if not run.accuracy:
        return "top-1"
    return run.accuracy[0].accuracy.metric


def fidelities(run: ReportInput) -> Mapping[str, Accuracy | Quality]:
    """Each smaller network's fidelity to the dense one, by its name; empty where that is the measure itself."""
    if metric_of(run) == FIDELITY:
        return {}
    return run.fidelity


def fidelity_of(run: ReportInput) -> Accuracy | Quality | None:
    """The shipped network's fidelity to the dense one; None where it is the measure itself, or was not taken."""
    return fidelities(run).get("shipped")


def value_of(figure: Accuracy | Quality | Metric | TradePoint) -> str:
    """A figure as it is printed: per cent where it is a share, else the number."""
    return told(figure.value, figure.is_share)


def told(value: float, is_share: bool) -> str:
    """`61.2 %` of a share, else `3.21`."""
    if is_share:
        return percent(value)
    return f"{value:.2f}"


def scale_of(is_share: bool) -> float:
    """What a value is multiplied by where it stands without its unit: shares are told in per cent."""
    return 100.0 if is_share else 1.0


def axis_title(metric: str, is_share: bool) -> str:
    """`top-1, %`; without the per cent where it is no share."""
    return f"{metric}, %" if is_share else metric


def interval_of(figure: Accuracy | Quality | Metric) -> str:
    """Its 95 % interval, in per cent where it is a share; a dash where nobody could give one."""
    if figure.low == figure.high:
        return ABSENT
    if figure.is_share:
        return f"{100 * figure.low:.1f}–{100 * figure.high:.1f}"
    return f"{figure.low:.2f}–{figure.high:.2f}"


def loss_of(figure: Accuracy | Quality, lost: float) -> str:
    """The signed difference, a loss below 0: points of a share, else per cent of the dense network's figure."""
    unit = "" if figure.is_share else " %"
    return points(lost) + unit


def lost_points(run: ReportInput, row: AccuracyRow) -> float | None:
    """What was lost against the dense model on the same images (whatever its precision): points, else per cent."""
    dense_rows = [dense for dense in run.accuracy if dense.variant == "dense" and dense.images == row.images]
    if not dense_rows:
        return None
    alike = [dense for dense in dense_rows if same_conditions(dense, row)]
    reference = (alike or dense_rows)[0]
    return reference.accuracy.lost(row.accuracy)


def latency_pairs(run: ReportInput) -> Iterator[tuple[LatencyRow, LatencyRow]]:
    """(dense, row) for every other row whose runtime, batch and threads a dense one has, of its precision or in fp32.

    Rows without such a dense one are left out.
    """
    dense_rows = {(row.precision, *_place(row)): row for row in run.latency if row.variant == "dense"}
    for row in run.latency:
        dense_in_fp32 = dense_rows.get(("fp32", *_place(row)))
        dense = dense_rows.get((row.precision, *_place(row)), dense_in_fp32)
        if row.variant != "dense" and dense is not None:
            yield dense, row


def timed_runtimes(run: ReportInput) -> tuple[str, ...]:
    """Each once, in the order of the timings."""
    return tuple(dict.fromkeys(row.runtime for row in run.latency))


def _place(row: LatencyRow) -> tuple[str, int, int]:
    return row.runtime, row.batch, row.threads


def median_ms(row: LatencyRow) -> float:
    """The p50 as measured; where the measurer gives none, the samples' median."""
    p50 = row.percentiles.get("p50")
    if p50 is None:
        return float(np.median(row.samples_ms))
    return p50


def speed_up(dense: LatencyRow, row: LatencyRow) -> float:
    """Dense p50 over this row's p50: above 1 is faster."""
    return median_ms(dense) / median_ms(row)


def pareto_front(points: Sequence[ParetoPoint]) -> tuple[ParetoPoint, ...]:
    """Points that no other beats: none is as fast and at least as accurate, one of the two strictly; fastest first."""
    fastest_first = sorted(points, key=lambda point: (point.ms, -point.accuracy.value))
    front: list[ParetoPoint] = []
    for point in fastest_first:
        # all that are as fast or faster came before, and the last of the front is the best of them
        if not front or point.accuracy.value > front[-1].accuracy.value:
            front.append(point)
    return tuple(front)


def last_variant(run: ReportInput) -> str:
    """The most finished variant that was timed."""
    timed = {row.variant for row in run.latency}
    return next((variant for variant in reversed(ORDER) if variant in timed), "dense")


def layer_name(layer: str) -> str:
    """The layer as the model calls it; what lies in none of its modules has no name there."""
    return layer or "(top level)"


def timed_layers(run: ReportInput) -> list[tuple[float, LayerRow]]:
    """Milliseconds of every timed layer of the shipped network, slowest first."""
    timed = [(row.ms_shipped, row) for row in run.layers if row.ms_shipped is not None]
    return sorted(timed, key=lambda pair: -pair[0])


def stage_title(run: ReportInput, name: str) -> str:
    """A stage in words; with its round where there is more than one. `scores-2` is the scoring of round 2."""
    stage = name.rpartition("-")[0]
    several = any(row.name == f"{stage}-2" for row in run.stages)
    return title_of(name, several=several)


def title_of(name: str, *, several: bool) -> str:
    """`scores-2` in words, with its round where there are several."""
    stage, _, number = name.rpartition("-")
    if not number.isdigit():
        return STAGES.get(name, name)
    title = STAGES.get(stage, stage)
    if several:
        title += f", round {number}"
    return title


def load_of(state: Mapping[str, object]) -> float:
    """The load average of the last minute in an environment's state; 0 where it is not known."""
    words = str(state.get("load_average", "")).split()
    return float(words[0]) if words else 0.0


def crowd(state: Mapping[str, object], machine: Mapping[str, object]) -> str:
    """What made a timing doubtful when it began: more wanted to run than there are cores. Empty where not."""
    cores = int(str(machine.get("cores") or 0))
    load = load_of(state)
    if not cores or load <= cores + ROOM_FOR_OURS:
        return ""
    return f"busy machine: load {load:.1f} on {counted(cores, 'core')}"


def counted(number: int, noun: str) -> str:
    """`1 layer`, `1,200 layers`."""
    plural = "" if number == 1 else "s"
    return f"{number:,} {noun}{plural}"


def removed_share(before: float, after: float) -> float:
    """What went, as a share of `before`; 0 of nothing."""
    return 1 - after / before if before else 0.0


def share_of(part: float, whole: float) -> float:
    """A part as a share of the whole; 0 of nothing."""
    return part / whole if whole else 0.0


def kept_mask(group: GroupRow) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """[units], true where a unit stays."""
    mask = np.zeros(group.size, dtype=np.bool_)
    mask[group.kept] = True
    return mask


def split_scores(group: GroupRow) -> tuple[FloatArray, FloatArray]:
    """Finite scores of the kept and of the removed units; both empty for a group without scores."""
    if group.scores.size != group.size:
        return np.empty(0), np.empty(0)
    kept, finite = kept_mask(group), np.isfinite(group.scores)
    return group.scores[kept & finite], group.scores[~kept & finite]


def written(number: float | None, write: Callable[[float], str], unknown: str = ABSENT) -> str:
    """The number as `write` has it, `unknown` where there is none."""
    return unknown if number is None else write(number)


def percent(share: float, digits: int = 1) -> str:
    """A share of one: `0.5` to `50.0 %`."""
    return f"{100 * share:.{digits}f} %"


def count(number: float) -> str:
    """`4.09 G`, `25.6 M`, `811`."""
    return _with_prefix(number, {"G": 1e9, "M": 1e6, "k": 1e3}, small=f"{number:.0f}")


def _with_prefix(number: float, factors: Mapping[str, float], *, small: str) -> str:
    """In the first unit that it has one of; `small` where it has none of any. Largest unit first."""
    for unit, factor in factors.items():
        if abs(number) >= factor:
            return f"{three_digits(number / factor)} {unit}"
    return small


def three_digits(number: float) -> str:
    """Three digits that count, zeros kept, so that columns line up: `4.10`, `31.2`, `272`."""
    magnitude = abs(number)
    if magnitude < 10:
        return f"{number:.2f}"
    if magnitude < 100:
        return f"{number:.1f}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes in decimal units, as file managers and shops give them."""
    return _with_prefix(number, {"GB": 1e9, "MB": 1e6, "kB": 1e3}, small=f"{number:.0f} B")


def milliseconds(ms: float) -> str:
    """Without the unit; microseconds still show below one: `0.034`."""
    if ms < 1:
        return f"{ms:.3f}"
    return three_digits(ms)


def points(lost: float) -> str:
    """A signed difference in points, with a true minus; a loss is negative."""
    if abs(lost) >= 0.05:
        return f"{-lost:+.1f}".replace("-", "\u2212")
    return "0.0"  # rounded to none, which has no sign


def number(value: object) -> str:
    """Any recipe or environment value; floats short, sequences with commas."""
    match value:
        case None:
            return ABSENT
        case bool():  # before numbers: in Python it is one
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case tuple() | list():
            return ", ".join(map(number, value))
        case _:
            return str(value)
