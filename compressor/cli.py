"""One sub-command per verb. Flags are the recipe's fields; the last line of stdout is one JSON object.

Progress and words go to stderr. Errors of the tree become one line and their exit code in `__main__`.
"""

from __future__ import annotations

import inspect as introspection
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from typer.core import TyperGroup

from . import __version__
from .errors import InputError
from .recipe import Recipe, read_recipe
from .searching import load_flow
from .searching.options import SearchOptions, make_options

_WrongUsage: Any = typer.BadParameter.__base__  # click's UsageError, which typer brings along under changing names
_INTERRUPTED = 130


class OneLine(TyperGroup):
    """Wrong usage as one line, Ctrl-C as the interrupt it is; what else a command raises goes its way."""

    def main(self, args: Sequence[str] | None = None, *given: Any, **options: Any) -> Any:
        try:
            code = super().main(args or ["--help"], *given, **{**options, "standalone_mode": False})
        except _WrongUsage as error:
            place = error.ctx.command_path if error.ctx else "compressor"
            raise InputError(f"{error.format_message().rstrip('.')}; see `{place} --help`") from error
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        raise SystemExit(code)


app = typer.Typer(
    cls=OneLine,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Makes trained vision models small and fast for the edge, guided by what they find relevant.",
)
console = Console(stderr=True)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"compressor {__version__}")
        raise typer.Exit


# `__main__` answers it before this module is imported; listed here for --help
@app.callback()
def _main(
    version: bool = typer.Option(
        False, "--version", help="print the version and end", is_eager=True, callback=_print_version, metavar=""
    ),
) -> None: ...


