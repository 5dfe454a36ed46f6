"""One sub-command per verb. Flags are the recipe's fields; the last line of stdout is one JSON object.

Progress and words go to stderr. Errors of the tree become one line and their exit code in `__main__`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer
from typer.core import TyperGroup

from .. import __version__
from ..budgets import points_of
from ..device.manifest import SIGNATURE
from ..errors import CompressorError, InputError, RecipeError
from ..launch import end_as_interrupted, is_launched, launched_rank
from ..listing import LISTS, rows_of
from ..recipe import Recipe, read_recipe
from ..records import Group
from ..searching import load_flow
from ..searching.options import SearchOptions
from ..signing import exposure, make_key, require_signer, sign_bundle
from . import tables
from .flags import Verb, show_all, with_recipe, with_search, without_kinds
from .passwords import new_password, password_of
from .screen import DeviceBars, StageBars, announce, console, say_now, warn
from .trials import search_screen

# click's UsageError, which typer brings along under changing names; its kinds share what is read of it here
_WrongUsage = cast(type[typer.BadParameter], typer.BadParameter.__base__)
_INTERRUPTED = 130


class OneLine(TyperGroup):
    """Wrong usage as one line, Ctrl-C as the interrupt it is; what else a command raises goes its way."""

    def get_params(self, ctx: Any) -> list[Any]:
        """What typer reads and shows, switches without a kind of value."""
        return without_kinds(super().get_params(ctx))

    def main(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> NoReturn:
        # not standalone: typer would print its own boxes and end the process
        options["standalone_mode"] = False
        try:
            code = super().main(args or ["--help"], *more, **options)
        except _WrongUsage as error:
            place = error.ctx.command_path if error.ctx else "compressor"
            raise InputError(f"{error.format_message().rstrip('.')}; see `{place} --help`") from error
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        raise SystemExit(code)


app = typer.Typer(
    cls=OneLine,
    pretty_exceptions_enable=False,
    help="Makes trained vision models small and fast for the edge, guided by what they find relevant. "
    "`compressor COMMAND --help` shows what most runs need, `compressor COMMAND --help-all` every flag.",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"compressor {__version__}")
        raise typer.Exit


# `__main__` answers it before this module is imported; listed here for --help
@app.callback()
def _main(
    ctx: typer.Context,
    version: bool = typer.Option(
        False, "--version", help="print the version and end", is_eager=True, callback=_print_version, metavar=""
    ),
    help_all: bool = typer.Option(
        False, "--help-all", help="the same as --help here", is_eager=True, callback=show_all, metavar=""
    ),
) -> None:
    if ctx.invoked_subcommand not in (None, "compress"):
        _require_alone(f"`{ctx.invoked_subcommand}`")


_TRUST = typer.Option(False, "--trust", help="run the model code that a run's folder names, whatever it is", metavar="")
_PASSWORD_FROM = typer.Option(
    "", help="the key's password: env:NAME or fd:NUMBER; asked for on the terminal by default", metavar="WHERE"
)
_QUIET = typer.Option(False, "--quiet", help="say nothing but errors and the last line, the JSON object", metavar="")


@app.command()
@with_recipe
def compress(
    recipe: Recipe,
    dry_run: bool = typer.Option(
        False, "--dry-run", help="check what a run checks first, print what it would cost, do nothing", metavar=""
    ),
    signing_key: Path | None = typer.Option(
        None, help="sign the bundle with this private key, as `compressor sign` does", metavar="FILE"
    ),
    password_from: str = _PASSWORD_FROM,
    quiet: bool = _QUIET,
) -> None:
    """Makes the model smaller, checks it, exports it and writes a report and a bundle."""
    console.quiet = quiet or launched_rank() > 0
    password = b""
    if signing_key is None and password_from:
        raise InputError("--password-from is of a key, and none is named; give --signing-key, or leave it out")
    if signing_key is not None and launched_rank() == 0:  # before hours of work, not after them
        password = password_of(signing_key, password_from)
        require_signer(signing_key, password)
    announce(_task(recipe), recipe)
    if dry_run:
        if launched_rank() == 0:
            print(json.dumps(_predicted(recipe)))
        return
    from .. import pipeline

    if is_launched():
        end_as_interrupted()
    if len(points_of(recipe.budget)) > 1:
        _require_alone("a sweep of budgets")
        sweep = pipeline.sweep(recipe, watch=_watched)
        _sign([run.folder for run in sweep.runs], signing_key, password)
        tables.swept(sweep.summary)
        print(json.dumps(sweep.summary))
        return
    with StageBars(recipe) as notify:
        run = pipeline.run(recipe, notify=notify)
    if launched_rank() > 0:
        return
    _sign([run.folder], signing_key, password)
    tables.compressed(run)
    print(json.dumps(run.summary))


def _require_alone(what: str) -> None:
    """Raises RecipeError under `torchrun` for what one process does."""
    if is_launched():
        raise RecipeError(f"{what} is one process's work; torchrun is for `compress` at one budget: start it without")


def _sign(folders: Sequence[Path], key: Path | None, password: bytes) -> None:
    """Signs the bundles in runs' folders, where there is a key."""
    if key is None:
        return
    for folder in folders:
        sha256 = sign_bundle(folder / "bundle", key, password)
        say_now(f"signed {folder / 'bundle'} with the key {sha256}")


