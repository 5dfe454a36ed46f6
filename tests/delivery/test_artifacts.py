"""What delivery's files are called: by measurements, by the report, and which precisions bring which along."""

from __future__ import annotations

import pytest

from compressor.delivery.artifacts import (
    DENSE,
    FP16,
    INT8,
    INT8_TENSORRT,
    SHIPPED,
    Artifact,
    of_subject,
    wanted_precisions,
)

FILES = (DENSE, SHIPPED, FP16, INT8, INT8_TENSORRT)


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        (("fp32",), ("fp32",)),
        ((), ("fp32",)),
        (("fp16",), ("fp32", "fp16")),
        (("int8",), ("fp32", "fp16", "int8")),
        (("int8", "fp32"), ("fp32", "fp16", "int8")),
        (("fp16", "int8", "fp16"), ("fp32", "fp16", "int8")),
    ],
)
def test_what_others_are_made_from_is_made_too_and_first(asked: tuple[str, ...], made: tuple[str, ...]) -> None:
    assert wanted_precisions(asked) == made


@pytest.mark.parametrize("artifact", FILES, ids=lambda artifact: artifact.name)
def test_a_subject_tells_variant_and_precision_again(artifact: Artifact) -> None:
    assert of_subject(artifact.subject) == (artifact.variant, artifact.precision)


def test_files_that_are_run_have_subjects_of_their_own() -> None:
    run = [artifact for artifact in FILES if not artifact.made_for]
    assert [artifact.subject for artifact in run] == ["dense", "shipped", "shipped-fp16", "shipped-int8"]
    assert len({artifact.name for artifact in FILES}) == len(FILES)


def test_each_form_says_whom_it_is_for() -> None:
    purposes = {artifact.name: artifact.purpose for artifact in FILES}
    assert purposes["dense.onnx"] == purposes["model.onnx"]
    assert len(set(purposes.values())) == len(FILES) - 1
    assert purposes["model.int8.tensorrt.onnx"].startswith("TensorRT")
    assert purposes["model.int8.onnx"].startswith("CPUs")
