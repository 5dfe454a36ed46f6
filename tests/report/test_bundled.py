"""A bundle's README and page: what is needed to use it stands there; what a manifest holds is text, never markup."""

from __future__ import annotations

from dataclasses import replace

import pytest

from compressor.device.images import Preprocessing
from compressor.device.leaves import Leaf
from compressor.device.manifest import Decode, Manifest, ModelFile
from compressor.device.metrics import Metric
from compressor.report.bundled import PAGE, README, describe_bundle

HASH = "ab" * 32
MANIFEST = Manifest(
    name="net.py:build",
    models=(ModelFile("model.onnx"), ModelFile("engines/a.engine", library="tensorrt_rtx", target="SM86")),
    preprocessing=Preprocessing((16, 24), (20,), "bilinear", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)),
    labels=("ant", "bee"),
    licences=("made for a test",),
    provenance={"budget": "macs 0.5", "macs": 1234567, "weights_sha256": HASH, "data": {"evaluation": HASH}},
    files={name: {"sha256": HASH, "bytes": 2048} for name in ("model.onnx", "engines/a.engine", "golden.npz")},
    inputs=(Leaf("image", (3, 16, 24), "float32"),),
    outputs=(Leaf("scores", (2,), "float32"),),
    metrics=(
        Metric("model.onnx", "top-1", 0.875, 0.8, 0.9, 719, runtime="onnxruntime"),
        Metric("dense", "top-1", 0.9, 0.85, 0.95, 719, runtime="pytorch"),
    ),
    not_checked=("engine for SM86: no GPU",),
)


@pytest.mark.parametrize("name", [README, PAGE])
def test_who_received_the_folder_alone_knows_what_it_is_and_what_to_type(name: str) -> None:
    text = describe_bundle(MANIFEST)[name].decode()
    for words in (
        *("net.py:build", "macs 0.5", "87.5 %", "80.0–90.0", "719", "90.0 %"),
        *("compressor verify .", "compressor run . photo.jpg", "compressor benchmark ."),
        *("image", "[N, 3, 16, 24]", "scores", "resized to 20", "16 × 24", "0.2, 0.25, 0.3", "ant"),
        *("engine for SM86: no GPU.", "1,234,567", HASH, "data.evaluation", "made for a test", "golden.npz"),
        *("model.sig", "manifest.json", "tensorrt_rtx, SM86"),
    ):
        assert words in text, words
    assert "compressor build" not in text  # there is no recipe


def test_what_is_no_image_and_no_class_is_told_as_it_is() -> None:
    decode = Decode("dense", {"threshold": 0.3})
    manifest = replace(MANIFEST, preprocessing=None, labels=(), decode=decode, metrics=(), not_checked=(), build=({},))
    text = describe_bundle(manifest)[README].decode()
    for words in ("run . inputs.npz", "nothing is done to them", "`dense`: threshold 0.3", "compressor build ."):
        assert words in text, words
    assert "Nothing that was asked for was left unchecked" in text


def test_thousands_of_labels_are_not_a_page() -> None:
    manifest = replace(MANIFEST, labels=tuple(f"label-{index}" for index in range(1000)))
    text = describe_bundle(manifest)[README].decode()
    assert "1,000 labels" in text
    assert "and 988 more" in text
    assert "label-500" not in text


def test_what_a_manifest_holds_is_text_and_the_page_needs_nothing_else() -> None:
    evil = "<script src=http://x>alert(1)</script>"
    manifest = replace(
        MANIFEST,
        name=evil,
        labels=(evil,),
        licences=(evil,),
        not_checked=(evil,),
        provenance={evil: evil},
        metrics=(replace(MANIFEST.metrics[0], metric=evil, of=evil),),
    )
    page = describe_bundle(manifest)[PAGE].decode()
    assert "<script" not in page
    assert "http:" not in page.replace("src=http://x", "")
    for reaching_out in ("<link", "@import", "url(", "<iframe", "<img"):
        assert reaching_out not in page


def test_the_same_manifest_makes_the_same_pages() -> None:
    assert describe_bundle(MANIFEST) == describe_bundle(MANIFEST)
