"""What the report says, in order, as sections of sentences, tables and figures; no markup.

In: `ReportInput` and the names of the plots that could be drawn. Out: `Section`s that Markdown and HTML
both print. What was not done is said where it would have stood, and again in a section of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from . import facts, tables
from .contents import AccuracyRow, LatencyRow, ParetoPoint, PictureRow, ReportInput
from .tables import Table


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot by the name its PNG has in `images`; `alt` is for who can't see it."""

    name: str
    alt: str
    caption: str


@dataclass(frozen=True, slots=True)
class Section:
    """Sentences, then tables and figures in `parts`; `anchor` is the link's end in the page."""

    anchor: str
    title: str
    text: tuple[str, ...]
    parts: tuple[Table | Figure, ...] = ()


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """One number on top of the page, and a line below it."""

    label: str
    value: str
    detail: str


def build_sections(run: ReportInput, plots: Collection[str]) -> tuple[Section, ...]:
    """All sections in their order; `plots` names those that could be drawn, the figures of others are left out."""
    builders: tuple[Callable[[ReportInput], Section], ...] = (
        _gates, _removed, _cost, _seen, _gain, _time, _not_done, _how,
    )  # fmt: skip
    return tuple(_without_missing_plots(build(run), plots) for build in builders)


def _without_missing_plots(section: Section, plots: Collection[str]) -> Section:
    shown = tuple(element for element in section.parts if _has_content(element, plots))
    return Section(section.anchor, section.title, section.text, shown)


def _has_content(element: Table | Figure, plots: Collection[str]) -> bool:
    if isinstance(element, Figure):
        return element.name in plots
    return bool(element.rows)


def subtitle(run: ReportInput) -> str:
    """What the network's answers were taken for and why; where that was a guess, how to say otherwise."""
    if not run.task_reason:
        return ""
    colon = "" if run.task_reason.startswith("taken as") else ":"
    words = f"Task{colon} {run.task_reason}"
    if "say task=" in words:
        words += " (--task on the command line)"
    return f"{words}."


def verdict(run: ReportInput) -> tuple[str, ...]:
    """The first sentences: what went, what it cost, what it bought, whether it may ship."""
    return _removal_sentence(run), _accuracy_sentence(run), _speed_sentence(run), _gate_sentence(run)


_NOTHING_REMOVED = "Nothing was removed: the network ships as it is."
_TRAINED_ALONE = "Nothing was removed: the network ships with the weights of your training."


def _removal_sentence(run: ReportInput) -> str:
    if run.as_it_is:
        return _NOTHING_REMOVED
    if run.whole:
        return _TRAINED_ALONE
    macs = facts.removed_share(run.cost_dense.macs, run.cost_shipped.macs)
    parameters = facts.removed_share(run.cost_dense.parameters, run.cost_shipped.parameters)
    return f"{facts.percent(macs)} of the MACs and {facts.percent(parameters)} of the parameters were removed."


def _before_and_after(run: ReportInput) -> tuple[AccuracyRow, AccuracyRow] | None:
    """The dense network's accuracy and that of what ships, which is the dense one's where nothing was removed.

    None where not both were measured.
    """
    dense = facts.dense_accuracy(run)
    final = dense if run.as_it_is else facts.final_accuracy(run)
    if dense is None or final is None:
        return None
    return dense, final


def _accuracy_sentence(run: ReportInput) -> str:
    pair = _before_and_after(run)
    if pair is None:
        return "Accuracy before and after was not measured."
    dense, final = pair
    metric = facts.metric_title(dense.accuracy.metric)
    images = f"{final.accuracy.n:,} {final.images} images"
    after = facts.value_of(final.accuracy)
    if run.as_it_is:
        return f"{metric} on {images} is {after}."

    before = facts.value_of(dense.accuracy)
    lost = facts.loss_of(dense.accuracy, dense.accuracy.lost(final.accuracy))
    unit = " points" if dense.accuracy.is_share else ""
    reached = facts.reached(run, final.variant)
    return f"{metric} on {images} went from {before} to {after} ({lost}{unit}, {reached})."


