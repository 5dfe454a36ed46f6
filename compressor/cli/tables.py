"""What a command found, as tables and closing lines on stderr; the JSON line on stdout is the commands' own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from ..recipe import Recipe
from ..records import Group, Groups
from .screen import console, percent, say_lines, warn

if TYPE_CHECKING:  # these bring torch
    from ..benchmarking.records import Summary as BenchmarkSummary
    from ..pipeline import Run
    from ..searching.outcome import SearchSummary
    from ..shipping import Outcome

# what `compress` and its prediction print as JSON; `delivery.summary` and `inspecting` say what is in it
Summary = Mapping[str, Any]
Overflow = Literal["fold", "ellipsis"]  # what becomes of words that a column is too narrow for
SHOWN_LAYERS = 3  # of a group; the others are counted


def counted(number: int, noun: str) -> str:
    """`1 group`, `2 groups`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _table(
    title: str, columns: Sequence[str], *, numbers: Collection[str] = (), overflow: Overflow = "ellipsis"
) -> Table:
    """An empty table; the columns that `numbers` names stand to the right."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow=overflow)
    return table


def units(recipe: Recipe, groups: Groups, image_size: str) -> None:
    """Groups, what was left alone and which images fit, on stdout: it is what was asked for."""
    title = f"{recipe.model}: {counted(len(groups.groups), 'group')} of units that go together"
    columns = ("group", "kind", "units", "layers that produce them", "not exact at")
    table = _table(title, columns, numbers=("units",), overflow="fold")
    for group in groups.groups:
        kind = group.kind if group.kind in recipe.units else f"{group.kind} (not in --units)"
        table.add_row(group.name, kind, str(group.size), _producers(group), ", ".join(group.inexact[:2]))
    title = f"{counted(len(groups.left_alone), 'layer')} left alone"
    left_alone = _table(title, ("layer", "operation", "why"), overflow="fold")
    for layer in groups.left_alone:
        left_alone.add_row(layer.layer, layer.operation, layer.reason)
    out = Console()
    out.print(table)
    out.print(left_alone)
    out.print(f"size of images: {image_size}", highlight=False, soft_wrap=True)


def _producers(group: Group) -> str:
    """`conv1, conv2, conv3 and 4 more`."""
    layers = list(dict.fromkeys(site.layer for site in group.sites))
    first = ", ".join(layers[:SHOWN_LAYERS])
    if len(layers) <= SHOWN_LAYERS:
        return first
    return f"{first} and {len(layers) - SHOWN_LAYERS} more"


def names(title: str, rows: list[tuple[str, str]]) -> None:
    """A list of names and what they are, on stdout."""
    table = Table(title=title)
    table.add_column("name", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, description in rows:
        table.add_row(name, description)
    Console().print(table)


def predicted(prediction: Summary, recipe: Recipe) -> None:
    """What `pipeline.predict` says: costs as a table, then what it would work with, and its warnings."""
    size = " x ".join(map(str, prediction["size"]))
    numbers = ("dense", "shipped", "kept")
    table = _table(f"{prediction['model']} at {size}, predicted", ("", *numbers), numbers=numbers)
    table.add_row("MMACs", *_predicted_cells(prediction, "macs", 1e6))
    table.add_row("thousand parameters", *_predicted_cells(prediction, "params", 1e3))
    console.print(table)

    images = "not named"
    if prediction["images"] is not None:
        images = ", ".join(f"{count} {name}" for name, count in prediction["images"].items() if count)
    groups = counted(prediction["groups"], "group")
    left_alone = counted(len(prediction["left_alone"]), "layer")
    units_text = "nothing would be removed" if recipe.as_it_is else f"{groups} of units, {left_alone} left alone"
    say_lines([f"{units_text}; images: {images}; budget: {recipe.budget}; folder: {recipe.folder}"])
    warn(prediction["warnings"])


def _predicted_cells(prediction: Summary, cost: str, unit: float) -> tuple[str, str, str]:
    """Dense, shipped and share kept of `macs` or `params`; `unit` is 1e6 for millions."""
    dense, shipped = prediction[f"{cost}_dense"], prediction.get(f"{cost}_predicted")
    if shipped is None:  # a latency budget leaves both open until layers are timed
        return f"{dense / unit:,.2f}", "measured in the run", ""
    return f"{dense / unit:,.2f}", f"{shipped / unit:,.2f}", f"{shipped / dense:.1%}"


def benchmarked(summary: BenchmarkSummary) -> None:
    """What `benchmarking.benchmark` returns: speed-ups, changes against another benchmark, what was not run."""
    busy = f"; {summary['busy']}" if summary["busy"] else ""
    title = f"speed-up over dense, by medians (95 % interval){busy}"
    table = _table(title, ("runtime", "scenario", "subject", "speed-up"), numbers=("speed-up",))
    for cells in _speed_up_cells(summary):
        table.add_row(*cells)
    if table.row_count:
        console.print(table)

    for name, runtime, scenario, ratio, low, high in summary["changes"]:
        text = f"{name} on {runtime}, {scenario}: {ratio:.2f}× as fast as before ({low:.2f}–{high:.2f})"
        console.print(text, highlight=False)
    if summary["busy"]:
        warn([f"{summary['busy']} when the timing began: times and ratios may be off; measure again on a quiet one"])
    say_lines(f"not run: {line}" for line in summary["not_run"])
    say_lines([f"page: {summary['page']}"])


def _speed_up_cells(summary: BenchmarkSummary) -> Iterator[tuple[str, str, str, str]]:
    """Runtime, scenario, subject and speed-up with its interval."""
    for runtime, scenarios in summary["speed_up"].items():
        for scenario, subjects in scenarios.items():
            for name, (ratio, low, high) in subjects.items():
                yield runtime, scenario, name, f"{ratio:.2f}× ({low:.2f}–{high:.2f})"


def compressed(run: Run) -> None:
    """A finished run's summary: dense against shipped, then `_closing_lines`."""
    summary = run.summary
    removed = "nothing was removed"
    if summary["shipped"] != "dense":
        removed = f"{summary['macs_kept']:.1%} of the MACs kept"
    numbers = ("dense", "shipped")
    table = _table(f"{summary['model']}, {summary['task']}: {removed}", ("", *numbers), numbers=numbers)
    _add_accuracies(table, summary)
    table.add_row("MMACs", f"{summary['macs_dense'] / 1e6:.2f}", f"{summary['macs_shipped'] / 1e6:.2f}")
    table.add_row("parameters", f"{summary['params_dense']:,}", f"{summary['params_shipped']:,}")
    table.add_row("ONNX, bytes", f"{summary['onnx_bytes_dense']:,}", f"{summary['onnx_bytes_shipped']:,}")
    for name, file in summary["precisions"].items():
        if file["precision"] != "fp32":
            quality = _quality(file["accuracy"], is_share=summary["is_share"])
            table.add_row(name, "", f"{file['bytes']:,} bytes, {quality}")
    for runtime, batches in summary["latency_ms"].items():
        for batch, statistics in batches.items():
            table.add_row(f"{runtime}, batch {batch}, p50 ms", *_latency_cells(statistics))
    if summary["busy"]:
        table.caption = f"{summary['busy']} when the timing began"
    console.print(table)
    _closing_lines(summary)


