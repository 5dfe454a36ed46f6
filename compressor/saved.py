"""A pruned network to disk and back: builder + plan + weights, rebuilt by replay, never a pickle.

`network.json` names the builder, the input's shape and which units stay; `weights.safetensors` holds the
tensors. Reading builds the dense network again, removes the same units and fills in the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from .errors import FolderError, ModelError
from .files import read_json, replacing, write_json
from .graph import fetch, trace
from .models import load_model
from .placement import CPU
from .pruning import Structure, analyse, prune
from .records import IntArray, Plan, Slices
from .training import TrainableGraph
from .wrappers import plain

NETWORK, WEIGHTS = "network.json", "weights.safetensors"


@dataclass(frozen=True, slots=True)
class Network:
    """What rebuilds a pruned network: `shape` is an image's [C, H, W]; `tied`, `frozen` what its check found."""

    builder: str
    shape: tuple[int, ...]
    tied: tuple[str, ...]
    frozen: tuple[str, ...]
    kept: dict[str, IntArray]


def example_of(shape: tuple[int, ...]) -> Tensor:
    """Two images of noise; what a network is traced with, the same in every process."""
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def write_network(folder: Path, network: Network) -> None:
    write_json(
        folder / NETWORK,
        {
            "schema": "network/1",
            "builder": network.builder,
            "shape": list(network.shape),
            "tied": list(network.tied),
            "frozen": list(network.frozen),
            "kept": {name: units.tolist() for name, units in network.kept.items()},
        },
    )


def read_network(folder: Path) -> Network:
    if not (folder / NETWORK).is_file():
        raise FolderError(f"{folder} holds no pruned network ({NETWORK} is missing); give the folder of a finished run")
    held = read_json(folder / NETWORK, "network/1")
    kept = {name: np.array(units, dtype=np.int64) for name, units in held["kept"].items()}
    return Network(held["builder"], tuple(held["shape"]), tuple(held["tied"]), tuple(held["frozen"]), kept)


def write_weights(path: Path, graph: nn.Module) -> None:
    """Every parameter and buffer under its own name; tied ones once for each name."""
    state = {name: tensor.detach().to(CPU, copy=True).contiguous() for name, tensor in _state(graph).items()}
    with replacing(path) as temporary:
        save_file(state, temporary)


def read_weights(path: Path, graph: nn.Module) -> None:
    """Fills a graph of the same shapes; raises ModelError where a tensor is missing or has another shape."""
    held = load_file(path)
    own = _state(graph)
    wrong = [n for n, t in own.items() if n not in held or held[n].shape != t.shape]
    if wrong:
        raise ModelError(
            f"{path} does not fit the rebuilt network at {', '.join(wrong[:3])}; it was written by another version or "
            "for another model: run `compressor compress` again"
        )
    with torch.no_grad():
        for name in own:
            fetch(graph, name).copy_(held[name])


def _state(graph: nn.Module) -> dict[str, Tensor]:
    named = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    return dict(named)


def load_saved(folder: str | Path, module: nn.Module | None = None) -> fx.GraphModule:
    """The pruned network of a run's folder, in evaluation mode; the same outputs as when it was written.

    `train()` gives batch normalisation its batch statistics and dropout its chances back, `eval()` takes them away.

    `module` stands for the dense network where the builder can't be called here (it was given as an object).
    """
    small = _replayed(Path(folder), module)[1]
    return TrainableGraph(small, small.graph)


def load_module(folder: str | Path, module: nn.Module | None = None) -> nn.Module:
    """The same network in the model's own class, for models whose code takes its widths from its layers.

    Raises ModelError for the others (attention with fixed head counts): `load_saved` serves those.
    """
    from .pruning.modules import to_module  # brings torch_pruning and, with it, timm, which nothing else here needs

    dense, small, slices, shape = _replayed(Path(folder), module)
    return to_module(dense, small, slices, example_of(shape))


def _replayed(folder: Path, module: nn.Module | None) -> tuple[nn.Module, fx.GraphModule, Slices, tuple[int, ...]]:
    network = read_network(folder)
    if module is None:
        if not network.builder:
            raise ModelError(f"the run in {folder} began with a model object; give that model to load it")
        module = load_model(network.builder, "none").module
    module = plain(module).module
    graph = trace(module, example_of(network.shape))
    structure = analyse(graph, network.tied, network.frozen)
    small, slices = prune(graph, structure, Plan(network.kept, 0, 0))
    read_weights(folder / WEIGHTS, small)
    return module, small, slices, network.shape


def rebuild(graph: fx.GraphModule, structure: Structure, kept: dict[str, IntArray]) -> fx.GraphModule:
    return prune(graph, structure, Plan(kept, 0, 0))[0]
