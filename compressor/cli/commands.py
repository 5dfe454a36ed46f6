"""One sub-command per verb. Flags are the recipe's fields; the last line of stdout is one JSON object.

Progress and words go to stderr. Errors of the tree become one line and their exit code in `__main__`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

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

if TYPE_CHECKING:  # brings what only these commands need
    from ..hosts.address import Device
    from ..shipping import Cargo, Outcome

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


# flags that several commands have
_Trust = Annotated[
    bool, typer.Option("--trust", help="run the model code that a run's folder names, whatever it is", metavar="")
]
_PasswordFrom = Annotated[
    str,
    typer.Option(
        help="the key's password: env:NAME or fd:NUMBER; asked for on the terminal by default", metavar="WHERE"
    ),
]
_Quiet = Annotated[
    bool, typer.Option("--quiet", help="say nothing but errors and the last line, the JSON object", metavar="")
]
_AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object", metavar="")]


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
    password_from: _PasswordFrom = "",
    quiet: _Quiet = False,
) -> None:
    """Makes the model smaller, checks it, exports it and writes a report and a bundle."""
    is_first = launched_rank() == 0
    console.quiet = quiet or not is_first
    password = _signers_password(signing_key, password_from)
    announce(_task(recipe), recipe)
    if dry_run:
        if is_first:
            print(json.dumps(_predicted(recipe)))
        return
    from .. import pipeline

    if is_launched():
        end_as_interrupted()
    if len(points_of(recipe.budget)) > 1:
        _require_alone("a sweep of budgets")
        _sweep(recipe, signing_key, password)
        return
    with StageBars(recipe) as notify:
        run = pipeline.run(recipe, notify=notify)
    if is_first:
        _sign([run.folder], signing_key, password)
        tables.compressed(run)
        print(json.dumps(run.summary))


def _signers_password(key: Path | None, password_from: str) -> bytes:
    """The password of the key that is to sign, which is tried with it: before hours of work, not after them."""
    if key is None:
        if password_from:
            raise InputError("--password-from is of a key, and none is named; give --signing-key, or leave it out")
        return b""
    if launched_rank() > 0:  # the first process signs
        return b""
    password = password_of(key, password_from)
    require_signer(key, password)
    return password


def _sweep(recipe: Recipe, signing_key: Path | None, password: bytes) -> None:
    """A run for each of the recipe's budgets, signed and shown."""
    from .. import pipeline

    sweep = pipeline.sweep(recipe, watch=_watched)
    _sign([run.folder for run in sweep.runs], signing_key, password)
    tables.swept(sweep.summary)
    print(json.dumps(sweep.summary))


def _require_alone(task: str) -> None:
    """Raises RecipeError under `torchrun` for what one process does."""
    if is_launched():
        raise RecipeError(f"{task} is one process's work; torchrun is for `compress` at one budget: start it without")


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
    if not as_json:
        tables.units(recipe, groups, inspection.image_size)
        return
    content = {
        "groups": [_brief(group, recipe) for group in groups.groups],
        "left_alone": [asdict(layer) for layer in groups.left_alone],
        "image_size": inspection.image_size,
    }
    print(json.dumps(content))


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
    layers_and_heads = list(explanation.heads.shape)
    print(json.dumps({"picture": str(paths[-1]), "layers": len(explanation.layers), "heads": layers_and_heads}))


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