def with_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command a `--recipe` file and one flag for each field of a recipe."""
    own = [
        p.replace(kind=introspection.Parameter.KEYWORD_ONLY)
        for n, p in introspection.signature(command, eval_str=True).parameters.items()
        if n != "recipe"
    ]
    kind = introspection.Parameter.KEYWORD_ONLY
    file = introspection.Parameter(
        "recipe_file",
        kind,
        annotation=Path | None,
        default=typer.Option(None, "--recipe", help="TOML file of the fields below", metavar="FILE"),
    )
    flags = [
        introspection.Parameter(
            f.name, kind, annotation=bool | None if f.type == "bool" else str | None, default=_flag(f)
        )
        for f in fields(Recipe)
    ]

    def wrapped(**given: Any) -> None:
        values = {f.name: given.pop(f.name) for f in fields(Recipe)}
        command(recipe=read_recipe(given.pop("recipe_file"), **values), **given)

    wrapped.__signature__ = introspection.Signature([file, *flags, *own])  # type: ignore[attr-defined]
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped


def _flag(f: Any, panel: str = "") -> Any:
    default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
    name = "--" + f.name.replace("_", "-")
    switch = f"{name}/--no-{name[2:]}" if f.type == "bool" else name
    text = f.metadata["help"] + (escape(f" [{default}]") if default != "" else "")
    shown = panel or _panel_of(f.name)
    metavar = _METAVARS.get(f.type, "TEXT")
    return typer.Option(None, switch, help=text, show_default=False, rich_help_panel=shown, metavar=metavar)


# what a value looks like; a flag has none
_METAVARS = {
    "bool": "",
    "int": "WHOLE",
    "float": "NUMBER",
    "tuple[int, ...]": "WHOLE,...",
    "tuple[float, ...]": "NUMBER,...",
    "tuple[str, ...]": "TEXT,...",
}
# each panel of --help begins at a field of the recipe
_PANELS = {
    "model": "Model",
    "data": "Images",
    "batch_size": "Computing",
    "criterion": "Relevance",
    "budget": "Budget and ranking",
    "compensate": "Repair and fine-tuning",
    "targets": "Files, engines and timing",
    "max_accuracy_loss": "Gates and folder",
}


def _panel_of(name: str) -> str:
    names = [f.name for f in fields(Recipe)]
    begun = [panel for first, panel in _PANELS.items() if names.index(first) <= names.index(name)]
    return begun[-1]


_TRUST = typer.Option(False, "--trust", help="run the model code that a run's folder names, whatever it is", metavar="")
_QUIET = typer.Option(False, "--quiet", help="say nothing but errors and the last line, the JSON object", metavar="")


@app.command()
@with_recipe
def compress(
    recipe: Recipe,
    dry_run: bool = typer.Option(
        False, "--dry-run", help="check what a run checks first, print what it would cost, do nothing", metavar=""
    ),
    quiet: bool = _QUIET,
) -> None:
    """Makes the model smaller, checks it, exports it and writes a report and a bundle."""
    console.quiet = quiet
    _announce(f"compress {recipe.model} to {recipe.budget}", recipe)
    from . import pipeline

    if dry_run:
        found = pipeline.predict(recipe)
        _say_predicted(found, recipe)
        print(json.dumps(found))
        return
    with _progress(recipe) as notify:
        run = pipeline.run(recipe, notify=notify)
    _say(run)
    print(json.dumps(run.summary))


def _say_predicted(found: dict[str, Any], recipe: Recipe) -> None:
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
    groups = f"{_counted(found['groups'], 'group')} of units, {_counted(len(found['left_alone']), 'layer')} left alone"
    _say_lines([f"{groups}; images: {counts}; budget: {recipe.budget}; folder: {recipe.folder}"])
    _warn(found["warnings"])


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _say_lines(lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _warn(warnings: Iterable[str]) -> None:
    for text in warnings:
        console.print(f"warning: {text}", style="bold yellow", highlight=False, markup=False, soft_wrap=True)


@app.command()
@with_recipe
def inspect(
    recipe: Recipe,
    as_json: bool = typer.Option(False, "--json", help="print groups and what was left alone as JSON", metavar=""),
    relevance: Path | None = typer.Option(
        None, help="draw what the model finds relevant in one image into this PNG", metavar="FILE"
    ),
    image: int = typer.Option(0, help="which image of the evaluation data (else of --data) to draw", metavar="WHOLE"),
) -> None:
    """Shows the units the model can lose, what is left alone and why; or what it finds relevant in one image."""
    from . import pipeline

    if relevance is not None:
        _draw(recipe, image, relevance)
        return
    groups = pipeline.inspect(recipe)
    if as_json:
        print(
            json.dumps(
                {"groups": [_brief(g) for g in groups.groups], "left_alone": [asdict(x) for x in groups.left_alone]}
            )
        )
        return
    table = Table(title=f"{recipe.model}: {_counted(len(groups.groups), 'group')} of units that go together")
    for column in ("group", "kind", "units", "layers that produce them", "not exact at"):
        table.add_column(column, justify="right" if column == "units" else "left", overflow="fold")
    for g in groups.groups:
        layers = list(dict.fromkeys(s.layer for s in g.sites))
        shown = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
        table.add_row(g.name, g.kind, str(g.size), shown, ", ".join(g.inexact[:2]))
    left = Table(title=f"{_counted(len(groups.left_alone), 'layer')} left alone")
    for column in ("layer", "operation", "why"):
        left.add_column(column, overflow="fold")
    for x in groups.left_alone:
        left.add_row(x.layer, x.operation, x.reason)
    out = Console()
    out.print(table)
    out.print(left)


def _announce(task: str, recipe: Recipe) -> None:
    """The first line, before torch is imported: that takes seconds, and what was asked for can be read meanwhile."""
    sources = [source for source in (recipe.data, recipe.evaluation_data) if source]
    images = " and ".join(sources) or "not named"
    _say_now(f"{task}: images {images}, folder {recipe.folder}")


def _say_now(text: str) -> None:
    """As it is, on stderr; nothing when asked to be quiet."""
    if not console.quiet:
        print(text, file=sys.stderr, flush=True)


def _draw(recipe: Recipe, image: int, path: Path) -> None:
    from .files import write_bytes
    from .looking import explain
    from .report.explanation import draw_explanation

    found = explain(recipe, image)
    write_bytes(path, draw_explanation(found))
    console.print(found.title, highlight=False)
    print(json.dumps({"picture": str(path), "layers": len(found.layers), "heads": list(found.heads.shape)}))


def _brief(group: Any) -> dict[str, Any]:
    layers = list(dict.fromkeys(s.layer for s in group.sites))
    return {
        "name": group.name,
        "kind": group.kind,
        "units": group.size,
        "layers": layers,
        "inexact": list(group.inexact),
    }


@app.command()
@with_recipe
def benchmark(
    recipe: Recipe,
    places: list[Path] = typer.Argument(
        None, help="folders of finished runs, or a bundle; none: the recipe's run, made if need be", show_default=False
    ),
    on: str = typer.Option(
        "", help="runtimes, such as onnxruntime,openvino; all that are here by default", metavar="TEXT,..."
    ),
    seconds: float = typer.Option(
        2.0, help="least time for each file, runtime and scenario", min=0.0, metavar="NUMBER"
    ),
    least_runs: int = typer.Option(
        662, help="least runs of single images; a p99 stands from 662 on", min=1, metavar="WHOLE"
    ),
    offline_batch: int = typer.Option(32, help="images at once where throughput counts", min=1, metavar="WHOLE"),
    rate_hz: float = typer.Option(
        0.0, help="adds a scenario with one image at a camera's rate", min=0.0, metavar="NUMBER"
    ),
    threads: int = typer.Option(0, help="threads of a runtime; one for every core by default", min=0, metavar="WHOLE"),
    cores: str = typer.Option("", help="cores to pin to, such as 0,1; all by default", metavar="WHOLE,..."),
    compare: Path | None = typer.Option(
        None, help="a benchmark.json to compare with; refused if taken elsewhere", metavar="FILE"
    ),
    report: Path | None = typer.Option(
        None, help="folder of the results; `benchmark` in the first place by default", metavar="FOLDER"
    ),
    trust: bool = _TRUST,
    quiet: bool = _QUIET,
) -> None:
    """Measures finished runs or a bundle: accuracy, costs, cold start and latency on every runtime, in turns."""
    console.quiet = quiet
    from . import pipeline, suite

    how = (seconds, least_runs, offline_batch, rate_hz, threads, suite.read_cores(cores))
    options = suite.Options(*how, on=tuple(part.strip() for part in on.split(",") if part.strip()))
    with _progress(None if places else recipe) as notify:
        folders = places or [pipeline.run(recipe, notify=notify).folder]
        opened = [suite.open_place(folder, evaluation_data=recipe.evaluation_data, trust=trust) for folder in folders]
        found = suite.benchmark(
            opened, options=options, out=report or folders[0] / suite.STEM, notify=notify, other=compare
        )
    _say_benchmark(found)
    print(json.dumps(found))


def _say_benchmark(found: dict[str, Any]) -> None:
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
        _warn([f"{found['busy']} when the timing began: times and ratios may be off; measure again on a quiet one"])
    _say_lines([*(f"not run: {line}" for line in found["not_run"]), f"page: {found['page']}"])


def with_search(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command one flag for each of the search's own options."""
    signature = introspection.signature(command, eval_str=True)
    own = [p for n, p in signature.parameters.items() if n != "options"]
    kind = introspection.Parameter.KEYWORD_ONLY
    flags = [
        introspection.Parameter(
            f.name, kind, annotation=bool | None if f.type == "bool" else str | None, default=_flag(f, "Search")
        )
        for f in fields(SearchOptions)
    ]

    def wrapped(**given: Any) -> None:
        values = {f.name: given.pop(f.name) for f in fields(SearchOptions)}
        command(options=make_options(values), **given)

    wrapped.__signature__ = introspection.Signature([*own, *flags])  # type: ignore[attr-defined]
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped


