"""The better of the repaired and the tuned network: by right answers, then by cross-entropy, then the repaired one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import DataError
from compressor.repair.better_of_two import choose, text_of

LABELS = torch.tensor([0, 1, 1, 0])


class Says(nn.Module):
    """The same logits whatever it is shown."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[: len(x)]


RIGHT = [[3.0, 0.0], [0.0, 3.0], [0.0, 3.0], [3.0, 0.0]]
SURER = [[6.0, 0.0], [0.0, 6.0], [0.0, 6.0], [6.0, 0.0]]
ONE_WRONG = [[9.0, 0.0], [0.0, 9.0], [0.0, 9.0], [0.0, 0.1]]
BROKEN = [[float("nan"), 0.0], [0.0, 3.0], [0.0, 3.0], [3.0, 0.0]]


@pytest.mark.parametrize(
    ("repaired", "tuned", "ships"),
    [
        (RIGHT, ONE_WRONG, "repaired"),
        (ONE_WRONG, RIGHT, "tuned"),
        (RIGHT, SURER, "tuned"),
        (SURER, RIGHT, "repaired"),
        (RIGHT, RIGHT, "repaired"),
        (RIGHT, BROKEN, "repaired"),
    ],
)
def test_the_better_one_ships(repaired: list[list[float]], tuned: list[list[float]], ships: str) -> None:
    found = choose(Says(repaired), Says(tuned), [(torch.zeros(4, 1), LABELS)], source="4 images")
    assert found.shipped == ships
    assert found.repaired.n == found.tuned.n == 4
    assert text_of(found).startswith(f"The {ships} network ships: of 4 images it is right on ")


def test_what_decides_is_said() -> None:
    images = [(torch.zeros(4, 1), LABELS)]
    assert "it is right on 4, the tuned one on 3." in text_of(choose(Says(RIGHT), Says(ONE_WRONG), images, source="x"))
    assert "cross-entropy decides" in text_of(choose(Says(RIGHT), Says(SURER), images, source="x"))


def test_without_an_image_nothing_is_chosen() -> None:
    with pytest.raises(DataError, match="no images to tell"):
        choose(Says(RIGHT), Says(SURER), [], source="none")
