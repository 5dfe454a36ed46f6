"""A search's options: read alike from text and from Python, each bound on its own."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from compressor.errors import RecipeError
from compressor.searching.options import USUAL_BUDGETS, SearchOptions, make_options


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        ({"trials": "7"}, "trials", 7),
        ({"budgets": "0.5, 0.8,"}, "budgets", (0.5, 0.8)),
        ({"budgets": [0.5]}, "budgets", (0.5,)),
        ({"families": "lrp,l1"}, "families", ("lrp", "l1")),
        ({"held": ""}, "held", ()),
        ({"minutes": "1.5"}, "minutes", 1.5),
        ({"evaluate": False}, "evaluate", False),
        ({"storage": "sqlite:///x.db"}, "storage", "sqlite:///x.db"),
        ({"trials": None}, "trials", 100),
    ],
)
def test_values_come_in_the_type_of_the_option(values: dict[str, Any], name: str, expected: Any) -> None:
    value = getattr(make_options(values), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("name", ["trials", "search_images", "trial_images", "score_images", "finalists", "workers"])
def test_what_is_counted_is_one_at_least(name: str) -> None:
    assert getattr(make_options({name: 1}), name) == 1
    with pytest.raises(RecipeError, match=f"{name} = 0 must be at least 1"):
        make_options({name: 0})


@pytest.mark.parametrize("budgets", [(0.0,), (1.0,), (0.5, 1.2), (-0.5,)])
def test_budgets_are_shares(budgets: tuple[float, ...]) -> None:
    with pytest.raises(RecipeError, match="shares of the MACs between 0 and 1"):
        make_options({"budgets": budgets})


@pytest.mark.parametrize(("name", "value"), [("trials", "many"), ("budgets", "half"), ("minutes", "soon")])
def test_what_cannot_be_read_is_named_with_an_example(name: str, value: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} = '{value}' is not understood; an example: "):
        make_options({name: value})


def test_every_option_has_a_help_and_the_usual_budgets_are_budgets() -> None:
    assert all(option.metadata["help"] for option in fields(SearchOptions))
    assert SearchOptions(budgets=USUAL_BUDGETS).budgets == tuple(sorted(USUAL_BUDGETS))
