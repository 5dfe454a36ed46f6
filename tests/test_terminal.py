"""What a finished command says on the terminal."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.cli.tables import _gates_line, units
from compressor.recipe import make_recipe
from compressor.records import Group, Groups


def test_a_gate_that_is_not_shown_is_explained_where_it_is_named() -> None:
    line = _gates_line({"identity": "passed", "accuracy: top-1 lost": "not shown"})
    assert line.startswith("1 of 2 gates passed; not shown (within the limit, ")
    assert line.endswith("see the warnings): accuracy: top-1 lost")
    assert _gates_line({"identity": "passed"}) == "all 1 gate passed"


def test_a_kind_of_unit_that_the_recipe_leaves_out_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    rows = np.zeros(4, dtype=np.int64)
    groups = Groups((Group("a", "head", 4, (), rows), Group("b", "head_dim", 4, (), rows)), ())
    units(make_recipe({}), groups, "32 x 32 alone")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert shown.count("(not in") == 1
    assert "head_dim" in shown
