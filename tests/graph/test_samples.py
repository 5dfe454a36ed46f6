"""Where a tensor keeps its images: layouts folded by hand, taken apart again, and measured on tiny graphs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.graph import trace
from compressor.graph.samples import Samples, _growing_axis, _inner, sample_layouts

FOLDINGS = list(itertools.product((1, 2, 3), (3, 5), (1, 2)))  # outer, images, inner


def folded(outer: int, n: int, inner: int) -> Tensor:
    """[outer * n * inner, 2] of which each entry holds its image's number."""
    images = torch.arange(n).reshape(1, n, 1).expand(outer, n, inner).reshape(-1)
    return images.unsqueeze(1).expand(-1, 2).float()


@pytest.mark.parametrize(("outer", "n", "inner"), FOLDINGS)
def test_images_come_first_from_any_folding(outer: int, n: int, inner: int) -> None:
    first = Samples(0, inner).images_first(folded(outer, n, inner), n)
    assert first.shape == (outer * n * inner, 2)
    assert torch.equal(first[:, 0], torch.arange(n).repeat_interleave(outer * inner).float())


@pytest.mark.parametrize(("outer", "n", "inner"), FOLDINGS)
def test_images_on_a_later_axis_leave_the_rest_in_place(outer: int, n: int, inner: int) -> None:
    rows = torch.arange(outer * inner).reshape(outer, 1, inner).expand(outer, n, inner).reshape(-1)
    value = torch.stack([folded(outer, n, inner)[:, 0], rows.float()])  # [2, outer * n * inner]
    first = Samples(1, inner).images_first(value, n)
    assert first.shape == (n, 2, outer * inner)
    for image in range(n):
        assert (first[image, 0] == image).all()
        assert first[image, 1].tolist() == list(range(outer * inner))


def test_a_plain_batch_is_handed_on_as_it_is() -> None:
    value = torch.randn(3, 4)
    assert Samples(0, 1).images_first(value, 3) is value


@pytest.mark.parametrize(
    ("shape", "traced", "axis"),
    [((3, 4), (2, 4), 0), ((12, 4), (8, 4), 0), ((4, 3, 5), (4, 2, 5), 1), ((4, 5), (4, 5), None), ((), (), None)],
)
def test_the_axis_that_grows_with_the_batch_is_the_images(
    shape: tuple[int, ...], traced: tuple[int, ...], axis: int | None
) -> None:
    assert _growing_axis(shape, traced, 3, 2) == axis


@pytest.mark.parametrize(("outer", "n", "inner"), [(2, 3, 2), (1, 3, 4), (4, 3, 1), (2, 5, 2)])
def test_the_stretch_of_one_image_is_told_by_what_changes_with_it(outer: int, n: int, inner: int) -> None:
    before = folded(outer, n, inner)
    after = torch.where(before == 0, 99.0, before)
    assert _inner(0, n, before, after) == inner


def test_where_little_of_an_image_changed_its_longest_stretch_is_taken() -> None:
    before = folded(1, 3, 4)
    after = before.clone()
    after[0] = 99.0  # the other three coordinates of the image were cut off by a clamp
    assert _inner(0, 3, before, after) == 4


def test_images_that_depend_on_each_other_have_no_stretch() -> None:
    before = folded(2, 3, 1)
    assert _inner(0, 3, before, before + 1) is None


class Folding(nn.Module):
    """Four tokens of each image on the first axis, images second behind a transposition, a table of no image."""

    def __init__(self, *, mixing: bool = False) -> None:
        super().__init__()
        self.mixing = mixing
        self.table = nn.Parameter(torch.ones(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 3)  # [N * 4, 3]
        turned = tokens.relu().reshape(-1, 4, 3).transpose(0, 1)  # [4, N, 3]
        if self.mixing:
            tokens = tokens - tokens.mean(0)
        return (turned @ self.table.exp()).sum(0) + tokens.sigmoid().reshape(-1, 4, 3).mean(1)[:, :2]


def layouts(network: nn.Module, *, strict: bool = True) -> dict[str, Samples | None]:
    images = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    graph = trace(network, images)
    nodes = [node.name for node in graph.graph.nodes if node.op == "call_function"]
    return sample_layouts(graph, nodes, images, strict=strict)


def test_layouts_of_a_graph_are_measured() -> None:
    found = layouts(Folding())
    assert found["relu"] == Samples(0, 4)
    assert found["transpose"] == Samples(1, 1)
    assert found["exp"] is None


def test_what_mixes_images_is_refused_by_a_nodes_name_or_left_out() -> None:
    with pytest.raises(ModelError, match="samples of a batch can't be told apart at node '"):
        layouts(Folding(mixing=True))
    assert layouts(Folding(mixing=True), strict=False)["sigmoid"] is None
