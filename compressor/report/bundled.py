"""What a bundle says of itself to people: its manifest in, a README.md and a page of its own out.

Written for who received nothing but the folder: what it is, what to type, how good it is, where it comes from, and
what nobody checked. Everything shown stands in the manifest; its texts and names are printed, never obeyed.
"""

from __future__ import annotations

from collections.abc import Mapping

from .. import __version__
from ..device.leaves import Leaf
from ..device.manifest import MANIFEST, SIGNATURE, Manifest, ModelFile
from ..device.metrics import Metric
from ..device.runtimes import kind_of, takers
from ..records import Quality
from . import facts
from .markdown import to_markdown
from .sections import KeyFigure, Section
from .tables import Table
from .write import Page, to_html

README, PAGE = "README.md", "index.html"
_MOST_SHOWN = 12  # labels, of which there may be thousands
_DIGITS = 16  # of a hash in a table


def describe_bundle(manifest: Manifest) -> dict[str, bytes]:
    """README.md and index.html of a bundle whose `manifest` lists all other files."""
    title = f"{facts.model_name(manifest.name)}: a bundle"
    sections, verdict = _sections(manifest), _verdict(manifest)
    page = Page(
        title,
        verdict,
        failures=(),
        key_figures=_key_figures(manifest),
        sections=sections,
        images={},
        footer=f"All of this and more stands in {MANIFEST}, which the commands read.",
    )
    return {
        README: to_markdown(title, verdict, sections).encode(),
        PAGE: to_html(page, MANIFEST).encode(),
    }


def _verdict(manifest: Manifest) -> tuple[str, ...]:
    """The first sentences: what it is, and how good."""
    name = facts.model_name(manifest.name)
    budget, shipped = manifest.provenance.get("budget"), manifest.provenance.get("shipped")
    made = "as it is" if shipped == "dense" else f"made smaller by compressor (budget: {budget})"
    lines = [f"The network {name}, {made}, ready to run: its models as files, and what they answered to known inputs."]
    first = next((metric for metric in manifest.metrics if metric.of != "dense"), None)
    dense = next((metric for metric in manifest.metrics if metric.of == "dense"), None)
    if first:
        was = f" The network it was made from: {_value(dense)}." if dense else ""
        lines.append(f"{first.of}: {first.metric} {_value(first)} on {first.n:,} evaluation samples.{was}")
    if not manifest.not_checked:
        lines.append("Nothing that was asked for was left unchecked.")
    return tuple(lines)


def _key_figures(manifest: Manifest) -> tuple[KeyFigure, ...]:
    figures = [
        KeyFigure(facts.capitalised(metric.metric), _value(metric), f"{metric.of}, 95 %: {_interval(metric)}")
        for metric in manifest.metrics[:3]
    ]
    for field, label in (("macs", "MACs"), ("parameters", "parameters")):
        number = manifest.provenance.get(field)
        if isinstance(number, int) and number >= 0:
            figures.append(KeyFigure(label, facts.count(number), "of one sample" if field == "macs" else ""))
    smallest = min((manifest.files[model.path]["bytes"] for model in manifest.models), default=0)
    figures.append(KeyFigure("smallest model file", facts.size(smallest), ""))
    return tuple(figures)


def _sections(manifest: Manifest) -> tuple[Section, ...]:
    builders = (_commands, _models, _ends, _not_checked, _origin, _files, _licences)
    return tuple(build(manifest) for build in builders)


def _commands(manifest: Manifest) -> Section:
    """What to type, in this folder."""
    given = "photo.jpg" if manifest.preprocessing else "inputs.npz"
    kind = "an image, or a folder of them" if manifest.preprocessing else "arrays called as the inputs, samples first"
    rows = [
        ("compressor verify .", "compare every file with its hash, run the models on the golden inputs"),
        ("compressor verify . --key release.pub.pem", f"and check that its owner signed all of it ({SIGNATURE})"),
        (f"compressor run . {given}", f"what the network says of {kind}"),
        ("compressor benchmark .", "time the models on the runtimes found there"),
    ]
    if manifest.build:
        rows.append(("compressor build .", "build the engines for the GPU of the machine it is typed on"))
    text = (
        f"With Python, the package compressor (version {__version__} made this) and one runtime installed, such as "
        "onnxruntime; for image files also pillow. In this folder:",
    )
    return Section("type", "What to type", text, (Table("Commands", ("command", "what it does"), "cl", tuple(rows)),))


def _models(manifest: Manifest) -> Section:
    by_model: dict[str, Metric] = {}
    for metric in manifest.metrics:
        by_model.setdefault(metric.of, metric)
    rows = tuple(_model_cells(manifest, model, by_model.get(model.path)) for model in manifest.models)
    dense = by_model.get("dense")
    measure = manifest.metrics[0].metric if manifest.metrics else "quality"
    note = "Of what was not measured, the outputs are held to those of the file it was made from."
    if dense:
        note = f"The dense network: {_value(dense)} ({_interval(dense)}). {note}"
    head = ("file", "precision", "runs in", "size", measure, "95 %", "samples")
    text = ("The files are plain ones of their runtimes: what runs those runs them without compressor too.",)
    return Section("models", "Models", text, (Table("Models", head, "cllrrrr", rows, note),))