@app.command()
@with_recipe
@with_search
def search(recipe: Recipe, options: SearchOptions, quiet: bool = _QUIET) -> None:
    """Searches relevance's own parameters for the recipe that keeps most; the same command goes on, or joins."""
    console.quiet = quiet
    _announce(f"search for {recipe.model}", recipe)
    run_search = load_flow().run_search
    with _search_progress(options.trials) as (notify, on_trial):
        found = run_search(recipe, options, notify=notify, on_trial=on_trial)
    _say_searched(found.summary)
    print(json.dumps(found.summary))


@app.command()
def load(
    folder: Annotated[Path, typer.Argument(help="the folder of a finished run", metavar="FOLDER")],
    trust: bool = _TRUST,
) -> None:
    """Rebuilds a run's pruned network from builder, plan and weights, and prints a hash of its outputs."""
    from . import pipeline

    print(json.dumps(pipeline.replay(folder, trust=trust)))


for verb, text in (
    ("verify", "Checks a bundle's hashes and golden outputs."),
    ("run", "Runs a bundle on images."),
    ("build", "Builds a bundle's engines on this device."),
):
    # handled in __main__ without torch and typer; listed here for --help
    def _device(context: typer.Context) -> None:
        from .device.__main__ import main as device_main

        raise typer.Exit(device_main([str(context.info_name), *context.args]))

    app.command(verb, help=text, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(_device)


class _progress:
    """A bar for each stage on stderr for people, one line per stage for logs; neither when asked to be quiet."""

    def __init__(self, recipe: Recipe | None) -> None:
        self.recipe = recipe

    def __enter__(self) -> Callable[[str, float], None]:
        from .progress import Course, course_of

        self.course = course_of(self.recipe) if self.recipe is not None else Course()
        self.live = sys.stderr.isatty() and not console.quiet
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self.bar = Progress(*columns, *times, console=console, disable=not self.live)
        self.bar.start()
        self.tasks: dict[str, Any] = {}
        self.said: set[str] = set()
        return self.notify

    def notify(self, stage: str, share: float) -> None:
        step = self.course.read(stage)
        if step is None:
            return
        if not self.live and str(step) not in self.said:
            self.said.add(str(step))
            _say_now(str(step))
        if step.key not in self.tasks:
            self.tasks[step.key] = self.bar.add_task(str(step), total=None)  # moves to and fro until a share is known
        self.bar.update(self.tasks[step.key], description=str(step))
        if share > 0:
            self.bar.update(self.tasks[step.key], total=1.0, completed=share)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


def _say(run: Any) -> None:
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
    _say_after(s)


def _say_after(s: dict[str, Any]) -> None:
    """Below the table: why this network ships, gates, what was not done, what is where, and what comes next."""
    folder, gates = Path(s["run_dir"]), s["gates"]
    doubtful = [name for name, state in gates.items() if state != "passed"]
    passed = f"all {_counted(len(gates), 'gate')} passed"
    if doubtful:
        passed = (
            f"{len(gates) - len(doubtful)} of {_counted(len(gates), 'gate')} passed; not shown: {'; '.join(doubtful)}"
        )
    _say_lines([*([s["choice"]] if s["choice"] else []), passed])
    _say_lines(f"not checked: {line}" for line in s["not_checked"])
    _warn(s["warnings"])
    _say_lines([f"report: {folder / 'report.html'}", f"next: compressor verify {folder / 'bundle'}"])


@contextmanager
def _search_progress(total: int) -> Iterator[tuple[Callable[[str, float], None], Callable[[Any], None]]]:
    """A bar with the best so far for people; for logs a line per stage. A line per trial for both."""
    from .report.facts import title_of

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    live = sys.stderr.isatty() and not console.quiet
    said: set[str] = set()
    with Progress(*columns, console=console, disable=not live) as bar:
        task = bar.add_task("search", total=total)

        def notify(stage: str, share: float) -> None:
            bar.update(task, description=title_of(stage, several=False))
            if not live and stage not in said:
                said.add(stage)
                _say_now(title_of(stage, several=False))

        def on_trial(progress: Any) -> None:
            best = f"best {_percent(progress.best and progress.best.value)}"
            bar.update(task, completed=progress.done, description=f"trials: {best}, {_minutes(progress.left_s)} left")
            line = _trial_line(progress)
            if live:
                bar.console.print(line, highlight=False, soft_wrap=True)
            else:
                _say_now(line)

        yield notify, on_trial


def _trial_line(progress: Any) -> str:
    row, best = progress.row, progress.best
    reached = ", ".join(f"{p.budget:g}: {100 * p.accuracy:.1f}" for p in row.points)
    named = f" [{row.preset}]" if row.preset else ""
    leads = " (best)" if best is not None and best.number == row.number else ""
    return (
        f"{progress.done}/{progress.total} trial {row.number}{named} {row.state}: area {_percent(row.value)}{leads}; "
        f"{reached or row.why}; {row.seconds:.1f} s, {_minutes(progress.left_s)} left, best "
        f"{_percent(best and best.value)}"
    )


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.2f} %"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _say_searched(s: dict[str, Any]) -> None:
    table = Table(title=f"{Path(s['model']).name}: {s['trials']} trials, best {s['best']}")
    parts = list(s["area"])
    table.add_column("area under accuracy over MACs kept")
    for part in parts:
        table.add_column(f"{part} images", justify="right")
    if s["best"] not in s["area_presets"]:
        table.add_row(f"{s['best']} (chosen)", *(_percent(s["area"][part]) for part in parts))
    for name, areas in s["area_presets"].items():
        chosen = " (chosen)" if name == s["best"] else ""
        table.add_row(name + chosen, *(_percent(areas[part]) for part in parts))
    console.print(table)
    console.print(f"recipe: {s['recipe']}", highlight=False, soft_wrap=True)
    console.print(f"report: {Path(s['run_dir']) / 'search.html'}", highlight=False, soft_wrap=True)
