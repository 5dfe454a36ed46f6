"""Accuracy is counted right, in evaluation mode, and the network's mode is put back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from compressor.accuracy import batch_norms, evaluate, evaluating
from compressor.errors import DataError
from compressor.graph import trace
from compressor.graph.training import set_training


class Echo(nn.Module):
    """Answers with its input, as a mapping or as a tuple."""

    def __init__(self, wrap: bool) -> None:
        super().__init__()
        self.wrap, self.drop = wrap, nn.Dropout(1.0)

    def forward(self, x: Tensor) -> object:
        return {"logits": self.drop(x), "other": x.sum()} if self.wrap else (self.drop(x),)


@pytest.mark.parametrize("wrap", [False, True])
def test_right_answers_are_counted_over_uneven_batches(wrap: bool) -> None:
    logits = torch.eye(7)[[0, 1, 2, 3, 4]] + 0.1 * torch.arange(7)
    labels = torch.tensor([0, 1, 2, 5, 0])
    seen: list[int] = []
    network = Echo(wrap).train()
    found = evaluate(network, [(logits[:3], labels[:3]), (logits[3:], labels[3:])], progress=seen.append)
    assert (found.correct, found.n, found.top1) == (3, 5, 0.6)
    assert found.correct_top5 == 4  # of 7 classes; label 0 is last of the last image's seven
    assert seen == [3, 5]
    assert network.training
    assert network.drop.training


def test_five_classes_have_no_top5() -> None:
    assert evaluate(Echo(False), [(torch.eye(5), torch.arange(5))]).correct_top5 == -1


def test_no_images_is_an_error() -> None:
    with pytest.raises(DataError, match="no images"):
        evaluate(Echo(False), [])


def test_a_traced_graph_in_training_is_put_back_even_after_an_error() -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 5, 5))
    set_training(graph, True)
    seen: list[object] = []
    with pytest.raises(RuntimeError, match="stop"):
        _fail_inside(graph, seen)
    assert seen == [False]
    assert [node.args[5] for node in batch_norms(graph)] == [True]


def _fail_inside(graph: fx.GraphModule, seen: list[object]) -> None:
    with evaluating(graph):
        seen.extend(node.args[5] for node in batch_norms(graph))
        raise RuntimeError("stop")