def _speed_sentence(run: ReportInput) -> str:
    ratios_by_place = _ratios_by_place(run)
    if ratios_by_place:
        listed = "; ".join(f"{place} {', '.join(ratios)}" for place, ratios in ratios_by_place.items())
        care = f" Not to be relied on ({run.busy} when the timing began)." if run.busy else ""
        return f"Speed against dense, by median latency: {listed}.{care}"
    if run.as_it_is and run.latency:
        medians = "; ".join(f"{_place(row)} {_median(row)}" for row in run.latency)
        return f"Median latency: {medians}."
    return "Latency was not measured, so nothing is said about speed."


def _ratios_by_place(run: ReportInput) -> dict[str, list[str]]:
    """How much faster than dense the last network is, in each precision, by runtime and batch."""
    last_variant = facts.last_variant(run)
    ratios_by_place: dict[str, list[str]] = {}
    for dense, row in facts.latency_pairs(run):
        if row.variant == last_variant:
            ratio = f"{facts.speed_up(dense, row):.2f}×{_unless_fp32(row.precision)}"
            ratios_by_place.setdefault(_place(row), []).append(ratio)
    return ratios_by_place


def _place(row: LatencyRow) -> str:
    return f"{row.runtime} at batch {row.batch}"


def _median(row: LatencyRow) -> str:
    return f"{facts.milliseconds(facts.median_ms(row))} ms"


def _unless_fp32(precision: str) -> str:
    return "" if precision == "fp32" else f" in {precision}"


def _gate_sentence(run: ReportInput) -> str:
    failed = failures(run)
    if failed:
        return f"Failed: {'; '.join(name for name, _ in failed)}. This result should not ship."
    if not run.gates:
        return "No gate was checked."
    doubtful = [gate.name for gate in run.gates if gate.doubt]
    if not doubtful:
        return f"All {len(run.gates)} gates passed."
    passed = len(run.gates) - len(doubtful)
    return f"{passed} of {len(run.gates)} gates passed; not shown: {'; '.join(doubtful)}."


def failures(run: ReportInput) -> tuple[tuple[str, str], ...]:
    """Name and remedy of every failed gate, and of parity limits that fail without a gate saying so."""
    gates = tuple((gate.name, gate.remedy) for gate in run.gates if gate.failed)
    if any("parity" in name.lower() for name, _ in gates):
        return gates
    remedy = "Its outputs differ from the reference's by more than the limit; do not use this file."
    parity = tuple((f"parity of {tables.conditions(row)}", remedy) for row in run.parity if not row.passed)
    return gates + parity


def key_figures(run: ReportInput) -> tuple[KeyFigure, ...]:
    """Costs, accuracy and fidelity where they were measured, and at most three latencies."""
    dense, shipped = run.cost_dense, run.cost_shipped
    return (
        _cost_figure("MACs", dense.macs, shipped.macs),
        _cost_figure("Parameters", dense.parameters, shipped.parameters),
        *_accuracy_figure(run),
        *_fidelity_figure(run),
        *(_latency_figure(run, reference, row) for reference, row in _headline_pairs(run)),
    )


def _cost_figure(label: str, dense: int, shipped: int) -> KeyFigure:
    if dense == shipped:
        return KeyFigure(label, facts.count(shipped), "as in the dense network")
    removed = facts.percent(facts.removed_share(dense, shipped))
    return KeyFigure(label, facts.count(shipped), f"dense {facts.count(dense)}; {removed} removed")


def _accuracy_figure(run: ReportInput) -> list[KeyFigure]:
    """One figure, or none where accuracy was not measured before and after."""
    pair = _before_and_after(run)
    if pair is None:
        return []
    dense, final = pair
    detail = f"dense {facts.value_of(dense.accuracy)}; 95 % interval {facts.interval_of(final.accuracy)}"
    return [KeyFigure(facts.metric_title(dense.accuracy.metric), facts.value_of(final.accuracy), detail)]


