"""A criterion is a function and a row: those of `docs/extending.md`, which scoring then takes like its own."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from compressor import criteria
from compressor.graph import trace
from compressor.listing import rows_of
from compressor.pruning import find_structure
from compressor.relevance import score, weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def largest_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's criterion in the table."""
    section = (ROOT / "docs" / "extending.md").read_text().partition("## A criterion")[2].partition("\n## ")[0]
    function, row = (textwrap.dedent(block) for block in re.findall(r" *```python\n(.*?) *```", section, re.DOTALL))
    module = dict(vars(weights))
    exec(function, module)
    monkeypatch.setattr(weights, "largest_weight", module["largest_weight"], raising=False)
    rows = eval(f"{{{row}}}", vars(criteria))
    monkeypatch.setattr(criteria, "CRITERIA", {**criteria.CRITERIA, **rows})


def test_it_is_listed_with_its_sentence() -> None:
    assert ("largest_weight", "the largest absolute weight of a unit") in rows_of("criteria")


def test_every_unit_has_its_largest_weight() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    graph = trace(model.eval(), images)
    groups = find_structure(graph, images).groups
    (name,) = [group.name for group in groups.groups]

    scores = score(graph, groups, [], criterion="largest_weight")

    kernel = model[0].weight.detach()  # [8, 3, 3, 3]
    of_units = torch.from_numpy(scores.values[name])  # [1 site, 8]
    torch.testing.assert_close(of_units[0].float(), kernel.abs().amax((1, 2, 3)))
