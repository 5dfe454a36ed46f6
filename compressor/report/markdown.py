"""Sections to GitHub-flavoured Markdown, with the plots as files beside it."""

from __future__ import annotations

from collections.abc import Sequence

from .sections import Figure, Section
from .tables import Table


def to_markdown(
    title: str,
    verdict: Sequence[str],
    sections: Sequence[Section],
    warnings: Sequence[str] = (),
    subtitle: str = "",
) -> str:
    """Title, what stands under it, warnings, the verdict as one paragraph, then the sections; empty lines between."""
    blocks = [f"# {title}"]
    if subtitle:
        blocks.append(subtitle)
    blocks += [f"> **Warning:** {warning}." for warning in warnings]
    blocks.append(" ".join(verdict))
    blocks += map(section_to_markdown, sections)
    return "\n\n".join(blocks) + "\n"


def section_to_markdown(section: Section) -> str:
    """Its title, sentences, tables and figures; empty lines between."""
    blocks = [f"## {section.title}", *section.text, *map(_block, section.parts)]
    return "\n\n".join(blocks)


def _block(element: Table | Figure) -> str:
    if isinstance(element, Figure):
        return _figure(element)
    return _table(element)


def _figure(figure: Figure) -> str:
    return f"![{figure.alt}](plots/{figure.name}.png)\n\n*{figure.caption}*"


def _table(table: Table) -> str:
    rules = ["---:" if letter == "r" else "---" for letter in table.align]
    lines = [_line(table.head), "|" + "|".join(rules) + "|"]
    lines += [_row(row, table.align) for row in table.rows]
    blocks = [f"**{table.title}**", "\n".join(lines)]
    if table.note:
        blocks.append(f"*{table.note}*")
    return "\n\n".join(blocks)


def _row(row: Sequence[str], align: str) -> str:
    if len(row) == 1 < len(align):  # heads the rows below it; Markdown has no cell over several columns
        empty = [""] * (len(align) - 1)
        return _line([f"**{_cell(row[0], 'l')}**", *empty])
    return _line([_cell(text, letter) for text, letter in zip(row, align, strict=True)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(text: str, letter: str) -> str:
    """`letter` is the column's in `Table.align`; code stands in backticks, and an empty pair of them is none."""
    one_line = " ".join(text.split()).replace("|", "\\|")
    if letter == "c" and one_line:
        return f"`{one_line}`"
    return one_line