def _fidelity_figure(run: ReportInput) -> list[KeyFigure]:
    """One figure, or none where fidelity is the measure itself or was not taken."""
    figure = facts.fidelity_of(run)
    if figure is None:
        return []
    return [KeyFigure("Fidelity to the dense network", f"{figure.value:.3f}", facts.MEANING_OF_FIDELITY)]


def _latency_figure(run: ReportInput, reference: LatencyRow, row: LatencyRow) -> KeyFigure:
    crowd = ", busy machine" if run.busy else ""
    place = f"{row.runtime}{_unless_fp32(row.precision)}{crowd}"
    return KeyFigure(f"p50, batch {row.batch}", _median(row), f"dense {_median(reference)}; {place}")


def _headline_pairs(run: ReportInput) -> list[tuple[LatencyRow, LatencyRow]]:
    """The first two timings in fp32 and the fastest of the other precisions at the first one's conditions."""
    pairs = list(facts.latency_pairs(run))
    if run.as_it_is:  # the dense network's own, beside the other precisions
        pairs += [(row, row) for row in run.latency if row.precision == "fp32"]
    in_fp32 = [pair for pair in pairs if pair[1].precision == "fp32"][:2]
    if not in_fp32:
        return []
    _, first = in_fp32[0]
    reduced = [pair for pair in pairs if pair[1].precision != "fp32" and _place(pair[1]) == _place(first)]
    fastest_first = sorted(reduced, key=lambda pair: facts.median_ms(pair[1]))
    return in_fp32 + fastest_first[:1]


def _gates(run: ReportInput) -> Section:
    text = "No gate was checked in this run."
    if run.gates:
        text = (
            "A gate is a limit stated in the recipe before the run; a failed one ends it with an error. One that is "
            "not shown was kept on images that can't tell."
        )
    return Section("gates", "Gates", (text,), (tables.gate_table(run),))


def _removed(run: ReportInput) -> Section:
    if run.as_it_is:
        return Section("removed", "What was removed, and why", (_NOTHING_REMOVED,))
    score_name = facts.worth(run)
    text = [_removed_sentences(run)]
    if run.criterion:
        text.append(
            f"Ranked by {run.criterion} over {run.samples:,} calibration images; budget: {run.budget or 'none'}."
        )
    if score_name != "relevance":
        text.append(_MEASURED)
    scores_alt = f"Dots: {score_name} of kept and of removed units by group"
    elements: tuple[Table | Figure, ...] = (
        tables.branch_table(run),
        tables.depth_table(run),
        Figure("removed", "Bars: share of units kept in every group", "Units kept and removed, group by group."),
        tables.group_table(run),
        Figure("relevance", scores_alt, score_name.capitalize() + _OF_UNITS),
        Figure("layers", "Bars: MACs of every layer before and after", "MACs by layer, dense and shipped."),
        tables.layer_table(run),
        tables.left_alone_table(run),
    )
    return Section("removed", "What was removed, and why", tuple(text), elements)


def _removed_sentences(run: ReportInput) -> str:
    units = sum(group.size for group in run.groups)
    removed = sum(group.size - len(group.kept) for group in run.groups)
    changed = sum(len(group.kept) < group.size for group in run.groups)
    blocks = ""
    if run.depth.gone:
        blocks = f"{facts.counted(len(run.depth.gone), 'block')} went whole; of what was left, "
    return (
        f"{blocks}{removed:,} of {units:,} units went, from {changed} of {len(run.groups)} groups. A group is a set of "
        "units that the network ties together, over one layer or many; a unit is gone from all of them at once."
    )


