"""The check itself: what it removes on trial, when two results agree, and what becomes of a node that fails."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.graph import trace
from compressor.pruning import analyse, check, find_structure
from compressor.pruning.check import TOLERANCE, _agree, random_units
from compressor.pruning.structure import Structure
from compressor.records import Group, Groups

from .conftest import images


def bare(*groups: Group, spans: dict[str, tuple[np.ndarray, ...]] | None = None) -> Structure:
    """Groups of no graph."""
    resolved = analyse(trace(nn.Conv2d(3, 4, 1), torch.randn(2, 3, 2, 2)))
    return Structure(Groups(groups), resolved.classes, {}, np.zeros(0, int), np.zeros(0, int), spans or {})


def group(name: str, size: int, *, rows: int = 1) -> Group:
    return Group(name, "channel", size, (), np.repeat(np.arange(rows), size // rows), rows > 1)


@pytest.mark.parametrize(("share", "stays"), [(1 / 3, 8), (2 / 3, 4), (0.01, 11)])
def test_a_share_of_every_row_goes_on_trial_and_at_least_one(share: float, stays: int) -> None:
    structure = bare(group("plain", 12), group("rows", 36, rows=3), group("single", 1), group("of one", 4, rows=4))
    for seed in range(5):
        kept = random_units(structure, seed, share)
        assert len(kept["plain"]) == stays
        assert np.unique(kept["rows"] // 12, return_counts=True)[1].tolist() == [stays] * 3
        assert (len(kept["single"]), len(kept["of one"])) == (1, 4)
        assert all((np.diff(units) > 0).all() for units in kept.values())
    assert kept["plain"].tolist() != random_units(structure, 0, share)["plain"].tolist()


def test_of_every_span_something_stays_on_trial() -> None:
    spans = {"g": (np.array([0, 1]), np.array([2, 3]))}
    for seed in range(8):
        kept = random_units(bare(group("g", 6), spans=spans), seed, 0.9)["g"]
        assert set(kept.tolist()) & {0, 1}
        assert set(kept.tolist()) & {2, 3}


LARGE = torch.tensor([1.0, 1e6], dtype=torch.float64)
SMALL = torch.tensor([1e-3, 1e-3], dtype=torch.float64)
ODD = torch.tensor([torch.inf, torch.nan, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("a", "b", "exact", "agree"),
    [
        (LARGE + 0.9 * TOLERANCE * 1e6, LARGE, True, True),  # at the scale of the largest
        (LARGE + 1.1 * TOLERANCE * 1e6, LARGE, True, False),
        (SMALL + 0.9 * TOLERANCE, SMALL, True, True),  # at a scale of at least 1
        (SMALL + 2 * TOLERANCE, SMALL, True, False),
        (ODD, ODD.clone(), True, True),
        (ODD, ODD.flip(0), True, False),
        (ODD, ODD.nan_to_num(nan=0.0), True, False),
        (LARGE + 5, LARGE, False, True),  # of what is said to be inexact the shape alone
        (LARGE[:1], LARGE, False, False),
        (torch.tensor([1, 2]), torch.tensor([7, 7]), True, True),  # places of a maximum
        (LARGE > 3, LARGE > -3, True, True),
    ],
)
def test_results_agree_but_for_rounding(a: Tensor, b: Tensor, exact: bool, agree: bool) -> None:
    assert _agree(a, b, exact=exact) == agree


class Headed(nn.Module):
    """Two heads of three dimensions, and a convolution that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.qkv, self.out = nn.Conv2d(3, 4, 1), nn.Linear(4, 18), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.a(x).flatten(2).mT).reshape(len(x), -1, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1)
        return out


def test_a_node_that_fails_is_tied_where_it_has_rows_then_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = trace(Headed(), images((3, 2, 2)).float())
    attention = next(node.name for node in graph.graph.nodes if "scaled_dot" in node.name)
    convolution = next(node.name for node in graph.graph.nodes if "conv2d" in node.name)
    asked: list[tuple[Sequence[str], Sequence[str]]] = []

    def failures(graph: object, structure: Structure, example: object, choices: object) -> list[str]:
        asked.append((structure.tied, structure.frozen))
        return [attention, convolution] if len(asked) < 3 else []

    monkeypatch.setattr(check, "_failures", failures)
    structure = find_structure(graph, images((3, 2, 2)).float())
    assert asked == [((), ()), ((attention,), (convolution,)), ((attention,), (convolution, attention))]
    alone = {row.layer: row.reason for row in structure.groups.left_alone}
    assert alone["a"] == "failed a trial without some channels at aten.conv2d.default"
    assert not structure.groups.groups


def test_a_check_that_does_not_settle_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_failures", lambda *_: ["conv2d"])
    example = images((3, 4, 4)).float()
    with pytest.raises(ModelError, match=r"does not settle at \['conv2d'\]; please report this model"):
        find_structure(trace(nn.Conv2d(3, 4, 1), example), example)
