"""Pruning in memory, step by step: what whoever waits for a step is told."""

from __future__ import annotations

import torch
from torch import nn

from compressor.choices import Scoring
from compressor.rounds import make_prunable, score_units


def test_scoring_says_what_share_of_the_images_is_done() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 6, 6), torch.zeros(4, dtype=torch.long)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).eval()
    shares: list[float] = []
    scoring = Scoring("gradient_x_input", measured=False)
    score_units(make_prunable(model, images), [(images, labels)] * 4, scoring=scoring, progress=shares.append)
    assert shares == [0.25, 0.5, 0.75, 1.0]
