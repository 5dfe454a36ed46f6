"""Networks that no stage makes: the dense one that ships as it is, and one that its owner trained.

In: such a network. Out: its weights in the run's folder, with what rebuilds it, and the network as it lies there.
"""

from __future__ import annotations

import copy
from pathlib import Path

from torch import fx

from ..files import content_hash, write_json, write_text
from ..recipe import to_toml
from ..run.fingerprints import Known
from ..run.finished import kept_facts
from ..run.saved import WEIGHTS, Network, read_weights, write_network, write_weights
from ..run.stages import Keeper, Progress
from ..run.user_code import code_sha256s
from ..run.work import Work
from .units import group_inputs


def keep_network(work: Work) -> None:
    """The dense network as the one that ships, to disk, with what rebuilds it."""

    def write(folder: Path, network: fx.GraphModule) -> None:
        write_weights(folder / WEIGHTS, network)

    work.stages.make(
        "network",
        _unchanged,
        Keeper(write, lambda folder: work.dense),
        dense=Known(work.dense, group_inputs(work)),
    )
    keep_inputs(work)
    code = code_sha256s(work.recipe)
    write_network(work.stages.folder, Network(work.model.builder, work.inputs, (), (), {}, work.keywords, code))


def _unchanged(dense: fx.GraphModule, progress: Progress) -> fx.GraphModule:
    return dense


def keep_inputs(work: Work) -> None:
    """The resolved recipe, and hashes of the images, for a reader of the folder."""
    folder = work.stages.folder
    write_text(folder / "recipe.toml", to_toml(work.recipe))
    write_json(folder / "splits.json", kept_facts(work))


def keep_trained(work: Work, network: fx.GraphModule) -> fx.GraphModule:
    """The trained network to disk, and as it lies there."""

    def write(folder: Path, result: fx.GraphModule) -> None:
        write_weights(folder / WEIGHTS, result)

    def read(folder: Path) -> fx.GraphModule:
        again = copy.deepcopy(network)
        read_weights(folder / WEIGHTS, again)
        return again

    of_dense = work.stages.keys.get("groups", content_hash(group_inputs(work)))
    return work.stages.make(
        "trained",
        _unchanged,
        Keeper(write, read),
        dense=Known(network, [of_dense, work.stages.identity["trained"]]),
    )