def shipped(release: str, outcomes: Sequence[Outcome], page: Path | None) -> None:
    """What came of shipping: a row for each device and timed model, then why some did not get it, and the page."""
    columns = ("device", "result", "runs now", "model", "p50 ms", "copied")
    title = f"{release} on {counted(len(outcomes), 'device')}"
    table = _table(title, columns, numbers=("p50 ms", "copied"), overflow="fold")
    for outcome in outcomes:
        copied = f"{outcome.copied_bytes / 1e6:.2f} MB"
        state = (outcome.device.name, outcome.result, outcome.current or "nothing")
        _add_device(table, state, outcome.latency, copied)
    console.print(table)
    warn(str(outcome.error) for outcome in outcomes if outcome.error is not None)
    if page:
        say_lines([f"page: {page}"])


def _add_device(table: Table, state: Sequence[str], latency: Sequence[Mapping[str, Any]], last: str) -> None:
    """A row for each model that a device timed, at least one; what is of the device stands in the first of them."""
    timed = [(f"{row['model']} on {row['runtime']}", f"{row['p50_ms']:.3f}") for row in latency]
    first, *others = timed or [("", "")]
    table.add_row(*state, *first, last)
    for cells in others:
        table.add_row(*[""] * len(state), *cells, "")


def running(rows: Sequence[Mapping[str, Any]]) -> None:
    """What runs on each device, on stdout: it is what was asked for."""
    from ..shipping import age_s, in_words

    columns = ("device", "address", "runs", "since", "model", "p50 ms", "answered")
    table = _table(counted(len(rows), "device"), columns, numbers=("p50 ms",), overflow="fold")
    for row in rows:
        answered = "now"
        if row["failure"]:
            answered = f"no: last {in_words(age_s(row['when_asked']))}" if row["when_asked"] else "never"
        since = in_words(age_s(row["when"])) if row["when"] else ""
        state = (row["device"], row["address"], row["release"] or "nothing", since)
        _add_device(table, state, row["latency"], answered)
    Console().print(table)
    warn(row["failure"] for row in rows)


def swept(summary: Summary) -> None:
    """A finished sweep's summary: a row for each budget, then why some gave none."""
    metric, is_share = summary["dense"].get("metric", "top-1"), summary["dense"].get("is_share", True)
    numbers = (metric, "MMACs", "parameters")
    title = f"{summary['model']}: {counted(len(summary['points']), 'budget')}"
    table = _table(title, ("budget", *numbers, "bundle"), numbers=numbers)
    table.add_row("dense", *_swept_cells(summary["dense"], is_share=is_share))
    for row in summary["points"]:
        table.add_row(row["budget"], *_swept_cells(row, is_share=is_share))
    console.print(table)
    warn(f"{row['budget']}: {row['failure']}" for row in summary["points"] if row["failure"])
    say_lines([f"page: {summary['page']}"])


