"""A bundle's bill of materials: valid CycloneDX with a model card, the same bytes for the same bundle."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from compressor.delivery.bom import bill_of_materials
from compressor.device.manifest import Manifest

from ..report.test_bundled import HASH, MANIFEST


@pytest.mark.parametrize(
    "manifest",
    [MANIFEST, Manifest("plain", (), None), replace(MANIFEST, licences=("a", "b"))],
    ids=["all", "none", "two"],
)
def test_it_is_what_the_standard_says(manifest: Manifest) -> None:
    document = bill_of_materials(manifest)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(document.decode()) is None
    assert bill_of_materials(manifest) == document


def test_it_names_files_data_figures_and_what_was_not_checked() -> None:
    document = json.loads(bill_of_materials(MANIFEST))
    model = document["metadata"]["component"]
    card = model["modelCard"]
    assert (model["type"], model["name"]) == ("machine-learning-model", MANIFEST.name)
    assert model["pedigree"]["ancestors"][0]["hashes"] == [{"alg": "SHA-256", "content": HASH}]
    assert {part["name"] for part in document["components"]} == {*MANIFEST.files, "evaluation data"}
    assert card["quantitativeAnalysis"]["performanceMetrics"][0] == {
        "type": "top-1",
        "value": "0.875",
        "slice": "model.onnx in onnxruntime, 719 samples",
        "confidenceInterval": {"lowerBound": "0.8", "upperBound": "0.9"},
    }
    assert card["considerations"]["technicalLimitations"] == ["not checked: engine for SM86: no GPU"]
    assert card["modelParameters"]["inputs"] == [{"format": "image: float32 [N, 3, 16, 24]"}]


def test_another_bundle_has_another_number() -> None:
    other = replace(MANIFEST, files={"model.onnx": {"sha256": "cd" * 32, "bytes": 1}})
    numbers = {json.loads(bill_of_materials(manifest))["serialNumber"] for manifest in (MANIFEST, other)}
    assert len(numbers) == 2
