"""What a value stands for in a stage's key: equal for equal contents, other for any other content, wherever it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compressor.files import content_hash
from compressor.graph import trace
from compressor.inputs.images import Images, batches
from compressor.run import fingerprints
from compressor.run.fingerprints import Known, fingerprint, source_hash


def key(value: object) -> str:
    return content_hash(fingerprint(value))


@pytest.fixture
def network() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return trace(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.randn(2, 3, 2, 2))


def test_a_network_stands_for_its_code_and_weights(network: Any) -> None:
    before = key(network)
    assert key(network) == before
    with torch.no_grad():
        next(network.parameters()).flatten()[0] += 1e-3
    assert key(network) != before


def test_images_stand_for_their_content_order_batches_and_preprocessing(images: Images) -> None:
    first = key(batches(images, 8))
    assert key(batches(images, 8)) == first
    assert key(batches(images, 4)) != first
    assert key(batches(images.subset(np.arange(59)), 8)) != first
    assert key(batches(images.subset(np.arange(60)[::-1]), 8)) != first


def test_a_file_stands_for_its_bytes_and_not_for_its_place(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "folder" / "b"
    second.parent.mkdir()
    first.write_bytes(b"content")
    second.write_bytes(b"content")
    assert key(first) == key(second)
    second.write_bytes(b"contents")
    assert key(first) != key(second)


def test_what_is_known_stands_for_a_value_that_is_not_looked_at() -> None:
    assert fingerprint(Known(object(), "its hash")) == "its hash"


def test_values_inside_others_are_looked_up_too(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    nested = {"files": [tmp_path / "a", (Known(object(), 1),)], "plain": np.arange(3)}
    assert fingerprint(nested)["files"] == [fingerprint(tmp_path / "a"), [1]]  # type: ignore[index]
    (tmp_path / "a").write_bytes(b"other")
    assert key(nested) != key({**nested, "plain": np.arange(4)})


@pytest.mark.parametrize("value", [1, 1.5, "text", None, True, np.arange(3)])
def test_plain_values_stand_for_themselves(value: object) -> None:
    assert fingerprint(value) is value


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.py", "pruning/b.py", "report/c.py", "cli/d.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x = 1\n")
    monkeypatch.setattr(fingerprints, "PACKAGE", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "counts"), [("a.py", True), ("pruning/b.py", True), ("report/c.py", False), ("cli/d.py", False)]
)
def test_code_that_only_shows_is_no_other_result(package: Path, name: str, counts: bool) -> None:
    before = source_hash.__wrapped__()
    (package / name).write_text("x = 2\n")
    assert (source_hash.__wrapped__() != before) == counts


def test_a_module_that_was_moved_is_other_code(package: Path) -> None:
    before = source_hash.__wrapped__()
    (package / "a.py").rename(package / "z.py")
    assert source_hash.__wrapped__() != before
