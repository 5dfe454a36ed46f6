"""A pruned network to disk and back: builder + plan + weights, rebuilt by replay, never a pickle.

`network.json` names the builder, what its inputs are, which units stay and the hash of `weights.safetensors`, which
holds the tensors. Reading builds the dense network again, removes the same units and fills in the weights. The
builder is code: what a folder names is run only where `trust` lets it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, fx, nn

from ..errors import FolderError, ModelError, first_line
from ..files import file_sha256, read_signed, signed, write_bytes, write_json
from ..graph import fetch, trace
from ..graph.nesting import nesting_of
from ..graph.training import TrainableGraph
from ..graph.wrappers import plain
from ..inputs.models import load_model
from ..inputs.trust import builder_sha256, require_trusted
from ..placement import CPU, placed
from ..pruning import Structure, analyse, prune
from ..pruning.branches import without_branches
from ..pruning.modules import to_module
from ..records import InputSpec, IntArray, Slices
from ..tensors import Inputs, as_tuple, noise_like

NETWORK, WEIGHTS = "network.json", "weights.safetensors"
_SCHEMA = "network/3"
_MOST_NUMBERS = 2**28  # of a sample; a shape from a file asks for memory before anything else is known of it
_MOST_INPUTS = 64
_LARGEST = 2**63
_TYPES = ("float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool")


@dataclass(frozen=True, slots=True)
class Network:
    """What rebuilds a pruned network: `inputs` are what it was traced with, `tied`, `frozen` what its check found.

    `keywords` name the inputs where forward takes them by name. `builder_sha256` is of the file the builder's code lies
    in, `weights_sha256` of the file of tensors; empty where there is none. `code_sha256s` are of the files of the other
    code that the run's recipe names, by what it says (`user_code`). `branches` are residual branches that went whole.
    """

    builder: str
    inputs: tuple[InputSpec, ...]
    tied: tuple[str, ...]
    frozen: tuple[str, ...]
    kept: dict[str, IntArray]
    keywords: tuple[str, ...] = ()
    code_sha256s: Mapping[str, str] = field(default_factory=dict)
    builder_sha256: str = ""
    weights_sha256: str = ""
    branches: tuple[str, ...] = ()

    @property
    def example(self) -> Inputs:
        """What it is traced with."""
        return noise_like(self.inputs)


def example_of(shape: tuple[int, ...]) -> Tensor:
    """Two images [C, H, W] of noise; what a network of one image is traced with, the same in every process."""
    (example,) = as_tuple(noise_like([InputSpec(shape)]))
    return example


def save(folder: Path, network: Network, graph: nn.Module) -> None:
    """The network's tensors and, naming them, what rebuilds it."""
    write_weights(folder / WEIGHTS, graph)
    write_network(folder, network)


def write_network(folder: Path, network: Network) -> None:
    """`network.json` beside the weights, which lie there already."""
    hashes = {
        "builder_sha256": builder_sha256(network.builder),
        "weights_sha256": file_sha256(folder / WEIGHTS),
    }
    kept = {name: units.tolist() for name, units in network.kept.items()}
    write_json(folder / NETWORK, signed({"schema": _SCHEMA, **asdict(network), **hashes, "kept": kept}))


def read_network(folder: Path) -> Network:
    """What `network.json` says. Raises FolderError where there is none, or one that is not as it was written."""
    if not (folder / NETWORK).is_file():
        raise FolderError(f"{folder} holds no pruned network ({NETWORK} is missing); give the folder of a finished run")
    content = read_signed(folder / NETWORK, _SCHEMA)
    try:
        return _network_of(content)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:80]
        raise FolderError(f"{folder / NETWORK} describes no network ({reason}); {_AGAIN}") from error


_AGAIN = "run the command that made this folder again, it writes the file anew"


def _network_of(content: Mapping[str, Any]) -> Network:
    """Raises one of many errors for anything but what `write_network` wrote."""
    builder = content["builder"]
    hash_of_builder, hash_of_weights = content["builder_sha256"], content["weights_sha256"]
    branches = content.get("branches", ())  # no run before 0.3 had any
    texts = [builder, hash_of_builder, hash_of_weights]
    texts += [*branches, *content["tied"], *content["frozen"], *content["kept"], *content["keywords"]]
    texts += [*content["code_sha256s"].keys(), *content["code_sha256s"].values()]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a name is no text")
    inputs = tuple(map(spec_of, content["inputs"]))
    numbers = sum(math.prod(spec.shape) for spec in inputs)
    if not 1 <= len(inputs) <= _MOST_INPUTS or numbers > _MOST_NUMBERS:
        raise ValueError(f"{len(inputs)} inputs, or too large ones")
    return Network(
        builder=builder,
        inputs=inputs,
        tied=tuple(content["tied"]),
        frozen=tuple(content["frozen"]),
        kept={name: np.array(units, dtype=np.int64) for name, units in content["kept"].items()},
        keywords=tuple(content["keywords"]),
        code_sha256s=dict(content["code_sha256s"]),
        builder_sha256=hash_of_builder,
        weights_sha256=hash_of_weights,
        branches=tuple(branches),
    )


def spec_of(content: Mapping[str, Any]) -> InputSpec:
    """An input as the file has it. Raises ValueError, TypeError or KeyError for what is none."""
    shape, dtype = tuple(content["shape"]), content["dtype"]
    is_shape = all(type(side) is int and side > 0 for side in shape)
    if not is_shape or dtype not in _TYPES:
        raise ValueError(f"an input of {str(dtype)[:20]} {str(list(shape))[:40]}")
    values = tuple(content.get("values", ()))  # earlier runs have none
    are_numbers = all(type(value) is int and abs(value) < _LARGEST for value in values)
    if values and not (are_numbers and len(values) == math.prod(shape)):
        raise ValueError(f"a sample of {len(values)} values for {str(list(shape))[:40]}")
    return InputSpec(shape, dtype, values)


