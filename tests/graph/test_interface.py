"""What a traced graph's inputs and outputs are called: no two alike, whatever the model calls them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressor.graph import trace
from compressor.graph.interface import input_names, output_names, output_paths


class Towers(nn.Module):
    """Answers under the names of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"left": self.layer(left), "right": self.layer(right), "both": self.layer(left + right)}


def test_an_output_called_as_an_input_has_a_name_of_its_own() -> None:
    graph = trace(Towers(), (torch.randn(2, 4), torch.randn(2, 4)))
    assert input_names(graph) == ("left", "right")
    assert output_names(graph) == ("output.left", "output.right", "both")
    assert output_paths(graph) == ("left", "right", "both")


class Rival(Towers):
    """Has an output that is called as another's new name would be."""

    def forward(self, left: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"input": self.layer(left), "output.input": self.layer(-left)}


def test_a_new_name_is_no_other_outputs_name() -> None:
    assert output_names(trace(Rival(), torch.randn(2, 4))) == ("output.output.input", "output.input")
