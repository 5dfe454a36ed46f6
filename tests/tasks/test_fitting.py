"""Whether an answer and targets are what a task takes: all that fits passes, what does not is told with its remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.errors import DataError, ModelError
from compressor.tasks import TASKS
from compressor.tasks.fitting import require_answer, require_targets

IMAGES = (4, 3, 32, 40)
ROW, MAP = torch.zeros(1, 5), torch.zeros(1, 5, 8, 10)  # of one image: what counts is the form of a sample
INDICES = torch.tensor([0, 4, -1, 2])


def boxes(*corners: float) -> list[dict[str, Tensor]]:
    """Of four images; the first has none."""
    one = {"boxes": torch.tensor([[1.0, 2.0, 9.0, 9.0], corners]), "labels": torch.zeros(2)}
    return [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}, one, one, one]


FITS: list[tuple[str, Tensor, Any]] = [
    ("multi-label", ROW, torch.tensor([[0, 1, -1, 1, 0]] * 4)),
    ("multi-label", ROW[:, :1], torch.tensor([0, 1, 1, -1])),
    ("segmentation", MAP, torch.full((4, 32, 40), 4)),
    ("segmentation", MAP, torch.full((4, 1, 32, 40), 255, dtype=torch.uint8)),
    ("segmentation", MAP, torch.ones(4, 31, 39)),  # whole numbers, and sides that were rounded
    ("segmentation", MAP[:, :1], torch.ones(4, 8, 10, dtype=torch.int64)),
    ("segmentation", MAP[..., None], torch.zeros(4, 8, 20, 3, dtype=torch.int64)),  # a volume's sides are its own
    ("embedding", ROW, 1000 + INDICES),
    ("regression", MAP[:, :1], torch.zeros(4, 8, 10)),
    ("image-to-image", MAP, torch.zeros(4, 5, 8, 10)),
    ("any", ROW, torch.zeros(4, 77)),
    ("detection", ROW, boxes(-5.0, -5.0, 60.0, 60.0)),  # reaches in
    ("detection", ROW, None),
    ("segmentation", MAP, torch.full((4,), -1)),
]


@pytest.mark.parametrize(("name", "leaf", "targets"), FITS)
def test_targets_that_fit_pass(name: str, leaf: Tensor, targets: Any) -> None:
    require_targets(name, {"anchors": torch.tensor(3.0), "output": leaf}, targets, IMAGES)


REFUSED: list[tuple[str, Tensor, Any, str]] = [
    ("multi-label", ROW, torch.tensor([[0, 1, 2, 1, 0]] * 4), "labels are 0 to 2, and multi-label takes 0 and 1"),
    ("multi-label", ROW, torch.zeros(4, 6), r"labels are \[4, 6\], the network answers with \[4, 5\]"),
    ("segmentation", MAP, torch.full((4, 32, 40), 0.5), "numbers with a fraction; segmentation takes the index"),
    ("segmentation", MAP, torch.full((4, 32, 40), 5), "a mask holds 5 to 5, the network answers with 5 classes"),
    ("segmentation", MAP[:, :1], torch.full((4, 8, 10), 2), "answers with 2 classes"),
    ("segmentation", MAP, torch.zeros(4, 32, 32), r"masks are \[4, 32, 32\].* give masks of the images' height"),
    ("embedding", ROW, torch.zeros(4), r"targets are float32 \[4\], and embedding takes one whole number"),
    ("embedding", ROW, torch.zeros(4, 2, dtype=torch.int64), r"int64 \[4, 2\]"),
    ("detection", ROW, torch.zeros(4, 32, 40), r"a tensor \[4, 32, 40\], and detection takes a list of dicts"),
    ("detection", ROW, boxes(41.0, 2.0, 50.0, 9.0), "the box 41 2 50 9, outside of the input of 40 x 32 pixels"),
    ("detection", ROW, boxes(1.0, -9.0, 5.0, -1.0), "outside of the input"),
    (
        "classification",
        ROW,
        boxes(0.0, 0.0, 1.0, 1.0),
        "the task 'classification' has no use for; say task='detection'",
    ),
]


@pytest.mark.parametrize(("name", "leaf", "targets", "words"), REFUSED)
def test_targets_that_do_not_fit_are_told_with_what_does(name: str, leaf: Tensor, targets: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        require_targets(name, {"output": leaf}, targets, IMAGES)


def test_numbers_of_no_leafs_form_are_no_targets() -> None:
    with pytest.raises(ModelError, match=r"a leaf of \[4, 6\], as the targets are, .* answers with output \[4, 5\]"):
        require_targets("regression", {"output": ROW}, torch.zeros(4, 6), IMAGES)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("leaf", [ROW, MAP])
def test_an_answer_has_the_form_that_its_task_reads(name: str, leaf: Tensor) -> None:
    rows, maps = {"classification", "multi-label", "embedding"}, {"segmentation", "image-to-image"}
    if name in (rows if leaf is MAP else maps):
        with pytest.raises(ModelError, match=r"the task needs a leaf .* say another task"):
            require_answer(name, {"output": leaf})
    else:
        require_answer(name, {"output": leaf})