def _predicted(recipe: Recipe) -> dict[str, object]:
    """What a run would cost, shown and as it is printed; of a sweep every run's."""
    from ..inspecting import predict
    from ..sweeping import recipes_of

    points = recipes_of(recipe)
    with StageBars(None) as notify:
        predictions = [predict(point, notify=notify) for point in points]
    for point, prediction in zip(points, predictions, strict=True):
        tables.predicted(prediction, point)
    if len(points) == 1:
        return predictions[0]
    return {"model": recipe.model, "budget": recipe.budget, "points": predictions}


def _watched(recipe: Recipe) -> StageBars:
    """One run of a sweep, on the screen."""
    announce(_task(recipe), recipe)
    return StageBars(recipe)


def _task(recipe: Recipe) -> str:
    """What is about to be done, in words."""
    return f"export {recipe.model} as it is" if recipe.as_it_is else f"compress {recipe.model} to {recipe.budget}"


@app.command()
@with_recipe
def inspect(
    recipe: Recipe,
    as_json: bool = typer.Option(False, "--json", help="print groups and what was left alone as JSON", metavar=""),
    relevance: Path | None = typer.Option(
        None, help="draw what the model finds relevant in one image into this PNG", metavar="FILE"
    ),
    saliency: Path | None = typer.Option(
        None,
        help="the same with the mask of the selector that a run with --criterion isp left in its folder (--out)",
        metavar="FILE",
    ),
    image: int = typer.Option(0, help="which image of the evaluation data (else of --data) to draw", metavar="WHOLE"),
) -> None:
    """Shows the units the model can lose, what is left alone and why; or what it finds relevant in one image."""
    from .. import inspecting

    if relevance is not None or saliency is not None:
        _draw(recipe, image, relevance, saliency)
        return
    with StageBars(None) as notify:
        inspection = inspecting.inspect(recipe, notify=notify)
    groups = inspection.groups
    if as_json:
        plain_groups = [_brief(group, recipe) for group in groups.groups]
        left_alone = [asdict(layer) for layer in groups.left_alone]
        content = {"groups": plain_groups, "left_alone": left_alone, "image_size": inspection.image_size}
        print(json.dumps(content))
        return
    tables.units(recipe, groups, inspection.image_size)


def _draw(recipe: Recipe, image: int, relevance: Path | None, saliency: Path | None) -> None:
    """One picture, into each file that was named."""
    from ..explaining import explain
    from ..files import write_bytes
    from ..report.explanation import draw_explanation

    with StageBars(None) as notify:
        notify("reading the model and the image, and sending relevance back", 0.0)
        explanation = explain(recipe, image, saliency=saliency is not None)
    paths = [path for path in (relevance, saliency) if path is not None]
    for path in paths:
        write_bytes(path, draw_explanation(explanation))
    console.print(explanation.title, highlight=False)
    heads = list(explanation.heads.shape)  # [layers, heads]
    print(json.dumps({"picture": str(paths[-1]), "layers": len(explanation.layers), "heads": heads}))