_Measured = Annotated[
    list[Path] | None,
    typer.Argument(
        help="folders of finished runs, a bundle or its archive; none: the recipe's run, made if need be",
        show_default=False,
    ),
]
_Runtimes = Annotated[
    str, typer.Option(help="runtimes, such as onnxruntime,openvino; all that are here by default", metavar="TEXT,...")
]
_LeastSeconds = Annotated[
    float, typer.Option(help="least time for each file, runtime and scenario", min=0.0, metavar="NUMBER")
]
_LeastRuns = Annotated[
    int,
    typer.Option(
        "--least-runs",
        "--runs",  # what the device's command line calls it
        help="least runs of single images; a p99 stands from 662 on",
        min=1,
        metavar="WHOLE",
    ),
]
_OfflineBatch = Annotated[int, typer.Option(help="images at once where throughput counts", min=1, metavar="WHOLE")]
_RateHz = Annotated[
    float, typer.Option(help="adds a scenario with one image at a camera's rate", min=0.0, metavar="NUMBER")
]
_Threads = Annotated[
    int, typer.Option(help="threads of a runtime; one for every core by default", min=0, metavar="WHOLE")
]
_Cores = Annotated[str, typer.Option(help="cores to pin to, such as 0,1; all by default", metavar="WHOLE,...")]
_Compare = Annotated[
    Path | None, typer.Option(help="a benchmark.json to compare with; refused if taken elsewhere", metavar="FILE")
]
_Results = Annotated[
    Path | None,
    typer.Option(
        help="folder of the results; by default `benchmark` in the first run's, or beside a bundle", metavar="FOLDER"
    ),
]
_SignersKey = Annotated[
    Path | None,
    typer.Option(help="a public key in PEM: go on only if its owner signed the bundles as they are", metavar="FILE"),
]


@app.command()
@with_recipe
def benchmark(
    context: typer.Context,
    recipe: Recipe,
    places: _Measured = None,
    on: _Runtimes = "",
    seconds: _LeastSeconds = 2.0,
    least_runs: _LeastRuns = 662,
    offline_batch: _OfflineBatch = 32,
    rate_hz: _RateHz = 0.0,
    threads: _Threads = 0,
    cores: _Cores = "",
    compare: _Compare = None,
    report: _Results = None,
    key: _SignersKey = None,
    trust: _Trust = False,
    quiet: _Quiet = False,
) -> None:
    """Measures finished runs or a bundle: accuracy, costs, cold start and latency on every runtime, in turns."""
    console.quiet = quiet
    from .. import benchmarking, pipeline

    options = benchmarking.Options(
        seconds=seconds,
        runs=least_runs,
        offline_batch=offline_batch,
        rate_hz=rate_hz,
        threads=threads,
        cores=benchmarking.read_cores(cores),
        on=tuple(filter(None, map(str.strip, on.split(",")))),
    )

    to_make = None if places else recipe
    with StageBars(to_make) as notify, ExitStack() as stack:
        paths = places or [pipeline.run(recipe, notify=notify).folder]
        data = _named_evaluation_data(context, recipe)
        open_at = partial(benchmarking.opened_place, evaluation_data=data, trust=trust, key=key)
        opened = [stack.enter_context(open_at(path)) for path in paths]
        out = report or benchmarking.results_folder(paths[0])
        summary = benchmarking.benchmark(opened, options=options, out=out, notify=notify, other=compare)
    tables.benchmarked(summary)
    print(json.dumps(summary))


def _named_evaluation_data(context: typer.Context, recipe: Recipe) -> str:
    """What the user named; empty where the recipe's is that of the model which is taken where none is named."""
    is_named = context.params["evaluation_data"] or context.params["recipe_file"]
    return recipe.evaluation_data if is_named else ""


@app.command()
@with_recipe
@with_search
def search(recipe: Recipe, options: SearchOptions, quiet: _Quiet = False) -> None:
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
    trust: _Trust = False,
    quiet: _Quiet = False,
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


# where devices are, and how they are spoken to
_Hosts = Annotated[
    list[str] | None,
    typer.Argument(help="user@host[:path], or names of the inventory; all of it where none is given"),
]
_Python = Annotated[str, typer.Option(help="the Python there, such as venv/bin/python; python3 by default")]
_SshConfig = Annotated[Path | None, typer.Option(help="a configuration file for ssh in place of yours", metavar="FILE")]
_Inventory = Annotated[
    Path | None,
    typer.Option(
        help="TOML file that names devices; devices.toml here, or what COMPRESSOR_DEVICES names", metavar="FILE"
    ),
]


def _find_devices(
    hosts: Sequence[str] | None, inventory: Path | None, *, python: str, ssh_config: Path | None
) -> Sequence[Device]:
    """The devices that are named, or all of the inventory."""
    from .. import shipping

    settings = "" if ssh_config is None else str(ssh_config)
    return shipping.find_devices(hosts or [], inventory, python=python, settings=settings)


