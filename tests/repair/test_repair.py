"""What is repaired is what the recipe asks for, in a search as in a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx, nn

from compressor.choices import repairing_of
from compressor.inputs.models import Model
from compressor.pruning import Structure, find_structure, prune
from compressor.recipe import make_recipe
from compressor.records import Plan
from compressor.rounds import repair_layers
from compressor.run.work import Request, Work, prepare
from compressor.searching.bench import Bench, light

READER, STATISTICS = {"3.weight", "3.bias", "7.weight", "7.bias"}, {"4.running_mean", "4.running_var"}


def network() -> nn.Module:
    torch.manual_seed(0)
    first = (nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(*first, nn.Conv2d(8, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 10))


def prepared(folder: Path, **asked: bool) -> tuple[Work, Structure, Plan]:
    """Half of the first convolution goes."""
    options = {"data": "digits", "size": 16, "mean": 0.5, "std": 0.5, "calibration": 64, "out": str(folder)}
    model = Model(network().eval(), "", "given", None, None, "0" * 64)
    work = prepare(Request(make_recipe({"model": "small", **options, **asked}), model), lambda stage, share: None)
    structure = find_structure(work.dense, work.example)
    first = next(group for group in structure.groups.groups if group.size == 8)
    return work, structure, Plan({first.name: np.arange(4)}, 0, 0)


def changed(before: fx.GraphModule, after: fx.GraphModule) -> set[str]:
    new = after.state_dict()
    return {name for name, old in before.state_dict().items() if not torch.equal(old, new[name])}


@pytest.mark.thorough
@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("reestimate", [False, True])
def test_what_the_recipe_asks_for_is_repaired_and_nothing_else(
    tmp_path: Path, compensate: bool, reestimate: bool
) -> None:
    work, structure, plan = prepared(tmp_path / "run", compensate=compensate, reestimate=reestimate)
    raw, _ = prune(work.dense, structure, plan)
    small, slices = prune(work.dense, structure, plan)
    record = repair_layers(work.dense, small, slices, work.calibration, repairing=repairing_of(work.recipe))
    found = changed(raw, small)
    assert bool(found & READER) == compensate == bool(record.repaired)
    assert bool(found & STATISTICS) == reestimate
    assert compensate or found <= STATISTICS | {"1.running_mean", "1.running_var"}
    sought = Bench(work, structure, (), ()).reduced(plan, list(work.calibration))
    assert changed(small, sought) == set(), "a search repairs otherwise than a run"


@pytest.mark.thorough
def test_a_repair_says_how_far_it_is(tmp_path: Path) -> None:
    work, structure, plan = prepared(tmp_path / "run")
    small, slices = prune(work.dense, structure, plan)
    shares: list[float] = []
    repair_layers(work.dense, small, slices, work.calibration, progress=shares.append)
    assert len(shares) == 2  # one for each layer that is refitted
    assert 0 < shares[0] < shares[1] <= 1


@pytest.mark.thorough
def test_a_lighter_repair_is_another_one(tmp_path: Path) -> None:
    work, structure, plan = prepared(tmp_path / "run")
    bench = Bench(work, structure, (), ())
    images = list(work.calibration)
    assert changed(bench.reduced(plan, images), bench.reduced(plan, images, light(work.recipe.seed)))
