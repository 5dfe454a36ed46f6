"""One image explained: with the mask of a run's selector, or with what to do where there is none of this network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compressor.errors import FolderError
from compressor.explaining import explain
from compressor.graph import trace
from compressor.inputs.models import load_model
from compressor.inputs.sources import load_images
from compressor.pruning import analyse
from compressor.recipe import Recipe, read_recipe
from compressor.report.explanation import draw_explanation
from compressor.run.saved import example_of
from compressor.steering import SelectorOptions, hash_of_network, learned_in
from compressor.steering.saving import write_selector
from compressor.steering.selector import make_selector


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Of a folder with a selector, which learned nothing yet."""
    folder = tmp_path_factory.mktemp("run")
    recipe = replace(read_recipe(None, model="digits-resnet"), out=str(folder))
    model = load_model(recipe.model)
    assert model.preprocessing is not None
    graph = trace(model.module, example_of(model.preprocessing.shape))
    images = load_images(recipe.data).prepared(model.preprocessing)
    selector = make_selector(graph, analyse(graph), [(images.inputs(range(4)), None)], SelectorOptions(), 0)
    write_selector(folder / learned_in(1), selector, hash_of_network(graph))
    return recipe


@pytest.mark.thorough
def test_the_mask_of_a_runs_selector_is_drawn_beside_the_heat_map(recipe: Recipe) -> None:
    explanation = explain(recipe, 3, saliency=True)
    assert explanation.mask is not None
    assert explanation.mask.shape == explanation.heat.shape
    assert 0 < explanation.mask.min() < explanation.mask.max() <= 1
    plain = explain(recipe, 3)
    assert plain.mask is None
    assert np.array_equal(plain.heat, explanation.heat)
    assert draw_explanation(explanation) != draw_explanation(plain)


def test_where_there_is_no_selector_it_is_said_how_to_get_one(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"has no selector: .*--criterion isp.*--out"):
        explain(replace(recipe, out=str(tmp_path)), saliency=True)


def test_another_networks_selector_is_refused(recipe: Recipe) -> None:
    with pytest.raises(FolderError, match="another network or other weights"):
        explain(replace(recipe, model="digits-vit"), saliency=True)
