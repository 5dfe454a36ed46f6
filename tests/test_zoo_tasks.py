"""The zoo beyond classification: its list, and one network from its name to its row."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compressor.tensors import as_tuple, named_leaves

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WANTED = 40


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import zoo

    return zoo


def test_the_list_holds_enough_networks_of_every_kind(zoo: Any) -> None:
    networks = zoo.zoo_tasks.NETWORKS
    assert len(networks) >= WANTED
    libraries = {network.library for network in networks.values()}
    assert libraries == {"own", "torchvision", "transformers", "segmentation-models-pytorch", "ultralytics"}
    assert zoo.names_of("tasks") == zoo.zoo_tasks.names()


def test_every_network_written_here_answers(zoo: Any) -> None:
    for name, network in zoo.zoo_tasks.NETWORKS.items():
        if network.library == "own":
            inputs = as_tuple(zoo.zoo_tasks.samples(network.inputs, 2))
            with torch.no_grad():
                leaves = named_leaves(network.build().eval()(*inputs))
            assert leaves, name
            assert all(len(leaf) == 2 and bool(leaf.isfinite().all()) for leaf in leaves.values()), name


@pytest.mark.thorough
def test_a_network_of_two_inputs_goes_the_whole_way_and_planted_changes_are_caught(zoo: Any, tmp_path: Path) -> None:
    log = zoo.Log(tmp_path / "state.json")
    for _ in zoo.zoo_tasks.job("tasks:siamese", tmp_path, log, SimpleNamespace()):
        pass
    row = json.loads((tmp_path / "state.json").read_text())
    assert row["identity_catches"]
    assert row["parity_catches"]
    assert set(row["planted"]) <= {"likeness", "output.left", "output.right"}
    assert row["macs_kept"] <= 0.5
    assert (row["inputs"], row["outputs"]) == (["left", "right"], ["likeness", "output.left", "output.right"])


def test_a_check_that_passes_a_planted_change_is_a_failure(zoo: Any) -> None:
    rows = {"output": {"weight": "w", "identity": 1e-12, "parity": 3.0}}
    assert not zoo.zoo_tasks._caught(rows, "identity", zoo.zoo_tasks.IDENTITY_LIMIT)
    assert zoo.zoo_tasks._caught(rows, "parity", 1.0)
    assert not zoo.zoo_tasks._caught({}, "parity", 1.0), "a comparison of nothing"
