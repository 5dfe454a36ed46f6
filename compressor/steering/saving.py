"""A selector to a file and back: its tensors, and what it reads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from ..files import read_arrays, read_json, write_arrays, write_json
from .selector import Scale, Selector

FILE, ABOUT = "selector.safetensors", "selector.json"
_SCHEMA = "selector/1"


def write_selector(folder: Path, selector: Selector) -> None:
    """Into a run's folder."""
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in selector.state_dict().items()}
    write_arrays(folder / FILE, tensors)
    about = {"scales": [asdict(scale) for scale in selector.scales], "shape": list(selector.shape)}
    write_json(folder / ABOUT, {"schema": _SCHEMA, **json.loads(json.dumps(about))})


def read_selector(folder: Path) -> Selector | None:
    """None where the folder has none. Raises FolderError where it is damaged."""
    if not (folder / ABOUT).is_file():
        return None
    about = read_json(folder / ABOUT, _SCHEMA)
    arrays = read_arrays(folder / FILE)
    scales = [Scale(**{**scale, "grid": tuple(scale["grid"])}) for scale in about["scales"]]
    height, width = about["shape"]
    selector = Selector(scales, arrays["question.weight"].shape[1], (height, width), 0)
    selector.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    return selector.eval()