def _brief(group: Group, recipe: Recipe) -> dict[str, object]:
    layers = dict.fromkeys(site.layer for site in group.sites)  # each once, in order
    return {
        "name": group.name,
        "kind": group.kind,
        "units": group.size,
        "may_go": group.kind in recipe.units,
        "layers": list(layers),
        "inexact": list(group.inexact),
    }


@app.command()
@with_recipe
def benchmark(
    context: typer.Context,
    recipe: Recipe,
    places: list[Path] = typer.Argument(
        None,
        help="folders of finished runs, a bundle or its archive; none: the recipe's run, made if need be",
        show_default=False,
    ),
    on: str = typer.Option(
        "", help="runtimes, such as onnxruntime,openvino; all that are here by default", metavar="TEXT,..."
    ),
    seconds: float = typer.Option(
        2.0, help="least time for each file, runtime and scenario", min=0.0, metavar="NUMBER"
    ),
    # --runs is what the device's command line calls it
    least_runs: int = typer.Option(
        662,
        "--least-runs",
        "--runs",
        help="least runs of single images; a p99 stands from 662 on",
        min=1,
        metavar="WHOLE",
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
        None,
        help="folder of the results; by default `benchmark` in the first run's, or beside a bundle",
        metavar="FOLDER",
    ),
    key: Path | None = typer.Option(
        None, help="a public key in PEM: go on only if its owner signed the bundles as they are", metavar="FILE"
    ),
    trust: bool = _TRUST,
    quiet: bool = _QUIET,
) -> None:
    """Measures finished runs or a bundle: accuracy, costs, cold start and latency on every runtime, in turns."""
    console.quiet = quiet
    from .. import benchmarking, pipeline

    runtimes = [name.strip() for name in on.split(",")]
    options = benchmarking.Options(
        seconds=seconds,
        runs=least_runs,
        offline_batch=offline_batch,
        rate_hz=rate_hz,
        threads=threads,
        cores=benchmarking.read_cores(cores),
        on=tuple(name for name in runtimes if name),
    )

    with StageBars(None if places else recipe) as notify, ExitStack() as stack:
        paths = places or [pipeline.run(recipe, notify=notify).folder]
        is_named = context.params["evaluation_data"] or context.params["recipe_file"]
        data = recipe.evaluation_data if is_named else ""  # of the model that is taken where none is named
        opening = [benchmarking.opened_place(path, evaluation_data=data, trust=trust, key=key) for path in paths]
        opened = [stack.enter_context(place) for place in opening]
        out = report or benchmarking.results_folder(paths[0])
        summary = benchmarking.benchmark(opened, options=options, out=out, notify=notify, other=compare)
    tables.benchmarked(summary)
    print(json.dumps(summary))


@app.command()
@with_recipe
@with_search
def search(recipe: Recipe, options: SearchOptions, quiet: bool = _QUIET) -> None:
    """Searches relevance's own parameters for the recipe that keeps most; the same command goes on, or joins."""
    console.quiet = quiet
    announce(f"search for {recipe.model}", recipe)
    run_search = load_flow().run_search
    several = options.workers > 1 or bool(options.storage)
    with search_screen(options.trials, several=several) as screen:
        finished_search = run_search(recipe, options, **screen._asdict())
    tables.searched(finished_search.summary)
    print(json.dumps(finished_search.summary))