@app.command()
def ship(
    bundle: Annotated[
        Path, typer.Argument(help="a bundle, its archive, or the folder of a run with one", metavar="BUNDLE")
    ],
    hosts: _Hosts = None,
    inventory: _Inventory = None,
    key: Path | None = typer.Option(None, help="public key: there, the signature must be by it", metavar="FILE"),
    canary: int = typer.Option(
        0, help="so many devices first; the others only if these get it", min=0, metavar="WHOLE"
    ),
    at_once: int = typer.Option(4, help="devices at the same time", min=1, metavar="WHOLE"),
    seconds: float = typer.Option(2.0, help="how long each model is timed there", min=0.0, metavar="NUMBER"),
    again: bool = typer.Option(False, "--again", help="try it there again where it already runs", metavar=""),
    python: _Python = "",
    ssh_config: _SshConfig = None,
    quiet: _Quiet = False,
) -> None:
    """Ships a bundle to devices over SSH: copied, verified and timed there, then switched to; else what ran runs on."""
    console.quiet = quiet
    from .. import shipping

    place = inventory or shipping.inventory_path()
    devices = _find_devices(hosts, place, python=python, ssh_config=ssh_config)
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
    _say_outcomes(cargo, outcomes, place)


def _say_outcomes(cargo: Cargo, outcomes: Sequence[Outcome], inventory: Path | None) -> None:
    """What came of shipping, kept beside the inventory and said; raises what failed, once it is."""
    from .. import shipping

    page, trouble = None, None
    try:
        page = shipping.keep_outcomes(cargo, outcomes, inventory)
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
    hosts: _Hosts = None,
    inventory: _Inventory = None,
    python: _Python = "",
    ssh_config: _SshConfig = None,
    as_json: _AsJson = False,
) -> None:
    """Lists which bundle runs on which device, and how fast; of one that does not answer, what it last said."""
    from .. import shipping

    place = inventory or shipping.inventory_path()
    reachable = _find_devices(hosts, place, python=python, ssh_config=ssh_config)
    notes = None if place is None else shipping.known_path(place)
    rows = shipping.running(reachable, notes, lambda name: say_now(f"asking {name}"))
    if as_json:
        print(json.dumps({"devices": rows}))
    else:
        tables.running(rows)


@app.command()
def load(
    folder: Annotated[Path, typer.Argument(help="the folder of a finished run", metavar="FOLDER")],
    trust: _Trust = False,
) -> None:
    """Rebuilds a run's pruned network from builder, plan and weights, and prints a hash of its outputs."""
    from .. import pipeline

    print(json.dumps(pipeline.replay(folder, trust=trust)))


@app.command()
def key(
    file: Annotated[Path, typer.Argument(help="the private key; its public half lies beside it", metavar="FILE")],
    password: bool = typer.Option(False, "--password", help="lock it with a password, asked for here", metavar=""),
    password_from: _PasswordFrom = "",
) -> None:
    """Makes a key pair that bundles are signed with: ECDSA on P-256, the private half readable to its owner alone."""
    lock = new_password(password_from) if password or password_from else b""
    public, sha256 = make_key(file, lock)
    print(json.dumps({"private": str(file), "public": str(public), "sha256": sha256}))


@app.command()
def sign(
    bundle: Annotated[Path, typer.Argument(help="the bundle's folder", metavar="BUNDLE")],
    key: Path = typer.Option(..., "--key", help="the private key, of `compressor key` or any on a NIST curve"),
    password_from: _PasswordFrom = "",
) -> None:
    """Signs a bundle as OpenSSF Model Signing has it; `compressor verify BUNDLE --key PUBLIC` checks it anywhere."""
    sha256 = sign_bundle(bundle, key, password_of(key, password_from))
    warn([exposure(key)])
    print(json.dumps({"bundle": str(bundle), "signature": str(bundle / SIGNATURE), "signed_by": sha256}))


@app.command("list")
def list_names(
    what: Annotated[
        str, typer.Argument(help=f"one of {', '.join(LISTS)}; without it, what these are", metavar="WHAT")
    ] = "",
    words: Annotated[str, typer.Argument(help="leaves the rows that hold these, such as resnet", metavar="WORDS")] = "",
    as_json: _AsJson = False,
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