def _model_cells(manifest: Manifest, model: ModelFile, metric: Metric | None) -> tuple[str, ...]:
    if model.library:
        runtimes = f"{model.library}, {model.target}"
    elif model.made_for:
        runtimes = f"built by {model.made_for}"
    else:
        runtimes = ", ".join(takers(kind_of(model.path))[:3])
    size = facts.size(manifest.files[model.path]["bytes"])
    if metric is None:
        return model.path, model.precision, runtimes, size, "–", "–", "–"
    return model.path, model.precision, runtimes, size, _value(metric), _interval(metric), f"{metric.n:,}"


def _ends(manifest: Manifest) -> Section:
    """Inputs and outputs, how an image becomes the one, and what the other means."""
    rows = [
        *(_leaf_cells("input", leaf) for leaf in manifest.inputs),
        *(_leaf_cells("output", leaf) for leaf in manifest.outputs),
    ]
    head = ("", "name", "shape", "type")
    table = Table("Inputs and outputs", head, "lclc", tuple(rows), "N is the number of samples at once.")
    text = (_prepared(manifest), f"Task: {manifest.task}.", *_meaning(manifest))
    return Section("ends", "Inputs and outputs", text, (table,))


def _leaf_cells(kind: str, leaf: Leaf) -> tuple[str, ...]:
    return kind, leaf.name, f"[{', '.join(map(str, ('N', *leaf.shape)))}]", leaf.dtype


def _prepared(manifest: Manifest) -> str:
    chosen = manifest.preprocessing
    if chosen is None:
        return "Inputs are arrays as the network takes them: nothing is done to them."
    sides = "the shorter side" if len(chosen.resize) == 1 else "the image"
    resized, cut = (" × ".join(map(str, side)) for side in (chosen.resize, chosen.size))
    mean, std = (", ".join(f"{number:g}" for number in numbers) for numbers in (chosen.mean, chosen.std))
    channels = "grey" if len(chosen.mean) == 1 else f"{len(chosen.mean)} channels"
    return (
        f"An image ({channels}) becomes the input so: {sides} resized to {resized} ({chosen.interpolation}), cut to "
        f"{cut} in the middle, values divided by 255, minus {mean}, divided by {std}."
    )


def _meaning(manifest: Manifest) -> list[str]:
    """How outputs become an answer: the classes' names, or the way to boxes."""
    lines = []
    if manifest.labels:
        shown = ", ".join(f"`{label}`" for label in manifest.labels[:_MOST_SHOWN])
        more = f" and {len(manifest.labels) - _MOST_SHOWN} more" if len(manifest.labels) > _MOST_SHOWN else ""
        lines.append(f"{facts.counted(len(manifest.labels), 'label')}, in the outputs' order: {shown}{more}.")
    if manifest.decode:
        parameters = ", ".join(f"{name} {value}" for name, value in manifest.decode.parameters.items())
        lines.append(f"Outputs are decoded as `{manifest.decode.kind}`: {parameters}.")
    return lines


def _not_checked(manifest: Manifest) -> Section:
    text = manifest.not_checked or ("Nothing that was asked for was left unchecked where this was made.",)
    return Section("unchecked", "What was not checked", tuple(f"{line.rstrip('.')}." for line in text))


def _origin(manifest: Manifest) -> Section:
    rows = tuple(_pairs(manifest.provenance))
    return Section("origin", "Where it comes from", (), (Table("Provenance", ("field", "value"), "cc", rows),))


def _pairs(values: Mapping[str, object], before: str = "") -> list[tuple[str, str]]:
    """A mapping's fields, inner ones by both names."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _pairs(value, f"{before}{name}.")
        else:
            rows.append((before + name, f"{value:,}" if isinstance(value, int) else str(value)))
    return rows


def _files(manifest: Manifest) -> Section:
    rows = tuple(
        (name, facts.size(listing["bytes"]), f"{listing['sha256'][:_DIGITS]}…")
        for name, listing in manifest.files.items()
    )
    text = (
        f"`{MANIFEST}` lists every file with its hash, these pages too; a file that it does not list stops every "
        f"command. `{SIGNATURE}`, where it is there, signs all of them.",
    )
    return Section("files", "Files", text, (Table("Files", ("file", "size", "sha256"), "crc", rows),))


def _licences(manifest: Manifest) -> Section:
    return Section("licences", "Licences", manifest.licences or ("None are stated.",))


def _value(metric: Metric) -> str:
    return facts.value_of(_quality(metric))


def _interval(metric: Metric) -> str:
    return facts.interval_of(_quality(metric))


def _quality(metric: Metric) -> Quality:
    return Quality(metric.metric, metric.value, metric.n, metric.low, metric.high, is_share=metric.is_share)