@app.command()
def rebundle(
    folder: Annotated[Path, typer.Argument(help="the folder of a run whose network you trained", metavar="RUN")],
    weights: Annotated[
        Path, typer.Argument(help="what your training left: a state dict or a loop's checkpoint", metavar="WEIGHTS")
    ],
    out: Path | None = typer.Option(None, help="folder to write to; RUN-trained by default", metavar="FOLDER"),
    entry: str = typer.Option("", help="what to take of a checkpoint that holds several, such as state_dict_ema"),
    data: str = typer.Option("", help="the run's images, where they have moved"),
    evaluation_data: str = typer.Option("", help="its evaluation images, where they have moved"),
    trust: bool = _TRUST,
    quiet: bool = _QUIET,
) -> None:
    """Makes a run's bundle anew with the weights of your own training: the same plan, gates, files and report."""
    console.quiet = quiet
    say_now(f"rebundle {folder} with the weights of {weights}")
    from .. import pipeline

    with StageBars(_recipe_in(folder), after_training=True) as notify:
        run = pipeline.ship(
            folder,
            weights,
            images=data or None,
            out=out,
            entry=entry,
            evaluation_data=evaluation_data,
            trust=trust,
            notify=notify,
        )
    tables.compressed(run)
    print(json.dumps(run.summary))


def _recipe_in(folder: Path) -> Recipe | None:
    """A run's recipe; None where none can be read, of which the flow says what is wrong."""
    try:
        return read_recipe(folder / "recipe.toml")
    except (CompressorError, OSError):
        return None


_PYTHON = typer.Option("", help="the Python there, such as venv/bin/python; python3 by default")
_SSH_CONFIG = typer.Option(None, help="a configuration file for ssh in place of yours", metavar="FILE")
_INVENTORY = typer.Option(
    None, help="TOML file that names devices; devices.toml here, or what COMPRESSOR_DEVICES names", metavar="FILE"
)


@app.command()
def ship(
    bundle: Annotated[
        Path, typer.Argument(help="a bundle, its archive, or the folder of a run with one", metavar="BUNDLE")
    ],
    hosts: Annotated[
        list[str] | None,
        typer.Argument(help="user@host[:path], or names of the inventory; all of it where none is given"),
    ] = None,
    inventory: Path | None = _INVENTORY,
    key: Path | None = typer.Option(None, help="public key: there, the signature must be by it", metavar="FILE"),
    canary: int = typer.Option(
        0, help="so many devices first; the others only if these get it", min=0, metavar="WHOLE"
    ),
    at_once: int = typer.Option(4, help="devices at the same time", min=1, metavar="WHOLE"),
    seconds: float = typer.Option(2.0, help="how long each model is timed there", min=0.0, metavar="NUMBER"),
    again: bool = typer.Option(False, "--again", help="try it there again where it already runs", metavar=""),
    python: str = _PYTHON,
    ssh_config: Path | None = _SSH_CONFIG,
    quiet: bool = _QUIET,
) -> None:
    """Ships a bundle to devices over SSH: copied, verified and timed there, then switched to; else what ran runs on."""
    console.quiet = quiet
    from .. import shipping

    place = inventory or shipping.inventory_path()
    settings = "" if ssh_config is None else str(ssh_config)
    devices = shipping.find_devices(hosts or [], place, python=python, settings=settings)
    options = shipping.Options(
        timing=shipping.Timing(seconds=seconds),
        key=b"" if key is None else shipping.read_key(key),
        again=again,
        at_once=at_once,
        canary=canary,
    )
    names = [device.name for device in devices]
    with shipping.opened_cargo(bundle) as cargo:
        say_now(f"ship {cargo.release} to {', '.join(names)}")
        with DeviceBars(names) as notify:
            outcomes = shipping.ship_all(cargo, devices, options, notify)
    page, trouble = None, None
    try:
        page = shipping.keep_outcomes(cargo, outcomes, place)
    except CompressorError as error:  # devices have what they have: that is said first
        trouble = error
    tables.shipped(cargo.release, outcomes, page)
    rows = [outcome.to_json() for outcome in outcomes]
    print(json.dumps({"release": cargo.release, "page": str(page or ""), "devices": rows}))
    failure = shipping.failure_of(outcomes) or trouble
    if failure is not None:
        raise failure


