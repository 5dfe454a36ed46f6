"""Networks of several inputs before a run: what goes into them is said by the data, and any answer is explained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor import inspecting
from compressor.__main__ import main
from compressor.errors import DataError, ModelError
from compressor.explaining import explain
from compressor.inputs.models import model_in_hand
from compressor.recipe import Recipe, make_recipe, read_recipe
from compressor.run.work import Request, read_work
from compressor.tensors import as_tuple

MODELS = """
import torch
from torch import nn

class Stereo(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.mix, self.depth, self.shift = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 1, 1), nn.Linear(8, 2)

    def forward(self, left, right):
        x = self.mix(torch.cat([self.left(left).relu(), 0 * self.right(right).relu()], 1)).relu()
        return {"depth": self.depth(x), "shift": self.shift(x.mean((2, 3)))}

def stereo():
    torch.manual_seed(0)
    return Stereo().eval()

def ears():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 3, 3)).eval()
"""


class Questioned(nn.Module):
    """Words beside images, of which only those that a mask names are attended to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.words, self.head = nn.Conv2d(3, 8, 3), nn.Embedding(12, 8), nn.Linear(8, 4)

    def forward(self, image: Tensor, words: Tensor, attended: Tensor) -> Tensor:
        query = self.conv(image).mean((2, 3)).unsqueeze(1)  # [N, 1, 8]
        keys = self.words(words)  # [N, W, 8]
        scores = (query @ keys.mT).masked_fill(attended.unsqueeze(1) == 0, float("-inf"))
        return self.head((scores.softmax(-1) @ keys).squeeze(1))  # type: ignore[no-any-return]


def test_masks_and_indices_are_tried_with_the_datas_own() -> None:
    torch.manual_seed(0)
    images = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)
    words = np.random.default_rng(1).integers(0, 12, (40, 5))
    attended = (np.arange(5) < np.random.default_rng(2).integers(1, 5, (40, 1))).astype(np.int64)
    data = ({"image": images, "words": words, "attended": attended}, np.arange(40) % 4)
    recipe = make_recipe({"out": "unused", "calibration": "16"})
    model = model_in_hand(Questioned().eval())
    work = read_work(Request(recipe, model, data), lambda stage, share: None)
    image, tokens, mask = as_tuple(work.example)
    assert tokens.shape == mask.shape == (2, 5)
    assert mask.sum(1).min() > 0
    assert work.dense(image, tokens, mask).isfinite().all()
    assert [len(spec.values) for spec in work.inputs] == [0, 5, 5]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    (folder / "net.py").write_text(MODELS)
    images = np.random.default_rng(0).standard_normal((2, 6, 3, 10, 12)).astype(np.float32)
    np.savez(folder / "stereo.npz", **{"input.right": images[0], "input.left": images[1]})
    np.savez(folder / "ears.npz", inputs=images.reshape(6, 2, -1)[:, :, :20])
    return folder


def recipe_of(place: Path, name: str, data: str = "") -> Recipe:
    return make_recipe({"model": f"{place / 'net.py'}:{name}", "data": str(place / (data or f"{name}.npz"))})


def test_what_goes_in_is_as_the_data_have_it(place: Path) -> None:
    inspection = inspecting.inspect(recipe_of(place, "stereo"))
    assert inspection.image_size == "left [3, 10, 12], right [3, 10, 12], as the data have it"
    assert {group.name for group in inspection.groups.groups} == {"left", "right", "mix"}
    assert inspecting.inspect(recipe_of(place, "ears")).image_size == "input [2, 20], as the data have it"


def test_without_data_several_inputs_are_asked_for(place: Path) -> None:
    recipe = make_recipe({"model": f"{place / 'net.py'}:stereo", "data": ""})
    with pytest.raises(ModelError, match=r"needs 2 inputs \(left, right\)"):
        inspecting.inspect(recipe)


def test_any_answer_is_explained_and_it_is_said_which_input_counts(place: Path) -> None:
    explanation = explain(recipe_of(place, "stereo"), 1)
    assert explanation.title.endswith(
        "image '1' asked for its whole answer; relevance lies to 100% in left, 0% in right"
    )
    assert explanation.heat.shape == (10, 12)
    assert explanation.image.shape == (10, 12, 3)
    assert np.abs(explanation.heat).max() > 0
    assert {row.layer for row in explanation.layers} == {"left", "right", "mix"}


@pytest.mark.thorough
def test_a_map_of_classes_is_explained_too() -> None:
    explanation = explain(read_recipe(None, model="digits-unet"), 2)
    assert "asked for its segmentation" in explanation.title
    inside = explanation.heat[explanation.image[..., 0] > 0.5]
    assert inside.mean() > 3 * np.abs(explanation.heat).mean()  # on the digits, not beside them


def test_what_is_no_image_has_no_picture(place: Path) -> None:
    with pytest.raises(DataError, match=r"none of the inputs is an image .*, there is input \[2, 20\]"):
        explain(recipe_of(place, "ears"))


def test_the_verb_says_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inspect", "--model", f"{place / 'net.py'}:stereo", "--data", str(place / "stereo.npz")]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image_size"].startswith("left [3, 10, 12]")
