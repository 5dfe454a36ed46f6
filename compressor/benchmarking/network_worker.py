"""The child process that times a run's networks in PyTorch, as `device.worker` does model files.

A "file" here is a run's folder with `dense` or `shipped` behind it: the network is rebuilt, nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import fx

from ..delivery.networks import caller
from ..device import child
from ..device.feeds import Array, as_tuple
from ..device.openers import Port
from ..device.runtimes import Session
from ..device.worker import Worker
from ..graph import trace
from ..graph.interface import input_names
from ..run.saved import load_dense, load_graph, read_network

MODULE = "compressor.benchmarking.network_worker"
VARIANTS = ("dense", "shipped")


def _open(path: Path, runtime: str, threads: int) -> Session:
    if threads:
        torch.set_num_threads(threads)

    folder = path.parent
    inputs = read_network(folder).inputs
    # who started this process has looked at the builder: `places` opens no folder whose code is not trusted
    network = load_graph(folder, trust=True) if path.name == "shipped" else _dense(folder)
    run = caller(network, runtime)
    ports = tuple(
        Port(name, (-1, *spec.shape), spec.dtype) for name, spec in zip(input_names(network), inputs, strict=True)
    )

    def call(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        return as_tuple(run(arrays))

    return Session(runtime, torch.__version__, str(path), ports, (), threads, call)


def _dense(folder: Path) -> fx.GraphModule:
    """Untrained weights: speed does not know the difference, and a checkpoint need not be here."""
    network = read_network(folder)
    return trace(load_dense(folder, trust=True), network.example, network.keywords)


if __name__ == "__main__":
    child.serve(Worker(_open).answer)
