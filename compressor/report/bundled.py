"""What a bundle says of itself to people: its manifest in, a README.md and a page of its own out.

Written for who received nothing but the folder: what it is, what to type, how good it is, where it comes from, and
what nobody checked. Everything shown stands in the manifest; its texts and names are printed, never obeyed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .. import __version__
from ..device.leaves import Leaf
from ..device.manifest import MANIFEST, SIGNATURE, Manifest, ModelFile
from ..device.metrics import Metric
from ..device.runtimes import kind_of, takers
from . import facts
from .facts import ABSENT
from .markdown import to_markdown
from .sections import KeyFigure, Section
from .tables import Table
from .write import Page, to_html

README, PAGE = "README.md", "index.html"
_MOST_SHOWN = 12  # labels, of which there may be thousands
_DIGITS = 16  # of a hash in a table
_COSTS = (("macs", "MACs", "of one sample"), ("parameters", "parameters", ""))  # field of the provenance, label, detail


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
    made = f"made smaller by compressor (budget: {manifest.provenance.get('budget')})"
    if manifest.provenance.get("shipped") == "dense":
        made = "as it is"
    lines = [f"The network {name}, {made}, ready to run: its models as files, and what they answered to known inputs."]
    lines += _quality_line(manifest)
    if not manifest.not_checked:
        lines.append("Nothing that was asked for was left unchecked.")
    return tuple(lines)


def _quality_line(manifest: Manifest) -> list[str]:
    """How good the first model is, and the network it was made from where that was judged too; or no line."""
    metric = next((metric for metric in manifest.metrics if metric.of != "dense"), None)
    if metric is None:
        return []
    line = f"{metric.of}: {metric.metric} {facts.value_of(metric)} on {metric.n:,} evaluation samples."
    dense = _metrics_by_model(manifest).get("dense")
    if dense is not None:
        line += f" The network it was made from: {facts.value_of(dense)}."
    return [line]


def _metrics_by_model(manifest: Manifest) -> dict[str, Metric]:
    """The first metric of each model, by its path, and of the dense network."""
    by_model: dict[str, Metric] = {}
    for metric in manifest.metrics:
        by_model.setdefault(metric.of, metric)
    return by_model


def _key_figures(manifest: Manifest) -> tuple[KeyFigure, ...]:
    figures = []
    for metric in manifest.metrics[:3]:
        detail = f"{metric.of}, 95 %: {facts.interval_of(metric)}"
        figures.append(KeyFigure(facts.capitalised(metric.metric), facts.value_of(metric), detail))
    for field, label, detail in _COSTS:
        number = manifest.provenance.get(field)
        if isinstance(number, int) and number >= 0:
            figures.append(KeyFigure(label, facts.count(number), detail))
    smallest = min((manifest.model_bytes(model.path) for model in manifest.models), default=0)
    figures.append(KeyFigure("smallest model file", facts.size(smallest), ""))
    return tuple(figures)


def _sections(manifest: Manifest) -> tuple[Section, ...]:
    builders = (_commands, _models, _ends, _not_checked, _origin, _files, _licences)
    return tuple(build(manifest) for build in builders)


def _commands(manifest: Manifest) -> Section:
    """What to type, in this folder."""
    inputs, kind = "inputs.npz", "arrays called as the inputs, samples first"
    if manifest.preprocessing:
        inputs, kind = "photo.jpg", "an image, or a folder of them"
    rows = [
        ("compressor verify .", "compare every file with its hash, run the models on the golden inputs"),
        ("compressor verify . --key release.pub.pem", f"and check that its owner signed all of it ({SIGNATURE})"),
        (f"compressor run . {inputs}", f"what the network says of {kind}"),
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
    by_model = _metrics_by_model(manifest)
    rows = tuple(_model_cells(manifest, model, by_model.get(model.path)) for model in manifest.models)
    measure = manifest.metrics[0].metric if manifest.metrics else "quality"
    note = "Of what was not measured, the outputs are held to those of the file it was made from."
    dense = by_model.get("dense")
    if dense is not None:
        note = f"The dense network: {facts.value_of(dense)} ({facts.interval_of(dense)}). {note}"
    head = ("file", "precision", "runs in", "size", measure, "95 %", "samples")
    text = ("The files are plain ones of their runtimes: what runs those runs them without compressor too.",)
    return Section("models", "Models", text, (Table("Models", head, "cllrrrr", rows, note),))


def _model_cells(manifest: Manifest, model: ModelFile, metric: Metric | None) -> tuple[str, ...]:
    quality = (ABSENT, ABSENT, ABSENT)
    if metric is not None:
        quality = (facts.value_of(metric), facts.interval_of(metric), f"{metric.n:,}")
    size = facts.size(manifest.model_bytes(model.path))
    return model.path, model.precision, _runtimes_of(model), size, *quality


def _runtimes_of(model: ModelFile) -> str:
    if model.library:
        return f"{model.library}, {model.target}"
    if model.made_for:
        return f"built by {model.made_for}"
    return ", ".join(takers(kind_of(model.path))[:3])


def _ends(manifest: Manifest) -> Section:
    """Inputs and outputs, how an image becomes the one, and what the other means."""
    rows = [_leaf_cells("input", leaf) for leaf in manifest.inputs]
    rows += [_leaf_cells("output", leaf) for leaf in manifest.outputs]
    head = ("", "name", "shape", "type")
    table = Table("Inputs and outputs", head, "lclc", tuple(rows), "N is the number of samples at once.")
    text = (_prepared(manifest), f"Task: {manifest.task}.", *_meaning(manifest))
    return Section("ends", "Inputs and outputs", text, (table,))


def _leaf_cells(kind: str, leaf: Leaf) -> tuple[str, ...]:
    shape = ", ".join(map(str, ("N", *leaf.shape)))
    return kind, leaf.name, f"[{shape}]", leaf.dtype


def _prepared(manifest: Manifest) -> str:
    chosen = manifest.preprocessing
    if chosen is None:
        return "Inputs are arrays as the network takes them: nothing is done to them."
    sides = "the shorter side" if len(chosen.resize) == 1 else "the image"
    channels = "grey" if len(chosen.mean) == 1 else f"{len(chosen.mean)} channels"
    resized = " × ".join(map(str, chosen.resize))
    cut = " × ".join(map(str, chosen.size))
    return (
        f"An image ({channels}) becomes the input so: {sides} resized to {resized} ({chosen.interpolation}), cut to "
        f"{cut} in the middle, values divided by 255, minus {_listed(chosen.mean)}, divided by {_listed(chosen.std)}."
    )


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(map("{:g}".format, numbers))


def _meaning(manifest: Manifest) -> list[str]:
    """How outputs become an answer: the classes' names, or the way to boxes."""
    lines = []
    if manifest.labels:
        shown = ", ".join(f"`{label}`" for label in manifest.labels[:_MOST_SHOWN])
        if len(manifest.labels) > _MOST_SHOWN:
            shown += f" and {len(manifest.labels) - _MOST_SHOWN} more"
        lines.append(f"{facts.counted(len(manifest.labels), 'label')}, in the outputs' order: {shown}.")
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
