"""The scripts that train the embedded models: they start, and describe each model as the index has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

MODELS = Path(__file__).parents[1] / "models"


@pytest.fixture
def canvases(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(MODELS))
    import train_canvases

    return train_canvases


def test_every_embedded_model_has_a_script_that_trains_it(canvases: Any) -> None:
    import train

    commands = [
        row["training"]["command"] for row in json.loads((MODELS / "index.json").read_text())["models"].values()
    ]
    assert {command.split()[1] for command in commands} == {"models/train.py", "models/train_canvases.py"}
    assert callable(train.main)
    assert callable(canvases.main)


def test_a_detector_trained_anew_is_read_as_the_one_that_is_there(canvases: Any) -> None:
    rows = json.loads((MODELS / "index.json").read_text())["models"]
    for name, course in canvases.COURSES.items():
        assert json.loads(json.dumps(course.decode)) == rows[name].get("decode")
