"""Models of the package transformers where it is installed; without it, that this is said."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.errors import MissingPackageError, ModelError
from compressor.inputs.images import Preprocessing
from compressor.inputs.models import load_model
from compressor.inputs.transformers_models import preprocessing_of
from compressor.tensors import named_leaves

SMALL = (
    "hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8, "
    "num_labels=3"
)
VIT = f"transformers:ViTForImageClassification({SMALL})"
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "do_normalize": True}
HALVES = ((0.5,) * 3, (0.5,) * 3)


def test_without_the_package_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'compressor\[transformers\]'"):
        load_model(VIT)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"size": {"height": 32, "width": 48}, "resample": 3}, Preprocessing((32, 48), (32, 48), "bicubic", *HALVES)),
        (
            {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
            Preprocessing((32, 32), (40,), "bilinear", *HALVES),
        ),
        (
            {"size": {"shortest_edge": 800, "longest_edge": 1333}, "resample": 2},
            Preprocessing((800, 800), (800, 800), "bilinear", *HALVES),
        ),
        (
            {"size": {"height": 8, "width": 8}, "do_normalize": False},
            Preprocessing((8, 8), (8, 8), "bilinear", (0.0,) * 3, (1.0,) * 3),
        ),
        ({"size": {"height": 8, "width": 8}, "do_rescale": False}, None),
        ({"size": {"height": 8, "width": 8}, "do_rescale": False, "rescale_factor": None}, None),
        ({"size": {"height": 8, "width": 8}, "rescale_factor": 1 / 127.5}, None),
        ({"do_resize": False, "size": {"height": 8, "width": 8}}, None),
        ({}, None),
    ],
)
def test_what_an_image_processor_says(fields: dict[str, Any], expected: Preprocessing | None) -> None:
    assert preprocessing_of(HALF | fields) == expected


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers", reason="an optional package")


def test_a_class_with_its_configuration(library: Any) -> None:
    model = load_model(VIT)
    assert (model.weights, model.preprocessing) == ("none", None)
    assert isinstance(model.module, library.ViTForImageClassification)
    with torch.no_grad():
        leaves = named_leaves(model.module(torch.rand(2, 3, 32, 32)))
    assert {name: tuple(leaf.shape) for name, leaf in leaves.items()} == {"logits": (2, 3)}


def test_a_folder_brings_its_class_weights_and_pre_processing(library: Any, tmp_path: Path) -> None:
    saved = load_model(VIT)
    saved.module.config.id2label = {0: "ant", 1: "bee", 2: "cat"}
    saved.module.save_pretrained(tmp_path)
    library.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    model = load_model(f"transformers:{tmp_path}")
    assert (model.weights, model.sha256) == ("default", saved.sha256)
    assert model.preprocessing == Preprocessing((32, 32), (32, 32), "bilinear", *HALVES)
    assert model.class_names == ("ant", "bee", "cat")
    assert load_model(f"transformers:{tmp_path}(num_labels=5)", "none").module.classifier.out_features == 5
    with pytest.raises(ModelError, match="raised RuntimeError"):  # its weights are for three
        load_model(f"transformers:{tmp_path}(num_labels=5)")


def test_weights_of_a_part_are_refused(library: Any, tmp_path: Path) -> None:
    module: Any = load_model(VIT).module
    module.vit.save_pretrained(tmp_path)
    config = library.AutoConfig.from_pretrained(tmp_path)
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lack 2 tensors of ViTForImageClassification \('classifier\.bias'"):
        load_model(f"transformers:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "weights", "message"),
    [
        ("ViTForImageClasification", None, "Did you mean 'ViTForImageClassification'"),
        ("Trainer", None, "no model class 'Trainer'"),
        ("ViTForImageClassification(hiden_size=3)", None, "Did you mean 'hidden_size'"),
        ("ViTForImageClassification(trust_remote_code=True)", None, "run code from elsewhere"),
        ("ViTForImageClassification(attn_implementation='a/b')", None, "run code from elsewhere"),
        ("ViTForImageClassification", "default", "has no default weights"),
        ("./nowhere", None, "can't be read .* check the name and the network"),
    ],
)
def test_what_is_no_model_is_refused(library: Any, spec: str, weights: str | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(f"transformers:{spec}", weights)
