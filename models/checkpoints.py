"""A trained model in, its checkpoint and its row of index.json out. Knows neither how it was trained nor on what."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from compressor.files import file_sha256, replacing, write_json
from compressor.inputs.images import Preprocessing
from compressor.inputs.scans import DIGITS_HELD_OUT, DIGITS_SEED

HERE = Path(__file__).resolve().parent

DATA = {
    "name": "scikit-learn load_digits (UCI optical recognition of handwritten digits, test part), 1,797 scans of 8x8",
    "licence": "CC BY 4.0 (Alpaydin, Kaynak 1998)",
    "training": "digits:training",
    "evaluation": "digits:evaluation",
    "split_seed": DIGITS_SEED,
    "split_rule": (
        "image names are '0000' to '1796' in scikit-learn's order; within each class images are ordered by "
        "sha256('<seed>:<name>'), image j of n stands at (j + 1/2) / n, all classes are merged by that place "
        f"(ties by the hash); the first {DIGITS_HELD_OUT:.0%} are held out for evaluation"
    ),
}


def saved(name: str, model: nn.Module, build: Callable[[], nn.Module]) -> dict[str, object]:
    """Writes the checkpoint; what the index says of the file and of the network that `build` makes for it."""
    path = HERE / f"{name.replace('-', '_')}.safetensors"
    state = {key: value for key, value in model.state_dict().items() if "num_batches_tracked" not in key}
    with replacing(path) as temporary:
        save_file({key: value.contiguous() for key, value in state.items()}, temporary)
    return {
        "file": path.name,
        "sha256": file_sha256(path),
        "bytes": path.stat().st_size,
        "builder": f"models/{Path(build.__code__.co_filename).name}:{build.__name__}",
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def prepared_as(preprocessing: Preprocessing) -> dict[str, object]:
    """How the index writes a pre-processing."""
    return {
        "size": list(preprocessing.size),
        "resize": list(preprocessing.resize),
        "interpolation": preprocessing.interpolation,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
    }


def record(name: str, described: dict[str, object]) -> None:
    """Puts one model's entry into index.json beside the others'."""
    path = HERE / "index.json"
    known = json.loads(path.read_text())["models"] if path.exists() else {}
    known[name] = described
    write_json(path, {"schema": "models/1", "data": DATA, "models": dict(sorted(known.items()))})