_MEASURED = (
    "How many units a group gives up was measured: each group alone was cut to four sizes and repaired, and the error "
    "of the network's outputs counts, per MAC saved. Those units went first whose work the others take over, where "
    "the criterion says what a layer's outputs count for."
)
_OF_UNITS = (
    " of every unit as a share of its group's largest. Where kept and removed overlap, the saving per unit, "
    "a rounding to the target's width or a limit per group decided."
)


def _cost(run: ReportInput) -> Section:
    text = (
        "" if run.accuracy else "Quality was not measured.",
        run.choice,
        run.recovered,
        "" if run.parity else "Parity between runtimes was not measured.",
    )
    metric = facts.metric_in_words(facts.metric_of(run))
    trade = Figure(
        "trade",
        f"Points: {metric} against the share of MACs kept",
        f"{tables.accuracy_title(run)} against the MACs kept; the ring is what ships.",
    )
    elements = (
        tables.accuracy_table(run),
        tables.fidelity_table(run),
        *_recovery(run),
        trade,
        tables.repair_table(run),
        tables.parity_table(run),
    )
    return Section("cost", "What it cost", _said(text), elements)


def _said(sentences: Iterable[str]) -> tuple[str, ...]:
    """Those that are not empty."""
    return tuple(filter(None, sentences))


def _recovery(run: ReportInput) -> tuple[Table | Figure, ...]:
    """What its minutes brought; nothing without any."""
    if not run.recovery:
        return ()
    caption = "Fidelity on held-out images over the time of recovery; the ring is the network that was kept."
    return Figure("recovery", "Curve: fidelity to the dense network over minutes", caption), tables.recovery_table(run)


def _seen(run: ReportInput) -> Section:
    survived = _survived(run)
    if not run.pictures:
        return Section("seen", "What it sees", (*survived, "No picture was drawn."))
    images = facts.counted(len(run.pictures), "image")
    text = (
        *survived,
        f"The {images} of {run.pictured_of:,} on which the shipped network differs most from the dense one, the "
        "farthest off first: the worst that was looked at, and not typical. Above, what both answer "
        f"({run.pictures[0].shows}); below, in each network, which pixels speak for {_spoken_for(run)} (warm colours) "
        f"and against it (cold ones).{_of_masks(run)}",
    )
    return Section("seen", "What it sees", text, tuple(map(_picture, run.pictures)))


def _of_masks(run: ReportInput) -> str:
    """Where a selector was learned, what the last row of a picture is."""
    if run.selector_masks is None:
        return ""
    return " Last, what the learned selector shows of the image by what each network finds in it."


def _survived(run: ReportInput) -> tuple[str, ...]:
    """One sentence; none where it was not measured."""
    figure = run.explanation
    if figure is None:
        return ()
    images = facts.counted(figure.n, "evaluation image")
    return (
        f"How well the explanation survived: {figure.value:.2f} ({figure.low:.2f} to {figure.high:.2f}), the rank "
        f"correlation of what each place of the input is worth to both networks, in the mean over {images}; 1 is the "
        "same order, 0 none.",
        *_masks_survived(run),
    )


def _masks_survived(run: ReportInput) -> tuple[str, ...]:
    """One sentence; none where no selector was learned."""
    masks = run.selector_masks
    if masks is None:
        return ()
    interval = f"{masks.low:.2f} to {masks.high:.2f}"
    return (f"The selector's masks in both networks share {masks.value:.2f} ({interval}) of what either shows.",)


_DECIDING = ("classification", "multi-label", "segmentation")  # both networks are asked for the same decision


def _spoken_for(run: ReportInput) -> str:
    return "the dense network's answer" if run.task in _DECIDING else "its own answer"


def _picture(row: PictureRow) -> Figure:
    caption = f"Image '{row.image}': distance {row.distance:.3g}, where 1 is as far off as the mean answer."
    return Figure(row.name, f"Image, answers and relevance of both networks: {row.image}", caption)


