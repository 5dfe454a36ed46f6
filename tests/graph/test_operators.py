"""One vocabulary of operations: what a family's member needs in each room, or the room's stated refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from compressor.graph import cost
from compressor.graph.operators import (
    ALL_CONVOLUTIONS,
    ATTENTION,
    LINEAR,
    NORMALISATIONS,
    PRODUCTS,
    Convolution,
    per_axis,
)
from compressor.pruning.operations import TABLE
from compressor.pruning.rewrites import REWRITES
from compressor.relevance.operations import COVERED

FAMILIES = (*ALL_CONVOLUTIONS, *PRODUCTS, *NORMALISATIONS, ATTENTION, LINEAR)
# relevance would pass these by input x gradient, and the report name them; there are none now
NO_RULE_OF_RELEVANCE: frozenset[Any] = frozenset()
NO_MACS = {*NORMALISATIONS}  # additions and multiplications by element, which no budget counts


def _name(operator: Any) -> str:
    return str(operator._schema.name)


@pytest.mark.parametrize("operator", FAMILIES, ids=str)
def test_labels_have_a_handler_for_every_member(operator: Any) -> None:
    assert operator in TABLE


@pytest.mark.parametrize("operator", FAMILIES, ids=str)
def test_costs_have_a_formula_for_every_member_or_it_costs_nothing(operator: Any) -> None:
    assert (_name(operator) in cost.FORMULAS) != (operator in NO_MACS)


@pytest.mark.parametrize("operator", ALL_CONVOLUTIONS, ids=str)
def test_a_thinned_convolution_has_its_groups_counted_anew(operator: Any) -> None:
    assert operator in REWRITES


@pytest.mark.parametrize("operator", FAMILIES, ids=str)
def test_relevance_has_a_rule_or_says_that_it_has_none(operator: Any) -> None:
    covered = _name(operator).split("::")[1] in COVERED

    assert covered != (operator in NO_RULE_OF_RELEVANCE)


def _convolutions() -> list[fx.Node]:
    graph, aten = fx.Graph(), torch.ops.aten
    x, w = graph.placeholder("x"), graph.placeholder("w")
    return [
        graph.call_function(aten.conv2d.default, (x, w, None, [2], [1, 0], [3, 3], 2)),
        graph.call_function(aten.conv2d.padding, (x, w, None, [1, 1], "same")),
        graph.call_function(aten.conv2d.padding, (x, w, None, [1, 1], "valid")),
        graph.call_function(aten.conv_transpose2d.input, (x, w, None, [2, 1], [0, 0], [1, 0], 4, [1, 2])),
    ]


def test_a_convolutions_arguments_are_read_by_name() -> None:
    plain, same, valid, transposed = map(Convolution.of, _convolutions())

    assert (plain.stride, plain.padding, plain.dilation, plain.groups) == ((2, 2), (1, 0), (3, 3), 2)
    assert (same.padding, valid.padding) == ("same", (0, 0))
    assert (transposed.stride, transposed.groups, transposed.dilation) == ((2, 1), 4, (1, 2))
    assert [c.transposed for c in (plain, same, valid, transposed)] == [False, False, False, True]


def test_one_number_stands_for_every_axis() -> None:
    assert per_axis(2, 3) == per_axis([2], 3) == (2, 2, 2)
    assert per_axis((1, 2), 2) == (1, 2)
