"""What a command found, as tables and closing lines on stderr; the JSON line on stdout is the commands' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..recipe import Recipe
from ..records import Groups
from .screen import console, percent, say_lines, warn

SHOWN_LAYERS = 3  # of a group; the others are counted


def counted(number: int, what: str) -> str:
    """`1 group`, `2 groups`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def units(recipe: Recipe, groups: Groups) -> None:
    """Groups and what was left alone, on stdout: it is what was asked for."""
    table = Table(title=f"{recipe.model}: {counted(len(groups.groups), 'group')} of units that go together")
    for column in ("group", "kind", "units", "layers that produce them", "not exact at"):
        table.add_column(column, justify="right" if column == "units" else "left", overflow="fold")
    for group in groups.groups:
        layers = list(dict.fromkeys(site.layer for site in group.sites))
        others = f" and {len(layers) - SHOWN_LAYERS} more" if len(layers) > SHOWN_LAYERS else ""
        producers = ", ".join(layers[:SHOWN_LAYERS]) + others
        table.add_row(group.name, group.kind, str(group.size), producers, ", ".join(group.inexact[:2]))
    left_alone = Table(title=f"{counted(len(groups.left_alone), 'layer')} left alone")
    for column in ("layer", "operation", "why"):
        left_alone.add_column(column, overflow="fold")
    for layer in groups.left_alone:
        left_alone.add_row(layer.layer, layer.operation, layer.reason)
    out = Console()
    out.print(table)
    out.print(left_alone)


def names(title: str, rows: list[tuple[str, str]]) -> None:
    """A list of names and what they are, on stdout."""
    table = Table(title=title)
    table.add_column("name", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, about in rows:
        table.add_row(name, about)
    Console().print(table)


def predicted(found: dict[str, Any], recipe: Recipe) -> None:
    table = Table(title=f"{found['model']} at {' x '.join(map(str, found['size']))}, predicted")
    for column in ("", "dense", "shipped", "kept"):
        table.add_column(column, justify="right" if column else "left")
    for name, unit, factor in (("macs", "MMACs", 1e6), ("params", "thousand parameters", 1e3)):
        before, after = found[f"{name}_dense"], found.get(f"{name}_predicted")
        shown = ("measured in the run", "") if after is None else (f"{after / factor:,.2f}", f"{after / before:.1%}")
        table.add_row(unit, f"{before / factor:,.2f}", *shown)
    console.print(table)
    images = found["images"]
    counts = "not named" if images is None else ", ".join(f"{n} {name}" for name, n in images.items() if n)
    groups = f"{counted(found['groups'], 'group')} of units, {counted(len(found['left_alone']), 'layer')} left alone"
    say_lines([f"{groups}; images: {counts}; budget: {recipe.budget}; folder: {recipe.folder}"])
    warn(found["warnings"])


def benchmarked(found: dict[str, Any]) -> None:
    busy = f"; {found['busy']}" if found["busy"] else ""
    table = Table(title=f"speed-up over dense, by medians (95 % interval){busy}")
    for column in ("runtime", "scenario", "subject", "speed-up"):
        table.add_column(column, justify="right" if column == "speed-up" else "left")
    for runtime, scenarios in found["speed_up"].items():
        for scenario, subjects in scenarios.items():
            for name, (ratio, low, high) in subjects.items():
                table.add_row(runtime, scenario, name, f"{ratio:.2f}× ({low:.2f}–{high:.2f})")
    if table.row_count:
        console.print(table)
    for name, runtime, scenario, ratio, low, high in found["changes"]:
        text = f"{name} on {runtime}, {scenario}: {ratio:.2f}× as fast as before ({low:.2f}–{high:.2f})"
        console.print(text, highlight=False)
    if found["busy"]:
        warn([f"{found['busy']} when the timing began: times and ratios may be off; measure again on a quiet one"])
    say_lines([*(f"not run: {line}" for line in found["not_run"]), f"page: {found['page']}"])


def compressed(run: Any) -> None:
    s = run.summary
    table = Table(title=f"{s['model']}: {s['macs_kept']:.1%} of the MACs kept")
    for column in ("", "dense", "shipped"):
        table.add_column(column, justify="left" if not column else "right")
    shipped = f"{s['accuracy_shipped']:.2%} ({s['shipped']})"
    table.add_row(f"top-1, {s['evaluation_images']:,} held out", f"{s['accuracy_dense']:.2%}", shipped)
    for name in ("removed", "repaired", "tuned"):
        if s[f"accuracy_{name}"] is not None:
            table.add_row(f"  {name}", "", f"{s[f'accuracy_{name}']:.2%}")
    table.add_row("MMACs", f"{s['macs_dense'] / 1e6:.2f}", f"{s['macs_shipped'] / 1e6:.2f}")
    table.add_row("parameters", f"{s['params_dense']:,}", f"{s['params_shipped']:,}")
    table.add_row("ONNX, bytes", f"{s['onnx_bytes_dense']:,}", f"{s['onnx_bytes_shipped']:,}")
    for name, about in s["precisions"].items():
        if about["precision"] != "fp32":
            table.add_row(f"{name}", "", f"{about['bytes']:,} bytes, {about['accuracy']:.2%}")
    for runtime, batches in s["latency_ms"].items():
        for batch, at in batches.items():
            cells = [f"{name.removeprefix('shipped-')} {t['p50']:.3f}" for name, t in at.items() if "-" in name]
            own = [f"{at['shipped']['p50']:.3f}"] if "shipped" in at else []
            dense = f"{at['dense']['p50']:.3f}" if "dense" in at else ""
            table.add_row(f"{runtime}, batch {batch}, p50 ms", dense, ", ".join(own + cells))
    if s["busy"]:
        table.caption = f"{s['busy']} when the timing began"
    console.print(table)
    _after(s)


def _after(s: dict[str, Any]) -> None:
    """Below the table: why this network ships, gates, what was not done, what is where, and what comes next."""
    folder, gates = Path(s["run_dir"]), s["gates"]
    doubtful = [name for name, state in gates.items() if state != "passed"]
    passed = f"all {counted(len(gates), 'gate')} passed"
    if doubtful:
        passed = (
            f"{len(gates) - len(doubtful)} of {counted(len(gates), 'gate')} passed; not shown: {'; '.join(doubtful)}"
        )
    say_lines([*([s["choice"]] if s["choice"] else []), passed])
    say_lines(f"not checked: {line}" for line in s["not_checked"])
    warn(s["warnings"])
    say_lines([f"report: {folder / 'report.html'}", f"next: compressor verify {folder / 'bundle'}"])


def searched(s: dict[str, Any]) -> None:
    table = Table(title=f"{Path(s['model']).name}: {s['trials']} trials, best {s['best']}")
    parts = list(s["area"])
    table.add_column("area under accuracy over MACs kept")
    for part in parts:
        table.add_column(f"{part} images", justify="right")
    if s["best"] not in s["area_presets"]:
        table.add_row(f"{s['best']} (chosen)", *(percent(s["area"][part]) for part in parts))
    for name, areas in s["area_presets"].items():
        chosen = " (chosen)" if name == s["best"] else ""
        table.add_row(name + chosen, *(percent(areas[part]) for part in parts))
    console.print(table)
    console.print(f"recipe: {s['recipe']}", highlight=False, soft_wrap=True)
    console.print(f"report: {Path(s['run_dir']) / 'search.html'}", highlight=False, soft_wrap=True)
