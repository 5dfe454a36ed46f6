"""What a finished command says on the terminal."""

from __future__ import annotations

from compressor.cli.tables import _gates_line


def test_a_gate_that_is_not_shown_is_explained_where_it_is_named() -> None:
    line = _gates_line({"identity": "passed", "accuracy: top-1 lost": "not shown"})
    assert line.startswith("1 of 2 gates passed; not shown (within the limit, ")
    assert line.endswith("see the warnings): accuracy: top-1 lost")
    assert _gates_line({"identity": "passed"}) == "all 1 gate passed"