@app.command()
def devices(
    hosts: Annotated[
        list[str] | None,
        typer.Argument(help="user@host[:path], or names of the inventory; all of it where none is given"),
    ] = None,
    inventory: Path | None = _INVENTORY,
    python: str = _PYTHON,
    ssh_config: Path | None = _SSH_CONFIG,
    as_json: bool = typer.Option(False, "--json", help="print one JSON object", metavar=""),
) -> None:
    """Lists which bundle runs on which device, and how fast; of one that does not answer, what it last said."""
    from .. import shipping

    place = inventory or shipping.inventory_path()
    settings = "" if ssh_config is None else str(ssh_config)
    found = shipping.find_devices(hosts or [], place, python=python, settings=settings)
    known = None if place is None else shipping.known_path(place)
    rows = shipping.running(found, known, lambda name: say_now(f"asking {name}"))
    if as_json:
        print(json.dumps({"devices": rows}))
    else:
        tables.running(rows)


@app.command()
def load(
    folder: Annotated[Path, typer.Argument(help="the folder of a finished run", metavar="FOLDER")],
    trust: bool = _TRUST,
) -> None:
    """Rebuilds a run's pruned network from builder, plan and weights, and prints a hash of its outputs."""
    from .. import pipeline

    print(json.dumps(pipeline.replay(folder, trust=trust)))


@app.command()
def key(
    file: Annotated[Path, typer.Argument(help="the private key; its public half lies beside it", metavar="FILE")],
    password: bool = typer.Option(False, "--password", help="lock it with a password, asked for here", metavar=""),
    password_from: str = _PASSWORD_FROM,
) -> None:
    """Makes a key pair that bundles are signed with: ECDSA on P-256, the private half readable to its owner alone."""
    public, sha256 = make_key(file, new_password(password_from) if password or password_from else b"")
    print(json.dumps({"private": str(file), "public": str(public), "sha256": sha256}))


@app.command()
def sign(
    bundle: Annotated[Path, typer.Argument(help="the bundle's folder", metavar="BUNDLE")],
    key: Path = typer.Option(..., "--key", help="the private key, of `compressor key` or any on a NIST curve"),
    password_from: str = _PASSWORD_FROM,
) -> None:
    """Signs a bundle as OpenSSF Model Signing has it; `compressor verify BUNDLE --key PUBLIC` checks it anywhere."""
    sha256 = sign_bundle(bundle, key, password_of(key, password_from))
    warn(filter(None, [exposure(key)]))
    print(json.dumps({"bundle": str(bundle), "signature": str(bundle / SIGNATURE), "signed_by": sha256}))


@app.command("list")
def list_names(
    what: Annotated[
        str, typer.Argument(help=f"one of {', '.join(LISTS)}; without it, what these are", metavar="WHAT")
    ] = "",
    words: Annotated[str, typer.Argument(help="leaves the rows that hold these, such as resnet", metavar="WORDS")] = "",
    as_json: bool = typer.Option(False, "--json", help="print one JSON object", metavar=""),
) -> None:
    """Lists the models, criteria, runtimes or targets that can be named."""
    rows = rows_of(what, words)
    if as_json:
        print(json.dumps(dict(rows)))
        return
    tables.names(what or "compressor list WHAT", rows)


# `__main__` hands these to the device's own command line, without torch and typer; listed here for --help
def _on_device(context: typer.Context) -> None:
    from ..device.__main__ import main as device_main

    raise typer.Exit(device_main([str(context.info_name), *context.args]))


_AS_THEY_ARE = {"ignore_unknown_options": True, "allow_extra_args": True}
_ON_DEVICE = {
    "verify": "Checks a bundle's signature, hashes and golden outputs.",
    "run": "Runs a bundle on images.",
    "build": "Builds a bundle's engines on this device.",
    "pack": "Makes one file of a bundle's folder.",
    "unpack": "Makes a bundle's folder of its archive.",
}
for _name, _help in _ON_DEVICE.items():
    app.command(_name, help=_help, context_settings=_AS_THEY_ARE)(_on_device)

for _verb in app.registered_commands:
    _verb.cls = Verb
