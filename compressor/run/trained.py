"""What a training loop left in (a module, its state, a checkpoint file), the run's network with those weights out.

Wrappers that loops put around a network or before its tensors' names are taken off. Nothing in a file is executed.
Knows no stage and no folder.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..errors import ModelError, with_article
from ..graph import fetch
from ..graph.tracing import named_tensors
from ..graph.wrappers import plain
from ..inputs.checkpoints import fitting, load_checkpoint, state_in

_INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # anywhere in a tensor's name
_REMEDY = "Give what came of training run.network() or run.module() of this very run"
_DENSE = "These are the dense network's shapes: train run.network() or run.module(), and give what came of that"


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Tensors by name, where they are from in words, and what to say of how they were read."""

    tensors: Mapping[str, Tensor]
    source: str
    notes: tuple[str, ...] = ()


def state_of(trained: object, entry: str = "") -> State:
    """The tensors of a module, of a state dict, or of a checkpoint's file, from its `entry` where it holds several.

    Raises ModelError for anything else, and for a file that can't be read safely.
    """
    if isinstance(trained, nn.Module):
        inner = plain(trained)
        return State(named_tensors(inner.module), f"the trained {type(trained).__name__}", inner.notes)
    if isinstance(trained, (str, os.PathLike)):
        path = os.fspath(trained)
        return _state_in(load_checkpoint(path), f"checkpoint {path!r}", entry)
    if isinstance(trained, Mapping):
        return _state_in(trained, "the given state", entry)
    raise ModelError(
        f"what was trained is {with_article(type(trained).__name__)}, expected a module, a state dict or a "
        "checkpoint's path"
    )


def _state_in(value: object, source: str, entry: str) -> State:
    read = state_in(value, entry)
    if read is None:
        lacking = f"no tensors under {entry!r}" if entry else "no tensors by name"
        raise ModelError(
            f"{source} holds {lacking}{_keys_in_words(value)}; save it with torch.save(network.state_dict(), ...)"
        )
    tensors, entries_left = read
    notes = []
    for name in entries_left:
        if "ema" in name:
            notes.append(f"{source} also holds {name!r}, which was not taken: entry={name!r} ships that")
    return State(tensors, source, tuple(notes))


def _keys_in_words(value: object) -> str:
    """` (it has 'epoch', 'model')`: the first keys of a mapping; empty where there are none."""
    if not isinstance(value, Mapping) or not value:
        return ""
    keys = ", ".join(repr(str(key)) for key in list(value)[:8])
    return f" (it has {keys})"


def with_trained(network: fx.GraphModule, state: State, dense: nn.Module) -> fx.GraphModule:
    """A copy of the network with the trained tensors, in evaluation; `dense` is the module it was made from.

    Raises ModelError for what is missing, unexpected, of another shape, or no trained weight.
    """
    filled = copy.deepcopy(network)
    expected, parameters = named_tensors(filled), dict(filled.named_parameters(remove_duplicate=False))
    of_dense, persistent = named_tensors(dense), dense.state_dict()
    optional = [name for name in expected if name not in parameters and name not in persistent]
    needed = [name for name in expected if name not in optional and not name.endswith("num_batches_tracked")]

    tensors = _without_wrappers(state, needed)
    values = fitting(
        tensors,
        expected,
        where=state.source,
        remedy=_DENSE if _are_dense(tensors, expected, of_dense) else _REMEDY,
        optional=optional,
        spare=[name for name in of_dense if name not in expected],
    )
    with torch.no_grad():
        for name, value in values.items():
            fetch(filled, name).copy_(value)
    for name, value in values.items():
        tensor = fetch(filled, name)
        if not torch.equal(tensor, value.to(tensor)):
            raise ModelError(
                f"{state.source} has other values for {name!r} than for a tensor that the network shares with it; "
                "train them tied"
            )
    return filled


def _are_dense(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], of_dense: Mapping[str, Tensor]) -> bool:
    """Whether one of the tensors has the dense network's shape where the smaller one's is another."""
    for name in tensors.keys() & expected.keys() & of_dense.keys():
        shape = tensors[name].shape
        if shape != expected[name].shape and shape == of_dense[name].shape:
            return True
    return False


def _without_wrappers(state: State, needed: Sequence[str]) -> dict[str, Tensor]:
    """Under the network's own names: without what compiling, sharding, averaging and trainers' modules put before them.

    Of a trainer's module, what lies beside the network (its metrics) is left out. Raises ModelError where it holds the
    network twice.
    """
    tensors = dict(state.tensors)
    for inside in _INSIDE:
        tensors = {name.replace(inside, ""): tensor for name, tensor in tensors.items()}
    anchor = max(needed, key=len, default="")  # the longest name is hardly the end of another
    prefixes = [name.removesuffix(anchor) for name in tensors if name.endswith(f".{anchor}")]
    if anchor in tensors or not prefixes:
        return tensors

    def is_whole(prefix: str) -> bool:
        return all(prefix + name in tensors for name in needed)

    whole = list(filter(is_whole, prefixes))
    if len(whole) > 1:
        listed = " and ".join(repr(prefix) for prefix in whole)
        raise ModelError(
            f"{state.source} holds the network's tensors several times, under {listed}; say which one ships: "
            f"entry={whole[0].rstrip('.')!r} (--entry on the command line)"
        )
    prefix = (whole or prefixes)[0]
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