def _swept_cells(row: Summary, *, is_share: bool) -> tuple[str, str, str, str]:
    """Quality, MACs in millions, parameters and bundle; empty where a run came to none."""
    accuracy = ""
    if row.get("accuracy") is not None:
        accuracy = _quality(row["accuracy"], is_share=is_share)
    macs = f"{row['macs'] / 1e6:.2f}" if "macs" in row else ""
    parameters = f"{row['params']:,}" if "params" in row else ""
    return accuracy, macs, parameters, row.get("bundle", "")


def _add_accuracies(table: Table, summary: Summary) -> None:
    """The shipped network's, below it those of the networks on the way there, and how near its answers are to dense."""
    from ..report import facts  # brings jinja2, which most commands do without

    metric, is_share = facts.metric_in_words(summary["metric"]), summary["is_share"]
    dense = _quality(summary["accuracy_dense"], is_share=is_share)
    shipped = _quality(summary["accuracy_shipped"], is_share=is_share)
    held_out = f"{metric}, {summary['evaluation_images']:,} held out"
    table.add_row(held_out, dense, f"{shipped} ({summary['shipped']})")
    for name in ("removed", "repaired", "tuned", "trained"):
        accuracy = summary.get(f"accuracy_{name}")
        if accuracy is not None:
            table.add_row(f"  {name}", "", _quality(accuracy, is_share=is_share))
    if summary["metric"] != facts.FIDELITY:
        words = facts.metric_in_words(facts.FIDELITY)
        table.add_row(f"{words} (1: the same)", "", f"{summary['fidelity_shipped']:.3f}")
    if summary.get("explanation_shipped") is not None:
        table.add_row("explanation, ranks (1: the same)", "", f"{summary['explanation_shipped']:.3f}")


def _quality(figure: float, *, is_share: bool) -> str:
    """By the run's measure: per cent of a share, else the number."""
    return f"{figure:.2%}" if is_share else f"{figure:.2f}"


def _latency_cells(statistics: Mapping[str, Mapping[str, float]]) -> tuple[str, str]:
    """p50 of the dense file, and of the shipped ones: `0.412, fp16 0.409, int8 0.201`; by subject as measured."""
    medians = {subject: f"{percentiles['p50']:.3f}" for subject, percentiles in statistics.items()}
    shipped = [medians["shipped"]] if "shipped" in medians else []
    for subject, median in medians.items():
        if "-" in subject:
            shipped.append(f"{subject.removeprefix('shipped-')} {median}")
    return medians.get("dense", ""), ", ".join(shipped)


def _closing_lines(summary: Summary) -> None:
    """Below the table: why this network ships, gates, what was not done, what is where, and what comes next."""
    if summary["choice"]:
        say_lines([summary["choice"]])
    say_lines([_gates_line(summary["gates"])])
    say_lines(f"not checked: {line}" for line in summary["not_checked"])
    warn(summary["warnings"])
    folder = Path(summary["run_dir"])
    say_lines([f"report: {folder / 'report.html'}", f"next: compressor verify {folder / 'bundle'}"])


def _gates_line(states: Mapping[str, str]) -> str:
    """States by gate; none has failed, since the run would have ended with an error."""
    gates = counted(len(states), "gate")
    doubtful = [name for name, state in states.items() if state != "passed"]
    if not doubtful:
        return f"all {gates} passed"
    passed = len(states) - len(doubtful)
    why = "within the limit, which these images are no proof of: see the warnings"
    return f"{passed} of {gates} passed; not shown ({why}): {'; '.join(doubtful)}"


def searched(summary: SearchSummary) -> None:
    """A finished search's summary: areas of the chosen recipe and of the presets, on each part of the images."""
    image_parts = list(summary["area"])
    told = percent if summary["is_share"] else "{:.2f}".format
    title = f"{Path(summary['model']).name}: {summary['trials']} trials, best {summary['best']}"
    numbers = [f"{image_part} images" for image_part in image_parts]
    table = _table(title, (f"area under {summary['metric']} over MACs kept", *numbers), numbers=numbers)
    areas_by_name = dict(summary["area_presets"])
    if summary["best"] not in areas_by_name:
        areas_by_name = {summary["best"]: summary["area"], **areas_by_name}
    for name, areas in areas_by_name.items():
        chosen = " (chosen)" if name == summary["best"] else ""
        table.add_row(name + chosen, *(told(areas[image_part]) for image_part in image_parts))
    console.print(table)
    console.print(f"recipe: {summary['recipe']}", highlight=False, soft_wrap=True)
    console.print(f"report: {Path(summary['run_dir']) / 'search.html'}", highlight=False, soft_wrap=True)
    warn(summary["lost_workers"])
