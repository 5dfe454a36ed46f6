"""`ReportInput` to `report.md`, `report.json`, a self-contained `report.html` and `plots/*.png`, each written whole."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ..files import write_bytes, write_json, write_text
from . import facts
from .contents import LatencyRow, ReportInput
from .markdown import to_markdown
from .sections import Figure, KeyFigure, Section, build_sections, failures, key_figures, subtitle, verdict

SCHEMA = "report/2"


@dataclass(frozen=True, slots=True)
class ReportPaths:
    """Where a page was written, in its three forms, and the plots that the Markdown shows."""

    markdown: Path
    json: Path
    html: Path
    plots: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """What a page shows, in order; `images` are PNGs by the names that its figures use. Warnings come first.

    `footer` takes the place of where a report's numbers are.
    """

    title: str
    verdict: tuple[str, ...]
    failures: tuple[tuple[str, str], ...]
    key_figures: tuple[KeyFigure, ...]
    sections: tuple[Section, ...]
    images: Mapping[str, bytes]
    warnings: tuple[str, ...] = ()
    subtitle: str = ""
    footer: str = ""


def write_report(run: ReportInput, folder: str | Path, pictures: Mapping[str, bytes] | None = None) -> ReportPaths:
    """Writes into `folder`, which is made if need be; `pictures` are PNGs by the names that the run's pictures have.

    Raises FolderError when the disk is in the way.
    """
    from .plots import draw_plots  # brings matplotlib, and the report is a run's last stage

    images = {**draw_plots(run), **(pictures or {})}
    sections = build_sections(run, images.keys())
    title = f"{facts.model_name(run.model)}, {_way_it_ships(run)}"
    warnings = tuple(warning for warning in run.warnings if warning != run.task_reason)  # which stands under the title
    page = Page(title, verdict(run), failures(run), key_figures(run), sections, images, warnings, subtitle(run))
    return write_page(page, folder, "report", {"schema": SCHEMA, "summary": summarise(run), **_plain(run)})


def _way_it_ships(run: ReportInput) -> str:
    if run.as_it_is:
        return "as it is"
    if run.whole:
        return "trained"
    return "made smaller"


def write_page(page: Page, folder: str | Path, stem: str, content: Mapping[str, Any]) -> ReportPaths:
    """The page as `<stem>.md` and `<stem>.html`, its plots as files, its content as `<stem>.json`."""
    root = Path(folder)
    paths = ReportPaths(
        root / f"{stem}.md",
        root / f"{stem}.json",
        root / f"{stem}.html",
        tuple(root / "plots" / f"{name}.png" for name in page.images),
    )
    for path, image in zip(paths.plots, page.images.values(), strict=True):
        write_bytes(path, image)
    write_text(paths.markdown, to_markdown(page.title, page.verdict, page.sections, page.warnings, page.subtitle))
    write_json(paths.json, content)
    write_text(paths.html, to_html(page, stem))
    return paths


def summarise(run: ReportInput) -> dict[str, Any]:
    """The headline numbers, for a machine: shares, accuracy, speed-ups (dense p50 over this p50)."""
    dense, final = facts.dense_accuracy(run), facts.final_accuracy(run)
    cost_dense, cost_shipped = run.cost_dense, run.cost_shipped
    fidelity = run.fidelity.get("shipped")
    return {
        "verdict": list(verdict(run)),
        "macs_removed_share": facts.removed_share(cost_dense.macs, cost_shipped.macs),
        "parameters_removed_share": facts.removed_share(cost_dense.parameters, cost_shipped.parameters),
        "task": run.task,
        "metric": None if dense is None else dense.accuracy.metric,
        "accuracy_dense": None if dense is None else dense.accuracy.value,
        "accuracy_final": None if final is None else final.accuracy.value,
        "fidelity_shipped": None if fidelity is None else fidelity.value,
        "explanation_shipped": None if run.explanation is None else run.explanation.value,
        "final_variant": None if final is None else final.variant,
        "shipped": run.shipped,
        "warnings": list(run.warnings),
        "failures": [name for name, _ in failures(run)],
        "speed_up": [_speed_up(reference, row) for reference, row in facts.latency_pairs(run)],
    }


def _speed_up(reference: LatencyRow, row: LatencyRow) -> dict[str, Any]:
    return {
        "runtime": row.runtime,
        "precision": row.precision,
        "batch": row.batch,
        "variant": row.variant,
        "ratio": facts.speed_up(reference, row),
    }


def _plain(value: Any) -> Any:
    """JSON's own types; what is not a number (NaN, infinity) becomes null."""
    match value:
        case _ if is_dataclass(value) and not isinstance(value, type):
            return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        case Mapping():
            return {str(key): _plain(element) for key, element in value.items()}
        case np.ndarray() | np.generic():
            return _plain(value.tolist())
        case list() | tuple():
            return [_plain(element) for element in value]
        case float():
            return value if isfinite(value) else None
        case None | bool() | int() | str():
            return value
        case _:
            return str(value)


_CODE = re.compile(r"`([^`]+)`")  # as Markdown writes it


def to_html(page: Page, stem: str) -> str:
    """The page on its own, images within; `stem` is what the file beside it that holds the numbers is called."""
    template = _templates().get_template("page.html.j2")
    return template.render(
        title=page.title,
        subtitle=page.subtitle,
        verdict=page.verdict,
        failures=page.failures,
        warnings=page.warnings,
        figures=page.key_figures,
        sections=page.sections,
        images={name: _data_url(image) for name, image in page.images.items()},
        footer=page.footer or f"Raw samples and every number shown are in {stem}.json.",
    )


def section_to_html(section: Section) -> str:
    """A section without figures, as it stands in a page."""
    shown = _templates().get_template("section.html.j2").module.shown  # type: ignore[attr-defined]
    return str(shown(section, {}))


def _templates() -> Environment:
    loader = PackageLoader("compressor.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # escaped first: what stands between backticks is as untrusted as the rest
    environment.filters["code"] = lambda text: Markup(_CODE.sub(r"<code>\1</code>", str(escape(text))))
    environment.tests["figure"] = lambda element: isinstance(element, Figure)
    return environment


def _data_url(png: bytes) -> str:
    """The image itself as its address, so that the page needs no files beside it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
