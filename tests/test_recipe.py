from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import InputError, RecipeError
from compressor.recipe import Recipe, RecipeFields, make_recipe, read_recipe, to_toml


def test_without_a_file_the_embedded_models_recipe_is_the_base_and_flags_replace_it() -> None:
    assert read_recipe().data == "digits:training"
    vit = read_recipe(model="digits-vit", multiple=2, seed=None)
    assert (vit.budget, vit.multiple, vit.seed) == ("macs 0.6", 2, Recipe().seed)
    assert read_recipe(model="torchvision:resnet18") == replace(Recipe(), model="torchvision:resnet18")


def test_a_recipe_written_as_toml_is_read_back_the_same(tmp_path: Path) -> None:
    odd = 'C:\\images\n"quoted" \t#é'
    recipe = make_recipe(
        {"data": odd, "size": "32,48", "mean": [0.5], "units": "head", "targets": "", "compensate": False, "seed": 7}
    )
    assert (recipe.data, recipe.size, recipe.targets) == (odd, (32, 48), ())
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    assert read_recipe(tmp_path / "recipe.toml") == recipe


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("bugdet", "macs 0.5", "no field 'bugdet'. Did you mean 'budget'?"),
        ("scope", "globall", "Did you mean 'global'?"),
        ("units", "chanel", "Did you mean 'channel'?"),
        ("precisions", "fp23", "Did you mean 'fp32'?"),
        ("calibration", "many", "calibration = 'many' is not understood"),
        ("calibration", 1.5, "expected a whole number"),
        ("calibration", True, "expected a whole number"),
        ("compensate", "yes", "expected true or false"),
        ("data", 3, "expected a text"),
        ("budget", 0.5, "expected a text"),
        ("multiple", -2, "multiple = -2 must lie between -1 and"),
        ("seed", -1, "seed = -1 must lie"),
        ("least", float("nan"), "least = nan must lie"),
        ("max_parity", float("inf"), "max_parity = inf must lie"),
        ("latency_batches", "1,0", "latency_batches = 0 must lie"),
        ("size", "a,b", "size = 'a,b' is not understood"),
        ("budget", "macs half", "budget 'macs half' is not understood"),
        ("criterion", "lpr", "Did you mean 'lrp'?"),
    ],
)
def test_a_value_that_a_field_cannot_have_is_refused_by_name(field: str, value: Any, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe({field: value})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_target_that_is_none_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match="Did you mean 'SM86'"):
        make_recipe({"targets": "SM866"})


def test_a_whole_number_will_do_where_a_number_is_wanted_and_a_path_for_a_text(tmp_path: Path) -> None:
    recipe = make_recipe({"evaluation": 0, "mean": 1, "out": tmp_path})
    assert (recipe.evaluation, recipe.mean, recipe.out) == (0.0, (1.0,), str(tmp_path))
    assert isinstance(recipe.evaluation, float)


@pytest.mark.parametrize(("text", "said"), [("seed = ", "not valid TOML"), (None, "can't read the recipe")])
def test_a_recipe_file_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "mine.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=said) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)


def test_every_field_says_what_it_is_for() -> None:
    assert [f.name for f in fields(Recipe) if not f.metadata["help"]] == []


def test_every_field_is_a_typed_argument_of_compress() -> None:
    assert ["model", *RecipeFields.__annotations__] == [field.name for field in fields(Recipe)]
