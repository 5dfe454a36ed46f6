"""A selector to a file and back: its tensors, and what it reads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from ..errors import FolderError
from ..files import read_arrays, read_json, write_arrays, write_json
from .selector import Scale, Selector

FILE, ABOUT = "selector.safetensors", "selector.json"
_SCHEMA = "selector/2"


def learned_in(number: int) -> str:
    """The folder, within a run's, of what a round learned: each has a selector of its own, of its own network."""
    return f"learned-{number}"


def write_selector(folder: Path, selector: Selector, network: str) -> None:
    """`network` is the hash of the one that it reads."""
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in selector.state_dict().items()}
    write_arrays(folder / FILE, tensors)
    scales = json.loads(json.dumps([asdict(scale) for scale in selector.scales]))
    about = {"scales": scales, "shape": list(selector.shape), "least": selector.least, "network": network}
    write_json(folder / ABOUT, {"schema": _SCHEMA, **about})


def read_selector(folder: Path, network: str = "") -> Selector | None:
    """None where the folder has none. Raises FolderError where it is damaged, or reads another `network`."""
    if not (folder / ABOUT).is_file():
        return None
    about = read_json(folder / ABOUT, _SCHEMA)
    if network and about["network"] != network:
        raise FolderError(
            f"the selector in {folder} was learned for another network or other weights; give the model and the "
            "weights of its run"
        )
    arrays = read_arrays(folder / FILE)
    scales = [Scale(**{**scale, "grid": tuple(scale["grid"])}) for scale in about["scales"]]
    height, width = about["shape"]
    selector = Selector(scales, arrays["question.weight"].shape[1], (height, width), 0, about["least"])
    selector.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    return selector.eval()
