"""The child process that times a run's networks in PyTorch, as `device.worker` does model files.

A "file" here is a run's folder with `dense` or `shipped` behind it: the network is rebuilt, nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..delivery.networks import caller
from ..device import child
from ..device.openers import Port
from ..device.runtimes import Session
from ..device.worker import Worker
from ..graph import trace
from ..run.saved import example_of, load_dense, load_saved, read_network

MODULE = "compressor.benchmarking.network_worker"
VARIANTS = ("dense", "shipped")


def _open(path: Path, runtime: str, threads: int) -> Session:
    if threads:
        torch.set_num_threads(threads)

    folder = path.parent
    shape = read_network(folder).shape  # (C, H, W)
    # who started this process has looked at the builder: `places` opens no folder whose code is not trusted
    network = load_saved(folder, trust=True) if path.name == "shipped" else _dense(folder)
    call, images = caller(network, runtime), Port("input", (-1, *shape), "float32")
    return Session(runtime, torch.__version__, str(path), (images,), (), threads, lambda arrays: (call(arrays[0]),))


def _dense(folder: Path) -> nn.Module:
    """Untrained weights: speed does not know the difference, and a checkpoint need not be here."""
    return trace(load_dense(folder, trust=True), example_of(read_network(folder).shape))


if __name__ == "__main__":
    child.serve(Worker(_open).answer)
