"""Builder + plan + weights give the same network in another process, or an error that names what does not fit."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compressor.errors import FolderError, ModelError
from compressor.graph import trace
from compressor.inputs.models import load_model
from compressor.pruning import find_structure, prune
from compressor.pruning.check import random_units
from compressor.records import InputSpec, Plan
from compressor.run.saved import (
    Network,
    example_of,
    load_saved,
    read_network,
    read_weights,
    save,
    spec_of,
    write_network,
    write_weights,
)
from compressor.tensors import as_tuple, specs_of

FACTORY = """
import torch
from timm.models.vision_transformer import VisionTransformer

def small():
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=5)
"""
READER = """
import sys
import numpy as np
from compressor.run.saved import example_of, load_saved
np.save(sys.argv[2], load_saved(sys.argv[1])(example_of((3, 16, 16))).detach().numpy())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved network, and beside it `expected.npy`, what it gave when it was written."""
    folder, code = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("code") / "factory.py"
    code.write_text(FACTORY)
    builder = f"{code}:small"
    example = example_of((3, 16, 16))
    graph = trace(load_model(builder, "none").module, example)
    structure = find_structure(graph, example)
    kept = random_units(structure, 0)
    small, _ = prune(graph, structure, Plan(kept, 0, 0))
    with torch.no_grad():
        for parameter in small.parameters():  # as recovery would: nothing may come from the builder
            parameter.mul_(1.25)
    save(folder, Network(builder, (InputSpec((3, 16, 16)),), structure.tied, structure.frozen, kept), small)
    np.save(folder / "expected.npy", small(example).detach().numpy())
    return folder


@pytest.mark.thorough
def test_the_same_outputs_in_a_fresh_process(folder: Path) -> None:
    command = [sys.executable, "-c", READER, str(folder), str(folder / "got.npy")]
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", "PATH": ""}, cwd=Path(__file__).parents[2])
    expected = np.load(folder / "expected.npy")
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(np.load(folder / "got.npy"), expected, rtol=1e-5, atol=1e-6)


def test_what_is_written_is_read(folder: Path) -> None:
    held = read_network(folder)
    assert held.inputs == (InputSpec((3, 16, 16)),)
    assert held.kept
    assert all(units.dtype == np.int64 for units in held.kept.values())


def test_a_samples_own_numbers_are_kept(folder: Path, tmp_path: Path) -> None:
    specs = specs_of((torch.rand(2, 3), torch.tensor([[True, False], [False, False]]), torch.tensor([[3, -1]])))
    (folder / "network.json").rename(tmp_path / "network.json")
    try:
        write_network(folder, Network("", specs, (), (), {}))
        network = read_network(folder)
    finally:
        (tmp_path / "network.json").rename(folder / "network.json")
    noise, mask, indices = as_tuple(network.example)
    assert network.inputs == specs
    assert noise.shape == (2, 3)
    assert mask.tolist() == [[True, False]] * 2
    assert indices.tolist() == [[3, -1]] * 2


@pytest.mark.parametrize("values", [[1, 2, 3], [1, 2.5], [1, 2**70], ["1", "2"], [True, False], 7])
def test_numbers_that_are_no_sample_are_refused(values: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        spec_of({"shape": [2], "dtype": "int64", "values": values})


def test_another_model_is_refused(folder: Path) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x).mean((2, 3))

    with pytest.raises(ModelError, match="rebuild the plan"):
        load_saved(folder, Other())


def test_a_full_disk_while_weights_are_written_is_one_line_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_weights(path, nn.Linear(2, 2))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # the same system call fails as on a full disk
    try:
        with pytest.raises(FolderError, match=r"can't be written .*Free space"):
            write_weights(path, nn.Linear(200, 200))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{}", None])
def test_a_damaged_file_of_weights_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((FolderError, ModelError), match=r"weights\.safetensors"):
        read_weights(path, nn.Linear(2, 2))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="holds no pruned network"):
        load_saved(tmp_path)
