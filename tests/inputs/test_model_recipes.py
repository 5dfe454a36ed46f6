"""The files that docs/models.md shows for other libraries, where these are installed."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

from compressor.inputs.models import load_model
from compressor.tensors import named_leaves

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def _file(name: str, folder: Path) -> Path:
    """The block of the page that begins with its file's name."""
    blocks = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL))
    (folder / name).write_text(blocks[name])
    return folder / name


def test_a_unet_of_segmentation_models_pytorch(tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="an optional package")
    model = load_model(f"{_file('unet.py', tmp_path)}:build(classes=3)")
    with torch.no_grad():
        answer = model.module(torch.rand(2, 3, 64, 64))
    assert answer.shape == (2, 3, 64, 64)


def test_a_yolo_of_ultralytics_and_its_decode(tmp_path: Path) -> None:
    pytest.importorskip("ultralytics", reason="not a dependency, by its licence")
    file = _file("yolo.py", tmp_path)
    model = load_model(f"{file}:build")
    with torch.no_grad():
        outputs = named_leaves(model.module(torch.rand(2, 3, 64, 64)))
    assert {name: tuple(leaf.shape) for name, leaf in outputs.items()} == {"output": (2, 84, 84)}
    boxes = runpy.run_path(str(file))["decode"](outputs, least_score=0.0)
    assert len(boxes) == 2
    assert all(image["boxes"].shape == (len(image["scores"]), 4) for image in boxes)