def _gain(run: ReportInput) -> Section:
    text = (
        "" if run.latency else "Latency was not measured.",
        "" if run.engines else "No engine was built.",
    )
    elements: list[Table | Figure] = [tables.latency_table(run)]
    for runtime in facts.timed_runtimes(run):
        alt = f"Curves: share of runs finished by a given time on {runtime}, dense and shipped"
        elements.append(Figure(f"latency-{slug(runtime)}", alt, _LATENCY_CAPTION.format(runtime=runtime)))
    metric = facts.metric_in_words(facts.metric_of(run))
    pareto_alt = f"Points: {metric} against median latency of every file"
    elements.append(Figure("pareto", pareto_alt, pareto_caption(run.pareto)))
    elements += [tables.cost_table(run), tables.file_table(run), tables.precision_table(run), tables.engine_table(run)]
    return Section("gain", "What it bought", _said(text), tuple(elements))


def pareto_caption(points: Sequence[ParetoPoint]) -> str:
    """How to read the plot; which points lie on the front, or the only one that does."""
    metric = points[0].accuracy.metric if points else "top-1"
    name = "accuracy" if metric == "top-1" else facts.metric_in_words(metric)
    return (
        f"{facts.capitalised(name)} against median latency, every file where it was timed; up and to the left is "
        f"better; {_front_clause(points)}. Bars: 95 % interval of the {name}."
    )


def _front_clause(points: Sequence[ParetoPoint]) -> str:
    front = facts.pareto_front(points)
    if not front:
        return ""
    if len(front) == 1:  # one point makes no line
        return f"none beats {front[0].label} in both"
    return "the grey line joins those that no other beats in both"


_LATENCY_CAPTION = "{runtime}: share of runs finished within a time, every sample shown; further left is faster."


def slug(text: str) -> str:
    """For names of files and links: letters and digits in lower case, a hyphen for all between them."""
    spaced = "".join(letter if letter.isalnum() else " " for letter in text.lower())
    return "-".join(spaced.split())


def _time(run: ReportInput) -> Section:
    slowest = tables.slowest_table(run)
    text = () if slowest.rows else ("Layers were not timed one by one.",)
    bars = Figure("time", "Bars: milliseconds of the slowest layers, dense and shipped", _TIME_CAPTION)
    return Section("time", "Where time still goes", text, (bars, slowest))


_TIME_CAPTION = "Profiled time of the slowest layers of the shipped network, and what they take in the dense one."


def _not_done(run: ReportInput) -> Section:
    lines = dict.fromkeys(_undone(run))  # each once
    text = () if lines else ("Nothing was left out.",)
    table = tables.lines_table("Not checked, not scored, not counted", "what", lines)
    return Section("not-done", "What was not done", text, (table,))


def _undone(run: ReportInput) -> list[str]:
    uncounted = sorted({*run.cost_dense.uncounted, *run.cost_shipped.uncounted})
    lines = [*run.not_checked]
    lines += [f"{engine.name}: {engine.status}" for engine in run.engines if "not run" in engine.status]
    lines += [f"group {name} was not scored, so all its units stayed" for name in run.unscored]
    lines += [f"operation {name} has no relevance rule; it was passed by input x gradient" for name in run.uncovered]
    lines += [f"operation {name} could not be counted, so MACs are a lower bound" for name in uncounted]
    lines += [f"layer {facts.layer_name(row.layer)} was not repaired: {row.reason}" for row in run.repair.left_alone]
    if run.left_alone:
        were = "was" if len(run.left_alone) == 1 else "were"
        lines.append(f"{facts.counted(len(run.left_alone), 'layer')} {were} left alone, for the reason given above")
    return lines


def _how(run: ReportInput) -> Section:
    elements = (
        tables.job_table(run),
        tables.pairs_table("Recipe", run.recipe),
        tables.pairs_table("Images", run.splits),
        tables.pairs_table("Environment", run.environment),
    )
    return Section("how", "How it was made", (), elements)