def write_weights(path: Path, graph: nn.Module) -> None:
    """Every parameter and buffer under its own name; tied ones once for each name."""
    state = {name: tensor.detach().to(CPU, copy=True).contiguous() for name, tensor in _state(graph).items()}
    write_bytes(path, safetensors.torch.save(state))  # `save_file` reports a full disk as an error of its own


def read_weights(path: Path, graph: nn.Module) -> None:
    """Fills a graph of the same shapes; raises FolderError for a damaged file, ModelError where a tensor is missing
    or has another shape."""
    tensors, state = _read_tensors(path), _state(graph)
    wrong = [name for name in state if name not in tensors or tensors[name].shape != state[name].shape]
    if wrong:
        raise ModelError(
            f"{path} does not fit the rebuilt network at {', '.join(wrong[:3])}; it was written by another version or "
            "for another model, or the model keeps what it saw since: give it as it was, or run `compressor compress` "
            "again"
        )
    with torch.no_grad():
        for name in state:
            fetch(graph, name).copy_(tensors[name])


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(path.read_bytes())
    except FileNotFoundError as error:
        raise FolderError(f"{path} doesn't exist; {_AGAIN}") from error
    except Exception as error:
        reason = first_line(error, longest=80)
        raise FolderError(f"{path} is not a safetensors file ({reason}); {_AGAIN}") from error
    return tensors


def _state(graph: nn.Module) -> dict[str, Tensor]:
    named = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    return dict(named)


def load_saved(folder: str | Path, module: nn.Module | None = None, *, trust: bool = False) -> fx.GraphModule:
    """The pruned network of a run's folder, in evaluation mode; the same outputs as when it was written.

    It is called as the model is and answers in the model's own containers (a dictionary, a dataclass, a tuple).
    `module` stands for the dense network where the builder can't be called here (it was given as an object). With
    `trust`, the builder's code is run whatever is known of it. `train()` gives batch normalisation its batch statistics
    and dropout its chances back, `eval()` takes them away. Raises FolderError for a folder that was changed.
    """
    dense, small, _, network = _replayed(Path(folder), module, trust)
    nesting = nesting_of(placed(dense, CPU), small, network.example, network.keywords)
    return TrainableGraph(small, small.graph, nesting=nesting)


def load_graph(folder: str | Path, module: nn.Module | None = None, *, trust: bool = False) -> fx.GraphModule:
    """The same as a flat graph, whose inputs and answers are tensors in their order (`graph.interface`)."""
    return _replayed(Path(folder), module, trust)[1]


def load_module(folder: str | Path, module: nn.Module | None = None, *, trust: bool = False) -> nn.Module:
    """The same network in the model's own class, for models whose code takes its widths from its layers.

    Raises ModelError for the others (attention with fixed head counts): `load_saved` serves those.
    """
    dense, small, slices, network = _replayed(Path(folder), module, trust)
    return to_module(dense, small, slices, network.example, network.keywords)


def load_dense(folder: Path, *, trust: bool = False) -> nn.Module:
    """The dense network as its builder makes it, without trained weights."""
    network = read_network(folder)
    if not network.builder:
        raise ModelError(f"the run in {folder} began with a model object; give that model to load it")
    require_trusted(network.builder, network.builder_sha256, folder, trust=trust)
    return load_model(network.builder, "none").module


def _replayed(folder: Path, module: nn.Module | None, trust: bool) -> tuple[nn.Module, fx.GraphModule, Slices, Network]:
    network = read_network(folder)
    _require_weights(folder, network)
    if module is None:
        module = load_dense(folder, trust=trust)
    module = plain(module).module
    graph = trace(module, network.example, network.keywords)
    small, slices = _without_units(folder, graph, network)
    read_weights(folder / WEIGHTS, small)
    return module, small, slices, network


def _without_units(folder: Path, graph: fx.GraphModule, network: Network) -> tuple[fx.GraphModule, Slices]:
    """What is left of the dense network; where nothing went, a copy of it whose units nobody looks for."""
    if network.branches:
        graph = without_branches(graph, network.branches)
    if not network.kept:
        return copy.deepcopy(graph), Slices({})
    structure = analyse(graph, network.tied, network.frozen)
    _require_units(folder, structure, network.kept)
    return prune(graph, structure, network.kept)


def _require_weights(folder: Path, network: Network) -> None:
    path = folder / WEIGHTS
    if not path.is_file():
        raise FolderError(f"{path} doesn't exist; {_AGAIN}")
    if file_sha256(path) != network.weights_sha256:
        raise FolderError(f"{path} was changed since it was written (its hash is not the one in {NETWORK}); {_AGAIN}")


def _require_units(folder: Path, structure: Structure, kept: Mapping[str, IntArray]) -> None:
    """Groups of other names are `prune`'s to refuse; units that a group does not have would be passed over."""
    sizes = {group.name: group.size for group in structure.groups.groups}
    for name, units in kept.items():
        size = sizes.get(name)
        if size is None:
            continue
        is_rising = units.ndim == 1 and bool((np.diff(units) > 0).all())
        if not is_rising or not len(units) or units[0] < 0 or units[-1] >= size:
            raise FolderError(
                f"{folder / NETWORK} keeps units of group {name!r} that it does not have (0 to {size - 1}); {_AGAIN}"
            )


def rebuild(graph: fx.GraphModule, structure: Structure, kept: dict[str, IntArray]) -> fx.GraphModule:
    """The graph with those units alone, its weights cut and not repaired."""
    return prune(graph, structure, kept)[0]
