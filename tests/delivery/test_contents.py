"""A report's layers, every node that has MACs by the units that it gives; and what the run was computed on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.delivery import contents
from compressor.delivery.contents import _layer_rows, computed_on
from compressor.graph import trace
from compressor.graph.cost import measure_cost


class Columns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cell = nn.Conv2d(3, 6, 3, 2, 1), nn.LSTM(24, 5, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).flatten(1, 2).transpose(1, 2)
        return self.head(self.cell(y)[0])  # type: ignore[no-any-return]


def test_a_layer_that_gives_more_than_one_tensor_is_as_wide_as_its_outputs() -> None:
    graph = trace(Columns().eval(), torch.randn(2, 3, 8, 8))
    cost = measure_cost(graph)
    rows = {row.layer: row for row in _layer_rows(graph, graph, cost, cost, {})}
    assert {name: row.width_dense for name, row in rows.items()} == {"stem": 6, "cell": 10, "head": 4}
    assert rows["cell"].operation == "lstm"
    assert rows["cell"].macs_dense == 4 * 2 * 20 * (24 + 5)  # steps, directions, gates


@pytest.mark.parametrize(("processes", "said"), [(1, "cpu"), (3, "cpu, in each of 3 processes")])
def test_several_processes_are_told_of(monkeypatch: pytest.MonkeyPatch, processes: int, said: str) -> None:
    monkeypatch.setattr(contents, "world", lambda: processes)
    assert computed_on(torch.device("cpu")) == said
