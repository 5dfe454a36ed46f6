"""Sections to GitHub-flavoured Markdown, with the plots as files beside it."""

from __future__ import annotations

from collections.abc import Sequence

from .sections import Figure, Section
from .tables import Table


def to_markdown(title: str, verdict: Sequence[str], sections: Sequence[Section], warnings: Sequence[str] = ()) -> str:
    blocks = [f"# {title}", *(f"> **Warning:** {warning}." for warning in warnings), " ".join(verdict)]
    for section in sections:
        blocks.append(f"## {section.title}")
        blocks.extend(section.text)
        blocks.extend(_figure(p) if isinstance(p, Figure) else _table(p) for p in section.parts)
    return "\n\n".join(blocks) + "\n"


def _figure(figure: Figure) -> str:
    return f"![{figure.alt}](plots/{figure.name}.png)\n\n*{figure.caption}*"


def _table(table: Table) -> str:
    lines = [
        _line(table.head),
        "|" + "|".join({"r": "---:"}.get(letter, "---") for letter in table.align) + "|",
        *(_row(row, table.align) for row in table.rows),
    ]
    note = f"\n\n*{table.note}*" if table.note else ""
    return f"**{table.title}**\n\n" + "\n".join(lines) + note


def _row(row: Sequence[str], align: str) -> str:
    if len(row) == 1 < len(align):
        return _line([f"**{_cell(row[0], 'l')}**", *[""] * (len(align) - 1)])
    return _line([_cell(c, a) for c, a in zip(row, align, strict=True)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(text: str, align: str) -> str:
    plain = " ".join(text.split()).replace("|", "\\|")
    return f"`{plain}`" if align == "c" and plain else plain
