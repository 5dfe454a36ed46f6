"""Sections as Markdown: read back cell by cell, and text from a model that must not break a table."""

from __future__ import annotations

import re

from compressor.report.markdown import to_markdown
from compressor.report.sections import Figure, Section
from compressor.report.tables import Table

TABLE = Table("Things", ("name", "what", "n"), "clr", (("a heading",), ("x", "y", "1"), ("", "z", "22")), "A note.")


def rows_of(markdown: str) -> list[list[str]]:
    """Every table line's cells; an escaped bar is no border."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def page(*parts: Table | Figure) -> str:
    return to_markdown("A title", ("First.", "Second."), [Section("a", "A section", ("Text.",), parts)], ("careful",))


def test_blocks_come_in_order_and_apart() -> None:
    assert page().split("\n\n") == [
        "# A title",
        "> **Warning:** careful.",
        "First. Second.",
        "## A section",
        "Text.\n",
    ]


def test_a_table_is_read_back_cell_by_cell() -> None:
    assert rows_of(page(TABLE)) == [
        ["name", "what", "n"],
        ["---", "---", "---:"],
        ["**a heading**", "", ""],
        ["`x`", "y", "1"],
        ["", "z", "22"],
    ]
    assert "**Things**\n\n|" in page(TABLE)
    assert page(TABLE).endswith("|\n\n*A note.*\n")


def test_a_table_of_one_column_has_rows_and_no_headings() -> None:
    table = Table("Lines", ("what",), "l", (("one",), ("two",)))
    assert rows_of(page(table))[2:] == [["one"], ["two"]]


def test_bars_and_line_ends_from_a_model_stay_inside_their_cell() -> None:
    table = Table("Odd", ("a", "b"), "cl", (("x|y", "one\ntwo | three"),))
    assert rows_of(page(table))[2] == ["`x\\|y`", "one two \\| three"]


def test_a_figure_has_its_words_its_file_and_its_caption() -> None:
    assert page(Figure("pareto", "what is seen", "how to read it")).endswith(
        "![what is seen](plots/pareto.png)\n\n*how to read it*\n"
    )
