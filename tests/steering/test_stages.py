"""What a run keeps of learned criteria: a selector for each round, which no other round's overwrites."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from compressor.graph import trace
from compressor.inputs.images import Images, batches
from compressor.pipeline.removal import find_scores
from compressor.pruning import find_structure, prune
from compressor.recipe import make_recipe
from compressor.records import NO_DEPTH
from compressor.run.fingerprints import Known
from compressor.run.stages import open_run
from compressor.run.tasking import NetworkTask
from compressor.run.work import Work
from compressor.steering import (
    GateOptions,
    SelectorOptions,
    SteeringOptions,
    hash_of_network,
    learned_in,
    read_selector,
)

from .test_selector import Corner

SHORT = SteeringOptions(
    gates=GateOptions(steps=2), selector=SelectorOptions(predictor_steps=1, steps=1), explanation=0.5
)


def work_of(folder: Path, images: Images) -> Work:
    stages = open_run(folder, {}, lambda stage, share: None)
    with stages.begun():
        pass
    stages.keys.update({"groups": "groups", "repair-1": "repair-1"})
    parts = {"calibration": images.subset(np.arange(8)), "search": images.subset(np.arange(8, 12))}
    recipe = make_recipe({"model": "net", "criterion": "isp", "normalisation": "mean", "batch_size": 4})
    given: dict[str, Any] = {
        "recipe": recipe,
        "stages": stages,
        "splits": SimpleNamespace(**parts, hashes={"calibration": "c", "search": "s"}),
        "prepared_as": None,
        "depth": NO_DEPTH,
        "calibration_images": Known(batches(parts["calibration"], 4), "c"),
    }
    return cast(Work, SimpleNamespace(**given))


def test_every_round_keeps_its_own_selector_and_none_is_learned_twice(
    tmp_path: Path, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.choices.steering_of", lambda recipe: SHORT)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Corner(channels=3, side=12).eval()
    example = images.inputs([0, 1])
    dense = trace(model, example)
    structure = find_structure(dense, example)
    small, _ = prune(dense, structure, {group.name: np.arange(1, group.size) for group in structure.groups.groups})
    networks = (dense, structure), (small, find_structure(small, example))
    task = cast(NetworkTask, SimpleNamespace(known=None))

    def both_rounds() -> tuple[list[Any], list[str]]:
        work = work_of(tmp_path / "run", images)
        scores = [find_scores(work, r, *network, task) for r, network in enumerate(networks, 1)]
        return scores, work.stages.reused

    first, done_before = both_rounds()
    assert done_before == []
    again, done_before = both_rounds()
    assert done_before == ["scores-1", "scores-2"]
    for one, other in zip(first, again, strict=True):
        assert all((one.values[name] == other.values[name]).all() for name in one.values)
    for r, (network, _) in enumerate(networks, 1):
        assert read_selector(tmp_path / "run" / learned_in(r), hash_of_network(network)) is not None
    assert not list(tmp_path.rglob("learning-*"))
